"""A PyTorch training loop over pairs of rasters: `inputs/NAME.npz` with 33 bands, `truth/NAME.npz` with 24.

    python train_rasters.py DIRECTORY --epochs 2 --workers 4 --seed 0

The model has one layer, which finds the mixture that the truth is made with: it is the data that takes the time. A line
of JSON an epoch. The digest is of the losses: the same pixels in the same order give the same one. With `--pause` each
further epoch waits for a line on stdin.
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
from torch.utils.data import DataLoader, Dataset

SCALE = 10_000.0
"""What a reflectance of 1 is stored as."""


class Rasters(Dataset):
    """(input, truth, bytes) of each pair, as 16-bit integers."""

    def __init__(self, root: Path) -> None:
        self.inputs = sorted((root / "inputs").iterdir())
        self.truths = sorted((root / "truth").iterdir())

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        with numpy.load(self.inputs[index]) as inputs, numpy.load(self.truths[index]) as truths:
            bands, truth = inputs["pixels"], truths["pixels"]
        return torch.from_numpy(bands), torch.from_numpy(truth), bands.nbytes + truth.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--bands", type=int, default=33)
    parser.add_argument("--truth-bands", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    rasters = Rasters(options.directory)
    order = torch.Generator().manual_seed(options.seed)
    loader = DataLoader(rasters, options.batch, shuffle=True, num_workers=options.workers, generator=order)
    model = torch.nn.Conv2d(options.bands, options.truth_bands, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for epoch in range(1, options.epochs + 1):
        if options.pause and epoch > 1:
            sys.stdin.readline()
        start = time.perf_counter()
        total = digest = 0
        for bands, truth, sizes in loader:
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(bands.float() / SCALE), truth.float() / SCALE)
            loss.backward()
            optimizer.step()
            total += int(sizes.sum())
            digest = zlib.crc32(loss.item().hex().encode(), digest)
        said = {
            "epoch": epoch,
            "seconds": time.perf_counter() - start,
            "files": len(rasters),
            "bytes": total,
            "digest": f"{digest:08x}",
        }
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
