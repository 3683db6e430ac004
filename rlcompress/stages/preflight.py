"""What can be told before anything is written or trained."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from rlcompress.core.data import BUILT_IN as DATA
from rlcompress.core.dynamic import DynamicCompressor
from rlcompress.core.errors import OutsideError, UserError
from rlcompress.core.files import read_json
from rlcompress.core.models import BUILT_IN as MODELS
from rlcompress.core.models import find_factory
from rlcompress.core.quant import own_clip
from rlcompress.core.rebuilt import require_kept
from rlcompress.core.schedule import MAX_BITS
from rlcompress.core.train import require_trains
from rlcompress.core.unseen import require_drawn_alike
from rlcompress.searchers import own_search
from rlcompress.stages.policies import policy_of
from rlcompress.stages.weights import load_weights
from rlcompress.stages.workspace import MARKER, Workspace


class Problems:
    """The mistakes that several checks find."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def none_in(self, check: Callable[[], object]) -> bool:
        """Whether the check passes; a mistake it raises is noted. What does not answer is raised
        on: it says nothing of the options."""
        try:
            check()
        except OutsideError:
            raise
        except UserError as error:
            self.lines += [line for line in str(error).splitlines() if line not in self.lines]
            return False
        return True

    def tell(self) -> None:
        """Raises UserError with all that was noted."""
        if self.lines:
            raise UserError(*self.lines)


def require_possible(
    run: Workspace,
    *,
    searches: bool = True,
    tracked: bool = True,
    plays: Callable[[Workspace], object] | None = policy_of,
    zoo: Mapping[str, Workspace] | None = None,
) -> None:
    """Raises UserError with every mistake that shows before the first training: network, data,
    weights, target, searchers, clipping rule, policy; and OutsideError where the MLflow server that
    is named does not answer. Writes nothing, and builds no network that was built before.

    searches  whether schedules are searched; else the network is compressed during training
    plays     finds the policy to begin with
    zoo       networks that are trained besides
    """
    e, problems = run.experiment, Problems()
    if searches:
        for name in {e.search.searcher, *e.search.baselines}:
            if ":" in name:
                problems.none_in(lambda name=name: own_search(name))  # type: ignore[misc]
    if ":" in e.search.clip:
        problems.none_in(lambda: own_clip(e.search.clip, torch.ones(4, 3, 3, 3), MAX_BITS))
    if not _made(run, searches=searches) and _built(run, problems):
        _trainable(run, problems, searches=searches)
    for name, member in (zoo or {}).items():
        theirs = Problems()
        if not dense_done(member) and _built(member, theirs):
            _kept(member, theirs)
        problems.lines += [f"zoo.networks.{name}: {line}" for line in theirs.lines]
    if plays is not None and ("@" not in e.search.policy or not problems.lines):  # fetching writes
        problems.none_in(lambda: plays(run))
    problems.tell()
    uri = e.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    done = (run.folder / "tracked.json").exists() and not run.fresh
    if tracked and uri and not done:
        from rlcompress.tracking import TrackingError, probe

        try:
            probe(uri)
        except TrackingError as error:
            raise OutsideError(str(error)) from error


def _built(run: Workspace, problems: Problems) -> bool:
    """Whether there are data, and a factory of the network."""
    e = run.experiment
    known = [
        problems.none_in(lambda: find_factory(e.data.factory, DATA)),
        problems.none_in(lambda: find_factory(e.model.factory, MODELS)),
    ]
    return all(known) and problems.none_in(lambda: run.data)


def _kept(run: Workspace, problems: Problems) -> nn.Module | None:
    """The network, if it can be read; whether it can be trained, and a file hold it."""
    if not problems.none_in(lambda: run.structure):
        return None
    model = run.ref.build(run.experiment.seed + 1)  # of the control `fresh`; files are read with 0
    problems.none_in(lambda: require_trains(model, run.data.train.images(slice(0, 2))))
    if problems.none_in(lambda: require_kept(model, run.structure, run.ref)):
        problems.none_in(lambda: require_drawn_alike(model, run.ref))
    return model


def _trainable(run: Workspace, problems: Problems, *, searches: bool) -> None:
    e = run.experiment
    if not run.data.labelled and not (searches and e.ticket.distill):
        what = "ticket.distill = false" if searches else "dynamic"
        problems.lines.append(f"{what}: needs labels, and the data have none")
    if (model := _kept(run, problems)) is None:
        return
    problems.none_in(run.require_reachable if searches else lambda: _require_dynamic(run))
    if (
        e.dense.weights
        and not dense_done(run)
        and problems.none_in(lambda: load_weights(model, Path(e.dense.weights or "")))
    ):
        problems.none_in(lambda: require_kept(model, run.structure, run.ref))


def _require_dynamic(run: Workspace) -> None:
    """Raises UserError for a network that cannot be compressed while it trains, or not so far."""
    e = run.experiment
    DynamicCompressor(
        run.ref.build(e.seed),
        run.ref.example(),
        policy=None,
        target=e.dynamic.target,
        keeps=e.search.keeps,
        bits=e.search.bits,
        clip=e.search.clip,
        network=run.structure,
    )


def _made(run: Workspace, *, searches: bool) -> bool:
    """Whether the stages whose inputs are to be checked are there already."""
    name, inputs = "search", run.inputs.search
    if not searches:
        name, inputs = "dynamic", run.inputs.dynamic
    marker = run.folder / name / MARKER
    # Behind these inputs some name the policy too.
    done = marker.exists() and str(read_json(marker)["inputs"]).startswith(inputs)
    return dense_done(run) and done


def dense_done(run: Workspace) -> bool:
    """Whether the dense network of these very options is there."""
    path = run.folder / "dense" / "metrics.json"
    there = path.exists() and not run.fresh
    return there and bool(read_json(path)["inputs"] == run.inputs.dense)
