"""Tickets: the surviving subnetwork, retrained per the Lottery Ticket Hypothesis.

Frankle & Carbin (2019); rewinding to an early iteration k: Frankle et al. (2020). The same
schedule, quantizer, data order and steps in every arm:

    reconstructed  the evaluator's closed-form fit, no training
    finetuned      the reconstructed network, then trained
    distilled      the reconstructed network, then trained on the dense one's answers alone
    inherited      the trained weights, cut, then trained
    rewind         weights of the dense network after k epochs, cut, then trained
    init           its weights before the first step, cut, then trained: the lottery ticket
    fresh          a new initialisation, cut, then trained: the control
    shuffled       as rewind, but as many channels of each group at random
    scratch        as fresh, for as many MACs as the dense network would take for the same epochs
                   (Liu et al., 2019, "Rethinking the Value of Network Pruning", section 3)

Each arm is written as a packed artifact and measured as read back from the disk.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rlcompress.core.artifact import ModelRef, load_artifact, pack
from rlcompress.core.cost import CostModel
from rlcompress.core.data import Split
from rlcompress.core.evaluate import Evaluator
from rlcompress.core.files import save_bytes
from rlcompress.core.fitted import CutNetwork, fitted_network, trained, trainee
from rlcompress.core.fold import snap
from rlcompress.core.graph import Network
from rlcompress.core.problem import pick_device
from rlcompress.core.prune import cut, kept_channels
from rlcompress.core.quant import mse_clip, scale_of
from rlcompress.core.rebuilt import require_one_network, require_rebuilds
from rlcompress.core.schedule import ARMS, FULL_PRECISION, Schedule
from rlcompress.core.train import Checkpoint, Recipe, epochs, teach

UNTRAINED = "reconstructed"


def cut_network(
    model: nn.Module, network: Network, kept: Mapping[str, np.ndarray], schedule: Schedule
) -> CutNetwork:
    """`model` cut to the channels `kept` (group -> mask (channels,)), its weights as they are, with
    the scales of least squared weight error for the layers that `schedule` gives fewer than 32
    bits. `model` itself stays whole; the copy is in its mode."""
    small = cut(model, network, kept)
    modules = dict(small.named_modules())
    widths = {name: schedule.width(name) for name in network.layers}
    bits = {name: width for name, width in widths.items() if width != FULL_PRECISION}
    scales = {}
    for name, width in bits.items():
        weight = modules[name].weight.detach()
        scales[name] = scale_of(weight, mse_clip(weight, width), width)
    return CutNetwork(small, scales, bits)


@dataclass(frozen=True)
class Lesson:
    """What the trained arms of a run's tickets have in common; goes to workers as one object."""

    data: Split
    validation: Split
    recipe: Recipe
    seed: int
    taught: torch.Tensor | None = None
    teacher: nn.Module | None = None
    device: str = "auto"

    @staticmethod
    def of(
        data: Split,
        validation: Split,
        recipe: Recipe,
        seed: int,
        teacher: nn.Module,
        device: str = "auto",
        *,
        arms: Sequence[str] = (),
    ) -> Lesson:
        """With what the teacher says of every image, or the teacher itself where augmentation
        makes new ones; if the recipe or one of the arms learns from it."""
        plain = Lesson(data, validation, recipe, seed, device=device)
        if not (recipe.distill or "distilled" in arms):
            return plain
        if recipe.augment:
            return replace(plain, teacher=copy.deepcopy(teacher).cpu())
        return replace(plain, taught=teach(teacher, data))


@dataclass(frozen=True)
class Task:
    """One arm to train: quantization-aware, from `start`, which stays as it was."""

    start: CutNetwork
    network: Network
    recipe: Recipe | None = None  # in place of the lesson's

    def prepared(self) -> nn.Module:
        return trainee(self.start, self.network)

    def train(self, lesson: Lesson, resume: Checkpoint | None = None) -> Iterator[Checkpoint]:
        """A checkpoint an epoch."""
        device = pick_device(lesson.device)
        yield from epochs(
            self.prepared().to(device),
            lesson.data,
            self.recipe or lesson.recipe,
            seed=lesson.seed,
            validation=lesson.validation,
            teacher=None if lesson.teacher is None else lesson.teacher.to(device),
            taught=lesson.taught,
            resume=resume,
        )

    def result(self, last: Checkpoint) -> CutNetwork:
        """The network of a checkpoint: float weights and learned scales."""
        model = self.prepared()
        model.load_state_dict(last.weights())
        return self.result_of(model)

    def result_of(self, model: nn.Module) -> CutNetwork:
        """The network that a `prepared` one has become by training."""
        return trained(self.start, self.network, model)


#: Trains (task, checkpoint to go on from) pairs; (number of the task, checkpoint) as they come.
Player = Callable[
    [Iterable[tuple[Task, Checkpoint | None]], Lesson], Iterator[tuple[int, Checkpoint]]
]


def in_process(
    tasks: Iterable[tuple[Task, Checkpoint | None]], lesson: Lesson
) -> Iterator[tuple[int, Checkpoint]]:
    """One task after the other."""
    for number, (task, resume) in enumerate(tasks):
        for checkpoint in task.train(lesson, resume):
            yield number, checkpoint


