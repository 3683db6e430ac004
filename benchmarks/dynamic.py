"""Compression during one training run, against rules that do not look, and against search first.

    uv run python -m benchmarks.dynamic                           # hours; goes on where it stopped
    uv run python -m benchmarks.dynamic --networks mobilenetv2    # two networks: two processes
    uv run python -m benchmarks.dynamic --quick                   # one setting an arm, few steps

Fashion-MNIST. Every arm begins at the same weights after one epoch of dense training and takes the
same `--steps` of 64 images under one cycle of the learning rate; `dense` takes them uncompressed.

closed   `DynamicCompressor` with the policy (`--policy`; by default the one that comes along)
prior    the same without a policy: the knapsack on live estimates
open     the choices that `closed` took with seed 0, at the same steps whatever training shows
static   one keep ratio and one bit-width for all layers from the first decision's step on
gradual  keep ratio falling by the cubic rule of Zhu & Gupta (2017), channels of least magnitude
         first, the same bits for all layers from the last decision's step on
search   half of the steps dense, then the knapsack with `--evaluations` on refitted sensitivities,
         reconstruction, and the other half of the steps of quantization-aware training

Each arm has several settings (targets, or keep x bits). The densest within a point of `dense` on
the validation split is the arm's answer, and it alone is measured on test.

gain      density of `closed` / density of `static` - 1, of the answers, on test
compute   processor seconds of `closed` (one run) / of `search` (training, search and retraining)

Drift: at a third of the steps the images change (rotation, noise, contrast, class priors; see
benchmarks.drifts). `closed`, `open` and `static` at the same size; what an arm loses is the
accuracy of `dense` under the same drift less its own, on changed test images. `drift_loss_ratio`:
mean loss over the four of `closed` / of `static`, seed by seed.

`changed_by_drift`: share of the choices behind the first round in which `closed` under drift
differs from `closed` without, of the same seed; `changed_by_seed`: from that of another seed,
without drift.

Every training is a line of runs/dynamic-NETWORK.jsonl as soon as it is done.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import results
from benchmarks.arms import Bench, closed, gradual, opened, searched, static
from benchmarks.drifts import DRIFTS
from benchmarks.networks import EXPERIMENTS, identity, workspace
from rlcompress.core.artifact import load_artifact
from rlcompress.core.cost import CostModel
from rlcompress.core.files import read_lines
from rlcompress.core.schedule import performance_density
from rlcompress.core.train import top1
from rlcompress.core.training import Trainer
from rlcompress.stages.workspace import Workspace

FLOOR = 1.0
TARGETS = {"vgg19": (20.0, 40.0, 60.0, 80.0), "mobilenetv2": (12.0, 16.0, 24.0, 36.0)}
#: (keep, bits) of the static and the gradual rule.
GRID = {
    "vgg19": ((1.0, 4), (0.85, 4), (0.7, 4), (0.55, 4), (0.4, 4), (0.3, 4)),
    "mobilenetv2": ((1.0, 6), (0.85, 6), (0.85, 4), (0.7, 6), (0.7, 4)),
}
#: The size at which drift is looked at.
DRIFT_TARGET = {"vgg19": 40.0, "mobilenetv2": 12.0}
ARMS = ("dense", "closed", "prior", "open", "static", "gradual", "search")


# --- one line -----------------------------------------------------------------------------------


def measure(bench: Bench, rows: results.Rows, about: dict[str, Any]) -> None:
    """One training of one arm: `about` is what identifies its line."""
    if any({**row, **about} == row for row in rows.rows):
        return
    arm, setting, drift = about["arm"], about["setting"], about["drift"]
    folder = Path("runs") / f"dynamic-{bench.network}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{arm}-{drift}-{bench.seed}-{'-'.join(map(str, setting))}.safetensors"
    begun = time.process_time()
    more: dict[str, Any] = {}
    training = bench.training(drift)
    if arm == "search":
        more = searched(bench, setting[0], path)
    else:
        # Nobody asks for the KL to the dense run here.
        trainer = Trainer(training)
        if arm == "dense":
            trainer.compressor.freeze()
            while trainer.step < training.steps:
                trainer.minibatch()
        elif arm in ("closed", "prior"):
            policy = bench.policy if arm == "closed" else None
            more = {"actions": closed(trainer, setting[0], policy)}
        elif arm == "open":
            opened(trainer, setting[0], actions_of(rows.rows, about["key"], setting))
        else:
            (static if arm == "static" else gradual)(trainer, *setting)
        trainer.compressor.save(path, bench.run.ref)
    seconds = time.process_time() - begun
    model, size = load_artifact(path), path.stat().st_size
    row = {
        **about,
        **more,
        "network": bench.network,
        "seconds": seconds,
        "bytes": size,
        "validation": top1(model, training.validation.split()),
        "path": str(path),
    }
    rows.append(row)
    said = {k: row[k] for k in ("arm", "setting", "drift", "seed", "bytes", "validation")}
    print(f"{bench.network} {said} {seconds:.0f} s", flush=True)


def actions_of(rows: list[dict[str, Any]], key: str, setting: list[Any]) -> list[int]:
    """What `closed` chose on the first of the seeds, without drift."""
    return next(
        row["actions"]
        for row in rows
        if row.get("arm") == "closed"
        and row["drift"] is None
        and row["setting"] == setting
        and row["key"] == key
    )


def key_of(run: Workspace, options: argparse.Namespace) -> str:
    return f"{identity(run)} {options.steps} {options.evaluations} {options.policy}"


def measure_all(network: str, seed: int, options: argparse.Namespace) -> None:
    run = workspace(EXPERIMENTS[network], f"search.target=[4,{max(TARGETS[network]) + 1}]")
    torch.set_num_threads(1)
    bench = Bench(network, run, seed, options.steps, options.evaluations, options.policy)
    rows = results.Rows(Path("runs") / f"dynamic-{network}.jsonl")
    key = key_of(run, options)
    about = {"key": key, "seed": seed}
    for arm, settings in settings_of(network, options).items():
        for setting in settings:
            measure(bench, rows, {**about, "arm": arm, "setting": setting, "drift": None})
    target = DRIFT_TARGET[network]
    dense_bytes = next(r["bytes"] for r in rows.rows if {**r, **about, "arm": "dense"} == r)
    like = closest(run, dense_bytes / target)
    for drift in options.drifts.split(",") if options.drifts else ():
        for arm, setting in (
            ("dense", []),
            ("closed", [target]),
            ("open", [target]),
            ("static", list(like)),
        ):
            measure(bench, rows, {**about, "arm": arm, "setting": setting, "drift": drift})
    judge(bench, rows, key)


def settings_of(network: str, options: argparse.Namespace) -> dict[str, list[list[Any]]]:
    targets = [[t] for t in TARGETS[network]]
    grid = [list(pair) for pair in GRID[network]]
    if options.quick:
        targets = [[DRIFT_TARGET[network]]]
        grid = grid[:1]
    drift = [DRIFT_TARGET[network]]
    closed_targets = targets if drift in targets else [*targets, drift]
    known: dict[str, list[list[Any]]] = {
        "dense": [[]],
        "closed": closed_targets,
        "prior": targets,
        "open": targets,
        "static": grid,
        "gradual": grid,
        "search": targets,
    }
    return {arm: known[arm] for arm in options.arms.split(",")}


def closest(run: Workspace, wanted: float) -> tuple[float, int]:
    """The (keep, bits) of a uniform schedule at 4 bits nearest to so many bytes."""
    costs, network = CostModel(run.structure), run.structure
    pairs = [(round(float(k), 3), 4) for k in np.linspace(0.05, 1.0, 96)]
    sizes = [abs(np.log(costs.cost(network.uniform(*p)).bytes / wanted)) for p in pairs]
    return pairs[int(np.argmin(sizes))]


def judge(bench: Bench, rows: results.Rows, key: str) -> None:
    """Measures the answers on the test split, once."""
    mine = [r for r in rows.rows if r["key"] == key and r["seed"] == bench.seed]
    tested = {row["tested"] for row in mine if "tested" in row}
    for path, drift in answers(mine):
        if path in tested:
            continue
        accuracy = top1(load_artifact(path), bench.test(drift))
        rows.append({"key": key, "seed": bench.seed, "tested": path, "test": accuracy})


def answers(mine: list[dict[str, Any]]) -> list[tuple[str, str | None]]:
    """Artifacts to test: of each arm the densest within the floor (else the most accurate), and
    all of the drift's."""
    trained = [r for r in mine if "arm" in r]
    dense = next(r for r in trained if r["arm"] == "dense" and r["drift"] is None)
    chosen = [r for r in trained if r["drift"] is not None]
    for arm in ARMS:
        rows = [r for r in trained if r["arm"] == arm and r["drift"] is None]
        good = [r for r in rows if r["validation"] >= dense["validation"] - FLOOR / 100]
        if good:
            chosen.append(min(good, key=lambda r: r["bytes"]))
        elif rows:
            chosen.append(max(rows, key=lambda r: r["validation"]))
    return [(r["path"], r["drift"]) for r in chosen]


