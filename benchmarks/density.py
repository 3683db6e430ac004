"""The headline: how small a network gets at one point of accuracy, against static rules.

    uv run python -m benchmarks.density                             # an hour; goes on if stopped
    uv run python -m benchmarks.density --networks vgg19 --seeds 1
    uv run python -m benchmarks.density --quick                     # 12 evaluations, 1 seed

Fashion-MNIST, one dense network, three seeds (calibration images and search). `--searcher` and
`uniform` (its whole grid: every distinct keep ratio x every bit-width) have the same evaluator and
the same recovery: reconstruction on 4,096 unlabelled training images; and, in rows `trained`, as
many steps as the rivals behind it, on the same images and answers of the dense network, no labels.
Of each, schedules of its front are recovered anew, written, read back and measured on the
validation images that no search saw, by halves until the smallest within 1 point of the dense
network is found (rows `half`: within half a point, untrained); that one is measured on the test
split, once. Bytes are the file's.

Torch-Pruning cuts to one ratio (25, 50, 70 and 85 % of the channels go, then three ratios more, by
halves between the last that is within 1 point and the first that is not; by weights or by Taylor,
whichever validates better; both look at 512 images), is trained for `--steps` steps of 128 images
towards the answers of the dense network, and goes to onnxruntime's static int8, ranges from 256
images, its file without metadata. The best ratio is the smallest file within 1 point on the same
validation images; if none is, the most accurate one, and the row says so.

FastNAS (nvidia-modelopt) is treated likewise at the squares of those ratios, its shares of the
parameters. It is measured where it is installed:

    uv run --with nvidia-modelopt --with torchprofile==0.0.4 --with huggingface_hub python -m \
        benchmarks.density --networks vgg19

density   test accuracy (%) per 10^6 bytes;  gain  ours / theirs - 1, at the accuracy floor: of each
          the smaller of its files with and without training; `gain_untrained`, `gain_trained`: both
          without, both with
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import results
from benchmarks.files import run_onnx
from benchmarks.networks import EXPERIMENTS, bundle, held_back, identity, workspace
from benchmarks.rivals import OutOfReachError, bare, export_float, fast_nas, pruned, quantize_int8
from rlcompress import core
from rlcompress.core.data import Split
from rlcompress.core.files import read_lines
from rlcompress.core.pareto import archive_front
from rlcompress.core.problem import Problem
from rlcompress.core.schedule import Record, Schedule, performance_density
from rlcompress.core.ticket import Lesson, Task
from rlcompress.core.train import Recipe, distill, teach, top1
from rlcompress.searchers import Settings, find, in_process
from rlcompress.searchers.uniform import grid
from rlcompress.stages.workspace import Workspace

FLOOR, HALF = 1.0, 0.5
IMAGES, FIT_IMAGES, STEP_IMAGES = 256, 4096, 128
#: A layer, of the last reconstruction. On 1,024 images and 2,048 positions VGG-19 at 92 times fewer
#: bytes is 0.4 points worse, at 46 times as good.
POSITIONS = 8192
CHECK_SEED = 10_000
#: Points below the floor, on the search's own images, from where a schedule is not tried; and if
#: it is to be trained.
MARGIN, TRAINED_MARGIN = 2.0, 10.0
#: Sizes that are searched: from below what the uniform rule reaches to beyond what any does.
SIZES = {"vgg19": (16.0, 160.0), "mobilenetv2": (8.0, 120.0), "resnet18": (16.0, 120.0)}
#: Of training.
RATE = 0.02
KEEPS = (0.75, 0.5, 0.3, 0.15)
#: Ratios more, where a rival's answer lies.
HALVES = 3
#: And what their figures are called.
RIVALS = {"torch-pruning": "gain_vs_torch_pruning", "fastnas": "gain_vs_fastnas"}


def searched(problem: Problem, name: str, settings: Settings) -> list[Record]:
    """The records of one search, in this process."""
    if name == "uniform":
        whole = len(grid(problem, settings.target))
        settings = replace(settings, evaluations=max(whole, 1))
    return list(find(name)(problem, settings, [], in_process(problem)))


def smallest(
    run: Workspace,
    fresh: Problem,
    model: nn.Module,
    records: Sequence[Record],
    held: Split,
    lesson: Lesson | None,
    floor: float,
) -> dict[str, Any]:
    """The smallest of the front within `floor` points on `held`, found by halves, as its written
    file; with the test split's answer. Recovered anew, then trained if there is a lesson."""
    least = top1(model, held) - floor / 100
    margin = MARGIN if lesson is None else TRAINED_MARGIN
    front = sorted(archive_front(records), key=lambda r: r.measurement.bytes)
    rough = max(r.measurement.accuracy for r in front) - (floor + margin) / 100
    front = [r for r in front if r.measurement.accuracy >= rough]
    low, high = 0, len(front)  # what is below low fails, high and above it pass
    tried: list[tuple[float, nn.Module, int]] = []
    while low < high:
        middle = (low + high) // 2
        read, size = written(run, fresh, model, front[middle].schedule, lesson)
        tried.append((top1(read, held), read, size))
        passed = tried[-1][0] >= least
        low, high = (low, middle) if passed else (middle + 1, high)
    good = [t for t in tried if t[0] >= least]
    accuracy, read, size = min(good, key=lambda t: t[2]) if good else max(tried, key=lambda t: t[0])
    return {"ok": bool(good), "tried": len(tried), **_judged(read, size, accuracy, run)}


