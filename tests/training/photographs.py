"""Builds an ImageFolder-style dataset of JPEG files from real photographs, without downloading anything.

The photographs are those inside scikit-image's wheel, of the packages in the `[test]` extra the one with
most of them: 18 different ones. Drawings, synthetic patterns, thumbnails and the second view of the stereo
pair are left out. A class is one photograph, or one vertical strip of it where there are more classes than
photographs; its files are crops of it, rotated, scaled, mirrored and brightened or darkened.

What holds:

- A file's content depends on the seed, the number of classes, its class and its index alone: the same call
  gives the same bytes with the same Pillow and scikit-image, and a larger `files` only adds files.
- Every file has between `SMALLEST` and `LARGEST` bytes, spread over that range as the photographs allow.

Run as a script: `python photographs.py DIRECTORY [--files N] [--classes N] [--seed N]`.
"""

from __future__ import annotations

import argparse
import io
import math
import random
from collections.abc import Callable
from importlib.resources import files as package_files
from pathlib import Path

from PIL import Image

# Those of which a strip is still a picture of its own come first: they are split first when classes are many.
PHOTOGRAPHS = (
    "astronaut.png",
    "motorcycle_left.png",
    "camera.png",
    "coffee.png",
    "rocket.jpg",
    "chelsea.png",
    "ihc.png",
    "retina.jpg",
    "page.png",
    "text.png",
    "coins.png",
    "hubble_deep_field.jpg",
    "moon.png",
    "brick.png",
    "grass.png",
    "gravel.png",
    "cell.png",
    "clock_motion.png",
)
SMALLEST = 15_000
LARGEST = 150_000
LONGEST_SIDE = 800  # pixels


def make_photographs(directory: Path, *, files: int = 2000, classes: int = 20, seed: int = 0) -> int:
    """Write `files` JPEG files into `classes` folders below `directory`; return their total size in bytes.

    `directory` is created if need be, and the class folders must not exist yet (FileExistsError). They differ
    by one file at most. ValueError if there are fewer files than classes.
    """
    if not 1 <= classes <= files:
        raise ValueError(f"{files} files cannot fill {classes} classes: ask for at least one file a class")
    total = 0
    for number, (name, region) in enumerate(_class_regions(classes)):
        folder = directory / f"{number:02d}_{name}"
        folder.mkdir(parents=True)
        for index in range(files // classes + (number < files % classes)):
            jpeg = _encode_variation(region, random.Random(f"{seed}/{number}/{index}"))
            (folder / f"{name}_{index:05d}.jpg").write_bytes(jpeg)
            total += len(jpeg)
    return total


def _class_regions(classes: int) -> list[tuple[str, Image.Image]]:
    """The name and the picture of every class: whole photographs, or strips of them."""
    regions = []
    folder = package_files("skimage") / "data"
    for position, photograph in enumerate(PHOTOGRAPHS):
        strips = classes // len(PHOTOGRAPHS) + (position < classes % len(PHOTOGRAPHS))
        name = photograph.partition(".")[0]
        with Image.open(io.BytesIO((folder / photograph).read_bytes())) as opened:
            picture = opened.convert("RGB")
        for strip in range(strips):
            left, right = picture.width * strip // strips, picture.width * (strip + 1) // strips
            label = name if strips == 1 else f"{name}_{strip + 1}of{strips}"
            regions.append((label, picture.crop((left, 0, right, picture.height))))
    return regions


def _encode_variation(region: Image.Image, rng: random.Random) -> bytes:
    """One JPEG of a random crop of `region`, its size drawn evenly from the range between the bounds.

    The drawn size is met roughly, and from below where a photograph has little detail (`LONGEST_SIDE` ends
    its growth); the bounds are kept exactly.
    """
    target = rng.uniform(SMALLEST, LARGEST)
    aspect = rng.choice((3 / 4, 1.0, 4 / 3))
    quality = rng.randint(85, 95)
    brightness = rng.uniform(0.7, 1.3)
    levels = [min(255, round(level * brightness)) for level in range(256)] * 3
    crop = _draw_crop(region, aspect, rng)

    height = 300.0
    probe = len(_encode(crop(height).point(levels), quality))
    # From 300 to 800 pixels the bytes of these photographs grow as the height to the power 1.3 to 1.6.
    height = min(height * (target / probe) ** (1 / 1.4), LONGEST_SIDE / max(aspect, 1.0))
    jpeg = _encode(crop(height).point(levels), quality)
    while not SMALLEST <= len(jpeg) <= LARGEST:
        height *= 1.2 if len(jpeg) < SMALLEST else 0.9
        jpeg = _encode(crop(height).point(levels), quality)
    return jpeg


def _draw_crop(region: Image.Image, aspect: float, rng: random.Random) -> Callable[[float], Image.Image]:
    """Draw a rotated and perhaps mirrored rectangle of this aspect, wholly inside `region`.

    Returns what renders it at a given height in pixels: one affine transformation, so that pixels are
    interpolated once.
    """
    angle = math.radians(rng.uniform(-15, 15))
    cosine, sine = math.cos(angle), math.sin(angle)
    bounding_width = aspect * cosine + abs(sine)  # of the rotated rectangle, whose height is 1
    bounding_height = aspect * abs(sine) + cosine
    largest = min((region.width - 2) / bounding_width, (region.height - 2) / bounding_height)
    side = largest * rng.uniform(0.55, 1.0)  # the rectangle's height, in pixels of the region
    centre_x = region.width / 2 + (rng.random() - 0.5) * (region.width - 2 - side * bounding_width)
    centre_y = region.height / 2 + (rng.random() - 0.5) * (region.height - 2 - side * bounding_height)
    mirror = rng.choice((-1, 1))

    def render(height: float) -> Image.Image:
        columns, rows = round(height * aspect), round(height)
        scale = side / height
        a, b = mirror * scale * cosine, -scale * sine
        d, e = mirror * scale * sine, scale * cosine
        matrix = (
            *(a, b, centre_x - (a * columns + b * rows) / 2),
            *(d, e, centre_y - (d * columns + e * rows) / 2),
        )
        return region.transform((columns, rows), Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR)

    return render


def _encode(picture: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build a dataset of JPEG files from real photographs.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    total_bytes = make_photographs(
        arguments.directory, files=arguments.files, classes=arguments.classes, seed=arguments.seed
    )
    print(f"{arguments.files} files, {total_bytes} bytes in {arguments.directory}")
