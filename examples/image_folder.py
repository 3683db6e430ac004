"""Your own network and your own image folder, one sub-folder a class, as an experiment.

    uv run python -m examples.image_folder              # makes data/digit-folder, runs all stages
    uv run python -m examples.image_folder --images 200 --out runs/folder

To use yours: change `FOLDER`, `network` and the transform, and delete `make_folder`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

FOLDER = Path("data/digit-folder")


def network(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Three convolutions for 16 x 16 images."""
    layers: list[nn.Module] = []
    for before, after in ((in_channels, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4, num_classes))


def data(root: str = str(FOLDER)) -> tuple[Subset, Subset, Subset]:
    """Train, validation and test: 60, 20 and 20 % of the folder, shuffled."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    prepared = transforms.Compose(
        [
            transforms.Resize((16, 16)),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    images = ImageFolder(root, prepared)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    first, second = int(0.6 * len(order)), int(0.8 * len(order))
    parts = order[:first], order[first:second], order[second:]
    return tuple(Subset(images, part) for part in parts)  # type: ignore[return-value]


def make_folder(root: Path, count: int) -> None:
    """scikit-learn's handwritten digits as PNG files: root/<digit>/<number>.png."""
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch = load_digits()
    for i, (pixels, label) in enumerate(zip(bunch.images[:count], bunch.target, strict=False)):
        folder = root / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype("uint8")).convert("RGB").save(folder / f"{i}.png")


def experiment(root: Path) -> dict[str, Any]:
    """What stands in an experiments.yaml."""
    return {
        "model": {"factory": "examples.image_folder:network"},
        "data": {"factory": "examples.image_folder:data", "args": {"root": str(root)}},
        "dense": {"epochs": 8, "batch_size": 32},
        "calibration": {"fit_images": 128, "score_images": 64, "positions": 512},
        "search": {"searcher": "knapsack", "episodes": 12, "target": [4, 16]},
        "ticket": {"epochs": 2, "batch_size": 32, "fit_images": 128, "floor": 2.0},
    }


def main() -> None:
    import yaml

    from rlcompress.cli import main as rlcompress

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1797, help="PNG files to make, at most 1,797")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--out", type=Path, default=Path("runs/image-folder"))
    options = parser.parse_args()
    make_folder(options.folder, options.images)
    file = options.folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({"experiments": {"image-folder": experiment(options.folder)}}))
    rlcompress(["run", "image-folder", "--file", str(file), "--out", str(options.out)])


if __name__ == "__main__":
    main()
