"""What an epoch will take: arithmetic on what was measured, nothing else.

The model: an epoch proceeds at the pace of its slowest part. Read directly, that is the source. In the first epoch
through a mount it is the source, the daemon or writing to scratch, which work at the same time; in later epochs the
daemon or reading from scratch for what is resident, and the source for the rest. The page cache is left out: where the
dataset fits into memory, later epochs are faster than this.
"""

from __future__ import annotations

from dataclasses import dataclass

READERS = 4
"""Processes that read at the same time, as the loader of a training script does; all figures are for so many."""

FETCH_SECONDS = 540e-6
"""What the daemon spends on a file that is fetched because somebody waits (benchmarks/results/small_files.json: "daemon
CPU" of the first epoch, 4 processes, 0.2 ms, prefetch off, median, 2 cores). The daemon is one process, so that this
does not shrink with more readers."""

HIT_SECONDS = 210e-6
"""What a file of 110 KB costs 4 readers through a warm mount that promotes nothing, the page cache dropped before (the
same results: "time" of the later epoch, page cache dropped, no promotion, median)."""


@dataclass(frozen=True)
class Dataset:
    """How much an epoch reads."""

    files: int
    bytes: int


@dataclass(frozen=True)
class Pace:
    """How fast READERS read the source together. `files_per_second` is None where files were read in part only."""

    bytes_per_second: float
    files_per_second: float | None = None

    def seconds(self, dataset: Dataset) -> float:
        """Of reading all of `dataset`. Small files cost their number, large ones their bytes."""
        if self.files_per_second:
            return dataset.files / self.files_per_second
        return dataset.bytes / self.bytes_per_second


@dataclass(frozen=True)
class Forecast:
    """Times in seconds an epoch. `hit_rate` (0 to 1) is that of later epochs under the policy `hold`."""

    direct: float
    first: float
    later: float
    hit_rate: float

    @property
    def speed_up(self) -> float:
        """Of a later epoch against one read directly."""
        return self.direct / self.later if self.later else 1.0


def make_forecast(
    dataset: Dataset, room: int, source: Pace, *, scratch_write: float | None, scratch_read: float | None
) -> Forecast:
    """What to expect with `room` bytes in scratch. The rates of scratch are in bytes/s, None if not measured.

    Under `hold` what was kept first stays, so that the hit rate is the share of the dataset that there is room for.
    """
    hit_rate = min(1.0, max(0, room) / dataset.bytes) if dataset.bytes else 1.0
    direct = source.seconds(dataset)
    copied = Dataset(round(dataset.files * hit_rate), round(dataset.bytes * hit_rate))
    first = max(direct, copied.files * FETCH_SECONDS, copied.bytes / scratch_write if scratch_write else 0.0)
    from_scratch = max(copied.files * HIT_SECONDS, copied.bytes / scratch_read if scratch_read else 0.0)
    return Forecast(direct, first, from_scratch + (1 - hit_rate) * direct, hit_rate)
