"""What the stages share: the experiment, its folder, and what is built from it on demand."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from rlcompress.core.artifact import ModelRef
from rlcompress.core.cost import CostModel
from rlcompress.core.data import Data, Split, build_data
from rlcompress.core.errors import UserError, first_line
from rlcompress.core.evaluate import Evaluator
from rlcompress.core.evaluators import build_evaluator
from rlcompress.core.files import read_archive, read_json, save_bytes, save_json
from rlcompress.core.graph import Network
from rlcompress.core.pareto import ticket_rank
from rlcompress.core.problem import Bundle, Problem, make_bundle, pick_device
from rlcompress.core.process import settle_process
from rlcompress.core.schedule import Record, Schedule
from rlcompress.core.sensitivity import Estimates, estimate
from rlcompress.core.structure import build_network, require_logits
from rlcompress.core.tensors import load_tensors
from rlcompress.core.train import logits_of
from rlcompress.live import console
from rlcompress.lock import Lock, move_aside
from rlcompress.spec import Experiment, spec_hash, write_resolved, write_single
from rlcompress.stages.inputs import Inputs
from rlcompress.stages.storage import Storage
from rlcompress.stages.weights import digest_of_weights, load_weights

#: Of a folder: names what its content is made from.
MARKER = "inputs.json"


def cores() -> int:
    """That this process may use; 1 where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def default_threads() -> int:
    """Half the cores: the layers are small, and on few cores a second thread costs more in
    waiting than it brings (5.8 s against 20 s for the estimates on two)."""
    return max(1, cores() // 2)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raises UserError for tensors of a run folder that are damaged or gone."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"{path}: damaged or missing ({first_line(error)}); "
            f"remove {path.parent} to make it again, or start over with --fresh"
        ) from error


