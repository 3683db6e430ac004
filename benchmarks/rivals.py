"""What others would do: Torch-Pruning at one ratio or FastNAS at a number of parameters, then
onnxruntime's static int8."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import torch
import torch_pruning as tp
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

from rlcompress.core.data import Split
from rlcompress.core.export import _quiet
from rlcompress.core.train import top1

#: FastNAS keeps multiples of so many.
CHANNELS = 8


def export_float(model: nn.Module, images: torch.Tensor, path: Path) -> None:
    """fp32 ONNX as torch writes it; `images` (2, C, H, W) show the shape."""
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format).eval()
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    names["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
    with _quiet():
        program = torch.onnx.export(model, (images,), dynamo=True, **names)
        program.save(str(path), external_data=False)


def quantize_int8(written: Path, images: torch.Tensor, folder: Path) -> Path:
    """Static int8 of an fp32 ONNX file, weights by channel, ranges from `images`."""
    ready, int8 = folder / "ready.onnx", folder / "int8.onnx"
    feeds = ({"images": x.numpy()} for x in images.split(64))
    reader: Any = SimpleNamespace(get_next=lambda: next(feeds, None))
    kinds = {"weight_type": QuantType.QInt8, "activation_type": QuantType.QUInt8}
    with _quiet():
        quant_pre_process(str(written), str(ready))
        quantize_static(ready, int8, reader, QuantFormat.QDQ, per_channel=True, **kinds)
    return int8


def bare(path: Path) -> bytes:
    """The file without metadata, remarks and recorded shapes."""
    model = onnx.load(path)
    graph = model.graph
    del graph.value_info[:]
    for thing in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        del thing.metadata_props[:]
        thing.doc_string = ""
    data: bytes = model.SerializeToString()
    return data


def pruned(model: nn.Module, fit: Split, keep: float, validation: Split) -> nn.Module:
    """Cut to one ratio by Torch-Pruning, by weights or by Taylor, whichever validates better; batch
    norms re-estimated on the images of `fit`."""
    rules = (tp.importance.MagnitudeImportance(p=2), tp.importance.TaylorImportance())
    cut = [_pruned(model, fit, keep, rule) for rule in rules]
    return max(cut, key=lambda one: top1(one, validation))


def _pruned(
    model: nn.Module, fit: Split, keep: float, importance: tp.importance.Importance
) -> nn.Module:
    model, images = copy.deepcopy(model), fit.images()
    nn.functional.cross_entropy(model(images), fit.labels_N).backward()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    options = {"pruning_ratio": 1 - keep, "ignored_layers": linear[-1:]}
    tp.pruner.BasePruner(model, images[:1], importance, **options).step()
    return _settled(model, images)


class OutOfReachError(ValueError):
    """No network so small is in the search space."""


def fast_nas(
    model: nn.Module, fit: Split, share: float, validation: Split, folder: Path
) -> nn.Module:
    """Cut to a share of its parameters by nvidia-modelopt's FastNAS, which tries every layer's
    widths on `validation`, in steps of 8 channels as ours; `folder` keeps what it measured for
    another share. Batch norms re-estimated on the images of `fit`. Raises OutOfReachError for a
    share that its search space does not have."""
    import modelopt.torch.prune as mtp

    steps = mtp.fastnas.FastNASConfig()
    steps["nn.Conv2d"]["*"]["channel_divisor"] = CHANNELS
    steps["nn.BatchNorm2d"]["*"]["feature_divisor"] = CHANNELS
    steps["nn.Linear"]["*"]["feature_divisor"] = CHANNELS
    images = fit.images()
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # it wants no other
    config = {
        "data_loader": [(some,) for some in images.split(64)],
        "collect_func": lambda some: some,
        "score_func": lambda one: 100 * top1(one, validation),
        "checkpoint": str(folder / "fastnas.pt"),
    }
    limit = {"params": f"{100 * share:g}%"}
    try:
        found = mtp.prune(model, [("fastnas", steps)], limit, images[:1], config=config)
    except ValueError as error:
        if "constraints" not in str(error):
            raise
        raise OutOfReachError(f"{share:.1%} of the parameters: {error}") from error
    return _settled(found[0], images)


def _settled(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """With batch norms of nothing but these images."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    for norm in norms:
        norm.momentum = 0.1  # as before
    return model.eval()
