"""Train a small convolutional network on a directory of class folders.

    python train.py DATA --epochs 2 --workers 4 --seed 0 --batch-size 64

Prints one JSON line an epoch, with exact losses (`float.hex`), so that two runs can be compared to the bit.
"""

import argparse
import json
import os
import time

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset


class ImageFolder(Dataset):
    """The images below `root`, one folder a class, as (3, 64, 64) tensors."""

    def __init__(self, root):
        self.classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        self.samples = []
        for label, name in enumerate(self.classes):
            with os.scandir(os.path.join(root, name)) as entries:
                paths = sorted(entry.path for entry in entries if entry.is_file())
            self.samples += [(path, label) for path in paths]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB").resize((64, 64)))
        image = torch.from_numpy(pixels).permute(2, 0, 1).float().div(255)
        return (image - 0.45) / 0.25, label


def build_model(classes):
    def block(inputs, outputs):
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )

    return nn.Sequential(
        block(3, 16),
        block(16, 32),
        block(32, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


def train_epoch(model, loader, optimizer):
    """Return the loss of every batch, and the accuracy over the epoch."""
    model.train()
    losses, correct, seen = [], 0, 0
    for images, labels in loader:
        optimizer.zero_grad()
        outputs = model(images)
        loss = nn.functional.cross_entropy(outputs, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        correct += (outputs.argmax(1) == labels).sum().item()
        seen += len(labels)
    return losses, correct / seen


def main():
    parser = argparse.ArgumentParser(description="Train a small network on a directory of class folders.")
    parser.add_argument("data")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)

    dataset = ImageFolder(args.data)
    loader = DataLoader(
        dataset,
        batch_size=args.batch_size,
        shuffle=True,
        num_workers=args.workers,
        generator=torch.Generator().manual_seed(args.seed),
    )
    model = build_model(len(dataset.classes))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

    for epoch in range(1, args.epochs + 1):
        start = time.perf_counter()
        losses, accuracy = train_epoch(model, loader, optimizer)
        mean = sum(losses) / len(losses)
        report = {
            "epoch": epoch,
            "seconds": round(time.perf_counter() - start, 3),
            "loss": round(mean, 4),
            "accuracy": round(accuracy, 4),
            "loss_hex": mean.hex(),
            "batch_losses_hex": [loss.hex() for loss in losses],
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
