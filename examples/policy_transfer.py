"""A policy that was trained elsewhere compresses a torchvision network that it never saw.

    uv run python -m examples.policy_transfer           # the policy in the box
    uv run python -m examples.policy_transfer --policy runs/zoo --evaluations 50

The first 24 evaluations are the policy's own schedules, one a size; more of them refine these. The
uniform rule gets as many; the last lines compare the two tickets.

To use yours: change `network`, `experiment`'s data and `--policy` (a folder that
`rlcompress train-policy` wrote, or NAME@ALIAS of MLflow's registry).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn

NAME = "policy-transfer"


def network(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """torchvision's DenseNet for small grey images: another stem, short blocks."""
    from torchvision.models import DenseNet

    made = DenseNet(12, (2, 3, 2), num_init_features=24, num_classes=num_classes)
    made.features.conv0 = nn.Conv2d(in_channels, 24, 3, padding=1, bias=False)
    return made


def experiment(policy: str, evaluations: int, epochs: int) -> dict[str, Any]:
    """What stands in an experiments.yaml."""
    return {
        "model": {"factory": "examples.policy_transfer:network"},
        "data": {"factory": "digits", "args": {"size": 16}},
        "dense": {"epochs": epochs, "batch_size": 32},
        "calibration": {"fit_images": 128, "score_images": 128, "positions": 512},
        "search": {
            "searcher": "transfer",
            "baselines": ["uniform"],
            "policy": policy,
            "episodes": evaluations,
            "target": [4, 16],
            "keeps": [1.0, 0.75, 0.5, 0.3],
            "bits": [2, 4, 8],
            "finalists": 3,
        },
        "ticket": {"epochs": 2, "batch_size": 32, "lr": 0.02, "fit_images": 256, "floor": 2.0},
    }


def main() -> None:
    import yaml

    from rlcompress.cli import main as rlcompress

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="default")
    parser.add_argument("--evaluations", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=16, help="of dense training")
    parser.add_argument("--out", type=Path, default=Path("runs") / NAME)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "experiments.yaml"
    content = experiment(options.policy, options.evaluations, options.epochs)
    file.write_text(yaml.safe_dump({"experiments": {NAME: content}}))
    rlcompress(["run", NAME, "--file", str(file), "--out", str(options.out)])


if __name__ == "__main__":
    main()