def written(
    run: Workspace, fresh: Problem, model: nn.Module, schedule: Schedule, lesson: Lesson | None
) -> tuple[nn.Module, int]:
    """What the file of a schedule reads as, and its bytes."""
    small = core.fitted_network(model, fresh.evaluator, schedule)
    if lesson is not None:
        task = Task(small, fresh.network)
        *_, last = task.train(lesson)
        small = task.result(last)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        core.write_network(path, small, fresh.network, run.ref, schedule)
        return core.load_artifact(path), path.stat().st_size


def _judged(model: nn.Module, size: int, validation: float, run: Workspace) -> dict[str, Any]:
    accuracy = top1(model, run.data.test)
    return {
        "bytes": size,
        "validation": validation,
        "test": accuracy,
        "density": performance_density(accuracy, size),
    }


def rival(
    method: str, run: Workspace, model: nn.Module, held: Split, seed: int, steps: int
) -> list[dict[str, Any]]:
    """A row a ratio, and the test answer of the best one."""
    fit = run.data.train.sample(512, seed)
    lesson = run.data.train.sample(steps * STEP_IMAGES, seed + 1)
    taught, few = teach(model, lesson), held.take(torch.arange(1000))
    floor = top1(model, held) - FLOOR / 100
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:

        def passes(keep: float) -> bool:
            folder = Path(name) / f"{keep}"
            folder.mkdir()
            if method == "fastnas":
                try:
                    small = fast_nas(model, fit, keep**2, few, Path(name))
                except OutOfReachError as error:
                    print(f"{method} keep {keep}: {error}", flush=True)
                    return False
            else:
                small = pruned(model, fit, keep, few)
            distill(small, lesson.images(), taught, steps, seed=seed, batch=STEP_IMAGES)
            written, stripped = folder / "float.onnx", folder / "bare.onnx"
            export_float(small, fit.images(slice(2)), written)
            stripped.write_bytes(bare(quantize_int8(written, fit.images(slice(256)), folder)))
            size, accuracy = stripped.stat().st_size, _accuracy(stripped, held)
            rows.append({"keep": keep, "bytes": size, "validation": accuracy, "path": stripped})
            print(f"{method} keep {keep}: {size:,} bytes, {accuracy:.2%} on validation", flush=True)
            return accuracy >= floor

        passed = [keep for keep in KEEPS if passes(keep)]
        high = min(passed, default=1.0)
        low = max((keep for keep in KEEPS if keep < high), default=0.0)
        for _ in range(HALVES):
            middle = (low + high) / 2
            low, high = (low, middle) if passes(middle) else (middle, high)
        if not rows:
            return []
        good = [row for row in rows if row["validation"] >= floor]
        best = min(good or rows, key=lambda r: r["bytes"] if good else -r["validation"])
        best["test"] = _accuracy(best["path"], run.data.test)
        best["density"] = performance_density(best["test"], best["bytes"])
        best["ok"] = bool(good)
    return [{**row, "path": ""} for row in rows]


def _accuracy(path: Path, split: Split) -> float:
    return float((run_onnx(path, split).argmax(1) == split.labels_N).float().mean())


def rivals() -> list[str]:
    """Those whose packages are there."""
    if importlib.util.find_spec("modelopt"):
        return list(RIVALS)
    print("no FastNAS: nvidia-modelopt is not installed")
    return [name for name in RIVALS if name != "fastnas"]


def rows_of(method: str, lesson: Lesson | None) -> list[tuple[str, Lesson | None, float]]:
    """(name, training, floor) of what is measured of a method."""
    if method in RIVALS:
        return [(method, lesson, FLOOR)]
    rows = [(method, None, FLOOR), (f"{method} trained", lesson, FLOOR)]
    return rows if method == "uniform" else [*rows, (f"{method} half", None, HALF)]


def key_of(run: Workspace, options: argparse.Namespace) -> str:
    by = "" if options.sensitivity == "refitted" else f" {options.sensitivity}"
    return f"{identity(run)} {options.evaluations} {options.steps} {FIT_IMAGES}{by}"


