"""What one evaluation costs: time against a plain forward, memory, episodes in lockstep.

    uv run python -m benchmarks.evaluator                  # about half an hour; goes on if stopped
    uv run python -m benchmarks.evaluator --quick          # fewer repetitions and evaluations
    uv run python -m benchmarks.evaluator --device cuda    # VGG-19 at full width, on the GPU

Times are those of one evaluation of 256 fitted and 256 scored images over that of a plain fp32
forward of the same 512 images in one batch, right before it, one thread. Networks as in
`benchmarks.networks`; medians, with the standard deviation of the single ratios.

keep      uniform 4 bits at each keep ratio, nothing cached
cut       a forward of the cut networks alone, in the precision of candidates: the least that an
          evaluation could take
search    averaged over a whole search with the default cache; `prior` samples episodes from the
          untrained policy, other names are searchers
memory    growth of a process's peak memory (on a GPU: of what is allocated there) by building the
          evaluator and measuring 40 random schedules with the default cache
vector    eight episodes in lockstep, one problem, against eight environments with a problem each,
          the same actions sampled from the prior's logits

Every row is a line of runs/evaluator-DEVICE.jsonl as soon as it is measured.
"""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
import torch

from benchmarks import results
from benchmarks.networks import EXPERIMENTS, bundle, identity, workspace
from rlcompress.core.files import read_lines
from rlcompress.core.fitted import fitted_network
from rlcompress.core.policy import ILLEGAL
from rlcompress.core.problem import Bundle, pick_device
from rlcompress.core.schedule import Measurement, Schedule
from rlcompress.searchers import SEARCHERS, Settings, find, in_process
from rlcompress.stages.workspace import Workspace

ENVIRONMENT = "envs:rlcompress/Compression-v0"
RECOVERIES = ("bn", "reconstruct")
KEEPS = (1.0, 0.7, 0.5, 0.2)
BITS = 4
PARTS = ("keep", "cut", "search", "memory", "vector")
RANDOM_SCHEDULES = 40
EPISODES = 8
UNIT = "plain fp32 forwards"
Target = tuple[float, float]
T = TypeVar("T")
R = TypeVar("R")


def network_of(name: str, device: str) -> Workspace:
    """The shared dense network; on a GPU VGG-19 at full width, trained for an epoch: how well it
    classifies does not matter here."""
    experiment = EXPERIMENTS[name]
    if device != "cpu" and name == "vgg19":
        changes = ("model.args={}", "dense.epochs=1", "dense.rewind_epoch=0", f"device={device}")
        return workspace(experiment, *changes, name=f"{experiment}-wide")
    return workspace(experiment, f"device={device}")


class Clock:
    """Times calls against a plain forward of a bundle's images."""

    def __init__(self, known: Bundle) -> None:
        self.device = pick_device(known.device)
        self.model = known.model().to(self.device, memory_format=torch.channels_last)
        images = torch.from_numpy(np.concatenate([known.fit_NCHW, known.score_NCHW]))
        self.images = images.to(self.device).contiguous(memory_format=torch.channels_last)
        self.plain()

    def timed(self, call: Callable[[T], R], argument: T) -> tuple[float, R]:
        """Seconds of a call, and what it returns."""
        self._wait()
        begun = time.perf_counter()
        returned = call(argument)
        self._wait()
        return time.perf_counter() - begun, returned

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def plain(self) -> float:
        """Seconds of a plain forward."""
        with torch.inference_mode():
            return self.timed(self.model, self.images)[0]


def time_keeps(known: Bundle, repetitions: int) -> Iterator[dict[str, Any]]:
    problem, clock = replace(known, cache_bytes=0).problem(), Clock(known)
    problem.evaluator.evaluate(problem.network.uniform(KEEPS[0], BITS))  # warm
    for keep in KEEPS:
        schedule = problem.network.uniform(keep, BITS)
        ratios = []
        for _ in range(repetitions):
            plain = clock.plain()
            taken, _ = clock.timed(problem.evaluator.evaluate, schedule)
            ratios.append(taken / plain)
        yield {"keep": keep, "ratios": ratios, "plain_s": plain, "evaluation_s": taken}


def time_cut(known: Bundle, repetitions: int) -> Iterator[dict[str, Any]]:
    problem, clock = replace(known, recovery="none", cache_bytes=0).problem(), Clock(known)
    dtype = problem.evaluator.dtype
    for keep in KEEPS:
        schedule = problem.network.uniform(keep, BITS)
        small = fitted_network(clock.model, problem.evaluator, schedule).model
        small = small.to(dtype, memory_format=torch.channels_last)
        ratios = []
        with torch.inference_mode():
            images = clock.images.to(dtype)
            small(images)  # warm
            for _ in range(repetitions):
                plain = clock.plain()
                ratios.append(clock.timed(small, images)[0] / plain)
        yield {"keep": keep, "ratios": ratios, "plain_s": plain, "dtype": str(dtype)}


