"""Stage 3: the best schedules become tickets, with their controls."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from rlcompress import __version__
from rlcompress.core.errors import UserError
from rlcompress.core.evaluate import Evaluator
from rlcompress.core.files import read_json, save_json
from rlcompress.core.pareto import ticket_rank
from rlcompress.core.schedule import Record, Schedule
from rlcompress.core.ticket import (
    Arm,
    Lesson,
    Plan,
    Player,
    in_process,
    play_arms,
    recipe_of,
    starts,
)
from rlcompress.core.train import Checkpoint, Recipe, logits_of, measure
from rlcompress.live import stage
from rlcompress.stages.finals import finals
from rlcompress.stages.workspace import Workspace

#: Share of the loss that the dense network's answers are, where `ticket.distill` is on.
DISTILLED = 0.5


def winners(run: Workspace, records: list[Record]) -> list[Record]:
    """The best finalists: `ticket.top` of the searcher, one of the baseline `uniform`."""
    e = run.experiment
    largest = run.problem.dense.bytes / e.search.target[0]
    wanted = {e.search.searcher: e.ticket.top}
    if "uniform" in e.search.baselines:
        wanted.setdefault("uniform", 1)
    chosen = []
    for name, count in wanted.items():
        # Probes of single choices are records too, of networks that are nearly dense.
        mine = [r for r in records if r.searcher == name and r.measurement.bytes <= largest]
        if not mine and name == e.search.searcher:
            raise UserError(f"{run.folder}: {name} has measured nothing yet; {run.next('search')}")
        chosen += finals(run, name, mine)[:count]
    return chosen


def make_tickets(run: Workspace) -> Iterator[dict[str, Any]]:
    """Retrains the winners with all their controls; the tickets, as they are written. Of those
    that were there already nothing is done again."""
    e, t = run.experiment, run.experiment.ticket
    run.require_search()
    chosen = winners(run, run.archive())
    inputs, folders = run.inputs.ticket, run.folder / "tickets"
    for path in sorted(folders.glob("*/ticket.json")):
        if read_json(path)["inputs"] != inputs:
            run.set_aside(path.parent)
    wanted = {}
    for record in chosen:
        folder = folders / f"{record.searcher}-{record.schedule.digest()}"
        run.exchange(folder, inputs, "ticket.json")
        if not (folder / "ticket.json").exists():
            run.claim(folder, inputs, "ticket.json")
            wanted[folder] = record
    for path in sorted(folders.glob("*/ticket.json")):
        judged_again(path, t.floor)
        for leftover in path.parent.glob("*.checkpoint"):
            leftover.unlink()
    yield from run.tickets()
    if not wanted:
        return

    dense = run.network("trained").to(run.device)
    # Without labels the dense network's answers are all there is to learn from.
    share = (DISTILLED if run.data.labelled else 1.0) if t.distill else 0.0
    recipe = Recipe(t.epochs, t.batch_size, t.lr, t.weight_decay, distill=share)
    lesson = Lesson.of(run.data.train, run.splits[2], recipe, e.seed, dense, e.device, arms=t.arms)
    evaluator = run.evaluator(dense, t.fit_images, run.splits[0], e.seed)
    epochs: dict[tuple[Path, str], int] = {}
    total = sum(
        recipe_of(arm, recipe, evaluator.network, record.schedule).epochs
        for record in wanted.values()
        for arm in t.arms
    )
    with stage("tickets", total) as shown:

        def on_epoch(plan: Plan, arm: str, checkpoint: Checkpoint) -> None:
            epochs[plan.folder, arm] = checkpoint.epoch
            accuracy = checkpoint.curve[-1]["validation_accuracy"]
            searcher = wanted[plan.folder].searcher
            shown.update(sum(epochs.values()), f"{searcher} {arm}  validation {accuracy:.1%}")

        played: dict[Path, dict[str, Arm]] = {folder: {} for folder in wanted}
        for plan, arm in play_arms(
            _plans(run, wanted, evaluator, dense),
            evaluator.network,
            run.ref,
            lesson,
            player=_player(run),
            on_epoch=on_epoch,
        ):
            arms = played[plan.folder]
            arms[arm.name] = arm
            if len(arms) == len(t.arms):
                ticket = _judge(run, wanted[plan.folder], plan.folder, arms, dense, evaluator)
                plan.clear()
                # Their networks are on the disk.
                arms.clear()
                yield ticket


def at_floor(ticket: dict[str, Any], floor: float) -> dict[str, Any]:
    """A ticket.json's content with `floor`, points below dense that are allowed, and `at_floor`:
    whether its validation accuracy is within them."""
    ticket = {**ticket, "floor": floor}
    return {**ticket, "at_floor": ticket_rank(ticket)[0]}


def judged_again(path: Path, floor: float) -> dict[str, Any]:
    """The ticket.json there, by the floor of now: another floor makes no other ticket."""
    ticket: dict[str, Any] = read_json(path)
    judged = at_floor(ticket, floor)
    if judged != ticket:
        save_json(path, judged)
    return judged


def lineage(run: Workspace, record: Record) -> dict[str, str]:
    """What made a ticket, beside its options and seed."""
    made = {"version": __version__, "commit": commit()}
    policy = run.folder / "search" / "policy" / "policy.safetensors"
    if record.searcher == "ppo" and policy.exists():
        made["policy"] = hashlib.sha256(policy.read_bytes()).hexdigest()[:12]
    return made


def commit() -> str:
    """Of the checkout that it runs in; empty outside of one."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _plans(
    run: Workspace, wanted: dict[Path, Record], evaluator: Evaluator, dense: nn.Module
) -> Iterator[Plan]:
    rewind = run.network("rewind").to(run.device)
    for folder, record in wanted.items():
        e = run.experiment
        begin = starts(
            record.schedule, evaluator, run.ref, dense, rewind, e.seed, arms=e.ticket.arms
        )
        yield Plan(
            folder, record.schedule, begin, f"{run.inputs.ticket}/{record.schedule.digest()}"
        )