# --- summary ------------------------------------------------------------------------------------


def summarise(options: argparse.Namespace) -> None:
    figures: dict[str, Any] = {}
    everything: list[dict[str, Any]] = []
    add: Callable[..., None] = functools.partial(_add, figures)
    ratios: list[float] = []
    for network, experiment in EXPERIMENTS.items():
        path = Path("runs") / f"dynamic-{network}.jsonl"
        if not path.exists():
            continue
        key = key_of(workspace(experiment), options)
        rows = [r for r in read_lines(path) if r["key"] == key]
        everything += [{"network": network, **row} for row in rows]
        gains, computes, losses = [], [], []
        seeds = sorted({r["seed"] for r in rows if "tested" in r})
        print(f"\n{network}, seeds {seeds}" if seeds else "", flush=True)
        for seed in seeds:
            mine = [r for r in rows if r["seed"] == seed]
            tests = {r["tested"]: r["test"] for r in mine if "tested" in r}
            chosen = {path for path, _ in answers(mine)}
            by = {
                (r["arm"], r["drift"]): {**r, "test": tests[r["path"]]}
                for r in mine
                if r.get("path") in chosen & tests.keys()
            }
            dense = by["dense", None]
            for arm in ARMS:
                if (arm, None) in by:
                    r = by[arm, None]
                    print(
                        f"{arm:8}{seed:3} {dense['bytes'] / r['bytes']:7.1f}x  test "
                        f"{r['test']:.2%} ({100 * (r['test'] - dense['test']):+.2f})  "
                        f"{r['seconds']:6.0f} s"
                    )
            if ("static", None) in by and ("closed", None) in by:
                density = {
                    a: performance_density(by[a, None]["test"], by[a, None]["bytes"])
                    for a in ("closed", "static")
                }
                gains.append(density["closed"] / density["static"] - 1)
            if ("search", None) in by:
                computes.append(by["closed", None]["seconds"] / by["search", None]["seconds"])
            drifted = []
            for kind in DRIFTS:
                if ("static", kind) in by:
                    lost = {
                        a: 100 * (by["dense", kind]["test"] - by[a, kind]["test"])
                        for a in ("closed", "open", "static")
                    }
                    print(f"drift {kind:10}{seed:3}  points lost: {lost}")
                    drifted.append((lost["closed"], lost["static"]))
            if drifted:
                ours, theirs = np.mean(drifted, axis=0)
                losses.append(float(ours / theirs))
        for name, shares in changed(rows, DRIFT_TARGET.get(network)).items():
            add(f"{name}_{network}", shares, "share of the second round's choices")
        add(f"closed_loop_gain_vs_static_{network}", gains, "density, closed / static - 1")
        add(f"compute_vs_search_{network}", computes, "processor seconds, closed / search")
        add(f"drift_loss_ratio_{network}", losses, "points lost, closed / static, of a seed")
        ratios += losses
    computes = [f["value"] for n, f in figures.items() if n.startswith("compute_vs_search_")]
    add("compute_vs_search", computes, "mean over networks")
    add("drift_loss_ratio", ratios, "points lost, closed / static, over networks and seeds")
    for name, value in figures.items():
        print(f"{name:44}{value['value']:9.2f}  {value['unit']}  (n = {value['n']})")
    if everything:
        print(results.write("dynamic", figures, everything, keep=True))


