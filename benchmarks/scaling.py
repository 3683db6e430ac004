"""What more env runners bring, what one driver takes in, and what 1,000 of them would need.

    uv run python -m benchmarks.scaling            # 3 seeds, machine idle; goes on
    uv run python -m benchmarks.scaling --quick    # one seed, fewer episodes

two_runner_speedup     episodes a second of 2 env runners / of 1, in `benchmarks.overhead`'s window
machine_speedup        the same of two processes that only evaluate and share nothing, Ray or else:
                       what this machine gives two busy processes
first_evaluation       seconds from the command to the first line of the archive, dense network
                       there; first_episode: to the first one that an env runner played
driver_episodes_per_s  episodes a second that one driver takes in from 64 env runners whose
                       environment costs nothing (goal 2,000): their results, made up and pickled as
                       Ray hands them over, through the driver's own code (`rlcompress.rl.ppo`'s
                       loop, RLlib's metrics, archive, front, policy's file) on this disk
learner_episodes_per_s episodes a second that the learner, in the driver, updates on
broadcast              MB a second from one node's object store to another's, on this machine

Then the model: what each station takes in, how many GPU env runners that feeds, and what to change
where it ends. Every part is a process, and then a line of runs/scaling.jsonl.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks import overhead, results, stage_set
from benchmarks.networks import identity, workspace
from rlcompress import spec
from rlcompress.stages.workspace import Workspace

PATH = Path("runs") / "scaling.jsonl"
FOLDER = Path("runs") / "scaling"
RUNNERS = (1, 8, 64)
SIZES_MB = (1, 10, 100, 400)
#: Of the model: what is assumed, not measured.
WISHED, GPU_FACTOR, LINK_BYTES, NODE_RUNNERS = 1000, 10.0, 1.25e9, 8


def tiny() -> Workspace:
    """The finished run that `benchmarks.faults` begins with, too."""
    folder = stage_set.prepare()
    file = spec.load_experiments(folder / "experiments.yaml")
    experiment = spec.resolve(file, stage_set.NAME)
    return Workspace(stage_set.NAME, experiment, stage_set.Scene(folder).run)


def driver(runners: int, episodes: int) -> dict[str, Any]:
    """One driver takes in the episodes of `runners` env runners that cost nothing."""
    from ray.rllib.utils.metrics.metrics_logger import MetricsLogger

    from rlcompress.core.files import JsonLines
    from rlcompress.core.policy import Policy, PolicyShape
    from rlcompress.core.schedule import Record
    from rlcompress.live import stage
    from rlcompress.rl import config, ppo
    from rlcompress.searchers import Settings
    from rlcompress.stages.search import SYNC_SECONDS, Keeper

    run = tiny()
    options = run.experiment.ppo.model_copy(
        update={"num_env_runners": runners, "episodes_per_iteration": 16}
    )
    batch = config.episodes_of(options, episodes)
    played = run.archive()
    rng = np.random.default_rng(0)
    # Made ahead and used in turns: making them is the env runners' work.
    pickled = [_results(played, runners, batch // runners, rng) for _ in range(32)]
    metrics = MetricsLogger(root=True)
    began: list[tuple[float, float]] = []
    turns = 0

    @contextlib.contextmanager
    def playing(settings: Any) -> Iterator[tuple[Any, Callable[[], Any]]]:
        def iteration() -> Any:
            nonlocal turns
            began.append((time.perf_counter(), time.process_time()))
            arrived = [pickle.loads(text) for text in pickled[turns % len(pickled)]]
            turns += 1
            metrics.aggregate(arrived, key="env_runners")
            result = metrics.reduce(compile=True)
            return result, config.records_of(result)

        shape = settings.rl_module_spec.model_config["shape"]
        state = {f"policy.{n}": t for n, t in Policy(PolicyShape(**shape)).state_dict().items()}
        whole = {"learner": {"rl_module": {"default_policy": state}}}
        yield SimpleNamespace(learner_group=SimpleNamespace(get_state=lambda **_: whole)), iteration

    total = math.ceil(episodes / (1 - ppo.FIRST - ppo.LAST)) + 2
    first = round(ppo.FIRST * total)
    history = [Record(played[0].schedule, played[0].measurement, "ppo", 0, 1)] * first
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=FOLDER) as name,
        mock.patch.object(ppo, "start_ray"),
        mock.patch.object(ppo, "share"),
        mock.patch.object(ppo, "playing", playing),
        JsonLines(Path(name) / "archive.jsonl", interval=SYNC_SECONDS) as archive,
        JsonLines(Path(name) / "curve.jsonl", interval=SYNC_SECONDS) as curve,
        stage("driver", total) as shown,
    ):
        keep = Keeper(archive, shown, run.problem.dense, 0.5)

        def on_iteration(row: dict[str, Any]) -> None:
            archive.sync()
            curve.append(json.dumps(row))

        found = ppo.search(
            run.bundle,
            run.problem,
            Settings(total, run.experiment.search.target, 0),
            history,
            ppo=options,
            folder=Path(name) / "policy",
            on_iteration=on_iteration,
        )
        taken = 0
        for record in found:
            keep(record)
            taken += 1
            if taken == episodes // batch * batch:
                break
        archive.sync()
        seconds, busy = time.perf_counter() - began[0][0], time.process_time() - began[0][1]
        return {"episodes": taken, "seconds": seconds, "cpu": busy, "front": len(keep.front)}


def _results(played: list[Any], runners: int, each: int, rng: np.random.Generator) -> list[bytes]:
    """What `runners` env runners send after `each` episodes."""
    from ray.rllib.utils.metrics.metrics_logger import MetricsLogger

    from rlcompress.rl.environment import CompressionCallbacks

    sent = []
    for runner in range(1, runners + 1):
        metrics, callbacks = MetricsLogger(), CompressionCallbacks()
        for _ in range(each):
            one = played[rng.integers(len(played))]
            size = float(np.exp(rng.uniform(9, 14)))
            noise = float(np.exp(rng.normal(0, 0.3)))
            measured = {**one.measurement.to_dict(), "bytes": int(size), "kl": 3e4 / size * noise}
            info = {"schedule": one.schedule.to_json(), "measurement": measured, "target": 10.0}
            episode = SimpleNamespace(
                get_infos=lambda index, info=info: info, get_return=lambda: 1.0
            )
            callbacks.on_episode_end(
                episode=episode,
                env_runner=SimpleNamespace(worker_index=runner),
                metrics_logger=metrics,
            )
        sent.append(pickle.dumps(metrics.reduce()))
    return sent


def alone(processes: int, seed: int, evaluations: int) -> dict[str, Any]:
    """Evaluations of quickstart's network a second, in processes that share nothing."""
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(processes), context.Queue()
    workers = [
        context.Process(target=_evaluate, args=(seed + i, evaluations, barrier, answers))
        for i in range(processes)
    ]
    for worker in workers:
        worker.start()
    slowest = max(answers.get(timeout=600) for _ in workers)
    for worker in workers:
        worker.join()
    return {"evaluations": evaluations * processes, "seconds": slowest}


