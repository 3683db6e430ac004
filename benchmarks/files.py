"""Files at the same schedule: rlcompress next to torch-pruning and onnxruntime's quantizer.

    uv run python -m benchmarks.files                 # about 20 minutes on one core
    uv run python -m benchmarks.files --quick         # about 5: fewer images, 2,000 to test on
    uv run python -m benchmarks.files --quick --only mobilenetv2

VGG-19 (width 0.25) and MobileNetV2 (width 0.5, stem stride 2), one trained network each, at 50 % of
the channels and 8 bits everywhere; Fashion-MNIST, 32 pixels. To be cheap, training sees 10,000 of
the 55,000 images (2 and 5 epochs): the dense networks are not good, and not the point.

ours           `network.uniform(keep=0.5, bits=8)`, reconstructed without labels: packed
               safetensors, ONNX with float activations, ONNX with int8 activations.
torch-pruning  `BasePruner` at `pruning_ratio=0.5` in every layer but the last, by magnitude or by
               Taylor expansion, whichever is better on 1,000 validation images; batch norms
               re-estimated: `torch.save` of the state dict, fp32 ONNX by `torch.onnx.export`,
               int8 ONNX by `quantize_static` (QDQ, per channel, int8 weights, uint8 activations;
               MinMax or Entropy, whichever is better on the same validation images).

Both recover on the same 512 training images (torch-pruning's Taylor expansion with their labels)
and calibrate activations on the first 256 of them. Recovery is not the same: reconstruction
refits weights too, which torch-pruning does not offer. `trained` adds one epoch of the 10,000
images to both, same order and recipe, in float before anything is quantized; `qat` is ours with
that epoch quantization-aware instead, as tickets are trained (torch-pruning has no such thing).

`bytes` are on disk; `/packed` and `/onnx` say how many times smaller than the dense network's
packed fp32 artifact and fp32 ONNX; `/tensors` is the file against the tensors in it (ONNX only):
the exporter's remarks are part of what it writes. `int8 bare` is the baseline's int8 ONNX without
them. `params` counts before batch norms are folded; each tool draws groups and rounds on its own,
so 50 % of the channels need not be the same weights. `top1` is what the file itself scores on the
10,000 test images: .onnx in onnxruntime, the others read back into torch. `ms` are medians for 1
and 64 images in onnxruntime, one thread, all files of a network taking turns; files for torch have
none. Bytes are not speed: the packed file and the ONNX with float activations compute in float32.
"""

from __future__ import annotations

import argparse
import copy
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch_pruning as tp
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import CalibrationDataReader
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from benchmarks import results
from rlcompress import core
from rlcompress.core.data import Split, fashion_mnist
from rlcompress.core.export import _quiet, _session, export_onnx, latency
from rlcompress.core.onnx_graph import container_bytes
from rlcompress.core.quant import mse_clip, scale_of
from rlcompress.core.schedule import FULL_PRECISION, Schedule
from rlcompress.core.ticket import CutNetwork, Lesson, Task, in_process
from rlcompress.core.train import Recipe, logits_of, top1, train

#: Network -> arguments, epochs of the dense training.
NETWORKS = {"vgg19": ({"width": 0.25}, 2), "mobilenetv2": ({"width": 0.5, "stem_stride": 2}, 5)}
SHAPE = (1, 32, 32)
KEEP, BITS = 0.5, 8
TRAIN, FIT, CALIBRATE, VALIDATE = 10_000, 512, 256, 1000
#: Largest difference of top-1 between our ONNX (float activations) and our packed file.
POINTS = 0.2


class Images(CalibrationDataReader):
    def __init__(self, images: torch.Tensor) -> None:
        self.parts: Iterator[torch.Tensor] = iter(images.split(64))

    def get_next(self) -> dict[str, np.ndarray] | None:
        part = next(self.parts, None)
        return None if part is None else {"images": part.numpy()}


