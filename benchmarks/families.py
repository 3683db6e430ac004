"""Which torchvision networks can be cut, quantized, written and read back, and how exactly.

    uv run python -m benchmarks.families                  # 18 families, 3 random schedules each
    uv run python -m benchmarks.families --quick          # 1 schedule
    uv run python -m benchmarks.families --only swin_t    # its row anew, the others stay

Networks as torchvision initialises them (`weights=None`, 10 classes, 224 pixels; Inception 299),
batch norms run in on noise, heads of zeros made random. A schedule draws every keep ratio and
every width (1-8 or 32 bits) at random. Differences are the largest ones over four images, relative
to the largest output: `masked_cut` between the network under masks and the cut one, `cut_reloaded`
between the cut and quantized network and the file read back by a new process that has nothing
else. `seconds` and `memory_mb` are those of reading the structure (with its check), above a process
that has the network loaded; `evaluate_s` one evaluation of 16 images with reconstruction, one
thread.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import results
from rlcompress.core.artifact import ModelRef, load_artifact, pack
from rlcompress.core.cost import CostModel
from rlcompress.core.evaluators import build_evaluator
from rlcompress.core.files import save_bytes
from rlcompress.core.fold import snap
from rlcompress.core.graph import Network
from rlcompress.core.prune import cut, kept_channels, masked
from rlcompress.core.quant import attach_fake_quant, mse_clip, scale_of
from rlcompress.core.schedule import Schedule
from rlcompress.core.sensitivity import estimate
from rlcompress.core.structure import build_network

FAMILIES = (
    "alexnet",
    "vgg19_bn",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "resnet18",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "squeezenet1_1",
    "densenet121",
    "googlenet",
    "inception_v3",
    "regnet_y_400mf",
    "efficientnet_b0",
    "convnext_tiny",
    "mnasnet0_5",
    "shufflenet_v2_x0_5",
    "vit_b_16",
    "swin_t",
)
KEEPS = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0)
BITS = (1, 2, 3, 4, 5, 6, 7, 8, 32)
LIMIT = 1e-4
#: Least spread of the outputs over images, against the largest: a dead network proves nothing.
ALIVE = 1e-3


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _relative(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max() / one.abs().max())


@torch.no_grad()
def _run_in(model: nn.Module, images: torch.Tensor) -> None:
    """Gives batch norms the statistics of what passes them, and random gammas and betas; a head
    that starts at zero (ViT's) random weights."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(0))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    generator = torch.Generator().manual_seed(1)
    for norm in norms:
        norm.momentum = None  # a plain average
        norm.weight.copy_(0.5 + torch.rand(norm.num_features, generator=generator))
        norm.bias.copy_(0.3 * torch.randn(norm.num_features, generator=generator))
    if norms:
        model.train()(images[:8])
    model.eval()


def _random(network: Network, rng: np.random.Generator) -> Schedule:
    return Schedule(
        {g: float(rng.choice(KEEPS)) for g in network.groups},
        {n: int(rng.choice(BITS)) for n in network.layers},
    )


def read_back(ref: ModelRef, folder: Path) -> torch.Tensor:
    """What a new process says of `folder/images` with nothing but the file."""
    words = [sys.executable, "-m", "benchmarks.families", "--reload", str(folder), ref.factory]
    subprocess.run(words, check=True)
    return torch.from_numpy(np.load(folder / "logits.npy"))


def reload(folder: Path, factory: str) -> None:
    images = torch.from_numpy(np.load(folder / "images.npy"))
    model = load_artifact(folder / "weights.safetensors", trust=[factory])
    with torch.inference_mode():
        np.save(folder / "logits.npy", model(images).numpy())


@torch.no_grad()
def chain(
    model: nn.Module, network: Network, ref: ModelRef, images: torch.Tensor, seed: int
) -> dict[str, Any]:
    """One random schedule through masks, cut, quantization, file and a new process."""
    rng = np.random.default_rng(seed)
    schedule = _random(network, rng)
    importance = {n: rng.random(g.channels) for n, g in network.groups.items()}
    kept = kept_channels(network, importance, network.counts(schedule))
    small = cut(model, network, kept)
    masked_cut = _relative(masked(model, network, kept)(images), small(images))
    bits = {n: schedule.width(n) for n in network.layers}
    modules = dict(small.named_modules())
    scales = {}
    for name, width in bits.items():
        if width != 32:
            weight = modules[name].weight.detach()
            scales[name] = scale_of(weight, mse_clip(weight, width), width)
    scales = snap(small, network, bits, scales)
    packed = pack(small, network, ref, bits, scales)
    attach_fake_quant(small, network, bits, scales)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_bytes(folder / "weights.safetensors", packed)
        np.save(folder / "images.npy", images.numpy())
        cut_reloaded = _relative(small(images), read_back(ref, folder))
        on_disk = (folder / "weights.safetensors").stat().st_size
    claimed = CostModel(network).cost(schedule).bytes
    return {
        "masked_cut": masked_cut,
        "cut_reloaded": cut_reloaded,
        "claimed": claimed,
        "on_disk": on_disk,
    }


def family(name: str, schedules: int) -> dict[str, Any]:
    """One network's row."""
    torch.set_num_threads(1)
    size = 299 if name == "inception_v3" else 224
    ref = ModelRef(f"torchvision.models:{name}", {}, 10, (3, size, size))
    model = ref.build()
    images = torch.randn(16, 3, size, size, generator=torch.Generator().manual_seed(0))
    _run_in(model, images)
    with torch.no_grad():
        logits = model(images[:4])
    if not float(logits.std(0).mean() / logits.abs().max()) >= ALIVE:
        raise SystemExit(f"{name}: its output does not depend on its input")
    before, begun = _peak_mb(), time.perf_counter()
    network = build_network(model, images[:1])
    seconds, memory = time.perf_counter() - begun, _peak_mb() - before
    runs = [chain(model, network, ref, images[:4], seed) for seed in range(schedules)]
    estimates = estimate(model, network, images[:4], keeps=KEEPS, bits=BITS[:-1], batch=4)
    labels = torch.zeros(8, dtype=torch.long)
    evaluator = build_evaluator(
        model, network, images[:8], images[8:], labels, estimates, positions=512
    )
    begun = time.perf_counter()
    measured = evaluator.evaluate(_random(network, np.random.default_rng(0)))
    evaluated = time.perf_counter() - begun
    return {
        "network": name,
        "layers": len(network.layers),
        "groups": len(network.groups),
        "protected": sum(bool(group.protected) for group in network.groups.values()),
        "seconds": round(seconds, 1),
        "memory_mb": round(memory),
        "dense_bytes": evaluator.dense.bytes,
        "masked_cut": max(run["masked_cut"] for run in runs),
        "cut_reloaded": max(run["cut_reloaded"] for run in runs),
        "claimed": [run["claimed"] for run in runs],
        "on_disk": [run["on_disk"] for run in runs],
        "evaluate_s": round(evaluated, 2),
        "evaluator": "whole network" if evaluator.slow else "incremental",
        "finite": bool(np.isfinite(measured.kl)),
        "why": next(iter(network.unread.values()), ""),
    }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ("network", "layers", "groups", "protected", "seconds", "memory_mb")
    for column in (*columns, "masked_cut", "cut_reloaded", "claimed", "on_disk", "evaluate_s"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for row in rows:
        table.add_row(
            *(f"{row[c]:,}" if c != "network" else row[c] for c in columns),
            f"{row['masked_cut']:.1e}",
            f"{row['cut_reloaded']:.1e}",
            f"{row['claimed'][0]:,}",
            f"{row['on_disk'][0]:,}",
            f"{row['evaluate_s']:.2f}{' *' if row['evaluator'] != 'incremental' else ''}",
        )
    Console(width=140).print(table)
    if any(row["evaluator"] != "incremental" for row in rows):
        print("* cannot be traced by torch.fx: the whole network runs at every step")


def _with_earlier(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The new rows, and the result file's of the networks that were not asked for; each with the
    commit that it was made at."""
    commit = results.commit()
    found = {row["network"]: {**row, "commit": commit} for row in rows}
    path = results.FOLDER / "families.json"
    if path.exists():
        earlier = json.loads(path.read_text())
        for row in earlier["rows"]:
            found.setdefault(row["network"], {"commit": earlier["commit"], **row})
    return [found[name] for name in FAMILIES if name in found]


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=FAMILIES)
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--reload", nargs=2, metavar=("DIR", "FACTORY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.reload:
        return reload(Path(args.reload[0]), args.reload[1])
    if args.one:
        return print(json.dumps(family(args.one, 1 if args.quick else 3)))
    rows = []
    for name in args.only or FAMILIES:
        # torchvision warns of its own future defaults.
        words = [sys.executable, "-W", "ignore", "-m", "benchmarks.families", "--one", name]
        done = subprocess.run(
            [*words, "--quick"] if args.quick else words, stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            print(f"{name}: failed")
            continue
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        show(rows[-1:])
    rows = _with_earlier(rows)
    show(rows)
    exact = [r for r in rows if max(r["masked_cut"], r["cut_reloaded"]) <= LIMIT]
    off = max(abs(c - d) / d for r in rows for c, d in zip(r["claimed"], r["on_disk"], strict=True))
    print(f"{len(exact)} of {len(FAMILIES)} exact to {LIMIT:g}")
    figures = {
        "families_exact": results.figure([len(exact)], "networks"),
        "largest_difference": results.figure(
            [max(max(r["masked_cut"], r["cut_reloaded"]) for r in rows)], "relative"
        ),
        "bytes_off": results.figure([off], "fraction"),
        "slowest_structure": results.figure([max(r["seconds"] for r in rows)], "s"),
        "largest_memory": results.figure([max(r["memory_mb"] for r in rows)], "MB"),
    }
    print(results.write("families", figures, rows))


if __name__ == "__main__":
    main()
