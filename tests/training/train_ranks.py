"""Train a small network on several ranks, as torchrun starts them: gradients are averaged over gloo.

    torchrun ... train_ranks.py OWN SHARED FIRST

Each rank trains on all files below OWN, in which "{rank}" is its rank; and on its part of those below SHARED, as
DistributedSampler says. FIRST is "own" or "shared". Rank 0 prints one JSON line: the exact losses (`float.hex`) of
every rank and step of both.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

EPOCHS, BATCH = 2, 4


class Folders(Dataset):
    """The files below `root`, one folder a class."""

    def __init__(self, root):
        self.classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        self.samples = []
        for label, name in enumerate(self.classes):
            with os.scandir(os.path.join(root, name)) as entries:
                self.samples += [(path, label) for path in sorted(entry.path for entry in entries)]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        with open(path, "rb") as file:
            values = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
        return values[:256].float().div(255) - 0.5, label


def train(data, sampler):
    """The losses of this rank, step by step. Ranks make as many steps as the one with the fewest files."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, len(data.classes)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(data, batch_size=BATCH, sampler=sampler, shuffle=sampler is None, generator=order)
    steps = torch.tensor(len(loader))
    dist.all_reduce(steps, dist.ReduceOp.MIN)
    losses = []
    for epoch in range(EPOCHS):
        if sampler is not None:
            sampler.set_epoch(epoch)
        for _, (values, labels) in zip(range(int(steps)), loader, strict=False):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(values), labels)
            loss.backward()
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
            optimizer.step()
            losses.append(loss.item().hex())
    return losses


def main():
    own, shared, first = sys.argv[1:]
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mine = Folders(own.format(rank=dist.get_rank()))
    everything = Folders(shared)
    facts = {
        "files": len(mine),
        "classes": mine.classes,
    }
    samplers = {"own": (mine, None), "shared": (everything, DistributedSampler(everything, seed=3))}
    for name in sorted(samplers, key=lambda name: name != first):
        facts[name] = train(*samplers[name])
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, facts)
    if dist.get_rank() == 0:
        print(json.dumps(gathered), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
