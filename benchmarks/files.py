"""Files at the same schedule: rlcompress next to torch-pruning and onnxruntime's quantizer.

    uv run python -m benchmarks.files                # about 10 minutes on one core
    uv run python -m benchmarks.files --quick        # about 6: fewer images, 2,000 to test on

VGG-19 (width 0.25) and MobileNetV2 (width 0.5, stem stride 2), one trained network each, at 50 % of
the channels and 8 bits; Fashion-MNIST, 32 pixels. To be cheap, training sees 10,000 of the 55,000
images (2 and 5 epochs): the dense networks are not good, and not the point.

ours           `network.uniform(keep=0.5, bits=8)`, reconstructed without labels
torch-pruning  `BasePruner` at `pruning_ratio=0.5` in every layer but the last, batch norms
               re-estimated; magnitude or Taylor, whichever is better on 1,000 validation images;
               `int8 onnx` by `quantize_static` (QDQ, per channel, int8 weights, uint8
               activations, MinMax: on the validation images Entropy scored the same)

Both recover on the same 512 training images (Taylor with their labels) and calibrate activations on
256 of them. Reconstruction refits weights too, which torch-pruning does not offer. `trained` adds
an epoch of the 10,000 images to both, in float before anything is quantized; `qat` is ours with
that epoch quantization-aware, as tickets are trained.

`/packed`, `/onnx`: times smaller than the dense network's packed fp32 artifact and fp32 ONNX.
`/tensors`: an ONNX file against its tensors; the exporter's remarks are part of what it writes,
`int8 bare` is the baseline's int8 ONNX without them. `params`: before batch norms are folded; 50 %
of the channels need not be the same weights for each tool. `top1`: of the file itself on the 10,000
test images, .onnx in onnxruntime, others read back into torch. `ms`: medians for 1 and 64 images in
onnxruntime, one thread, files in turns. `Δtop1` (points), `Δlogits` (largest, of the largest logit)
and `same` (share of answers): our ONNX against our packed file; over 0.2 points with float
activations is an error. Bytes are not speed: all but int8 ONNX compute in float32.
"""

from __future__ import annotations

import copy
import re
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import results
from benchmarks.rivals import bare, export_float, pruned, quantize_int8
from rlcompress import core
from rlcompress.core.data import Split, fashion_mnist
from rlcompress.core.export import _session, export_onnx, latency
from rlcompress.core.onnx_graph import container_bytes
from rlcompress.core.quant import mse_clip, scale_of
from rlcompress.core.schedule import FULL_PRECISION, Schedule
from rlcompress.core.ticket import CutNetwork, Lesson, Task, in_process
from rlcompress.core.train import Recipe, logits_of, train

#: Network -> arguments, epochs of the dense training.
NETWORKS = {"vgg19": ({"width": 0.25}, 2), "mobilenetv2": ({"width": 0.5, "stem_stride": 2}, 5)}
SHAPE = (1, 32, 32)
KEEP, BITS = 0.5, 8
TRAIN, FIT, CALIBRATE, VALIDATE = 10_000, 512, 256, 1000
#: Key of a row -> title, form.
COLUMNS = {
    **{key: (key, "") for key in ("network", "method", "file")},
    **{"bytes": ("bytes", ","), "smaller_than_packed": ("/packed", ".2f")},
    **{"smaller_than_onnx": ("/onnx", ".2f"), "share": ("/tensors", ".3f")},
    **{"params": ("params", ","), "accuracy": ("top1", ".2%")},
    **{"ms_1": ("ms b1", ".3f"), "ms_64": ("ms b64", ".2f"), "same_answer": ("same", ".2%")},
    **{"points_from_packed": ("Δtop1", "+.2f"), "difference": ("Δlogits", ".1e")},
}


def run_onnx(path: Path, split: Split) -> torch.Tensor:
    """Logits (N, classes) of a file in onnxruntime with one thread, else default options."""
    session = _session(path, 1)
    feeds = (split.images(slice(at, at + 64)).numpy() for at in range(0, len(split), 64))
    return torch.from_numpy(np.concatenate([session.run(None, {"images": x})[0] for x in feeds]))


def accuracy(logits: torch.Tensor, split: Split) -> float:
    return float((logits.argmax(1) == split.labels_N).float().mean())


