"""A PyTorch training loop over a directory of class folders of JPEG files, which worker processes decode.

    python train.py DIRECTORY --epochs 3 --workers 4 --seed 0

A line of JSON an epoch. The digest is of the losses: the same pixels in the same order give the same one. The time that
the loop waited for its loader is told separately: with `--blank`, which loads nothing, that is what a loader costs in
any case. With `--pause` each further epoch waits for a line on stdin.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import zlib
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler

SIDE = 64


class Images(Dataset):
    """The images of the class folders below `root` as (3, 64, 64) tensors, with the number of their class."""

    def __init__(self, root: Path) -> None:
        self.classes = sorted(path.name for path in root.iterdir())
        self.samples = [
            (path, label) for label, name in enumerate(self.classes) for path in sorted((root / name).iterdir())
        ]

        self.blank: tuple[torch.Tensor, list[int]] | None = None
        """Instead of what is in the files: one image, and their sizes."""

    def make_blank(self) -> None:
        self.blank = torch.zeros(3, SIDE, SIDE), [path.stat().st_size for path, _ in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        path, label = self.samples[index]
        if self.blank is not None:
            return self.blank[0], label, self.blank[1][index]
        with Image.open(path) as image:
            pixels = numpy.array(image.convert("RGB").resize((SIDE, SIDE)))
            size = image.fp.seek(0, 2) if image.fp else path.stat().st_size
        return torch.from_numpy(pixels).permute(2, 0, 1).float().div(255), label, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=1, help="of the model, whose cost grows with its square")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--persistent", action="store_true", help="the workers stay from one epoch to the next")
    parser.add_argument("--blank", action="store_true", help="images without a file")
    parser.add_argument("--pause", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    images = Images(options.directory)
    if options.blank:
        images.make_blank()
    # of the sampler alone: the loader draws from its own, as often as it starts workers
    order = RandomSampler(images, generator=torch.Generator().manual_seed(options.seed))
    loader = DataLoader(
        images,
        batch_size=options.batch,
        sampler=order,
        num_workers=options.workers,
        persistent_workers=options.persistent,
    )
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16 * options.width, 3, stride=2),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16 * options.width, 32 * options.width, 3, stride=2),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(32 * options.width, len(images.classes)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for epoch in range(1, options.epochs + 1):
        if options.pause and epoch > 1:
            sys.stdin.readline()
        start = time.perf_counter()
        total = digest = 0
        waited, asked = 0.0, start
        for pixels, labels, sizes in loader:
            waited += time.perf_counter() - asked
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(pixels), labels)
            loss.backward()
            optimizer.step()
            total += int(sizes.sum())
            digest = zlib.crc32(loss.item().hex().encode(), digest)
            asked = time.perf_counter()
        said = {
            "epoch": epoch,
            "seconds": time.perf_counter() - start,
            "waited_seconds": waited,
            "files": len(images),
            "bytes": total,
            "digest": f"{digest:08x}",
        }
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
