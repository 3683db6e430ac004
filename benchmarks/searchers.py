"""Searchers with equally many evaluations, on the same problems, over seeds.

    uv run python -m benchmarks.searchers                              # hours; goes on if stopped
    uv run python -m benchmarks.searchers --networks mobilenetv2       # two networks: two processes
    uv run python -m benchmarks.searchers --searchers local --evaluations 300 --networks vgg19
    uv run python -m benchmarks.searchers --quick                      # 12 evaluations, 2 seeds

A seed draws the calibration images (256 fitted, 256 scored) and is the search's own; all searchers
of a seed share estimates and evaluator. The dense networks are those of `benchmarks.networks`.

volume    hypervolume of (log size ratio, accuracy) above the low end of the target range and 10
          points below dense, as a share of the rectangle up to its high end and dense accuracy;
          `searched` on the images that scored the search, `checked` on others: the schedule of
          least KL at each of 12 sizes, even in their logarithm, if it is within 10 points of dense
          on the search's images, fitted anew on 1,024 other training images and measured on the
          validation images held back
ratio     dense bytes / least bytes within 1 point of dense, `checked`

`--score`: what the searches go by, and whose front is checked. Figures of another than `kl` end
with its name.

`--after`: a search that goes on with more evaluations keeps the probes that it had. The knapsack
does nothing else than to probe and to solve: with another number it is another search.

`ppo100_minus_best100_NETWORK`: relative difference of the checked volume, paired by seed, between
ppo and whichever other searcher has the best mean; the same for other numbers of evaluations.

Every evaluation is a line of runs/searchers-NETWORK-SEED.jsonl as soon as it is measured. What one
search of a seed has measured, probes above all, is not measured again for another that asks for it:
it counts as its evaluation all the same.
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.fronts import (
    SEARCHED,
    WORTH,
    figures_of,
    judge,
    own_records,
    picture,
    worth_checking,
)
from benchmarks.networks import EXPERIMENTS, bundle, held_back, identity, workspace
from rlcompress.core.files import read_lines
from rlcompress.core.policy import PRIOR
from rlcompress.core.problem import Bundle, Problem
from rlcompress.core.schedule import Record, Schedule
from rlcompress.core.ticket import Task, fitted_network
from rlcompress.core.train import top1
from rlcompress.searchers import Measure, Settings, find
from rlcompress.stages.policies import agent_of
from rlcompress.stages.workspace import Workspace

#: Of PPO over the zoo, for `played-N`.
EPISODES = 512
IMAGES = 256
CHECK_FIT_IMAGES = 1024
#: Added to the seed that draws the images of the fresh fit.
CHECK_SEED = 10_000
SCORES = ("kl", "unexplained")
SENSITIVITY = "refitted"
#: Evaluations of the fronts in the picture.
PICTURED = 100
#: Searchers whose first evaluations are the probes of `--sensitivity`.
PROBING = ("knapsack", "local", "ppo")


def path_of(network: str, seed: int) -> Path:
    return Path("runs") / f"searchers-{network}-{seed}.jsonl"


def key_of(run: Workspace, sensitivity: str, score: str = "kl") -> str:
    low, high = run.experiment.search.target
    # What is estimated has changed since the first rows were measured.
    kind = {"estimated": "solved"}.get(sensitivity, sensitivity)
    by = "" if score == "kl" else f" {score}"
    return f"{identity(run)} {IMAGES} {low:g}-{high:g} {kind}{by}"


def short(run: Workspace) -> str:
    """The network's name in `EXPERIMENTS`."""
    return next(name for name, experiment in EXPERIMENTS.items() if experiment == run.name)


def records_of(
    name: str,
    run: Workspace,
    known: Bundle,
    problem: Problem,
    settings: Settings,
    history: Sequence[Record],
    measure: Measure,
    runners: int,
    folder: Path,
) -> Iterator[Record]:
    """What a searcher measures behind its `history`. `transfer-N` plays the policy of seed N that
    never saw the network's family, `played-N` the same after `EPISODES` of PPO over the zoo,
    `quick-N` one that learned on four small networks, `ppo-N` begins with the first."""
    base, _, number = name.partition("-")
    agent = PRIOR
    if number:
        from benchmarks.policies import held_out_policy

        episodes = EPISODES if base == "played" else 0
        quick = base == "quick"
        agent = agent_of(held_out_policy(short(run), int(number), episodes, quick=quick))
    spec = run.experiment.ppo.model_copy(update={"num_env_runners": runners})
    if name == "untrained":
        from rlcompress.rl import untrained

        return untrained.search(problem, settings, history, ppo=spec, begin=agent)
    if base in ("transfer", "played", "quick"):
        from rlcompress.rl import transfer

        return transfer.search(problem, settings, history, measure, ppo=spec, agent=agent)
    if base == "ppo":
        from rlcompress.rl import ppo

        return ppo.search(known, problem, settings, history, ppo=spec, folder=folder, begin=agent)
    return find(name)(problem, settings, history, measure)


