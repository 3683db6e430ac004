"""The verb `dynamic`: the network is compressed while it trains, in one training run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlcompress.core.artifact import load_artifact
from rlcompress.core.files import JsonLines, read_archive, read_json, save_json
from rlcompress.core.policy import Agent
from rlcompress.core.schedule import Schedule
from rlcompress.core.squeeze import Pace
from rlcompress.core.tensors import arrays_of
from rlcompress.core.train import logits_of, measure
from rlcompress.core.training import Images, Trainer, Training
from rlcompress.live import console, stage
from rlcompress.report.card import below_floor
from rlcompress.stages.policies import agent_of, digest_of, find_policy
from rlcompress.stages.ticket import at_floor, commit, judged_again
from rlcompress.stages.workspace import Workspace

ARM = "closed-loop"


def training_of(run: Workspace, agent: Agent) -> Training:
    """From the rewind point on. Episodes are measured on the images that score finalists."""
    e, d = run.experiment, run.experiment.dynamic
    return Training(
        run.ref,
        run.structure,
        arrays_of(run.network("rewind")),
        Images.of(run.data.train),
        Images.of(run.splits[1]),
        Pace(d.warmup, d.recovery_steps, d.rounds, d.watch),
        final_steps=d.final_steps,
        batch_size=d.batch_size,
        lr=d.lr,
        weight_decay=d.weight_decay,
        keeps=e.search.keeps,
        bits=e.search.bits,
        clip=e.search.clip,
        seed=e.seed,
        device=e.device,
        agent=agent,
    )


def compress_in_training(run: Workspace) -> dict[str, Any]:
    """Trains the policy if `dynamic.policy_episodes` says so, plays one training run and writes
    `dynamic/weights.safetensors` and `dynamic/ticket.json`, its content; found there, they are
    not made again."""
    folder, d = run.folder / "dynamic", run.experiment.dynamic
    path, begin = folder / "ticket.json", begins_with(run)
    inputs = f"{run.inputs.dynamic} {digest_of(begin)}"
    run.exchange(folder, inputs, path.name)
    if path.exists():
        return judged_again(path, run.experiment.ticket.floor)
    training = training_of(run, agent_of(begin))
    trainer = Trainer(training)
    compressor = trainer.compressor
    compressor.require_reachable(d.target)
    run.claim(folder, inputs, path.name)
    policy = _trained(run, training, folder) if d.policy_episodes else begin
    compressor.use(policy)
    trainer.begin(d.target, run.experiment.seed)
    decisions: list[dict[str, Any]] = []
    with stage("dynamic", training.steps) as shown:
        due = True
        while due:
            layer = compressor.layers[compressor.decisions % len(compressor.layers)].name
            step = trainer.step
            compressor.decide(compressor.choose())
            due = trainer.advance()
            choice = compressor.choice_of(layer)
            decisions.append({"step": step, "layer": layer, **choice, "loss": trainer.loss})
            shown.update(
                trainer.step, f"loss {trainer.loss:.3f}  {compressor.ratio:.1f}x fewer bytes"
            )
    ratio, schedule = compressor.ratio, compressor.schedule
    kept = {g: mask.nonzero()[0].tolist() for g, mask in compressor.kept.items()}
    weights = folder / "weights.safetensors"
    compressor.save(weights, run.ref)
    model, dense = load_artifact(weights, trust=[run.ref.factory]), run.network("trained")
    small, whole = (compressor.costs.cost(s) for s in (schedule, Schedule()))
    selection, test = run.splits[2], run.data.test
    answers, chosen = logits_of(dense, test), logits_of(dense, selection)
    validation = measure(model, selection, chosen, small)
    content = {
        "id": f"dynamic-{schedule.digest()}",
        "searcher": "dynamic",
        "arm": ARM,
        "schedule": schedule.to_dict(),
        "kept": kept,
        # The only place of this verb that reads the test split.
        "ticket": measure(model, test, answers, small).to_dict(),
        "dense": measure(dense, test, answers, whole).to_dict(),
        "search": validation.to_dict(),
        "controls": {},
        "validation": {
            "dense": measure(dense, selection, chosen, whole).accuracy,
            ARM: validation.accuracy,
        },
        "curves": {},
        "decisions": decisions,
        "steps": training.steps,
        "target": d.target,
        "ratio": ratio,
        "seed": run.experiment.seed,
        "spec_hash": run.hash,
        "inputs": inputs,
        "split": "test",
        "lineage": {"policy": str(policy or "prior"), "commit": commit()},
    }
    content = at_floor(content, run.experiment.ticket.floor)
    save_json(path, content)
    return content


def ticket_of(run: Workspace) -> dict[str, Any] | None:
    """The content of `dynamic/ticket.json`, if it is of these very options."""
    path = run.folder / "dynamic" / "ticket.json"
    found: dict[str, Any] | None = read_json(path) if path.exists() else None
    # Behind the options stands the policy that it began with.
    ours = found is not None and found["inputs"].rpartition(" ")[0] == run.inputs.dynamic
    return found if ours else None


def begins_with(run: Workspace) -> Path | None:
    """The folder of the policy that the search of this run has trained, else of `search.policy`;
    None for the prior. Raises UserError for one that this version cannot use."""
    found = run.folder / "search" / "policy"
    if not (found / "policy.json").exists():
        return find_policy(run)
    agent_of(found)
    return found


def _trained(run: Workspace, training: Training, folder: Path) -> Path:
    """The folder of a policy that has played `dynamic.policy_episodes` training runs, those of an
    earlier call among them."""
    from rlcompress.rl.dynamic import train

    e = run.experiment
    most, played = e.dynamic.target, len(read_archive(folder / "archive.jsonl"))
    with (
        JsonLines(folder / "archive.jsonl") as archive,
        JsonLines(folder / "curve.jsonl") as curve,
        stage("policy", e.dynamic.policy_episodes, played) as shown,
    ):
        for record in train(
            training.prepared(),
            e.ppo,
            target=(max(1.0, most / 2), most),
            episodes=e.dynamic.policy_episodes,
            seed=e.seed,
            folder=folder / "policy",
            played=played,
            on_iteration=lambda row: curve.append(json.dumps(row)),
        ):
            archive.append(record.to_json())
            m = record.measurement
            shown.update(record.evaluation, f"accuracy {m.accuracy:.1%}  {m.bytes:,} bytes")
    return folder / "policy"


def last_lines(ticket: dict[str, Any], run: Workspace) -> None:
    """What the terminal says at the end."""
    small, dense = ticket["ticket"], ticket["dense"]
    points = 100 * (small["accuracy"] - dense["accuracy"])
    console.print(
        f"{small['accuracy']:.2%} on test ({points:+.2f} points), {small['bytes']:,} bytes, "
        f"{ticket['ratio']:.1f}x fewer, in {ticket['steps']} minibatches"
    )
    console.print(f"ticket   {run.folder / 'dynamic' / 'weights.safetensors'}")
    if short := below_floor(ticket):
        console.print(short)