def _evaluate(seed: int, evaluations: int, barrier: Any, answers: Any) -> None:
    from rlcompress import searchers
    from rlcompress.searchers import Settings

    run = workspace(overhead.EXPERIMENT)
    torch.set_num_threads(1)
    problem = run.problem

    def search(count: int) -> None:
        settings = Settings(count, run.experiment.search.target, seed)
        list(searchers.find("random")(problem, settings, [], searchers.in_process(problem)))

    search(2)
    barrier.wait()
    begun = time.perf_counter()
    search(evaluations)
    answers.put(time.perf_counter() - begun)


def first(runners: int) -> dict[str, Any]:
    """Seconds until the archive has its first line, and the first one of an env runner."""
    whole = stage_set.prepare()
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as name:
        scene = stage_set.Scene(Path(name))
        scene.begin(whole, "dense")
        begun = time.perf_counter()
        # The untrained policy's own schedules come first: a twentieth.
        untrained = max(1, round(0.05 * stage_set.BUDGETS["ppo"]))
        with scene.command("search", "--set", f"ppo.num_env_runners={runners}") as command:
            command.until(lambda: bool(scene.lines()))
            evaluation = time.perf_counter() - begun
            command.until(lambda: len(scene.lines()) > untrained)
            return {"evaluation": evaluation, "episode": time.perf_counter() - begun}