def beginning(
    rows: Sequence[dict[str, Any]], key: str, name: str, budget: int, after: int
) -> list[Record]:
    """What a search has measured so far, or begins with: what the same one has measured with the
    budget `after` that it goes on from, or with another that changes nothing in it; the probes
    that another has measured."""
    same = [row for row in rows if row["key"] == key and row["kind"] == "record"]
    if own := own_records(same, name, budget) or own_records(same, name, after):
        return own
    if name == "untrained":
        budgets = {row["budget"] for row in same}
        return max((own_records(same, name, b) for b in budgets), key=len, default=[])[:budget]
    if name not in PROBING:
        return []
    kind = key.split()[3]
    probes: list[Record] = []
    searches = {
        (row["key"], row["searcher"], row["budget"])
        for row in rows
        if row["kind"] == "record" and row["key"].split()[3] == kind
    }
    for other, searcher, number in searches:
        if searcher in PROBING:
            its = [row for row in rows if row["key"] == other]
            asked = [r for r in own_records(its, searcher, number) if r.target is None]
            probes = max(probes, asked, key=len)
    return [replace(record, searcher=name) for record in probes[: budget // 2]]


def remembering(problem: Problem, rows: Sequence[dict[str, Any]]) -> Measure:
    """Measures what is not in `rows`."""
    records = (
        Record.from_json(json.dumps(row["record"])) for row in rows if row["kind"] == "record"
    )
    known = {record.schedule: record.measurement for record in records}
    return lambda schedules: (
        known.get(schedule) or problem.evaluator.evaluate(schedule) for schedule in schedules
    )


@dataclass
class Problems:
    """One seed's problem, built when something is to be measured."""

    run: Workspace
    seed: int
    score: str = "kl"

    def __post_init__(self) -> None:
        self.known = bundle(
            self.run, seed=self.seed, fit_images=IMAGES, score_images=IMAGES, score=self.score
        )
        self.problem = self.known.problem()
        self.model = self.known.model().to(memory_format=torch.channels_last)
        self.held_back = held_back(self.run, seed=self.seed, score_images=IMAGES)

    def fresh(self) -> Problem:
        """The same choices, channels and clips on images that no search has seen."""
        fit = self.run.data.train.sample(CHECK_FIT_IMAGES, CHECK_SEED + self.seed)
        few = replace(self.known, score_NCHW=self.known.score_NCHW[:16], cache_bytes=0)
        assert self.known.labels_N is not None
        few = replace(few, labels_N=self.known.labels_N[:16])
        return replace(few, fit_NCHW=fit.images().numpy()).problem()

    def check(self, fresh: Problem, schedule: Schedule) -> float:
        """Accuracy (0-1) on the validation images held back."""
        small = fitted_network(self.model, fresh.evaluator, schedule)
        return top1(Task(small, fresh.network).prepared(), self.held_back)


def measure(
    network: str,
    seed: int,
    names: Sequence[str],
    budget: int,
    sensitivity: str,
    runners: int,
    folder: Path,
    score: str = "kl",
    after: int = 0,
) -> None:
    """Searches and checks what is missing of one seed."""
    run = workspace(EXPERIMENTS[network])
    torch.set_num_threads(1)
    key, target = key_of(run, sensitivity, score), run.experiment.search.target
    rows = results.Rows(path_of(network, seed))

    def mine() -> list[dict[str, Any]]:
        return [row for row in rows.rows if row["key"] == key]

    def done(name: str) -> bool:
        return any(
            row["kind"] == "done" and (row["searcher"], row["budget"]) == (name, budget)
            for row in mine()
        )

    problems = Problems(run, seed, score)
    if not any(row["kind"] == "dense" for row in mine()):
        accuracy = top1(problems.model, problems.held_back)
        whole = problems.problem.dense
        found = {"searched": whole.accuracy, "checked": accuracy, "bytes": whole.bytes}
        rows.append({"key": key, "kind": "dense", **found})
    fresh = problems.fresh()
    for name in names:
        about = {"key": key, "searcher": name, "budget": budget}
        begun = time.monotonic()
        if not done(name):
            # One evaluator measures all sizes and scores.
            about_it = key.split()[:2]
            known_rows = [row for row in rows.rows if row["key"].split()[:2] == about_it]
            history = beginning(known_rows, key, name, budget, after)
            policy, earlier = folder / f"{name}-{budget}", folder / f"{name}-{after}"
            if earlier.exists() and not policy.exists():
                shutil.copytree(earlier, policy)
            for record in history[len(own_records(mine(), name, budget)) :]:
                found = {"seconds": 0.0, "record": json.loads(record.to_json())}
                rows.append({"kind": "record", **about, **found})
            settings = Settings(budget, target, seed, sensitivity)
            known, problem = problems.known, problems.problem
            searched = records_of(
                name,
                run,
                known,
                problem,
                settings,
                history,
                remembering(problem, known_rows),
                runners,
                policy,
            )
            for record in searched:
                seconds = time.monotonic() - begun
                found = {"seconds": seconds, "record": json.loads(record.to_json())}
                rows.append({"kind": "record", **about, **found})
        checked = {row["digest"] for row in mine() if row["kind"] == "checked"}
        all_records = own_records(mine(), name, budget)
        dense = problems.problem.dense
        floor = dense.accuracy - WORTH / 100
        for record in worth_checking(all_records, dense.bytes, target, floor, score=score):
            digest = record.schedule.digest()
            if digest not in checked:
                accuracy = problems.check(fresh, record.schedule)
                rows.append({"key": key, "kind": "checked", "digest": digest, "accuracy": accuracy})
        if not done(name):
            rows.append({"kind": "done", **about})
        seconds = time.monotonic() - begun
        said = f"{len(all_records)} of {budget} evaluations, {seconds:.0f} s"
        print(f"{network} seed {seed} {name}: {said}", flush=True)


def summarise(budget: int, sensitivity: str) -> None:
    """Prints the tables and writes the result file, of all that is measured so far."""
    figures: dict[str, Any] = {}
    everything: list[dict[str, Any]] = []
    for (network, experiment), score in itertools.product(EXPERIMENTS.items(), SCORES):
        paths = sorted(Path("runs").glob(f"searchers-{network}-*.jsonl"))
        if not paths:
            continue  # no reason to train it
        run = workspace(experiment)
        key, target = key_of(run, sensitivity, score), run.experiment.search.target
        rows: list[dict[str, Any]] = []
        for path in paths:
            mine = [row for row in read_lines(path) if row["key"] == key]
            if any(row["kind"] == "done" for row in mine):
                seed = int(path.stem.rpartition("-")[2])
                if score == "kl" and budget == PICTURED and path == paths[0]:
                    picture(network, run, seed, budget, mine)
                about = {"network": network, "seed": seed, "score": score, "target": target}
                about["sensitivity"] = sensitivity
                rows += [{**about, **row} for row in judge(mine, target, score)]
        if not rows:
            continue
        everything += rows
        end = "" if score == "kl" else f"_{score}"
        end += "" if sensitivity == SENSITIVITY else f"_{sensitivity}"
        print(f"\nscore: {score}, {target[0]:g} to {target[1]:g} times", end="")
        figures |= {f"{k}{end}": v for k, v in figures_of(network, rows).items()}
    for name, value in figures.items():
        sd = f" ± {value['sd']:.3f}" if value["sd"] is not None else ""
        mean = "       -" if value["value"] is None else f"{value['value']:8.3f}"
        print(f"{name:36}{mean}{sd}  {value['unit']}  (n = {value['n']})")
    if everything:
        print(results.write("searchers", figures, everything, keep=True), flush=True)


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--networks", default="vgg19,mobilenetv2")
    parser.add_argument("--searchers", default=",".join(SEARCHED))
    parser.add_argument("--evaluations", type=int, default=100)
    parser.add_argument(
        "--after", type=int, default=0, help="go on from the same search with this many"
    )
    parser.add_argument("--seeds", default="1,2,3,4,5")
    parser.add_argument(
        "--sensitivity",
        default=SENSITIVITY,
        choices=("estimated", "measured", "refitted"),
        help="of knapsack, local and ppo; their probes are among their evaluations",
    )
    parser.add_argument("--score", default="kl", choices=SCORES)
    parser.add_argument("--env-runners", type=int, default=0, help="of ppo; 0 = in this process")
    parser.add_argument("--summary", action="store_true", help="of what is measured; no more")
    options = parser.parse_args()
    if options.quick:
        options.evaluations, options.seeds = 12, "1,2"
    if options.after and "knapsack" in options.searchers.split(","):
        parser.error("--after: the knapsack does not go on, it begins anew; name other --searchers")
    for seed in () if options.summary else options.seeds.split(","):
        for network in options.networks.split(","):
            folder = Path("runs") / f"searchers-{network}-{seed}"
            names = options.searchers.split(",")
            budget, kind = options.evaluations, options.sensitivity
            if options.score != "kl":
                folder = folder.with_name(f"{folder.name}-{options.score}")
            runners, score, after = options.env_runners, options.score, options.after
            measure(network, int(seed), names, budget, kind, runners, folder, score, after)
        summarise(options.evaluations, options.sensitivity)
    if options.summary:
        summarise(options.evaluations, options.sensitivity)


if __name__ == "__main__":
    main()