def write_network(
    path: Path | str, small: CutNetwork, network: Network, ref: ModelRef, schedule: Schedule
) -> None:
    """Writes the packed artifact; whole or not there. `small` is rounded to what the file can hold,
    in place. `ref` says who builds the dense network.

    Raises UserError if `ref` builds another network, `small` is not `network` cut and quantized by
    `schedule`, or a number is not finite.
    """
    require_rebuilds(ref, network)
    require_one_network(small, network, schedule)
    bits = {name: schedule.width(name) for name in network.layers}
    small.model.to("cpu")
    scales = {name: scale.cpu() for name, scale in small.scales.items()}
    small.scales = snap(small.model, network, bits, scales)
    save_bytes(Path(path), pack(small.model, network, ref, bits, small.scales))


@dataclass(frozen=True)
class Plan:
    """A ticket to play. `folder/<arm>.safetensors` become the arms' artifacts and
    `folder/<arm>.checkpoint` their training, kept until `clear`."""

    folder: Path
    schedule: Schedule
    starts: Mapping[str, CutNetwork]
    key: str = ""

    def checkpoint(self, arm: str) -> Path:
        return self.folder / f"{arm}.checkpoint"

    def clear(self) -> None:
        for arm in self.starts:
            self.checkpoint(arm).unlink(missing_ok=True)


@dataclass(frozen=True)
class Arm:
    name: str
    model: nn.Module  # read back from the disk
    curve: list[dict[str, Any]]


def starts(
    schedule: Schedule,
    evaluator: Evaluator,
    ref: ModelRef,
    dense: nn.Module,
    rewind: nn.Module,
    seed: int,
    *,
    arms: Sequence[str] = ARMS,
) -> dict[str, CutNetwork]:
    """Where each arm begins, on the CPU.

    dense, rewind  the trained network and the one after k epochs;  evaluator  fits the
    reconstruction;  seed  of the dense network's initialisation: plus one is the fresh one's
    """
    network = evaluator.network
    kept = evaluator.kept(schedule)
    rng = np.random.default_rng(seed)
    noise = {name: rng.random(group.channels) for name, group in network.groups.items()}
    reconstructed: list[CutNetwork] = []

    def fitted() -> CutNetwork:
        if not reconstructed:
            reconstructed.append(fitted_network(dense, evaluator, schedule).cpu())
        return reconstructed[0]

    def of(model: nn.Module, masks: Mapping[str, np.ndarray] = kept) -> CutNetwork:
        return cut_network(model, network, masks, schedule).cpu()

    begin: dict[str, Callable[[], CutNetwork]] = {
        "reconstructed": fitted,
        "finetuned": fitted,
        "distilled": fitted,
        "inherited": lambda: of(dense),
        "rewind": lambda: of(rewind),
        "init": lambda: of(ref.build(seed)),
        "fresh": lambda: of(ref.build(seed + 1)),
        "shuffled": lambda: of(rewind, kept_channels(network, noise, network.counts(schedule))),
        "scratch": lambda: of(ref.build(seed + 1)),
    }
    return {arm: begin[arm]() for arm in arms}


def recipe_of(arm: str, recipe: Recipe, network: Network, schedule: Schedule) -> Recipe:
    """What an arm is trained by, `recipe` being everyone's."""
    if arm == "distilled":
        return replace(recipe, distill=1.0)
    if arm == "scratch":
        costs = CostModel(network)
        times = costs.cost(Schedule()).macs / costs.cost(schedule).macs
        return replace(recipe, epochs=max(1, round(recipe.epochs * times)))
    return replace(recipe, epochs=0) if arm == UNTRAINED else recipe


def play_arms(
    plans: Iterable[Plan],
    network: Network,
    ref: ModelRef,
    lesson: Lesson,
    *,
    player: Player = in_process,
    on_epoch: Callable[[Plan, str, Checkpoint], None] = lambda plan, arm, checkpoint: None,
) -> Iterator[tuple[Plan, Arm]]:
    """Plays every arm of every plan, as they end. What an earlier call left unfinished in the
    plans' folders goes on."""
    queue: list[tuple[Plan, str, Task]] = []
    ready: list[tuple[Plan, str, CutNetwork, list[dict[str, Any]]]] = []

    def tasks() -> Iterator[tuple[Task, Checkpoint | None]]:
        for plan in plans:
            for arm, begin in plan.starts.items():
                recipe = recipe_of(arm, lesson.recipe, network, plan.schedule)
                task = Task(begin, network, recipe)
                resume = Checkpoint.load(plan.checkpoint(arm), plan.key)
                if recipe.epochs == 0:
                    ready.append((plan, arm, copy.deepcopy(task.start), []))
                elif resume is not None and resume.epoch == recipe.epochs:
                    on_epoch(plan, arm, resume)
                    ready.append((plan, arm, task.result(resume), resume.curve))
                else:
                    queue.append((plan, arm, task))
                    yield task, resume

    def written() -> Iterator[tuple[Plan, Arm]]:
        while ready:
            plan, arm, small, curve = ready.pop(0)
            path = plan.folder / f"{arm}.safetensors"
            write_network(path, small, network, ref, plan.schedule)
            yield plan, Arm(arm, load_artifact(path, trust=[ref.factory]), curve)

    for number, checkpoint in player(tasks(), lesson):
        plan, arm, task = queue[number]
        checkpoint.save(plan.checkpoint(arm), plan.key)
        on_epoch(plan, arm, checkpoint)
        if task.recipe is not None and checkpoint.epoch == task.recipe.epochs:
            ready.append((plan, arm, task.result(checkpoint), checkpoint.curve))
        yield from written()
    yield from written()