def changed(rows: list[dict[str, Any]], target: float | None) -> dict[str, list[float]]:
    """How far choices follow the drift, and how far only the order of the images."""
    chosen = {
        (r["seed"], r["drift"]): np.array(r["actions"][len(r["actions"]) // 2 :])
        for r in rows
        if r.get("arm") == "closed" and r["setting"] == [target]
    }
    plain = {seed: actions for (seed, drift), actions in chosen.items() if drift is None}
    drifted = [(seed, actions) for (seed, drift), actions in chosen.items() if drift is not None]
    return {
        "changed_by_drift": [float(np.mean(plain[seed] != a)) for seed, a in drifted],
        "changed_by_seed": [
            float(np.mean(a != b)) for a, b in itertools.combinations(plain.values(), 2)
        ],
    }


def _add(figures: dict[str, Any], name: str, values: list[float], unit: str) -> None:
    if values:
        figures[name] = results.figure(values, unit)


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--networks", default="vgg19,mobilenetv2")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--drifts", default=",".join(DRIFTS))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--evaluations", type=int, default=100)
    parser.add_argument("--policy", default="default", help="default, or the folder of another")
    parser.add_argument("--summary", action="store_true", help="of what is measured; no more")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.evaluations, options.seeds = 120, 12, "0"
        options.drifts = "noise"
    for seed in () if options.summary else options.seeds.split(","):
        for network in options.networks.split(","):
            measure_all(network, int(seed), options)
    summarise(options)


if __name__ == "__main__":
    main()
