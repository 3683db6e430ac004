"""What the stages share: the experiment, its folder, and what is built from it on demand."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlcompress.core.artifact import ModelRef
from rlcompress.core.data import Data, Split, build_data
from rlcompress.core.files import load_tensors, read_archive
from rlcompress.core.graph import build_network
from rlcompress.core.problem import Bundle, Problem, make_bundle, pick_device
from rlcompress.core.schedule import Record
from rlcompress.core.sensitivity import Estimates, estimate
from rlcompress.live import console
from rlcompress.spec import Experiment, spec_hash, write_resolved

DENSE_INPUTS = ("model", "data", "dense", "seed")


def default_threads() -> int:
    """Half the cores: the layers are small, and on few cores a second thread costs more in
    waiting than it brings (5.8 s against 20 s for the estimates on two)."""
    return max(1, len(os.sched_getaffinity(0)) // 2 if hasattr(os, "sched_getaffinity") else 1)


class Workspace:
    """One experiment in its run folder."""

    def __init__(self, name: str, experiment: Experiment, folder: Path) -> None:
        self.name, self.experiment, self.folder = name, experiment, folder
        self.hash = spec_hash(experiment)
        torch.set_flush_denormal(True)
        torch.set_num_threads(experiment.threads or default_threads())
        self.device = pick_device(experiment.device)

    def has_workers(self) -> bool:
        """Whether Ray runs already or a cluster is named: starting it for a little work takes
        longer than the work."""
        ppo = self.experiment.ppo
        ray = sys.modules.get("ray")
        runs = ray is not None and bool(ray.is_initialized())
        return bool(ppo.num_env_runners and (ppo.address or "RAY_ADDRESS" in os.environ or runs))

    def set_aside(self, path: Path) -> None:
        """Moves what was made from other options out of the way; nothing is deleted."""
        folder = self.folder / "set-aside"
        folder.mkdir(exist_ok=True)
        number = 1
        while (aside := folder / f"{path.name}.{number}").exists():
            number += 1
        path.rename(aside)
        console.print(f"{path} was made from other options: it is now {aside}")

    def search_inputs(self) -> str:
        """All that gives a measurement or a proposal its meaning; not how many there are."""
        search = self.experiment.search
        counted = {"evaluations", "baseline_evaluations", "searcher", "baselines"}
        rest = {
            name: getattr(search, name) for name in type(search).model_fields if name not in counted
        }
        hashed = spec_hash(self.experiment, *DENSE_INPUTS, "calibration", "ppo")
        return f"{hashed} {json.dumps(rest, sort_keys=True)}"

    def ticket_inputs(self) -> str:
        """What a schedule's ticket depends on, beside the schedule; not how many there are."""
        ticket = self.experiment.ticket.model_dump(exclude={"top", "floor"})
        return f"{self.search_inputs()} {json.dumps(ticket, sort_keys=True)}"

    @functools.cached_property
    def data(self) -> Data:
        spec = self.experiment.data
        return build_data(spec.factory, spec.args)

    @functools.cached_property
    def ref(self) -> ModelRef:
        spec, shape = self.experiment.model, self.data.train.raw_NCHW.shape[1:]
        return ModelRef(spec.factory, dict(spec.args), self.data.num_classes, tuple(shape))

    @functools.cached_property
    def splits(self) -> tuple[Split, Split]:
        """The validation images that score schedules, and those that choose tickets."""
        calibration = self.experiment.calibration
        return self.data.score_and_selection(calibration.score_images, self.experiment.seed)

    @functools.cached_property
    def bundle(self) -> Bundle:
        """The search problem. Needs the dense stage."""
        e, folder = self.experiment, self.folder / "search"
        dense = self.network("trained")
        fit = self.data.train.sample(e.calibration.fit_images, e.seed)
        path = folder / "estimates.safetensors"
        if path.exists():
            estimates = Estimates.load(path)
        else:
            estimates = self.estimate(dense, fit)
            estimates.save(path)
        return make_bundle(
            dense,
            self.ref,
            fit,
            self.splits[0],
            estimates,
            recovery=e.search.recovery,
            positions=e.calibration.positions,
            cache_bytes=e.search.cache_mb * 2**20,
            seed=e.seed,
            device=e.device,
        )

    @functools.cached_property
    def problem(self) -> Problem:
        return self.bundle.problem()

    def estimate(self, dense: nn.Module, fit: Split) -> Estimates:
        e = self.experiment
        network = build_network(dense, self.ref.example())
        images = fit.images(slice(0, e.calibration.estimate_images))
        return estimate(
            dense.to(memory_format=torch.channels_last),
            network,
            images.contiguous(memory_format=torch.channels_last),
            keeps=e.search.keeps,
            bits=e.search.bits,
            clip=e.search.clip,
            seed=e.seed,
        )

    def network(self, which: str) -> nn.Module:
        """init, rewind or trained, from dense/."""
        tensors, _ = load_tensors(self.folder / "dense" / f"{which}.safetensors")
        model = self.ref.build(self.experiment.seed)
        model.load_state_dict(tensors)
        return model.eval()

    def archive(self) -> list[Record]:
        return read_archive(self.folder / "search" / "archive.jsonl")

    def tickets(self) -> list[dict[str, Any]]:
        """All written tickets, the exported one (best on validation) of each searcher first."""
        paths = sorted((self.folder / "tickets").glob("*/ticket.json"))
        found = [json.loads(path.read_text()) for path in paths]
        order = [self.experiment.search.searcher, *self.experiment.search.baselines]
        inputs = self.ticket_inputs()
        current = [t for t in found if t["inputs"] == inputs and t["searcher"] in order]
        return sorted(
            current,
            key=lambda t: (order.index(t["searcher"]), -t["validation"][t["arm"]], t["id"]),
        )

    def begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_resolved(self.experiment, self.name, self.folder / "spec.yaml")

    def log(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / "log.txt"