class Comparison:
    """One network's files and rows."""

    def __init__(self, name: str, seed: int, quick: bool, folder: Path) -> None:
        self.name, self.seed, self.folder = name, seed, folder
        args, epochs = NETWORKS[name]
        data = fashion_mnist(size=SHAPE[-1])
        self.ref = core.ModelRef(name, args, data.num_classes, SHAPE)
        self.train = data.train.sample(TRAIN // 5 if quick else TRAIN, seed)
        self.fit = self.train.take(torch.arange(FIT))
        self.validation = data.validation.sample(VALIDATE, seed)
        self.test = data.test.sample(2000, seed) if quick else data.test
        self.lesson = Recipe(epochs=1, batch_size=64, lr=0.02)
        self.model = self.ref.build(seed)
        train(self.model, self.train, Recipe(epochs, batch_size=64, lr=0.05), seed=seed)
        self.model.to(memory_format=torch.contiguous_format)
        self.rows: list[dict[str, Any]] = []

    def add(self, method: str, kind: str, path: Path, model: nn.Module, logits: Any) -> None:
        """A row; `logits` are the file's own on the test images, `model` has its parameters."""
        tensors = container_bytes(onnx.load(path)) if path.suffix == ".onnx" else None
        row: dict[str, Any] = {"network": self.name, "method": method, "file": kind, "path": path}
        row["params"] = sum(p.numel() for p in model.parameters())
        row |= {"bytes": path.stat().st_size, "tensor_bytes": tensors, "ms_1": None, "ms_64": None}
        self.rows.append({**row, "accuracy": accuracy(logits, self.test)})
        print(f"{self.name}, {method}, {kind}: {row['bytes']:,} bytes", flush=True)

    def export(self, model: nn.Module, path: Path) -> None:
        export_float(model, self.fit.images(slice(2)), path)

    def dense(self) -> None:
        model, folder = self.model, self.folder
        self.network = core.build_network(model, self.fit.images(slice(1)))
        packed, written = folder / "weights.safetensors", folder / "weights.onnx"
        same = CutNetwork(copy.deepcopy(model), {}, {})
        core.write_network(packed, same, self.network, self.ref, Schedule())
        read = core.load_artifact(packed)
        self.add("dense", "packed", packed, model, logits_of(read, self.test))
        self.export(model, written)
        self.add("dense", "fp32 onnx", written, model, run_onnx(written, self.test))

    def ours(self) -> None:
        images = self.fit.images()
        estimates = core.estimate(self.model, self.network, images, seed=self.seed)
        few = self.validation.take(torch.arange(64))  # nobody asks for the score
        known = (self.model, self.network, images, few.images(), few.labels_N, estimates)
        evaluator = core.build_evaluator(*known, seed=self.seed)
        schedule, whole = (self.network.uniform(KEEP, bits) for bits in (BITS, FULL_PRECISION))
        small = core.fitted_network(self.model, evaluator, schedule)
        task = Task(copy.deepcopy(small), self.network)
        self._our_files("ours", small, schedule)
        model = core.fitted_network(self.model, evaluator, whole).model
        train(model, self.train, self.lesson, seed=self.seed)
        weights = {name: model.get_submodule(name).weight.detach() for name in self.network.layers}
        scales = {name: scale_of(w, mse_clip(w, BITS), BITS) for name, w in weights.items()}
        self._our_files("ours, trained", CutNetwork(model, scales, schedule.bits), schedule)
        lesson = Lesson(self.train, self.validation, self.lesson, self.seed, device="cpu")
        *_, (_, last) = in_process([(task, None)], lesson)
        self._our_files("ours, qat", task.result(last), schedule)

    def _our_files(self, method: str, small: CutNetwork, schedule: Schedule) -> None:
        folder, model = Path(tempfile.mkdtemp(dir=self.folder)), small.model
        path = folder / "weights.safetensors"
        core.write_network(path, small, self.network, self.ref, schedule)
        artifact = core.read_artifact(path)
        packed = logits_of(artifact.model, self.test)
        self.add(method, "packed", path, model, packed)
        parts = artifact.model, artifact.bits, artifact.scales, self.fit.images(slice(CALIBRATE))
        kinds: tuple[tuple[str, Literal["float", "int8"]], ...] = (
            ("onnx", "float"),
            ("int8 onnx", "int8"),
        )
        for kind, activations in kinds:
            written = folder / f"{activations}.onnx"
            try:
                file = export_onnx(*parts, written, activations=activations)
            except core.UserError as error:  # it refuses files that change too many answers
                print(error)
                continue
            theirs = run_onnx(written, self.test)
            self.add(method, kind, written, model, theirs)
            points = 100 * (accuracy(theirs, self.test) - accuracy(packed, self.test))
            same = float((theirs.argmax(1) == packed.argmax(1)).float().mean())
            off = float((theirs - packed).abs().max() / packed.abs().max())
            self.rows[-1] |= {"points_from_packed": points, "same_answer": same, "difference": off}
            self.rows[-1]["bytes_over_container"] = file.bytes / file.container_bytes

    def baseline(self) -> None:
        model = pruned(self.model, self.fit, KEEP, self.validation)
        self._their_files("torch-pruning", model)
        train(model, self.train, self.lesson, seed=self.seed)
        self._their_files("torch-pruning, trained", model)

    def _their_files(self, method: str, model: nn.Module) -> None:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        saved, written, stripped = (folder / name for name in ("1.pt", "2.onnx", "5.onnx"))
        torch.save(model.state_dict(), saved)
        self.add(method, "state dict", saved, model, logits_of(model, self.test))
        self.export(model, written)
        self.add(method, "fp32 onnx", written, model, run_onnx(written, self.test))
        int8 = quantize_int8(written, self.fit.images(slice(CALIBRATE)), folder)
        self.add(method, "int8 onnx", int8, model, run_onnx(int8, self.test))
        stripped.write_bytes(bare(int8))
        self.add(method, "int8 bare", stripped, model, run_onnx(stripped, self.test))

    def finish(self) -> None:
        """Ratios and latencies."""
        dense = {row["file"]: row["bytes"] for row in self.rows if row["method"] == "dense"}
        run = [row for row in self.rows if row["path"].suffix == ".onnx"]
        for batch in (1, 64):
            seconds = latency([row["path"] for row in run], SHAPE, batch)
            for row, value in zip(run, seconds, strict=True):
                row[f"ms_{batch}"] = 1000 * value
        for row in self.rows:
            row["smaller_than_packed"] = dense["packed"] / row["bytes"]
            row["smaller_than_onnx"] = dense["fp32 onnx"] / row["bytes"]
            del row["path"]


def show(rows: list[dict[str, Any]]) -> None:
    """The table, and where ours is bigger, worse or slower than the baseline's int8 ONNX."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, (title, _) in enumerate(COLUMNS.values()):
        table.add_column(title, justify="right" if number > 2 else "left", no_wrap=True)
    for row in rows:
        share = row["tensor_bytes"] and row["bytes"] / row["tensor_bytes"]
        cells = [({**row, "share": share}.get(key), form) for key, (_, form) in COLUMNS.items()]
        table.add_row(*("-" if cell is None else format(cell, form) for cell, form in cells))
    Console(width=160).print(table)
    print("\nours behind the baseline's int8 ONNX (ours / theirs):")
    int8 = {(r["network"], r["method"]): r for r in rows if r["file"] == "int8 onnx"}
    for row in [r for r in rows if r["method"].startswith("ours")]:
        method = row["method"].replace("ours", "torch-pruning").replace("qat", "trained")
        theirs = int8[row["network"], method]
        for key, sign in (("bytes", 1), ("accuracy", -1), ("ms_1", 1), ("ms_64", 1)):
            if row[key] is not None and sign * row[key] > sign * theirs[key]:
                name = f"{row['network']}, {row['method']}, {row['file']}"
                print(f"  {name}: {key} {row[key]:.4g} / {theirs[key]:.4g}")


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    made = {}
    for row in rows:
        if (row["method"], row["file"]) == ("dense", "packed"):
            dense = row["accuracy"]
        words = f"{row['method']} {row['file']} {row['network']}"
        name = re.sub("[^a-z0-9]+", "_", words.replace("int8 onnx", "int8"))
        made[f"bytes_{name}"] = results.figure([row["bytes"]], "bytes")
        made[f"points_{name}"] = results.figure([100 * (row["accuracy"] - dense)], "points")
    for name, key in (("points", "points_from_packed"), ("difference", "difference")):
        largest = max(abs(row[key]) for row in rows if row["file"] == "onnx")
        made[f"onnx_packed_{name}"] = results.figure([largest], name)
    return made


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            one = Comparison(name, args.seed, args.quick, Path(folder))
            for step in (one.dense, one.ours, one.baseline, one.finish):
                step()
        rows += one.rows
    show(rows)
    print(results.write("files", figures(rows), rows))
    if any(abs(row["points_from_packed"]) > 0.2 for row in rows if row["file"] == "onnx"):
        raise SystemExit("an ONNX file differs from its packed one by more than 0.2 points")


if __name__ == "__main__":
    main()
