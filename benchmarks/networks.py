"""The trained dense networks that the benchmarks compress, kept in `runs/benchmark-NAME`.

    uv run python -m benchmarks.networks vgg19-fashion mobilenetv2-fashion resnet18-fashion

Each benchmark calls `workspace` and so trains what is missing (a quarter of an hour each on one
core); trained once, all of them share it.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlcompress import spec
from rlcompress.core.data import Split
from rlcompress.core.problem import Bundle, make_bundle
from rlcompress.core.sensitivity import estimate
from rlcompress.stages.dense import train_dense
from rlcompress.stages.workspace import Workspace

#: Short names, as figures carry them.
EXPERIMENTS = {
    "vgg19": "vgg19-fashion",
    "mobilenetv2": "mobilenetv2-fashion",
    "resnet18": "resnet18-fashion",
}


def workspace(experiment: str, *overrides: str, name: str = "") -> Workspace:
    """The experiment with `KEY=VALUE` overrides, its dense network trained. Overrides that change
    the dense network need a `name` of their own for the folder."""
    resolved = spec.resolve(
        spec.load_experiments(Path("experiments.yaml")), experiment, list(overrides)
    )
    run = Workspace(experiment, resolved, Path("runs") / f"benchmark-{name or experiment}")
    train_dense(run)
    return run


def identity(run: Workspace) -> str:
    """Eight hex digits of the trained dense network: what rows were measured on."""
    content = (run.folder / "dense" / "trained.safetensors").read_bytes()
    return hashlib.sha256(content).hexdigest()[:8]


def bundle(
    run: Workspace,
    *,
    seed: int,
    fit_images: int = 256,
    score_images: int = 256,
    positions: int = 2048,
    recovery: str = "reconstruct",
    precision: str = "auto",
    model: nn.Module | None = None,
    **options: Any,
) -> Bundle:
    """A search problem on the run's dense network (or on `model`) whose images are drawn by `seed`,
    not by the run's: fitted ones from the train split, scored ones from the validation split (the
    rest of it is `held_back`). `options` are `make_bundle`'s others."""
    e = run.experiment
    fit = run.data.train.sample(fit_images, seed)
    score, _, _ = run.data.validation_parts(score_images, 0, seed)
    dense = run.network("trained") if model is None else model
    dense = dense.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = fit.images().contiguous(memory_format=torch.channels_last)
    estimates = estimate(
        dense,
        run.structure,
        images,
        told=e.calibration.estimate_images,
        positions=positions,
        keeps=e.search.keeps,
        bits=e.search.bits,
        clip=e.search.clip,
        seed=seed,
    )
    return make_bundle(
        dense,
        run.ref,
        run.structure,
        fit,
        score,
        estimates,
        recovery=recovery,
        positions=positions,
        precision=precision,
        seed=seed,
        **options,
    )


def held_back(run: Workspace, *, seed: int, score_images: int = 256) -> Split:
    """The validation images that `bundle` with the same seed leaves alone."""
    return run.data.validation_parts(score_images, 0, seed)[2]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="+", choices=sorted(EXPERIMENTS.values()))
    for name in parser.parse_args().name:
        print(name, workspace(name, "threads=1").folder)