def time_search(known: Bundle, searcher: str, target: Target, count: int) -> dict[str, Any]:
    """All time in the evaluator over a search."""
    problem, clock = known.problem(), Clock(known)
    taken, plain = [], []

    def measure(schedules: Iterable[Schedule]) -> Iterator[Measurement]:
        for schedule in schedules:
            plain.append(clock.plain())
            seconds, measurement = clock.timed(problem.evaluator.evaluate, schedule)
            taken.append(seconds)
            yield measurement

    if searcher == "prior":
        list(measure(sampled_schedules(known, target, count)))
    else:
        list(find(searcher)(problem, Settings(count, target, seed=0), [], measure))
    ratios = [one / two for one, two in zip(taken, plain, strict=True)]
    return {"searcher": searcher, "ratio": float(np.mean(taken) / np.median(plain)), "all": ratios}


def sample(actions_AF: np.ndarray, mask_A: np.ndarray, rng: np.random.Generator) -> int:
    """An action by the probabilities of the prior's logits, the last column."""
    logits_A = np.where(mask_A > 0, actions_AF[:, -1].astype(np.float64), ILLEGAL)
    weights_A = np.exp(logits_A - logits_A.max())
    return int(rng.choice(len(weights_A), p=weights_A / weights_A.sum()))


def play(env: gym.Env[Any, Any], target: float, rng: np.random.Generator) -> Schedule:
    """One sampled episode."""
    observation, _ = env.reset(options={"target": target})
    while True:
        action = sample(observation["actions"], observation["mask"], rng)
        observation, _, done, _, info = env.step(np.int64(action))
        if done:
            return Schedule.from_json(info["schedule"])


def goals(target: Target, count: int, seed: int) -> list[float]:
    low, high = np.log(target)
    return [float(np.exp(x)) for x in np.random.default_rng(seed).uniform(low, high, count)]


def sampled_schedules(known: Bundle, target: Target, count: int) -> list[Schedule]:
    """Of episodes on another problem, so that nothing of them is cached in the timed one."""
    assert known.labels_N is not None
    cheap = replace(known, recovery="bn", score_NCHW=known.score_NCHW[:8])
    cheap = replace(cheap, fit_NCHW=known.fit_NCHW[:8], labels_N=known.labels_N[:8])
    env = gym.make(ENVIRONMENT, problem=cheap.problem(), target=target)
    rng = np.random.default_rng(0)
    return [play(env, goal, rng) for goal in goals(target, count, 0)]


def memory(known: Bundle, target: Target) -> dict[str, Any]:
    """Measured in a process that has nothing but the bundle."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bundle.pickle"
        path.write_bytes(pickle.dumps((known, target)))
        words = [sys.executable, "-m", "benchmarks.evaluator", "--memory-of", str(path)]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _peak_bytes() -> int:
    """This process's own peak; `getrusage` would start from the parent's."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return 1024 * int(line.split()[1])