def run_onnx(path: Path, split: Split) -> torch.Tensor:
    """Logits (N, classes) of a file in onnxruntime with one thread, else default options."""
    session = _session(path, 1)
    feeds = (split.images(slice(at, at + 64)).numpy() for at in range(0, len(split), 64))
    return torch.from_numpy(np.concatenate([session.run(None, {"images": x})[0] for x in feeds]))


def accuracy(logits: torch.Tensor, split: Split) -> float:
    return float((logits.argmax(1) == split.labels_N).float().mean())


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


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

    def add(self, method: str, kind: str, path: Path, params: int, logits: torch.Tensor) -> None:
        """A row; `logits` are the file's own on the test images."""
        tensors = container_bytes(onnx.load(path)) if path.suffix == ".onnx" else None
        row = {"network": self.name, "method": method, "file": kind, "path": path}
        row |= {"bytes": path.stat().st_size, "tensor_bytes": tensors, "params": params}
        row |= {"accuracy": accuracy(logits, self.test), "ms_1": None, "ms_64": None}
        self.rows.append(row)
        print(f"{self.name}, {method}, {kind}: {row['bytes']:,} bytes", flush=True)

    def export(self, model: nn.Module, path: Path) -> None:
        """fp32 ONNX as torch writes it."""
        model = copy.deepcopy(model).to(memory_format=torch.contiguous_format).eval()
        names = {"input_names": ["images"], "output_names": ["logits"]}
        names["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
        with _quiet():
            program = torch.onnx.export(model, (self.fit.images(slice(2)),), dynamo=True, **names)
            program.save(str(path), external_data=False)

    # --- dense -------------------------------------------------------------------------------

    def dense(self) -> None:
        params = count(self.model)
        self.network = core.build_network(self.model, self.fit.images(slice(0, 1)))
        folder = self._folder("dense")
        packed, saved, written = (folder / f"weights.{e}" for e in ("safetensors", "pt", "onnx"))
        whole = CutNetwork(copy.deepcopy(self.model), {})
        core.write_network(packed, whole, self.network, self.ref, Schedule())
        self.add(
            "dense", "packed", packed, params, logits_of(core.load_artifact(packed), self.test)
        )
        torch.save(self.model.state_dict(), saved)
        self.add("dense", "state dict", saved, params, logits_of(self.model, self.test))
        self.export(self.model, written)
        self.add("dense", "fp32 onnx", written, params, run_onnx(written, self.test))

    # --- ours --------------------------------------------------------------------------------

    def ours(self) -> None:
        images, score = self.fit.images(), self.validation  # whose score is not asked for
        estimates = core.estimate(self.model, self.network, images, seed=self.seed)
        few = score.images(slice(0, 64)), score.labels_N[:64]
        evaluator = core.build_evaluator(
            self.model, self.network, images, *few, estimates, seed=self.seed
        )
        schedule = self.network.uniform(keep=KEEP, bits=BITS)
        small = core.fitted_network(self.model, evaluator, schedule)
        task = Task(copy.deepcopy(small), self.network, schedule)
        self._our_files("ours", small, schedule)
        whole = self.network.uniform(keep=KEEP, bits=FULL_PRECISION)
        model = core.fitted_network(self.model, evaluator, whole).model
        train(model, self.train, self.lesson, seed=self.seed)
        modules, scales = dict(model.named_modules()), {}
        for name in self.network.layers:
            weight = modules[name].weight.detach()
            scales[name] = scale_of(weight, mse_clip(weight, BITS), BITS)
        self._our_files("ours, trained", CutNetwork(model, scales), schedule)
        lesson = Lesson(self.train, self.validation, self.lesson, self.seed, device="cpu")
        *_, (_, last) = in_process([(task, None)], lesson)
        self._our_files("ours, qat", task.result(last), schedule)

    def _our_files(self, method: str, small: CutNetwork, schedule: Schedule) -> None:
        folder, params = self._folder(method), count(small.model)
        path = folder / "weights.safetensors"
        core.write_network(path, small, self.network, self.ref, schedule)
        artifact = core.read_artifact(path)
        packed = logits_of(artifact.model, self.test)
        self.add(method, "packed", path, params, packed)
        parts = artifact.model, artifact.bits, artifact.scales, self.fit.images(slice(CALIBRATE))
        for kind, activations in (("onnx", "float"), ("int8 onnx", "int8")):
            written = folder / f"{activations}.onnx"
            try:
                file = export_onnx(*parts, written, activations=activations)
            except core.UserError as error:  # it refuses files that change too many answers
                print(f"{self.name}, {method}, {kind}: REFUSED: {error}")
                continue
            theirs = run_onnx(written, self.test)
            self.add(method, kind, written, params, theirs)
            points = 100 * (accuracy(theirs, self.test) - accuracy(packed, self.test))
            same = float((theirs.argmax(1) == packed.argmax(1)).float().mean())
            off = float((theirs - packed).abs().max() / packed.abs().max())
            over = file.bytes / file.container_bytes
            self.rows[-1] |= {"points_from_packed": points, "same_answer": same}
            self.rows[-1] |= {"difference": off, "bytes_over_container": over}

    # --- torch-pruning -----------------------------------------------------------------------

    def _pruned(self, importance: tp.importance.Importance) -> nn.Module:
        """Cut by torch-pruning, batch norms re-estimated on the fitted images."""
        model = copy.deepcopy(self.model)
        images = self.fit.images()
        F.cross_entropy(model(images), self.fit.labels_N).backward()
        last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        tp.pruner.BasePruner(
            model, images[:1], importance, pruning_ratio=1 - KEEP, ignored_layers=[last]
        ).step()
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average
        with torch.no_grad():
            model.train()(images)
        for norm in norms:
            norm.momentum = 0.1  # the default, as before
        return model.eval()

    def baseline(self) -> None:
        rules = (tp.importance.MagnitudeImportance(p=2), tp.importance.TaylorImportance())
        models = [self._pruned(rule) for rule in rules]
        scores = [top1(model, self.validation) for model in models]
        print(f"torch-pruning on validation: magnitude {scores[0]:.3f}, Taylor {scores[1]:.3f}")
        model = models[int(np.argmax(scores))]
        self._their_files("torch-pruning", model)
        train(model, self.train, self.lesson, seed=self.seed)
        self._their_files("torch-pruning, trained", model)

    def _their_files(self, method: str, model: nn.Module) -> None:
        folder, params = self._folder(method), count(model)
        saved, written, ready, bare = (
            folder / n for n in ("weights.pt", "float.onnx", "ready.onnx", "bare.onnx")
        )
        torch.save(model.state_dict(), saved)
        self.add(method, "state dict", saved, params, logits_of(model, self.test))
        self.export(model, written)
        self.add(method, "fp32 onnx", written, params, run_onnx(written, self.test))
        scores = {}
        for rule in (CalibrationMethod.MinMax, CalibrationMethod.Entropy):
            path, reader = folder / f"{rule.name}.onnx", Images(self.fit.images(slice(CALIBRATE)))
            options = {"per_channel": True, "calibrate_method": rule}
            options |= {"weight_type": QuantType.QInt8, "activation_type": QuantType.QUInt8}
            with _quiet():
                quant_pre_process(str(written), str(ready))
                quantize_static(str(ready), str(path), reader, QuantFormat.QDQ, **options)
            scores[path] = accuracy(run_onnx(path, self.validation), self.validation)
        best = max(scores, key=lambda path: scores[path])
        print(
            f"quantize_static on validation: { {p.stem: round(s, 3) for p, s in scores.items()} }"
        )
        self.add(method, "int8 onnx", best, params, run_onnx(best, self.test))
        bare.write_bytes(_bare(onnx.load(best)))
        self.add(method, "int8 bare", bare, params, run_onnx(bare, self.test))

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

    def _folder(self, method: str) -> Path:
        folder = self.folder / method.replace(", ", "_")
        folder.mkdir()
        return folder


def _bare(model: onnx.ModelProto) -> bytes:
    """The file without metadata, remarks and recorded shapes."""
    graph = model.graph
    del model.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    for thing in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        del thing.metadata_props[:]
        thing.doc_string = ""
    return model.SerializeToString()


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    words = ("network", "method", "file")
    columns = ("bytes", "/packed", "/onnx", "/tensors", "params", "top1", "ms b1", "ms b64")
    for column in (*words, *columns):
        table.add_column(column, justify="left" if column in words else "right")

    for row in rows:
        share = row["tensor_bytes"] and row["bytes"] / row["tensor_bytes"]
        table.add_row(
            *(row[word] for word in words),
            f"{row['bytes']:,}",
            *(f"{row[f'smaller_than_{dense}']:.2f}" for dense in ("packed", "onnx")),
            f"{share:.3f}" if share else "-",
            f"{row['params']:,}",
            f"{100 * row['accuracy']:.2f}",
            *(f"{row[key]:.3f}" if row[key] else "-" for key in ("ms_1", "ms_64")),
        )
    Console(width=140).print(table)


def show_agreements(rows: list[dict[str, Any]]) -> bool:
    """How far our ONNX files lie from the packed one; whether the float ones agree."""
    print("\nours, ONNX against the packed file on the test images:")
    agree = True
    for row in [r for r in rows if "difference" in r]:
        fine = row["file"] != "onnx" or abs(row["points_from_packed"]) <= POINTS
        agree = agree and fine
        print(
            f"  {row['network']}, {row['method']}, {row['file']}: top-1 "
            f"{row['points_from_packed']:+.2f} points, same answer {row['same_answer']:.2%}, "
            f"largest logit difference {row['difference']:.1e}, bytes / container_bytes "
            f"{row['bytes_over_container']:.3f}{'' if fine else f': MORE THAN {POINTS} POINTS OFF'}"
        )
    return agree


def show_losses(rows: list[dict[str, Any]]) -> None:
    """Where the baseline's int8 file is smaller, better or faster than a file of ours."""
    print("\nwhere ours is behind the baseline's int8 ONNX (ours / theirs):")
    for theirs in [r for r in rows if r["method"][:5] == "torch" and r["file"] == "int8 onnx"]:
        trained = "trained" in theirs["method"]
        for row in [r for r in rows if r["network"] == theirs["network"] and "ours" in r["method"]]:
            if (row["method"] != "ours") != trained:
                continue
            words = []
            for key, sign in (("bytes", 1), ("accuracy", -1), ("ms_1", 1), ("ms_64", 1)):
                if row[key] is not None and sign * row[key] > sign * theirs[key]:
                    words.append(f"{key} {row[key]:.4g} / {theirs[key]:.4g}")
            if words:
                print(f"  {row['network']}, {row['method']}, {row['file']}: {'; '.join(words)}")


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    made = {}
    for row in rows:
        if (row["method"], row["file"]) == ("dense", "packed"):
            dense = row["accuracy"]
        words = f"{row['method']} {row['file']} {row['network']}"
        name = re.sub("[^a-z0-9]+", "_", words.replace("int8 onnx", "int8"))
        made[f"bytes_{name}"] = results.figure([row["bytes"]], "bytes")
        made[f"points_{name}"] = results.figure([100 * (row["accuracy"] - dense)], "points")
    floats = [row for row in rows if row["file"] == "onnx"]
    points = max(abs(row["points_from_packed"]) for row in floats)
    made["onnx_packed_points"] = results.figure([points], "points")
    largest = max(row["difference"] for row in floats)
    made["onnx_packed_difference"] = results.figure([largest], "relative")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=NETWORKS)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in [args.only] if args.only else NETWORKS:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            one = Comparison(name, args.seed, args.quick, Path(folder))
            one.dense()
            one.ours()
            one.baseline()
            one.finish()
        rows += one.rows
        print(f"{name}: {time.monotonic() - begun:.0f} s")
    show(rows)
    agree = show_agreements(rows)
    show_losses(rows)
    if not args.quick and not args.only:
        print(results.write("files", figures(rows), rows))
    if not agree:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
