"""What a policy's prior is worth on networks that it did not learn on: every network of the zoo.

    uv run python -m benchmarks.held_out             # half an hour; goes on if stopped
    uv run python -m benchmarks.held_out --quick     # one seed, three networks

For each network of experiments.yaml's zoo (18, of five families) losses are learned from the
measured schedules of all networks but its family's, once a seed. The knapsack on them and the
knapsack on the estimates propose one schedule for each of six sizes of the zoo's range; both are
measured by the network's own evaluator (reconstruction, held-out images). No other evaluation of
the network is used.

decades   log10 of the KL on learned losses over the KL on estimates, mean over the sizes: below
          zero the policy is better. Mean over seeds, then mean and sd over networks
won       share of the networks where it is below zero
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import results
from benchmarks.policies import family_of, lessons, zoo
from rlcompress.core.files import read_lines
from rlcompress.core.learned import KL_FLOOR, fit
from rlcompress.core.prior import Prior
from rlcompress.stages.workspace import Workspace
from rlcompress.stages.zoo import members, target_of

ROWS = Path("runs") / "held-out.jsonl"
SIZES = 6


def kls(run: Workspace, prior: Prior) -> list[float]:
    """KL of what a prior proposes for each size."""
    problem = run.problem
    return [
        problem.evaluator.evaluate(prior.schedule(problem.dense.bytes / ratio)).kl
        for ratio in np.geomspace(*target_of(run), SIZES)
    ]


def key_of(run: Workspace) -> str:
    return f"{run.inputs.samples} {run.experiment.zoo.target}"


def measure(names: list[str], seeds: list[int]) -> None:
    rows, known = results.Rows(ROWS), lessons(zoo())
    done = {(row.get("key"), row["network"], row["seed"]) for row in rows.rows}
    learned = {
        (family, seed): fit([known[n] for n in known if family_of(n) != family], seed=seed)
        for family in sorted({family_of(name) for name in names})
        for seed in seeds
    }
    for name, run in members(zoo()).items():
        if name not in names:
            continue
        key = key_of(run)
        missing = [seed for seed in seeds if (key, name, seed) not in done]
        if not missing:
            continue
        problem = run.problem
        evaluator = problem.evaluator
        estimated = kls(run, problem.prior)
        for seed in missing:
            losses = learned[family_of(name), seed].corrected(
                problem.network, evaluator.costs, evaluator.estimates
            )
            row = {"key": key, "network": name, "seed": seed, "estimated": estimated}
            rows.append({**row, "learned": kls(run, problem.with_losses(losses).prior)})
        print(f"{name}: seeds {missing}", flush=True)


def decades(row: dict[str, Any]) -> float:
    ours, theirs = (np.log10(np.maximum(row[k], KL_FLOOR)) for k in ("learned", "estimated"))
    return float((ours - theirs).mean())


def summarise() -> None:
    keys = {name: key_of(run) for name, run in members(zoo()).items()}
    rows = [row for row in read_lines(ROWS) if row.get("key") == keys.get(row["network"], "")]
    names = list(dict.fromkeys(row["network"] for row in rows))
    means = {
        name: statistics.mean(decades(row) for row in rows if row["network"] == name)
        for name in names
    }
    print(f"{'network, its family left out':32}{'decades of KL':>14}")
    for name, value in means.items():
        print(f"{name:32}{value:+14.3f}")
    values = list(means.values())
    figures = {
        "held_out_decades": results.figure(values, "log10 KL, learned / estimated; of networks"),
        "held_out_won": results.figure([float(v < 0) for v in values], "share of networks"),
    }
    seeds = len({row["seed"] for row in rows})
    print(
        f"mean {figures['held_out_decades']['value']:+.3f}, standard error "
        f"{np.std(values, ddof=1) / len(values) ** 0.5:.3f} (n = {len(values)} networks, "
        f"{seeds} seeds), better on {figures['held_out_won']['value']:.0%}"
    )
    print(results.write("held_out", figures, rows))


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", default="0,1,2", help="of the learned losses")
    parser.add_argument("--summary", action="store_true", help="of what is measured; no more")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names, seeds = list(members(zoo())), [int(seed) for seed in options.seeds.split(",")]
    if options.quick:
        names, seeds = names[:3], seeds[:1]
    if not options.summary:
        measure(names, seeds)
    summarise()


if __name__ == "__main__":
    main()