def memory_of(path: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    known, target = pickle.loads(path.read_bytes())
    device = pick_device(known.device)
    before = _peak_bytes()
    problem = known.problem()
    built = _peak_bytes()
    settings = Settings(RANDOM_SCHEDULES, target, seed=0)
    list(find("random")(problem, settings, [], in_process(problem)))
    gb = (_peak_bytes() - before) / 1e9
    if device.type == "cuda":
        gb = torch.cuda.max_memory_allocated(device) / 1e9
    return {"gb": gb, "built_gb": (built - before) / 1e9}


def time_vector(known: Bundle, target: Target, rounds: int) -> dict[str, Any]:
    """Seconds of eight episodes, both ways."""
    clock = Clock(known)
    single = [
        gym.make(ENVIRONMENT, problem=known.problem(), target=target) for _ in range(EPISODES)
    ]
    together = gym.make_vec(
        ENVIRONMENT,
        num_envs=EPISODES,
        vectorization_mode="vector_entry_point",
        problem=known.problem(),
        target=target,
    )
    layers = len(known.network.layers)

    def streams(round_: int) -> list[np.random.Generator]:
        return [np.random.default_rng([round_, i]) for i in range(EPISODES)]

    def alone(round_: int) -> None:
        wanted = goals(target, EPISODES, round_)
        for env, goal, rng in zip(single, wanted, streams(round_), strict=True):
            play(env, goal, rng)

    def lockstep(round_: int) -> None:
        rngs, wanted = streams(round_), goals(target, EPISODES, round_)
        observation, _ = together.reset(options={"target": wanted})
        for _ in range(layers):
            rows = zip(observation["actions"], observation["mask"], rngs, strict=True)
            observation, *_ = together.step(np.array([sample(*row) for row in rows]))

    seconds = [(clock.timed(alone, i)[0], clock.timed(lockstep, i)[0]) for i in range(rounds)]
    return {"alone_s": [a for a, _ in seconds], "lockstep_s": [b for _, b in seconds]}


def measure_all(options: argparse.Namespace, path: Path, key: str) -> None:
    """Measures what is missing."""
    torch.set_num_threads(1)
    rows = results.Rows(path)

    def missing(**what: Any) -> bool:
        what["key"] = key
        return not any(row.items() >= what.items() for row in rows.rows)

    def add(**row: Any) -> None:
        rows.append({"key": key, **row})
        shown = {k: v for k, v in row.items() if k != "all" and not isinstance(v, list)}
        texts = (f"{k}={v:.3g}" if isinstance(v, float) else str(v) for k, v in shown.items())
        print(*texts, flush=True)

    for name in options.networks.split(","):
        run = network_of(name, options.device)
        dense = {"network": name, "dense": identity(run)}
        known = bundle(run, seed=0, device=options.device)
        target = run.experiment.search.target
        if "cut" in options.parts and missing(part="cut", keep=KEEPS[-1], **dense):
            for row in time_cut(known, options.repetitions):
                add(part="cut", **dense, **row)
        for recovery in RECOVERIES:
            chosen, what = replace(known, recovery=recovery), {**dense, "recovery": recovery}
            if "keep" in options.parts and missing(part="keep", keep=KEEPS[-1], **what):
                for row in time_keeps(chosen, options.repetitions):
                    add(part="keep", **what, **row)
            if "search" in options.parts and missing(
                part="search", searcher=options.search, **what
            ):
                row = time_search(chosen, options.search, target, options.evaluations)
                add(part="search", **what, **row)
        if "memory" in options.parts and missing(part="memory", **dense):
            add(part="memory", **dense, **memory(known, target))
        if "vector" in options.parts and missing(part="vector", **dense):
            add(part="vector", **dense, **time_vector(known, target, options.rounds))


def summarise(device: str, path: Path, key: str) -> None:
    """Prints the figures and writes the result file."""
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in read_lines(path):
        if row["key"] == key:
            kind = ("part", "network", "recovery", "keep", "searcher")
            newest[tuple(row.get(k) for k in kind)] = row
    figures: dict[str, Any] = {}
    for row in newest.values():
        network, recovery = row["network"], row.get("recovery")
        if row["part"] in ("keep", "cut"):
            name = f"{recovery or 'cut'}_keep{row['keep']:.1f}_{network}".replace(".", "")
            figures[name] = results.median_figure(row["ratios"], UNIT)
        elif row["part"] == "search":
            figures[f"{recovery}_search_{network}"] = {
                **results.figure(row["all"], f"{UNIT}, mean over a search ({row['searcher']})"),
                "value": row["ratio"],
            }
        elif row["part"] == "memory":
            figures[f"evaluator_gb_{network}"] = results.figure([row["gb"]], "GB")
        else:
            speedups = [a / b for a, b in zip(row["alone_s"], row["lockstep_s"], strict=True)]
            figures[f"vector_speedup_{network}"] = results.median_figure(speedups, "times faster")
    if "vector_speedup_vgg19" in figures:
        figures["vector_speedup"] = figures["vector_speedup_vgg19"]
    for name, value in figures.items():
        sd = f" ± {value['sd']:.2f}" if value["sd"] is not None else ""
        print(f"{name:32}{value['value']:8.2f}{sd}  {value['unit']}  (n = {value['n']})")
    name = "evaluator" if device == "cpu" else f"evaluator_{device.replace(':', '')}"
    print(results.write(name, figures, list(newest.values()), keep=True), flush=True)


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--networks", default="vgg19,mobilenetv2")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--search", default="local", choices=("prior", *SEARCHERS))
    parser.add_argument("--evaluations", type=int, default=60, help="of a search")
    parser.add_argument("--repetitions", type=int, default=15, help="of a keep ratio")
    parser.add_argument("--rounds", type=int, default=5, help="of eight episodes")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        return print(json.dumps(memory_of(options.memory_of)))
    if options.quick:
        options.evaluations, options.repetitions, options.rounds = 10, 3, 1
    options.parts = options.parts.split(",")
    key = f"{options.repetitions} {options.evaluations} {options.rounds}"
    path = Path("runs") / f"evaluator-{options.device.replace(':', '')}.jsonl"
    measure_all(options, path, key)
    summarise(options.device, path, key)


if __name__ == "__main__":
    main()
