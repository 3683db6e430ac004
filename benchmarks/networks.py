"""The trained dense networks that the benchmarks compress, kept in `runs/benchmark-NAME`.

    uv run python -m benchmarks.networks vgg19-fashion mobilenetv2-fashion resnet18-fashion

Each benchmark calls `workspace` and so trains what is missing (a quarter of an hour each on one
core); trained once, all of them share it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rlcompress import spec
from rlcompress.stages.dense import train_dense
from rlcompress.stages.workspace import Workspace

#: Short names, as figures carry them.
EXPERIMENTS = {
    "vgg19": "vgg19-fashion",
    "mobilenetv2": "mobilenetv2-fashion",
    "resnet18": "resnet18-fashion",
}


def workspace(experiment: str, *overrides: str) -> Workspace:
    """The experiment with `KEY=VALUE` overrides, its dense network trained."""
    resolved = spec.resolve(
        spec.load_experiments(Path("experiments.yaml")), experiment, list(overrides)
    )
    run = Workspace(experiment, resolved, Path("runs") / f"benchmark-{experiment}")
    train_dense(run)
    return run


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name, workspace(name, "threads=1").folder)