def measure(network: str, seed: int, options: argparse.Namespace) -> None:
    """What is missing of one seed."""
    run = workspace(EXPERIMENTS[network])
    torch.set_num_threads(1)
    rows = results.Rows(Path("runs") / f"density-{network}.jsonl")
    about = {"key": key_of(run, options), "seed": seed}
    done = {row["method"] for row in rows.rows if {**row, **about} == row}
    wanted = ["uniform", options.searcher, *rivals()]
    methods = [m for m in wanted if not {name for name, *_ in rows_of(m, None)} <= done]
    if not methods:
        return
    known = bundle(run, seed=seed, fit_images=IMAGES, score_images=IMAGES)
    model = known.model().to(memory_format=torch.channels_last)
    held = held_back(run, seed=seed, score_images=IMAGES)
    problem = known.problem()
    fit = run.data.train.sample(FIT_IMAGES, CHECK_SEED + seed).images().numpy()
    few = replace(known, fit_NCHW=fit, score_NCHW=known.score_NCHW[:16], cache_bytes=0)
    few = replace(few, positions=POSITIONS)
    lesson = Lesson.of(
        run.data.train.sample(options.steps * STEP_IMAGES, seed + 1),
        held.take(torch.arange(1000)),
        Recipe(1, STEP_IMAGES, RATE, distill=1.0),
        seed,
        model,
        device="cpu",
    )
    assert known.labels_N is not None
    fresh = replace(few, labels_N=known.labels_N[:16], precision="float32").problem()
    dense = {"dense_bytes": problem.dense.bytes, "dense_test": top1(model, run.data.test)}
    for method in methods:
        if method in RIVALS:
            for row in rival(method, run, model, held, seed, options.steps):
                named = {**about, "network": network, "method": method}
                rows.append({**named, "method": f"{method} ratio", **row})
                if "test" in row:
                    rows.append({**named, **dense, **row})
                    print(f"{network} seed {seed} {method}: {row}", flush=True)
        else:
            low, high = SIZES[network]
            low = low / 2 if method == "uniform" else low
            settings = Settings(options.evaluations, (low, high), seed, options.sensitivity)
            records = searched(problem, method, settings)
            small = [r for r in records if problem.dense.bytes / r.measurement.bytes >= low]
            for name, taught, floor in rows_of(method, lesson):
                if name in done:
                    continue
                found = smallest(run, fresh, model, small, held, taught, floor)
                found = {"evaluations": len(records), **dense, **found}
                rows.append({**about, "network": network, "method": name, **found})
                print(f"{network} seed {seed} {name}: {found}", flush=True)


def summarise(options: argparse.Namespace) -> None:
    figures: dict[str, Any] = {}
    everything: list[dict[str, Any]] = []
    for network, experiment in EXPERIMENTS.items():
        path = Path("runs") / f"density-{network}.jsonl"
        if not path.exists():
            continue
        key = key_of(workspace(experiment), options)
        rows = [row for row in read_lines(path) if row["key"] == key]
        everything += rows
        by = {(r["method"], r["seed"]): r for r in rows if "dense_bytes" in r}
        seeds = sorted({seed for method, seed in by if method == options.searcher})
        best = {
            (method, seed): min(both, key=lambda r: (not r["ok"], r["bytes"]))
            for seed in seeds
            for method in (options.searcher, "uniform", *RIVALS)
            if (both := [by[m, seed] for m in (method, f"{method} trained") if (m, seed) in by])
        }
        for method in dict.fromkeys(method for method, _ in by):
            mine = [by[method, seed] for seed in seeds if (method, seed) in by]
            if not mine:
                continue  # the searcher has not come as far
            name = method.replace("-", "_").replace(" ", "_")
            figures[f"ratio_{name}_{network}"] = results.figure(
                [r["dense_bytes"] / r["bytes"] for r in mine], "times smaller"
            )
            figures[f"points_{name}_{network}"] = results.figure(
                [100 * (r["test"] - r["dense_test"]) for r in mine],
                "points against dense, test",
            )
        ours = options.searcher
        for name, table, mine, theirs in (
            ("gain", best, ours, "uniform"),
            ("gain_untrained", by, ours, "uniform"),
            ("gain_trained", by, f"{ours} trained", "uniform trained"),
            *((name, best, ours, method) for method, name in RIVALS.items()),
        ):
            pairs = [
                (table[mine, seed], table[theirs, seed])
                for seed in seeds
                if (mine, seed) in table and (theirs, seed) in table
            ]
            if pairs:
                unit = "density, ours / theirs - 1"
                if not all(row["ok"] for _, row in pairs):
                    unit += " (theirs is not within a point: its most accurate one)"
                figures[f"{name}_{network}"] = results.figure(
                    [own["density"] / row["density"] - 1 for own, row in pairs], unit
                )
    for name, value in figures.items():
        sd = f" ± {value['sd']:.2f}" if value["sd"] is not None else ""
        print(f"{name:40}{value['value']:9.2f}{sd}  {value['unit']}  (n = {value['n']})")
    if everything:
        print(results.write("density", figures, everything, keep=True), flush=True)


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--networks", default="vgg19,mobilenetv2")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--searcher", default="knapsack")
    parser.add_argument("--sensitivity", default="refitted")
    parser.add_argument("--evaluations", type=int, default=100)
    parser.add_argument("--steps", type=int, default=100, help="of training")
    parser.add_argument("--summary", action="store_true", help="of what is measured; no more")
    options = parser.parse_args()
    if options.quick:
        options.evaluations, options.seeds, options.steps = 12, "1", 5
    for seed in () if options.summary else options.seeds.split(","):
        for network in options.networks.split(","):
            measure(network, int(seed), options)
        summarise(options)
    if options.summary:
        summarise(options)


if __name__ == "__main__":
    main()