class Workspace:
    """One experiment in its run folder. `words`: the options of the command line. `fresh`: until
    `begin`, what is in the folder is another run's."""

    def __init__(
        self,
        name: str,
        experiment: Experiment,
        folder: Path,
        words: Sequence[str] = (),
        fresh: bool = False,
    ) -> None:
        self.name, self.experiment, self.folder = name, experiment, folder
        self.words, self.fresh = words, fresh
        self.hash = spec_hash(experiment)
        settle_process()
        torch.set_num_threads(experiment.threads or default_threads())
        self.device = pick_device(experiment.device)

    def has_workers(self) -> bool:
        """Whether Ray runs already or a cluster is named: starting it for a little work takes
        longer than the work."""
        ppo = self.experiment.ppo
        if not ppo.num_env_runners:
            return False
        if ppo.address or "RAY_ADDRESS" in os.environ:
            return True
        return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())

    def require_search(self) -> None:
        """Raises UserError unless there is a search, and of these very options."""
        marker = self.folder / "search" / "inputs.json"
        if not marker.exists() or not self.archive():
            raise UserError(f"{self.folder}: nothing searched yet; {self.next('search')}")
        if read_json(marker)["inputs"] != self.inputs.search:
            raise UserError(
                f"{self.folder}: searched with other options than these; {self.next('search')}"
            )

    def next(self, verb: str) -> str:
        """The command for another verb of this very run."""
        return shlex.join(["rlcompress", verb, self.name, *self.words])

    def set_aside(self, path: Path) -> None:
        """Moves what was made from other options out of the way; nothing is deleted."""
        aside = self._aside(path)
        path.rename(aside)
        console.print(f"{path} was made from other options: it is now {aside}")

    def copy_aside(self, path: Path) -> None:
        """As `set_aside`, of a file that only in part was made from other options."""
        aside = self._aside(path)
        save_bytes(aside, path.read_bytes())
        console.print(f"{path} was made from other options in part: all of it is now {aside}")

    def _aside(self, path: Path) -> Path:
        folder = self.folder / "set-aside"
        folder.mkdir(exist_ok=True)
        number = 1
        while (aside := folder / f"{path.name}.{number}").exists():
            number += 1
        return aside

    def exchange(self, folder: Path, inputs: str, result: str = MARKER) -> None:
        """Sets aside what other inputs made in `folder`, and brings back what these once made.
        `result`: a file there that names them too, all that older versions wrote."""

        def inputs_of(place: Path) -> str | None:
            paths = (path for path in (place / MARKER, place / result) if path.exists())
            named = (read_json(path).get("inputs") for path in paths)
            return next((str(inputs) for inputs in named if inputs is not None), None)

        there = inputs_of(folder)
        if there == inputs:
            return
        asides = sorted((self.folder / "set-aside").glob(f"{folder.name}.*"))
        ours = next((aside for aside in asides if inputs_of(aside) == inputs), None)
        # Nobody's may be ours: it stays if there is no other.
        if folder.exists() and (there is not None or ours is not None):
            self.set_aside(folder)
        if ours is not None:
            ours.rename(folder)
            console.print(f"{ours} was made from these options: it is {folder} again")

    def claim(self, folder: Path, inputs: str, result: str = MARKER) -> None:
        """Makes `folder` for results of these inputs; what others left there is set aside."""
        self.exchange(folder, inputs, result)
        folder.mkdir(parents=True, exist_ok=True)
        save_json(folder / MARKER, {"inputs": inputs})

    def weights_digest(self) -> str:
        """What `dense.weights` holds, in twelve hex digits: the file may change under its name.
        Where it is gone, what was loaded of it; "" without one."""
        if not self.experiment.dense.weights:
            return ""
        path, known = Path(self.experiment.dense.weights), self.folder / "dense" / "metrics.json"
        if digest := digest_of_weights(path):
            return digest
        there = known.exists() and not self.fresh
        return str(read_json(known).get("weights", "")) if there else ""

    @property
    def inputs(self) -> Inputs:
        return Inputs(self.experiment, self.weights_digest())

    @functools.cached_property
    def given(self) -> Data:
        """As the factory gives them. Raises UserError for others than those that the dense network
        of these very options was made with."""
        spec, path = self.experiment.data, self.folder / "dense" / "metrics.json"
        data = build_data(spec.factory, spec.args)
        metrics = read_json(path) if path.exists() and not self.fresh else {}
        known = metrics.get("data") if metrics.get("inputs") == self.inputs.dense else None
        if known and (changed := data.changed(known)):
            raise UserError(
                f"data {spec.factory}: other images or labels in {', '.join(changed)} than "
                f"{path.parent} was made with; allowed: the same each time (split by a generator "
                "with a fixed seed), or --fresh"
            )
        return data

    @functools.cached_property
    def data(self) -> Data:
        """Raises UserError for data without labels, unless `dense.weights` answers for them."""
        weights, data = self.experiment.dense.weights, self.given
        if data.labelled:
            return data
        if not weights:
            raise UserError(
                "data: no labels, so nothing can be trained on them: "
                "give labels, or a trained network with dense.weights = FILE"
            )
        model = self._ref(data).build(self.experiment.seed)
        load_weights(model, Path(weights))
        model.to(self.device)
        return data.answered(lambda split: logits_of(model, split))

    @functools.cached_property
    def ref(self) -> ModelRef:
        return self._ref(self.data)

    def _ref(self, data: Data) -> ModelRef:
        spec = self.experiment.model
        shape = tuple(data.train.raw_NCHW.shape[1:])
        return ModelRef(spec.factory, dict(spec.args), data.num_classes, shape)

    @functools.cached_property
    def structure(self) -> Network:
        """Layers, groups and what is protected: the same whatever the weights are. Raises UserError
        for a network that cannot be compressed, or that has fewer logits than the data classes."""
        e, ref = self.experiment, self.ref
        model, example = ref.build(e.seed), ref.example()
        network = build_network(model, example, round_to=e.search.round_to)
        require_logits(model, example, ref.num_classes)
        return network

    def require_reachable(self) -> None:
        """Raises UserError if the choices do not allow the largest target. Needs no dense stage;
        `Problem.require_reachable` knows more, and comes later."""
        search, costs = self.experiment.search, CostModel(self.structure)
        smallest = self.structure.uniform(min(search.keeps), min(search.bits))
        most = costs.cost(Schedule()).bytes / costs.cost(smallest).bytes
        if search.target[1] > most:
            raise UserError(
                f"search.target = {list(search.target)}: at most {most:.1f} is possible "
                f"with the smallest keep {min(search.keeps)} and bits {min(search.bits)}"
            )

    @functools.cached_property
    def splits(self) -> tuple[Split, Split, Split]:
        """The validation images that score schedules, those that score finalists (the first among
        them), and those that choose tickets."""
        c = self.experiment.calibration
        return self.data.validation_parts(c.score_images, c.final_images, self.experiment.seed)

    @property
    def fit(self) -> Split:
        """The training images that reconstructions are fitted on."""
        e = self.experiment
        return self.data.train.sample(e.calibration.fit_images, e.seed)

    @functools.cached_property
    def bundle(self) -> Bundle:
        """The search problem. Needs the dense stage."""
        dense = self.network("trained")
        path = self.folder / "search" / "estimates.safetensors"
        if path.exists():
            with _readable(path):
                known = Estimates.load(path, self.inputs.estimates)
            if known is not None:
                return self.bundle_of(dense, known)
        estimates = self.estimate(dense)
        path.parent.mkdir(parents=True, exist_ok=True)
        estimates.save(path, self.inputs.estimates)
        return self.bundle_of(dense, estimates)

    def bundle_of(self, dense: nn.Module, estimates: Estimates) -> Bundle:
        e = self.experiment
        return make_bundle(
            dense,
            self.ref,
            self.structure,
            self.fit,
            self.splits[0],
            estimates,
            recovery=e.search.recovery,
            score=e.search.score,
            use_labels=e.calibration.labels,
            positions=e.calibration.positions,
            precision=e.search.precision,
            cache_bytes=e.search.cache_mb * 2**20,
            seed=e.seed,
            device=e.device,
        )

    def evaluator(self, dense: nn.Module, fit_images: int, score: Split, seed: int) -> Evaluator:
        """For a last judgement: fits reconstructions on other and more images than the search
        did, at twice the positions, and keeps no cache."""
        e = self.experiment
        return build_evaluator(
            dense,
            self.structure,
            self.data.train.sample(fit_images, seed).images().to(self.device),
            score.images().to(self.device),
            score.labels_N.to(self.device) if e.calibration.labels else None,
            self.bundle.estimates,
            recovery=e.search.recovery,
            positions=2 * e.calibration.positions,
            precision=e.search.precision,
            cache_bytes=0,
            seed=seed,
        )

    @functools.cached_property
    def problem(self) -> Problem:
        return self.bundle.problem()

    def estimate(self, dense: nn.Module) -> Estimates:
        e = self.experiment
        images = self.fit.images().contiguous(memory_format=torch.channels_last)
        return estimate(
            dense.to(memory_format=torch.channels_last),
            self.structure,
            images,
            told=e.calibration.estimate_images,
            positions=e.calibration.positions,
            keeps=e.search.keeps,
            bits=e.search.bits,
            clip=e.search.clip,
            seed=e.seed,
        )

    def network(self, which: str) -> nn.Module:
        """init, rewind or trained, from dense/."""
        path = self.folder / "dense" / f"{which}.safetensors"
        model = self.ref.build(self.experiment.seed)
        with _readable(path):
            model.load_state_dict(load_tensors(path)[0])
        return model.eval()

    def archive(self) -> list[Record]:
        return read_archive(self.folder / "search" / "archive.jsonl")

    def tickets(self) -> list[dict[str, Any]]:
        """All tickets of these very options: searcher by searcher, the best first."""
        paths = sorted((self.folder / "tickets").glob("*/ticket.json"))
        found = [read_json(path) for path in paths]
        order = [self.experiment.search.searcher, *self.experiment.search.baselines]
        inputs = self.inputs.ticket
        current = [t for t in found if t["inputs"] == inputs and t["searcher"] in order]
        current.sort(key=lambda t: (ticket_rank(t), t["id"]), reverse=True)
        return sorted(current, key=lambda t: order.index(t["searcher"]))

    @functools.cached_property
    def storage(self) -> Storage | None:
        uri = self.experiment.storage
        return Storage(uri, self.name) if uri else None

    def keep(self) -> None:
        """Brings the copy at `storage`, if there is to be one, up to date."""
        if self.storage is not None:
            self.storage.save(self.folder)

    def fetch(self) -> None:
        """Where no run is here, the one that `storage` keeps: before it is asked what is there."""
        here = (self.folder / "spec.yaml").exists()
        if self.storage is not None and not here and self.storage.has_run():
            with Lock(self.folder):
                self.storage.load(self.folder)

    def begin(self, write: Path | None = None) -> Lock:
        """Takes the run folder for this command, until the lock is closed; what `storage` has goes
        into it, and an old run out of it where a fresh one begins. Raises UserError if another one
        is at work in it. `write`: an experiments file to make of this experiment alone."""
        if self.fresh:
            move_aside(self.folder)
            self.fresh = False
        lock = Lock(self.folder)
        if self.storage is not None:
            self.storage.load(self.folder)
        write_resolved(self.experiment, self.name, self.folder / "spec.yaml")
        if write is not None:
            given = self.experiment.model_dump(mode="json", exclude_unset=True)
            write_single(write, self.name, given)
        return lock

    def log(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / "log.txt"
