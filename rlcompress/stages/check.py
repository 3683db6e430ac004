"""`check`: what an experiment, or a network alone, is and would cost, before anything long begins.

Starts no Ray and writes nothing.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from rlcompress.core.artifact import ModelRef
from rlcompress.core.data import Split
from rlcompress.core.problem import Problem, make_bundle
from rlcompress.core.schedule import Schedule
from rlcompress.core.sensitivity import estimate
from rlcompress.core.structure import build_network, require_logits
from rlcompress.core.train import Recipe, train
from rlcompress.live import console, json_only, print_json
from rlcompress.schema import CalibrationSpec, SearchSpec
from rlcompress.searchers import uniform
from rlcompress.stages.describe import notes, show_structure, structure_rows
from rlcompress.stages.policies import policy_of
from rlcompress.stages.preflight import dense_done, require_possible
from rlcompress.stages.weights import load_weights
from rlcompress.stages.workspace import Workspace, default_threads

#: Images, of the calibration's usual 512, that a network without data is tried on.
TRIED_IMAGES = 32


def check(run: Workspace, *, as_json: bool = False) -> None:
    """Prints the resolved experiment, the tables of layers and groups, the dense cost, one
    measured evaluation and the time to expect; or all of that as JSON."""
    with json_only(as_json):
        content = _check(run)
    if as_json:
        print_json(content)


def _check(run: Workspace) -> dict[str, Any]:
    e = run.experiment
    # An alias would be fetched, which writes.
    require_possible(run, tracked=False, plays=None if "@" in e.search.policy else policy_of)
    console.print(yaml.safe_dump(e.model_dump(mode="json"), sort_keys=False, width=100).rstrip())
    done = dense_done(run)
    trained = done or e.dense.weights is not None
    model = run.network("trained") if done else run.ref.build(e.seed)
    if e.dense.weights and not done:
        load_weights(model, Path(e.dense.weights))
    show_structure(run.structure)
    begun = time.perf_counter()
    problem = run.bundle_of(model, run.estimate(model)).problem()
    prepared = time.perf_counter() - begun
    problem.require_reachable(e.search.target)
    untrained = "" if trained else "of the untrained network: only its time means anything"
    evaluation = _evaluate(problem, e.search.target, untrained)
    seconds = _expect(run, trained, prepared, evaluation["seconds"])
    console.print(f"next     {run.next('run')}")
    return {
        "experiment": run.name,
        "spec_hash": run.hash,
        "spec": e.model_dump(mode="json"),
        **structure_rows(run.structure),
        "evaluation": evaluation,
        "most_ratio": problem.max_ratio(),
        "expected_seconds": seconds,
    }


def check_model(
    factory: str, input_shape: tuple[int, ...], num_classes: int, *, as_json: bool = False
) -> None:
    """The same for a network without data: random weights, noise for images."""
    with json_only(as_json):
        content = _check_model(factory, input_shape, num_classes)
    if as_json:
        print_json(content)


def _check_model(factory: str, input_shape: tuple[int, ...], num_classes: int) -> dict[str, Any]:
    torch.set_num_threads(default_threads())
    ref = ModelRef(factory, {}, num_classes, input_shape)
    model = ref.build()
    search = SearchSpec()
    network = build_network(model, ref.example(), round_to=search.round_to)
    require_logits(model, ref.example(), 1)
    show_structure(network)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(TRIED_IMAGES, *input_shape, generator=generator)
    labels = torch.zeros(TRIED_IMAGES, dtype=torch.long)
    half = TRIED_IMAGES // 2
    fit, score = (Split(noise[part], labels[part]) for part in (slice(half), slice(half, None)))
    estimates = estimate(
        model, network, fit.images(), keeps=search.keeps, bits=search.bits, batch=half
    )
    bundle = make_bundle(model, ref, network, fit, score, estimates, cache_bytes=0)
    problem = bundle.problem()
    largest = problem.max_ratio()
    evaluation = _evaluate(problem, (min(8.0, largest), largest), "noise, random weights")
    calibration = CalibrationSpec()
    images = calibration.fit_images + calibration.score_images
    seconds = evaluation["seconds"] * images / TRIED_IMAGES * search.episodes
    console.print(
        f"to expect, about: {seconds / 60:.0f} minutes for {search.episodes} evaluations of "
        f"{images} images in one process; at most {largest:.0f}x fewer bytes"
    )
    console.print("next     name it in experiments.yaml: model: {factory: " + factory + "}")
    return {
        "model": factory,
        **structure_rows(network),
        "evaluation": evaluation,
        "most_ratio": largest,
        "expected_seconds": {"search": seconds},
    }


def _evaluate(problem: Problem, target: tuple[float, float], note: str) -> dict[str, Any]:
    """Measures one schedule: seconds, ratio, accuracy, and what is to be known of them."""
    for line in notes(problem.network, problem.evaluator):
        console.print(line)
    sizes = uniform.grid(problem, target)
    # A narrow range may hold no uniform schedule.
    schedule: Schedule = (
        sizes[len(sizes) // 2] if sizes else problem.prior.schedule(problem.dense.bytes / target[0])
    )
    begun = time.perf_counter()
    measurement = problem.evaluator.evaluate(schedule)
    seconds = time.perf_counter() - begun
    console.print(
        f"one evaluation: {seconds:.2f} s, {problem.dense.bytes / measurement.bytes:.1f}x, "
        f"accuracy {measurement.accuracy:.1%}{f' ({note})' if note else ''}"
    )
    return {
        "seconds": seconds,
        "ratio": problem.dense.bytes / measurement.bytes,
        "accuracy": measurement.accuracy,
        "note": note,
    }


def _image_seconds(run: Workspace) -> float:
    """One image forward and backward, measured."""
    e = run.experiment
    batch = min(e.dense.batch_size, len(run.data.train))
    sample = run.data.train.sample(2 * batch, e.seed)
    probe: nn.Module = run.ref.build(e.seed).to(run.device)
    recipe = Recipe(epochs=1, batch_size=batch, lr=1e-4)
    train(probe, sample, recipe, seed=0)
    begun = time.perf_counter()
    train(probe, sample, replace(recipe, lr=1e-4), seed=1)
    return (time.perf_counter() - begun) / len(sample)


def _expect(run: Workspace, trained: bool, prepared: float, episode: float) -> dict[str, float]:
    """Adds up what a run takes: seconds by stage."""
    e = run.experiment
    image = _image_seconds(run)
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
    return parts
