"""`check`: what an experiment is and what it would cost, before anything long begins."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import yaml
from rich.table import Table
from torch import nn

from rlcompress.core.cost import CostModel
from rlcompress.core.schedule import Schedule
from rlcompress.core.structure import build_network
from rlcompress.core.train import Recipe, train
from rlcompress.live import console
from rlcompress.searchers import uniform
from rlcompress.stages.workspace import Workspace


def check(run: Workspace) -> None:
    """Prints the resolved experiment, the layer and group table, the dense cost, one measured
    evaluation and the time to expect. Starts no Ray and writes nothing."""
    e = run.experiment
    console.print(yaml.safe_dump(e.model_dump(mode="json"), sort_keys=False, width=100).rstrip())
    trained = (run.folder / "dense" / "metrics.json").exists()
    model = run.network("trained") if trained else run.ref.build(e.seed)
    network = build_network(model, run.ref.example())
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("layer", "kind", "in", "out", "kernel", "params", "MACs", "keep is decided by"):
        right = column in ("in", "out", "kernel", "params", "MACs")
        table.add_column(column, justify="right" if right else "left")
    for layer in network.layers.values():
        group = network.groups[layer.group] if layer.group else None
        if group is None:
            decided = "nothing: it is the network's output"
        elif group.protected:
            decided = f"nothing: {group.protected}"
        else:
            decided = "this layer" if group.owner == layer.name else group.owner
        numbers = (layer.in_channels, layer.out_channels, layer.kernel, layer.weights, layer.macs)
        table.add_row(layer.name, layer.kind, *(f"{n:,}" for n in numbers), decided)
    console.print(table)
    cost = CostModel(network).cost(Schedule())
    console.print(
        f"dense: {len(network.layers)} layers in {len(network.groups)} groups, "
        f"{cost.bytes:,} bytes, {cost.params:,} parameters, {cost.macs:,} MACs"
    )
    _time(run, model, trained)


def _time(run: Workspace, model: nn.Module, trained: bool) -> None:
    """Measures one evaluation and a little training, and adds up what a run takes."""
    e = run.experiment
    begun = time.perf_counter()
    problem = run.bundle_of(model, run.estimate(model)).problem()
    prepared = time.perf_counter() - begun
    problem.require_reachable(e.search.target)
    sizes = uniform.grid(problem, e.search.target)
    # A narrow range may hold no uniform schedule.
    schedule = (
        sizes[len(sizes) // 2]
        if sizes
        else problem.prior.schedule(problem.dense.bytes / e.search.target[0])
    )
    begun = time.perf_counter()
    measurement = problem.evaluator.evaluate(schedule)
    episode = time.perf_counter() - begun
    note = "" if trained else " (of the untrained network: only its time means anything)"
    console.print(
        f"one evaluation: {episode:.2f} s, {problem.dense.bytes / measurement.bytes:.1f}x, "
        f"accuracy {measurement.accuracy:.1%}{note}"
    )
    batch = min(e.dense.batch_size, len(run.data.train))
    sample = run.data.train.sample(2 * batch, e.seed)
    probe = run.ref.build(e.seed).to(run.device)
    recipe = Recipe(epochs=1, batch_size=batch, lr=1e-4)
    train(probe, sample, recipe, seed=0)
    begun = time.perf_counter()
    train(probe, sample, replace(recipe, lr=1e-4), seed=1)
    image = (time.perf_counter() - begun) / len(sample)
    own = e.search.episodes
    baseline = (e.search.baseline_episodes or own) * len(e.search.baselines)
    on_ray = "ppo" in (e.search.searcher, *e.search.baselines)
    # One thread each: more runners than cores are no faster.
    runners = min(max(1, e.ppo.num_env_runners), os.cpu_count() or 1) if on_ray else 1
    images = len(run.data.train)
    tickets = e.ticket.top + ("uniform" in e.search.baselines)
    parts = {
        "dense": 0.0 if trained else e.dense.epochs * images * image,
        "search": prepared + episode * (own + baseline) / runners,
        "tickets": 3 * tickets * e.ticket.epochs * images * image / runners,
    }
    console.print(
        "to expect, about: "
        + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in parts.items())
        + f"; {sum(parts.values()) / 60:.1f} minutes in all"
    )
    console.print(f"next     rlcompress run {run.name}")
