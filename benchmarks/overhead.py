"""RLlib's own share of a search, and what a second env runner brings.

    uv run python -m benchmarks.overhead            # 3 seeds, 1 and 2 env runners; goes on
    uv run python -m benchmarks.overhead --quick    # one seed, 40 episodes

`ppo` searches quickstart's network (its dense network is trained once) at quickstart's settings,
with timers around the parts of every env runner (`benchmarks.clock`). The window is that from the
start of the first training iteration to the end of the last. Shares of it, per env runner:

evaluator    measuring the compressed network
environment  observations, masks, rewards
policy       forward passes that choose actions
glue         the rest of RLlib's `sample`: connectors, episodes
learner      the driver's updates, while env runners wait
rest         the rest of waiting: weights and results on their way, the other runner, records

rllib_share         all but evaluator and environment
two_runner_speedup  episodes a second in the window, 2 env runners / 1

Every search is a process, and then a line of runs/overhead.jsonl.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import clock, results
from benchmarks.networks import bundle, identity, workspace
from rlcompress.stages.workspace import Workspace

EXPERIMENT = "quickstart"
RUNNERS = (1, 2)
PATH = Path("runs") / "overhead.jsonl"
SHARES = ("evaluator", "environment", "policy", "glue", "learner", "rest")


def search(run: Workspace, runners: int, seed: int, episodes: int) -> dict[str, Any]:
    """One search in this process, timed."""
    from ray.rllib.algorithms.ppo import PPO
    from ray.rllib.core.learner.learner_group import LearnerGroup

    from rlcompress.rl import config, ppo
    from rlcompress.rl.environment import RECORDS
    from rlcompress.searchers import Settings

    torch.set_num_threads(1)
    marks: list[float] = []
    clocks: dict[int, dict[str, float]] = {}
    played = 0
    train = PPO.train

    def timed_train(algorithm: Any) -> Any:
        nonlocal played
        marks.append(time.perf_counter())
        result = train(algorithm)
        marks.append(time.perf_counter())
        said = result["env_runners"]
        played += len(_items(said.get(RECORDS, [])))
        for row in _items(said[clock.CLOCK]):
            clocks[int(row["runner"])] = {k: float(v) for k, v in row.items() if k != "runner"}
        return result

    spec = run.experiment.ppo.model_copy(update={"num_env_runners": runners})
    calibration = run.experiment.calibration
    known = bundle(
        run,
        seed=seed,
        fit_images=calibration.fit_images,
        score_images=calibration.score_images,
        positions=calibration.positions,
    )
    problem = known.problem()
    settings = Settings(episodes, run.experiment.search.target, seed)
    begun = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(config, "CompressionCallbacks", clock.TimedRecords),
        mock.patch.object(PPO, "train", timed_train),
        mock.patch.object(LearnerGroup, "update", clock.timed("learner", LearnerGroup.update)),
    ):
        found = list(ppo.search(known, problem, settings, [], ppo=spec, folder=Path(folder)))
    window = marks[-1] - marks[0]
    return {
        "seconds": time.perf_counter() - begun,
        "records": len(found),
        "startup": marks[0] - begun,
        "window": window,
        "episodes": played,
        "runners": [
            _shares(parts, clock.seconds("learner"), window) for _, parts in sorted(clocks.items())
        ],
    }


def _items(logged: Any) -> list[dict[str, Any]]:
    """RLlib gives a list of one item as that item."""
    return [logged] if isinstance(logged, dict) else list(logged)


def _shares(parts: dict[str, float], learner: float, window: float) -> dict[str, float]:
    seconds = {
        "evaluator": parts["evaluator"],
        "environment": parts["environment"] - parts["evaluator"],
        "policy": parts["policy"],
        "glue": parts["sample"] - parts["environment"] - parts["policy"],
        "learner": learner,
        "rest": window - parts["sample"] - learner,
    }
    return {name: value / window for name, value in seconds.items()}


def _mean_share(row: dict[str, Any], name: str) -> float:
    return float(statistics.mean(runner[name] for runner in row["shares"]))


def summarise(rows: list[dict[str, Any]]) -> None:
    """Prints the table and writes the result file."""
    figures: dict[str, Any] = {}
    rates: dict[tuple[int, int], float] = {}
    print(f"\n{'runners':8}{'seed':>5}{'s':>7}{'start':>7}{'window':>8}{'ep/s':>7}", end="")
    print("".join(f"{name:>12}" for name in SHARES))
    for row in rows:
        rates[row["env_runners"], row["seed"]] = row["episodes"] / row["window"]
        print(
            f"{row['env_runners']:<8}{row['seed']:5}{row['seconds']:7.0f}{row['startup']:7.0f}"
            f"{row['window']:8.0f}{row['episodes'] / row['window']:7.2f}"
            + "".join(f"{_mean_share(row, name):12.1%}" for name in SHARES)
        )
    for count in RUNNERS:
        mine = [row for row in rows if row["env_runners"] == count]
        if mine:
            shares = [
                1 - _mean_share(row, "evaluator") - _mean_share(row, "environment") for row in mine
            ]
            figures[f"rllib_share_{count}"] = results.figure(shares, "of the window")
    pairs = [rates[2, s] / rates[1, s] for n, s in rates if n == 1 and (2, s) in rates]
    if pairs:
        figures["rllib_share"] = figures["rllib_share_2"]
        figures["two_runner_speedup"] = results.figure(pairs, "times the episodes a second")
    for name, value in figures.items():
        print(f"{name:20}{value['value']:8.3f}  {value['unit']}  (n = {value['n']})")
    print(results.write("overhead", figures, rows), flush=True)


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--episodes", type=int, default=80)
    parser.add_argument("--one", type=int, nargs=2, metavar=("RUNNERS", "SEED"))
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.episodes = "1", 40
    run = workspace(EXPERIMENT)
    if options.one:
        runners, seed = options.one
        return print(json.dumps(search(run, runners, seed, options.episodes)))
    key = f"{identity(run)} {options.episodes}"
    rows = results.Rows(PATH)
    for seed in (int(seed) for seed in options.seeds.split(",")):
        for runners in RUNNERS:
            what = {"key": key, "env_runners": runners, "seed": seed}
            if not any(row.items() >= what.items() for row in rows.rows):
                words = [sys.executable, "-m", "benchmarks.overhead"]
                words += ["--one", str(runners), str(seed), "--episodes", str(options.episodes)]
                done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
                found = json.loads(done.stdout.splitlines()[-1])
                rows.append({**what, "shares": found.pop("runners"), **found})
        summarise([row for row in rows.rows if row["key"] == key])


if __name__ == "__main__":
    main()
