"""Compression during one training run, against rules that do not look, and against search first.

    uv run python -m benchmarks.dynamic                           # hours; goes on where it stopped
    uv run python -m benchmarks.dynamic --networks mobilenetv2    # two networks: two processes
    uv run python -m benchmarks.dynamic --quick                   # one setting an arm, few steps

Fashion-MNIST. Every arm begins at the same weights after one epoch of dense training and takes the
same `--steps` of 64 images under one cycle of the learning rate; `dense` takes them uncompressed.

closed   `DynamicCompressor` with the policy (`--policy`; without one, the prior on live estimates)
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
mean loss of `closed` / of `static`.

Every training is a line of runs/dynamic-NETWORK.jsonl as soon as it is done.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import results
from benchmarks.drifts import DRIFTS, drifted
from benchmarks.networks import EXPERIMENTS, bundle, workspace
from rlcompress.core.artifact import load_artifact
from rlcompress.core.files import read_lines
from rlcompress.core.fitted import fitted_network
from rlcompress.core.pareto import archive_front
from rlcompress.core.quant import float_weight
from rlcompress.core.schedule import Schedule, performance_density
from rlcompress.core.squeeze import Pace
from rlcompress.core.ticket import Task, write_network
from rlcompress.core.train import Recipe, top1
from rlcompress.core.train import train as train_plain
from rlcompress.core.training import Images, Trainer, Training
from rlcompress.searchers import Settings, find
from rlcompress.searchers.base import in_process
from rlcompress.stages.workspace import Workspace

FLOOR = 1.0
LR, BATCH = 0.05, 64
DRIFT_AT = 1 / 3
TARGETS = {"vgg19": (20.0, 40.0, 60.0, 80.0), "mobilenetv2": (8.0, 12.0, 16.0, 24.0)}
#: (keep, bits) of the static and the gradual rule.
GRID = {
    "vgg19": ((1.0, 4), (0.85, 4), (0.7, 4), (0.55, 4), (0.55, 3), (0.4, 4), (0.4, 3), (0.3, 4)),
    "mobilenetv2": ((1.0, 6), (0.85, 6), (0.85, 4), (0.7, 6), (0.7, 4), (0.55, 6)),
}
#: The size at which drift is looked at.
DRIFT_TARGET = {"vgg19": 40.0, "mobilenetv2": 12.0}
ARMS = ("dense", "closed", "open", "static", "gradual", "search")


@dataclass
class Bench:
    """One network and one seed: everything that the arms share."""

    network: str
    run: Workspace
    seed: int
    options: argparse.Namespace

    def training(self, drift: str | None = None) -> Training:
        run, data = self.run, self.run.data
        layers = len(run.structure.layers)
        pace = pace_of(self.options.steps, layers)
        later = None
        held, _, _ = data.validation_parts(2000, 0, self.seed)
        if drift is not None:
            later = Images.of(drifted(data.train, drift, self.seed))
            held = drifted(held, drift, self.seed)
        return Training(
            run.ref,
            run.structure,
            {n: t.numpy() for n, t in run.network("rewind").state_dict().items()},
            Images.of(data.train),
            Images.of(held),
            pace,
            final_steps=self.options.steps - pace.steps(layers),
            batch_size=BATCH,
            lr=LR,
            seed=self.seed,
            later=later,
            drift_at=DRIFT_AT,
        )

    def test(self, drift: str | None) -> Any:
        return self.run.data.test if drift is None else drifted(self.run.data.test, drift, 1)


def pace_of(steps: int, layers: int) -> Pace:
    """Two rounds over the layers in the first six tenths of the steps."""
    watch = min(30, max(2, steps // 25))
    warmup = 2 * watch + 1
    recovery = max(1, (6 * steps // 10 - warmup) // (2 * layers))
    return Pace(warmup, recovery, 2, watch)


# --- arms ---------------------------------------------------------------------------------------


def closed(trainer: Trainer, target: float, policy: Any, actions: list[int] | None = None) -> None:
    """One training run; `actions` gets what was chosen."""
    compressor = trainer.compressor
    compressor.policy = policy
    begin(trainer, target)
    while True:
        action = compressor.choose()
        if actions is not None:
            actions.append(action)
        compressor.decide(action)
        if not trainer.advance():
            return


def begin(trainer: Trainer, target: float) -> None:
    trainer.begin(target, trainer.training.seed)


def opened(trainer: Trainer, target: float, actions: list[int]) -> None:
    begin(trainer, target)
    for action in actions:
        trainer.compressor.decide(action)
        trainer.advance()


def static(trainer: Trainer, keep: float, bits: int) -> None:
    begin(trainer, 1.0)
    trainer.compressor.apply(trainer.network.uniform(keep, bits))
    trainer.compressor.freeze()
    trainer.advance()


def gradual(trainer: Trainer, keep: float, bits: int) -> None:
    begin(trainer, 1.0)
    pace, layers = trainer.training.pace, len(trainer.network.layers)
    trainer.compressor.freeze()
    last = pace.steps(layers)
    while trainer.step < trainer.training.steps:
        done = (trainer.step - pace.warmup) / (last - pace.warmup)
        if done <= 1 and (trainer.step - pace.warmup) % pace.recovery_steps == 0:
            now = keep + (1 - keep) * (1 - min(1.0, done)) ** 3
            schedule = trainer.network.uniform(now, 32 if done < 1 else bits)
            trainer.compressor.apply(schedule, by_magnitude(trainer, schedule))
        trainer.minibatch()


def by_magnitude(trainer: Trainer, schedule: Schedule) -> dict[str, np.ndarray]:
    """Channels whose filters have the largest L1 norm."""
    network, kept = trainer.network, {}
    modules = dict(trainer.model.named_modules())
    counts = network.counts(schedule)
    for name, group in network.groups.items():
        norm = np.zeros(group.channels)
        for layer in network.layers.values():
            for link in layer.outputs:
                if link.group == name:
                    size = float_weight(modules[layer.name]).abs().flatten(1).sum(1).cpu().numpy()
                    np.add.at(norm, link.root, size[link.index])
        mask = np.zeros(group.channels, dtype=bool)
        mask[np.argsort(-norm, kind="stable")[: counts[name]]] = True
        kept[name] = mask
    return kept


def searched(bench: Bench, target: float, path: Path) -> dict[str, Any]:
    """Search first, then retrain; writes the artifact."""
    run, options, half = bench.run, bench.options, bench.options.steps // 2
    data = run.data.train.sample(2 * half * BATCH, bench.seed)
    model = run.network("rewind").to(memory_format=torch.channels_last)
    first = data.take(torch.arange(half * BATCH) % len(data))
    train_plain(model, first, Recipe(1, BATCH, LR), seed=bench.seed)
    known = bundle(run, seed=bench.seed, model=model)
    problem = known.problem()
    settings = Settings(
        options.evaluations, (target, target * 1.05), bench.seed, sensitivity="refitted"
    )
    records = list(find("knapsack")(problem, settings, [], in_process(problem)))
    limit = problem.dense.bytes / target
    small = [r for r in records if r.measurement.bytes <= limit]
    best = min(archive_front(small), key=lambda r: r.measurement.kl)
    start = fitted_network(model, problem.evaluator, best.schedule)
    task = Task(start, run.structure, best.schedule)
    tuned = task.prepared()
    rest = data.take(torch.arange(half * BATCH, 2 * half * BATCH) % len(data))
    train_plain(tuned, rest, Recipe(1, BATCH, LR / 5), seed=bench.seed)
    write_network(path, task.result_of(tuned), run.structure, run.ref, best.schedule)
    return {"evaluations": len(records)}


# --- one line -----------------------------------------------------------------------------------


def measure(bench: Bench, rows: results.Rows, about: dict[str, Any], policy: Any) -> None:
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
        elif arm == "closed":
            actions: list[int] = []
            closed(trainer, setting[0], policy, actions)
            more = {"actions": actions}
        elif arm == "open":
            opened(trainer, setting[0], actions_of(rows.rows, bench, setting))
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


def actions_of(rows: list[dict[str, Any]], bench: Bench, setting: list[Any]) -> list[int]:
    """What `closed` chose on the first of the seeds, without drift."""
    return next(
        row["actions"]
        for row in rows
        if row["arm"] == "closed"
        and row["drift"] is None
        and row["setting"] == setting
        and row["key"] == key_of(bench.options)
    )


def key_of(options: argparse.Namespace) -> str:
    return f"{options.steps} {options.evaluations} {options.policy or 'prior'}"


def measure_all(network: str, seed: int, options: argparse.Namespace, policy: Any) -> None:
    run = workspace(EXPERIMENTS[network], f"search.target=[4,{max(TARGETS[network]) + 1}]")
    torch.set_num_threads(1)
    bench = Bench(network, run, seed, options)
    rows = results.Rows(Path("runs") / f"dynamic-{network}.jsonl")
    about = {"key": key_of(options), "seed": seed}
    for arm, settings in settings_of(network, options).items():
        for setting in settings:
            measure(bench, rows, {**about, "arm": arm, "setting": setting, "drift": None}, policy)
    target = DRIFT_TARGET[network]
    dense_bytes = next(r["bytes"] for r in rows.rows if r["arm"] == "dense")
    like = closest(run, dense_bytes / target)
    for drift in options.drifts.split(",") if options.drifts else ():
        for arm, setting in (
            ("dense", []),
            ("closed", [target]),
            ("open", [target]),
            ("static", list(like)),
        ):
            measure(bench, rows, {**about, "arm": arm, "setting": setting, "drift": drift}, policy)
    judge(bench, rows)


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
        "open": targets,
        "static": grid,
        "gradual": grid,
        "search": targets[1:3] if len(targets) > 2 else targets,
    }
    return {arm: known[arm] for arm in options.arms.split(",")}


def closest(run: Workspace, wanted: float) -> tuple[float, int]:
    """The (keep, bits) of a uniform schedule at 4 bits nearest to so many bytes."""
    from rlcompress.core.cost import CostModel

    costs, network = CostModel(run.structure), run.structure
    pairs = [(round(float(k), 3), 4) for k in np.linspace(0.05, 1.0, 96)]
    sizes = [abs(np.log(costs.cost(network.uniform(*p)).bytes / wanted)) for p in pairs]
    return pairs[int(np.argmin(sizes))]


def judge(bench: Bench, rows: results.Rows) -> None:
    """Measures the answers on the test split, once."""
    mine = [r for r in rows.rows if r["key"] == key_of(bench.options) and r["seed"] == bench.seed]
    tested = {row["tested"] for row in mine if "tested" in row}
    for path, drift in answers(mine):
        if path in tested:
            continue
        accuracy = top1(load_artifact(path), bench.test(drift))
        rows.append(
            {"key": key_of(bench.options), "seed": bench.seed, "tested": path, "test": accuracy}
        )


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
    for network in EXPERIMENTS:
        rows = read_lines(Path("runs") / f"dynamic-{network}.jsonl")
        rows = [r for r in rows if r["key"] == key_of(options)]
        everything += rows
        gains, computes, drift_losses = [], [], []
        seeds = sorted({r["seed"] for r in rows if "tested" in r})
        print(f"\n{network}, seeds {seeds}" if seeds else "", flush=True)
        for seed in seeds:
            mine = [r for r in rows if r["seed"] == seed]
            tests = {r["tested"]: r["test"] for r in mine if "tested" in r}
            by = {
                (r["arm"], r["drift"]): {**r, "test": tests[r["path"]]}
                for r in mine
                if r.get("path") in tests
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
            for kind in DRIFTS:
                if ("static", kind) in by:
                    lost = {
                        a: 100 * (by["dense", kind]["test"] - by[a, kind]["test"])
                        for a in ("closed", "open", "static")
                    }
                    print(f"drift {kind:10}{seed:3}  points lost: {lost}")
                    drift_losses.append((lost["closed"], lost["static"]))
        add(f"closed_loop_gain_vs_static_{network}", gains, "density, closed / static - 1")
        add(f"compute_vs_search_{network}", computes, "processor seconds, closed / search")
        if drift_losses:
            ours, theirs = np.mean(drift_losses, axis=0)
            ratios.append(float(ours / theirs))
            add(f"drift_loss_ratio_{network}", [float(ours / theirs)], "points lost, closed/static")
    computes = [f["value"] for n, f in figures.items() if n.startswith("compute_vs_search_")]
    add("compute_vs_search", computes, "mean over networks")
    add("drift_loss_ratio", ratios, "mean over networks")
    for name, value in figures.items():
        print(f"{name:44}{value['value']:9.2f}  {value['unit']}  (n = {value['n']})")
    if everything:
        print(results.write("dynamic", figures, everything))


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
    parser.add_argument("--policy", default="", help="folder of a policy")
    parser.add_argument("--summary", action="store_true", help="of what is measured; no more")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.evaluations, options.seeds = 120, 12, "0"
        options.drifts = "noise"
    policy = None
    if options.policy:
        from rlcompress.core.observation import OBSERVATION_VERSION
        from rlcompress.core.policy import load_policy

        policy, _ = load_policy(Path(options.policy), OBSERVATION_VERSION)
    for seed in () if options.summary else options.seeds.split(","):
        for network in options.networks.split(","):
            measure_all(network, int(seed), options, policy)
    summarise(options)


if __name__ == "__main__":
    main()