def _player(run: Workspace) -> Player:
    ppo = run.experiment.ppo
    if not run.has_workers():
        return in_process
    from rlcompress.rl import arms, cluster

    cluster.start_ray(ppo)
    return arms.player(num_gpus=ppo.num_gpus_per_env_runner)


def _judge(
    run: Workspace,
    record: Record,
    folder: Path,
    arms: dict[str, Arm],
    dense: nn.Module,
    evaluator: Evaluator,
) -> dict[str, Any]:
    """Chooses the arm to export by validation, tests all and writes the ticket."""
    e, selection = run.experiment, run.splits[2]
    dense_logits = logits_of(dense, selection)
    cost = evaluator.costs.cost(record.schedule)
    names = e.ticket.arms
    chosen = {name: measure(arms[name].model, selection, dense_logits, cost) for name in names}
    best = max(chosen, key=lambda name: (chosen[name].accuracy, -chosen[name].kl))
    size = os.path.getsize(folder / f"{best}.safetensors")
    if size != cost.bytes:
        raise AssertionError(f"{folder}: {size} bytes on disk, {cost.bytes} in closed form")
    shutil.copyfile(folder / f"{best}.safetensors", folder / "weights.safetensors")
    # The only place of `run` that reads the test split: nothing is chosen by it.
    test_logits = logits_of(dense, run.data.test)
    dense_cost = evaluator.costs.cost(Schedule())
    tested = {name: measure(arms[name].model, run.data.test, test_logits, cost) for name in names}
    content = {
        "id": folder.name,
        "searcher": record.searcher,
        "schedule": record.schedule.to_dict(),
        "channels": evaluator.network.counts(record.schedule),
        "kept": {
            g: mask.nonzero()[0].tolist() for g, mask in evaluator.kept(record.schedule).items()
        },
        "dense": measure(dense, run.data.test, test_logits, dense_cost).to_dict(),
        "ticket": tested[best].to_dict(),
        "arm": best,
        "controls": {n: m.to_dict() for n, m in tested.items() if n != best},
        "validation": {
            "dense": measure(dense, selection, dense_logits, dense_cost).accuracy,
            **{n: m.accuracy for n, m in chosen.items()},
        },
        "input": {
            "shape": list(run.ref.input_shape),
            "mean": run.data.train.mean,
            "std": run.data.train.std,
        },
        "curves": {n: arm.curve for n, arm in arms.items() if arm.curve},
        "seed": e.seed,
        "spec_hash": run.hash,
        "inputs": run.inputs.ticket,
        "split": "test",
        "target": record.target,
        "ratio": dense_cost.bytes / cost.bytes,
        "search": record.measurement.to_dict(),
        "lineage": lineage(run, record),
    }
    content = at_floor(content, e.ticket.floor)
    save_json(folder / "ticket.json", content)
    return content
