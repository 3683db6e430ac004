"""Compress a network inside your own training loop, in plain PyTorch.

    uv run python -m examples.own_loop              # about a minute on one core
    uv run python -m examples.own_loop --resume     # goes on from the checkpoint

Three lines are rlcompress: the compressor, its step behind the optimizer's, and `save` at the end.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import rlcompress


def network(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """Four convolutions for 8 x 8 images."""
    layers: list[nn.Module] = []
    widths = (in_channels, 32, 64, 64, 128)
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if i in (1, 3) else []
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, num_classes)
    )


def digits() -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's handwritten digits: 1,397 to train on, 400 to test."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    y = torch.tensor(labels)
    return TensorDataset(x[:-400], y[:-400]), TensorDataset(x[-400:], y[-400:])


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    images, labels = data.tensors
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--target", type=float, default=20.0, help="times fewer bytes")
    parser.add_argument("--out", type=Path, default=Path("runs/own-loop"))
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    checkpoint = options.out / "checkpoint.pt"

    torch.manual_seed(0)
    train, test = digits()
    model = network()
    compressor = rlcompress.DynamicCompressor(
        model,
        torch.zeros(1, 1, 8, 8),
        target=options.target,
        pace=rlcompress.Pace(warmup=100, recovery_steps=10, rounds=2, watch=20),
    )
    print(f"{compressor.steps_needed} steps are needed for {options.target:g}x fewer bytes")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    first = 0
    if options.resume:
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        compressor.load_state_dict(saved["compressor"])
        first = saved["epoch"]

    for epoch in range(first, options.epochs):
        torch.manual_seed(epoch)
        model.train()
        for images, labels in DataLoader(train, batch_size=64, shuffle=True, drop_last=True):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            compressor.step(loss)
        print(
            f"epoch {epoch + 1}: loss {loss.item():.3f}, {compressor.ratio:.1f}x fewer bytes, "
            f"test {accuracy(model, test):.1%}"
        )
        torch.save(
            {
                "epoch": epoch + 1,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "compressor": compressor.state_dict(),
            },
            checkpoint,
        )

    factory = rlcompress.ModelRef("examples.own_loop:network", {}, 10, (1, 8, 8))
    path = options.out / "weights.safetensors"
    compressor.save(path, factory)
    small = rlcompress.load_artifact(path, trust=[factory.factory])
    print(f"{path}: {path.stat().st_size:,} bytes, test {accuracy(small, test):.1%}")


if __name__ == "__main__":
    main()
