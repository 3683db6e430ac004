"""A policy on networks of a family that it never saw, against searches of that network alone.

    uv run python -m benchmarks.transfer                 # hours; goes on if stopped
    uv run python -m benchmarks.transfer --networks resnet18 --seeds 0 --no-rivals
    uv run python -m benchmarks.transfer --summary       # of what is measured; no more
    uv run python -m benchmarks.transfer --quick         # a zoo of four, ResNet-18, zero-shot

For each network (`benchmarks.networks`) a policy learns on the zoo of experiments.yaml without its
family (`benchmarks.policies`), once for each seed, and plays: 10 evaluations are zero-shot
(one episode a size), of 25 the first 24 are and the last refines. `transfer` plays the prior that
learned from measured schedules, `played` the policy that PPO trained on it over the zoo (512
episodes). The rivals search that network:
`knapsack` on estimates (10 evaluations, one a size), on measured and on refitted sensitivities
(100), `local` on estimates (25) and on refitted ones (500), `evolution` and `ppo` from scratch
(100). All have one problem (images of seed 1), and are judged as in `benchmarks.searchers`:
`checked` is the share of the rectangle of (log size ratio, accuracy) that the front covers, its
schedules fitted anew on other images and measured on the validation images held back.
`retrained` is the same after training (`benchmarks.retrained`).

zero_shot_vs_estimated_knapsack   checked volume of transfer at 10 / knapsack on estimates - 1
zero_shot_vs_local500             ... at 10 / local at 500;  at25_vs_local500  ... at 25
slope_with_networks               agreement of learned losses with measured KLs on networks of a
                                  family that was left out, per doubling of the training networks
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import policies, results, retrained
from benchmarks.fronts import judge
from benchmarks.networks import EXPERIMENTS, workspace
from benchmarks.searchers import key_of, measure, path_of
from rlcompress.core.files import read_lines
from rlcompress.core.learned import COLUMNS, Lessons, agreement, fit

PROBLEM_SEED = 1
BUDGETS = (10, 25)
#: Searcher, evaluations, sensitivity.
RIVALS = (
    ("knapsack", 10, "estimated"),
    ("knapsack", 100, "refitted"),
    ("local", 25, "estimated"),
    ("knapsack", 100, "measured"),
    ("evolution", 100, "estimated"),
    ("ppo", 100, "estimated"),
    ("local", 500, "refitted"),
)
#: Of these the fronts are retrained too, beside the first policy's.
RETRAINED = (RIVALS[0], RIVALS[1], RIVALS[-1])
COUNTS = (1, 2, 4, 8)
#: Schedules measured of each network; fewer than the first tell nothing within a size.
SAMPLES = (5, 10, 20)
#: Columns of `rlcompress.core.learned` that the ablation leaves out together.
GROUPS = {
    "nothing": (),
    "the layer's shape": ("log_kernel", "owners", "readers"),
    "its place and size": ("depth", "log_share"),
    "the choice": ("ratio", "bits"),
    "the estimates": ("loss", "plain_loss", "output_kl"),
    "the rank": ("rank",),
}


def scores(network: str) -> dict[tuple[str, int, str], float]:
    """(searcher, evaluations, sensitivity) -> checked volume of what is measured."""
    run = workspace(EXPERIMENTS[network])
    every = read_lines(path_of(network, PROBLEM_SEED))
    found = {}
    for kind in ("estimated", "measured", "refitted"):
        key = key_of(run, kind)
        rows = [row for row in every if row["key"] == key]
        if any(row["kind"] == "done" for row in rows):
            for row in judge(rows, run.experiment.search.target):
                found[row["searcher"], row["budget"], kind] = row["checked"]
    return found


def blind(known: Lessons, columns: Sequence[str]) -> Lessons:
    """The same network, its `columns` all zero."""
    seen = torch.tensor([float(name not in columns) for name in COLUMNS])
    return replace(
        known,
        group_columns=known.group_columns * seen,
        layer_columns=known.layer_columns * seen,
    )


def held_out(known: Mapping[str, Lessons]) -> Iterator[tuple[list[str], list[str]]]:
    """Names to learn on and names to judge on: each family once."""
    for family in sorted({policies.family_of(name) for name in known}):
        yield (
            [name for name in known if policies.family_of(name) != family],
            [name for name in known if policies.family_of(name) == family],
        )


def ablation(seeds: list[int]) -> list[dict[str, Any]]:
    """Agreement on networks of a family left out, where groups of columns are hidden."""
    known = policies.lessons(policies.zoo())
    rows = []
    for group, columns in GROUPS.items():
        seen = {name: blind(lesson, columns) for name, lesson in known.items()}
        for seed in seeds:
            for rest, judged in held_out(known):
                learned = fit([seen[name] for name in rest], seed=seed)
                rows += [
                    {
                        "kind": "ablation",
                        "seed": seed,
                        "without": group,
                        "network": name,
                        "agreement": agreement(seen[name], learned),
                    }
                    for name in judged
                ]
    return rows


def print_ablation(rows: list[dict[str, Any]]) -> None:
    print("\nhidden                agreement on families left out (sd over policy seeds)")
    for group in GROUPS:
        mine = [row for row in rows if row["without"] == group]
        of_seeds = [
            statistics.mean(row["agreement"] for row in mine if row["seed"] == seed)
            for seed in sorted({row["seed"] for row in mine})
        ]
        sd = f" ± {statistics.stdev(of_seeds):.3f}" if len(of_seeds) > 1 else ""
        print(f"{group:20}{statistics.mean(of_seeds):8.3f}{sd}   (n = {len(of_seeds)})")


def scale_curve(seeds: list[int]) -> list[dict[str, Any]]:
    """Agreement on each network of the zoo whose family the losses did not learn on, against how
    many networks they learned on, and against how many schedules of each."""
    fewer = policies.lessons_by_samples(policies.zoo(), (None, *SAMPLES))
    known = fewer.pop(None)
    rows: list[dict[str, Any]] = []

    def add(taught: Sequence[Lessons], judged: Sequence[str], **about: Any) -> None:
        learned = fit(taught, seed=about["seed"])
        rows.extend(
            {
                "kind": "scale",
                **about,
                "trained_on": len(taught),
                "network": name,
                "agreement": agreement(known[name], learned),
                "estimated": agreement(known[name], None),
            }
            for name in judged
        )

    for seed in seeds:
        for rest, judged in held_out(known):
            order = np.random.default_rng([seed, len(rest)]).permutation(rest)
            for count in (*COUNTS, len(rest)):
                named = "all" if count == len(rest) else count
                taught = [known[name] for name in order[:count]]
                add(taught, judged, seed=seed, networks=named, samples="all")
            for samples, lessons in fewer.items():
                taught = [lessons[name] for name in rest]
                add(taught, judged, seed=seed, networks="all", samples=samples)
    return rows


def print_scale(rows: list[dict[str, Any]]) -> dict[str, Any]:
    print("\nlearned on                      agreement on families left out")
    estimated = statistics.mean(row["estimated"] for row in rows)
    print(f"{'nothing (estimates)':32}{estimated:8.3f}")
    steps = [*((n, "all") for n in COUNTS), *(("all", n) for n in SAMPLES), ("all", "all")]
    for networks, samples in steps:
        mine = [
            row["agreement"]
            for row in rows
            if (row["networks"], row["samples"]) == (networks, samples)
        ]
        text = f"{networks} networks, {samples} schedules"
        print(f"{text:32}{statistics.mean(mine):8.3f}   (n = {len(mine)})")
    slopes = []
    for seed in sorted({row["seed"] for row in rows}):
        mine = [row for row in rows if row["seed"] == seed and row["samples"] == "all"]
        doublings = np.log2([row["trained_on"] for row in mine])
        slopes.append(float(np.polyfit(doublings, [row["agreement"] for row in mine], 1)[0]))
    return {"slope_with_networks": results.figure(slopes, "correlation a doubling")}


def print_cost() -> None:
    """What the policies learned on, and when a policy has paid for itself."""
    evaluations = [
        len(about["networks"]) * policies.zoo().experiment.zoo.samples
        for path in sorted((Path("runs") / "transfer").glob("*/done"))  # not those in training
        for about in [json.loads(path.with_name("policy.json").read_text())]
    ]
    if evaluations:
        mean, saved = statistics.mean(evaluations), RIVALS[1][1] // 2
        print(
            f"\na policy learned on {mean:.0f} evaluations; refitted sensitivities take {saved} a"
        )
        print(f"network, so where it is as good it has paid after {mean / saved:.0f} networks")


def summarise(
    seeds: list[int],
    scale: list[dict[str, Any]],
    ablated: list[dict[str, Any]],
    ours_name: str = "transfer",
) -> None:
    figures: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    row: dict[str, Any]
    ratios: dict[str, list[float]] = {}
    print(f"{'network':14}{'searcher':14}{'evaluations':>12}{'sensitivity':>13}", end="")
    print(f"{'checked':>9}{'retrained':>11}")
    for network in EXPERIMENTS:
        if not path_of(network, PROBLEM_SEED).exists():
            continue
        found = scores(network)
        after = retrained.volumes(network, PROBLEM_SEED, found)
        for (name, count, kind), value in sorted(found.items()):
            if name.startswith((ours_name, "played")) or (name, count, kind) in RIVALS:
                trained = after.get((name, count, kind))
                text = "" if trained is None else f"{trained:11.3f}"
                print(f"{network:14}{name:14}{count:12}{kind:>13}{value:9.3f}{text}")
                row = {"network": network, "searcher": name, "evaluations": count}
                rows.append({**row, "sensitivity": kind, "checked": value, "retrained": trained})
        for figure, count, rival in (
            ("zero_shot_vs_estimated_knapsack", 10, RIVALS[0]),
            ("zero_shot_vs_local500", 10, RIVALS[-1]),
            ("at25_vs_local500", 25, RIVALS[-1]),
        ):
            for seed in seeds:
                ours = found.get((f"{ours_name}-{seed}", count, "estimated"))
                if ours is not None and found.get(rival):
                    ratio = ours / found[rival] - (1 if figure.endswith("knapsack") else 0)
                    ratios.setdefault(figure, []).append(ratio)
                    ratios.setdefault(f"{figure}_{network}", []).append(ratio)
    print_cost()
    for name, values in ratios.items():
        figures[name] = results.figure(values, "relative checked volume")
    if scale:
        figures |= print_scale(scale)
    if ablated:
        print_ablation(ablated)
    for name, value in figures.items():
        sd = f" ± {value['sd']:.3f}" if value["sd"] is not None else ""
        print(f"{name:48}{value['value']:8.3f}{sd}  (n = {value['n']})")
    print(results.write("transfer", figures, [*rows, *scale, *ablated], keep=True))


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--networks", default=",".join(EXPERIMENTS))
    parser.add_argument("--seeds", default="0,1,2", help="of the policy")
    parser.add_argument("--fit-seeds", default="0,1,2", help="of the scale curve and ablation")
    parser.add_argument("--played", action="store_true", help="and after PPO over the zoo")
    parser.add_argument("--no-rivals", action="store_true")
    parser.add_argument("--no-retraining", action="store_true")
    parser.add_argument("--no-scale", action="store_true", help="without the scale curve")
    parser.add_argument("--no-ablation", action="store_true", help="of the columns")
    parser.add_argument("--summary", action="store_true", help="of what is measured; no more")
    options = parser.parse_args()
    torch.set_num_threads(1)
    quick, most = options.quick, 1 if options.quick else None
    budgets, rivals = BUDGETS[:most], () if options.no_rivals else RIVALS[:most]
    if quick:
        options.networks, options.seeds = "resnet18", "0"
        options.no_retraining = options.no_scale = options.no_ablation = True
    kind_of_policy = "quick" if quick else "transfer"
    seeds = [int(seed) for seed in options.seeds.split(",")]
    for network in [] if options.summary else options.networks.split(","):
        folder = Path("runs") / f"searchers-{network}-{PROBLEM_SEED}"
        names = []
        for seed in seeds:
            begun = time.monotonic()
            policies.held_out_policy(network, seed, quick=quick)
            print(f"{network}: policy {seed} in {time.monotonic() - begun:.0f} s", flush=True)
            names.append(f"{kind_of_policy}-{seed}")
        if options.played:
            names += [f"played-{seed}" for seed in seeds[:1]]
        for budget in budgets:
            measure(network, PROBLEM_SEED, names, budget, "estimated", 0, folder)
        for name, budget, kind in rivals:
            measure(network, PROBLEM_SEED, [name], budget, kind, 0, folder)
        if not options.no_retraining:
            mine = [(names[0], budget, "estimated") for budget in BUDGETS]
            retrained.measure(network, PROBLEM_SEED, [*mine, *RETRAINED])
    fit_seeds = [int(seed) for seed in options.fit_seeds.split(",")]
    summarise(
        seeds,
        [] if options.no_scale else scale_curve(fit_seeds),
        [] if options.no_ablation else ablation(fit_seeds),
        kind_of_policy,
    )


if __name__ == "__main__":
    main()