def broadcast() -> dict[str, Any]:
    """Seconds to put arrays, to have them on another node, and in a second process there."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray
    from ray.cluster_utils import Cluster

    store = 2**30
    head = {"num_cpus": 1, "object_store_memory": store, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=2, resources={"far": 2}, object_store_memory=store)
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)

        @ray.remote(num_cpus=1, resources={"far": 1})
        class Far:
            def get(self, references: list[Any]) -> float:
                begun = time.perf_counter()
                ray.get(references[0]).sum()
                return time.perf_counter() - begun

        far: Any = Far
        actors = [far.remote(), far.remote()]
        ray.get([actor.get.remote([ray.put(np.ones(1))]) for actor in actors])
        rows = []
        for size in SIZES_MB:
            array = np.ones(size * 2**18, np.float32)
            begun = time.perf_counter()
            reference = ray.put(array)
            put = time.perf_counter() - begun
            there = ray.get(actors[0].get.remote([reference]))
            again = ray.get(actors[1].get.remote([reference]))
            begun = time.perf_counter()
            array.sum()
            read = time.perf_counter() - begun
            rows.append({"mb": size, "put": put, "there": there, "again": again, "read": read})
            del reference
        return {"sizes": rows}
    finally:
        ray.shutdown()
        cluster.shutdown()


def episode_bytes(run: Workspace) -> int:
    """Of the observations that an env runner sends of one episode."""
    from rlcompress.core.observation import ACTION_COLUMNS, STATE_COLUMNS

    search = run.experiment.search
    actions = len(search.keeps) * len(search.bits)
    row = actions * (len(ACTION_COLUMNS) + 1) + len(STATE_COLUMNS)
    return 4 * row * len(run.structure.layers)


def summarise(rows: list[dict[str, Any]], run: Workspace) -> None:
    """Prints the tables and writes the result file."""
    figures: dict[str, Any] = {}

    def of(part: str, **which: int) -> list[dict[str, Any]]:
        return [r for r in rows if r["part"] == part and r.items() >= which.items()]

    def speedup(part: str, count: str) -> list[float]:
        rate = {(r["processes"], r["seed"]): r[count] / r["clocked"] for r in of(part)}
        return [v / rate[1, s] for (n, s), v in rate.items() if n == 2 and (1, s) in rate]

    if times := speedup("search", "episodes"):
        figures["two_runner_speedup"] = results.figure(times, "times the episodes a second")
    if times := speedup("alone", "evaluations"):
        figures["machine_speedup"] = results.figure(times, "times the evaluations a second")
    if found := of("search", processes=1):
        figures["runner_episodes_per_s"] = results.figure(
            [r["episodes"] / r["clocked"] for r in found], "episodes a second of one env runner"
        )
        figures["learner_episodes_per_s"] = results.figure(
            [r["episodes"] / (r["runners"][0]["learner"] * r["clocked"]) for r in found],
            "episodes a second through the learner in the driver",
        )
    for name in ("evaluation", "episode"):
        if found := of("first"):
            figures[f"first_{name}"] = results.figure([r[name] for r in found], "s")
    for count in RUNNERS:
        if found := of("driver", runners=count):
            rates = [r["episodes"] / r["clocked"] for r in found]
            figures[f"driver_episodes_per_s_{count}"] = results.figure(rates, "episodes a second")
    if f"driver_episodes_per_s_{RUNNERS[-1]}" in figures:
        figures["driver_episodes_per_s"] = figures[f"driver_episodes_per_s_{RUNNERS[-1]}"]
    for row in of("broadcast")[-1:]:
        print(f"\n{'MB':>6}{'put, s':>9}{'to a node, s':>14}{'2nd process, s':>16}")
        for size in row["sizes"]:
            print(f"{size['mb']:6}{size['put']:9.3f}{size['there']:14.3f}{size['again']:16.3f}")
        largest = row["sizes"][-1]
        rate = largest["mb"] / (largest["there"] - largest["again"])
        figures["broadcast"] = results.figure([rate], "MB a second to another node")
    for name, value in figures.items():
        print(f"{name:26}{value['value']:10.2f}  {value['unit']}  (n = {value['n']})")
    if {"runner_episodes_per_s", "driver_episodes_per_s"} <= figures.keys():
        print_model(figures, episode_bytes(run))
    print(results.write("scaling", figures, rows), flush=True)


def print_model(figures: dict[str, Any], sample: int) -> None:
    """What each station of one driver takes in, and how many GPU env runners that is."""
    runner = figures["runner_episodes_per_s"]["value"] * GPU_FACTOR
    stations = {
        "PPO's update, in the driver": (
            figures["learner_episodes_per_s"]["value"],
            "a learner group on GPUs (num_learners), larger minibatches, fewer epochs",
        ),
        "results, archive, front": (
            figures["driver_episodes_per_s"]["value"],
            "an archive a driver, merged into one front behind (as `tune` does)",
        ),
        "samples over the driver's link": (
            LINK_BYTES / sample,
            "several drivers, each with its own runners and learners",
        ),
    }
    print(
        f"\n{WISHED:,} GPU env runners, each {GPU_FACTOR:g} times as fast as one here "
        f"(assumed): {WISHED * runner:,.0f} episodes a second. One driver takes in"
    )
    for name, (rate, change) in sorted(stations.items(), key=lambda item: item[1][0]):
        print(f"  {name:32}{rate:10,.0f} a second = {rate / runner:7,.0f} runners; then: {change}")
    nodes = WISHED // NODE_RUNNERS
    print(
        f"  (samples: {sample / 1e3:.1f} kB an episode, link {LINK_BYTES * 8 / 1e9:g} Gbit/s, "
        f"assumed; a problem of 100 MB goes to {nodes} nodes once: "
        f"{1e8 * nodes / LINK_BYTES:.0f} s if all came from one node)"
    )


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--episodes", type=int, default=80, help="of each search")
    parser.add_argument("--taken", type=int, default=20_000, help="episodes each driver takes in")
    parser.add_argument("--part", nargs="+", help="one of them, in this process")
    options = parser.parse_args()
    if options.part:
        name, *numbers = options.part
        parts: dict[str, Callable[..., Any]] = {
            "driver": driver, "alone": alone, "first": first, "broadcast": broadcast,
        }  # fmt: skip
        return print(json.dumps(parts[name](*map(int, numbers))))
    if options.quick:
        options.seeds, options.episodes, options.taken = "1", 40, 5000
    run = workspace(overhead.EXPERIMENT)
    stage_set.prepare()
    key = f"{identity(run)} {options.episodes} {options.taken}"
    rows = results.Rows(PATH)

    def once(module: str, words: list[object], **what: Any) -> None:
        if any(row.items() >= {"key": key, **what}.items() for row in rows.rows):
            return
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, words)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        # Of a search, the window from its first iteration to its last.
        found["clocked"] = found.get("window", found.get("seconds"))
        rows.append({"key": key, **what, **found, "wall": time.perf_counter() - begun})
        print(what, {k: v for k, v in found.items() if not isinstance(v, list)}, flush=True)

    me = "benchmarks.scaling"
    for seed in (int(seed) for seed in options.seeds.split(",")):
        for n in (1, 2):
            words: list[object] = ["--one", n, seed, "--episodes", options.episodes]
            once("benchmarks.overhead", words, part="search", processes=n, seed=seed)
            words = ["--part", "alone", n, seed, options.episodes // 2]
            once(me, words, part="alone", processes=n, seed=seed)
        once(me, ["--part", "first", 2], part="first", seed=seed)
        for n in RUNNERS:
            words = ["--part", "driver", n, options.taken]
            once(me, words, part="driver", runners=n, seed=seed)
    once(me, ["--part", "broadcast"], part="broadcast")
    summarise([row for row in rows.rows if row["key"] == key], run)


if __name__ == "__main__":
    main()
