"""Pairs of rasters as remote sensing has them: 33 bands of 224 x 224 pixels, and 24 bands of truth.

Reflectances are stored as 16-bit integers, 10,000 for 1, as the agencies deliver them: 3.3 and 2.4 MB a sample instead
of 6.6 and 4.8 MB as float32, which nobody would keep on a network file system.

Invariant: the same number and seed make the same bytes, and a larger number only adds samples.
"""

from __future__ import annotations

from pathlib import Path

BANDS, TRUTH_BANDS, SIDE = 33, 24, 224
SAMPLE_BYTES = (BANDS + TRUTH_BANDS) * SIDE * SIDE * 2
LARGEST = 10_000
_COARSE = 14


def make_rasters(directory: Path, samples: int, seed: int = 0) -> Path:
    """Write `inputs/` and `truth/` below `directory`; returns it."""
    import numpy  # an extra, which only this needs

    mixture = numpy.random.default_rng((seed, 1)).dirichlet(numpy.ones(BANDS), TRUTH_BANDS).astype("float32")
    for name in "inputs", "truth":
        (directory / name).mkdir(parents=True)
    for number in range(samples):
        draw = numpy.random.default_rng((seed, 2, number))
        # fields that are 16 pixels wide, with the noise of a sensor: neither flat nor compressible
        fields = draw.integers(500, 8000, (BANDS, _COARSE, _COARSE), dtype="int16")
        bands = fields.repeat(SIDE // _COARSE, 1).repeat(SIDE // _COARSE, 2)
        bands += draw.integers(-256, 256, bands.shape, dtype="int16")
        truth = (mixture @ bands.reshape(BANDS, -1)).astype("int16").reshape(TRUTH_BANDS, SIDE, SIDE)
        numpy.save(directory / "inputs" / f"{number:06}.npy", bands)
        numpy.save(directory / "truth" / f"{number:06}.npy", truth)
    return directory
