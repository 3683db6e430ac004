"""The ONNX graph of a compressed network: weights as low-bit integers, nothing that only explains.

A b-bit weight is kept in the narrowest integer type that onnxruntime's CPU kernels read, under a
Cast to float and a Mul by one scale a channel:

| bits | type | weight |
| ---- | ---- | ------ |
| 1, 2 | INT2 (opset 25) | (2 q + 1) * scale: Cast, Mul, Add, Mul; q = -2 ... 1 |
| 3, 4 | INT4 (opset 21) | q * scale |
| 5-8  | INT8 | q * scale |

Why not DequantizeLinear: a session of onnxruntime with default options keeps it in the graph,
computes it at every run (1.4 to 5 times the dense network's time, measured) and joins it to a
MatMul that rounds its inputs to 8 bits (1e-3 of the output). Cast and Mul of constants it folds
when it loads the file. With int8 activations DequantizeLinear is what makes operators integer.

Shapes: w_O... and q_O... have O output channels first; scale_O.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from rlcompress.core.errors import UserError
from rlcompress.core.quant import encode, fake_quantize
from rlcompress.core.schedule import FULL_PRECISION

#: Opset and IR version: the oldest with INT4, and the oldest with INT2.
INT4_VERSIONS, INT2_VERSIONS = (21, 10), (25, 13)
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
#: What an absent attribute means, where the operators' schemas do not say it.
ABSENT: dict[str, dict[str, int | None]] = {
    "Conv": {"strides": 1, "dilations": 1, "pads": 0, "kernel_shape": None},
    "MaxPool": {"strides": 1, "dilations": 1, "pads": 0},
    "AveragePool": {"strides": 1, "dilations": 1, "pads": 0},
    "BatchNormalization": {"momentum": None},
}


@dataclass(frozen=True)
class Codes:
    """A layer's weight: the float32 w_O..., and how it is stored."""

    weight: np.ndarray
    codes: np.ndarray  # int8, the weight's shape
    scale: np.ndarray  # float32 (O,), not negative
    bits: int


def layer_codes(
    model: nn.Module, bits: Mapping[str, int], scales: Mapping[str, torch.Tensor]
) -> dict[str, Codes]:
    """Layer -> codes of all layers below 32 bits.

    Raises UserError for a layer that the model lacks, without a scale of its own, or whose
    weights are not codes x scale.
    """
    found: dict[str, Codes] = {}
    seen: set[int] = set()
    for name, width in bits.items():
        if width == FULL_PRECISION:
            continue
        try:
            parameter = model.get_submodule(name).weight
        except AttributeError as error:
            raise UserError(f"layer {name!r}: the network has no such layer") from error
        weight = parameter.detach().cpu()  # type: ignore[union-attr, operator]
        scale = scales[name].detach().cpu().float() if name in scales else torch.zeros(0)
        if scale.shape != weight.shape[:1]:
            raise UserError(f"layer {name!r}: {len(weight)} channels, {scale.numel()} scales")
        if not torch.equal(fake_quantize(weight, scale, width), weight):
            raise UserError(f"layer {name!r}: its weights are not {width}-bit codes x scale")
        if id(parameter) in seen:  # tied to another layer: stored once
            continue
        seen.add(id(parameter))
        codes = encode(weight, scale, width).numpy().astype(np.int8)
        # Whose scales are negative gets them here: the codes' range is symmetric.
        sign = np.where(scale.numpy() < 0, -1, 1).astype(np.int8)
        codes = codes * sign.reshape(-1, *[1] * (codes.ndim - 1))
        found[name] = Codes(weight.numpy(), codes, np.abs(scale.numpy()), width)
    return found


def versions(bits: Mapping[str, int]) -> tuple[int, int]:
    """The opset and the IR version that these bits need."""
    return INT2_VERSIONS if min(bits.values(), default=8) <= 2 else INT4_VERSIONS


def _find(graph: Any, name: str, weight: np.ndarray) -> tuple[Any, bool]:
    """The value that holds a layer's weight, and whether it holds the transpose."""
    first = graph.initializers.get(f"{name}.weight")
    others = [value for value in graph.initializers.values() if value is not first]
    for value in [first, *others]:  # a tied or traced weight has another name
        if value is None or value.const_value.size != weight.size:
            continue
        array = value.const_value.numpy()
        if np.array_equal(array, weight):
            return value, False
        if weight.ndim == 2 and np.array_equal(array, weight.T):
            return value, True
    raise UserError(f"layer {name!r}: its weight is not in the exported ONNX graph")


def _transposes(value: Any) -> list[Any]:
    """The Transpose nodes that turn a matrix round, if nothing else uses it."""
    nodes = [use.node for use in value.uses()]
    turn = all(
        node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]
        for node in nodes
    )
    return nodes if turn else []


def store_codes(model: Any, layers: Mapping[str, Codes], *, int8: bool = False) -> None:
    """Replaces the layers' float weights in `model` (onnx_ir) by codes and what restores them.

    A matrix that is only used transposed is stored transposed: no run has to turn it round.

    int8  keep every layer in INT8 under a DequantizeLinear, whatever its bits
    Raises UserError if a layer's weight is not in the graph.
    """
    import ml_dtypes
    import onnx_ir as ir
    from onnx_ir.passes import common

    ir.passes.Sequential(
        common.InlinePass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    )(model)
    graph = model.graph

    def constant(name: str, array: Any) -> Any:
        value = ir.val(name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
        graph.register_initializer(value)
        return value

    shared: list[Any] = []
    for name, layer in layers.items():
        value, turned = _find(graph, name, layer.weight)
        transposes = _transposes(value)
        turned ^= bool(transposes)
        codes, axis = (layer.codes.T, 1) if turned else (layer.codes, 0)
        if int8:
            q = constant(f"{name}.codes", codes.astype(np.int8))
            scale = constant(f"{name}.scale", layer.scale)
            nodes = [ir.node("DequantizeLinear", [q, scale], {"axis": axis})]
        else:
            two_bits = layer.bits <= 2
            kind = ml_dtypes.int2 if two_bits else ml_dtypes.int4 if layer.bits <= 4 else np.int8
            stored = (codes - 1) // 2 if two_bits else codes
            q = constant(f"{name}.codes", stored.astype(kind))
            across = [-1 if i == axis else 1 for i in range(codes.ndim)]
            scale = constant(f"{name}.scale", layer.scale.reshape(across))
            nodes = [ir.node("Cast", [q], {"to": ir.DataType.FLOAT})]
            if two_bits:
                shared = shared or [constant(f"code.{n}", np.array(n, np.float32)) for n in (2, 1)]
                nodes.append(ir.node("Mul", [nodes[-1].outputs[0], shared[0]]))
                nodes.append(ir.node("Add", [nodes[-1].outputs[0], shared[1]]))
            nodes.append(ir.node("Mul", [nodes[-1].outputs[0], scale]))
        for node in nodes:
            node.outputs[0].dtype = ir.DataType.FLOAT
            node.outputs[0].shape = ir.Shape(codes.shape)
        graph.insert_before(graph[0], nodes)
        for old in [node.outputs[0] for node in transposes] or [value]:
            old.replace_all_uses_with(nodes[-1].outputs[0])
        graph.remove(transposes, safe=True)
        del graph.initializers[value.name]


def simplify(model: Any) -> None:
    """Folds constants and fuses what the exporter left apart; the stored weights stay."""
    import onnx_ir as ir
    from onnxscript import optimizer

    low = (ir.DataType.INT2, ir.DataType.INT4, ir.DataType.INT8)

    def restores(node: Any) -> bool:
        return node.op_type in ("Cast", "DequantizeLinear") and node.inputs[0].dtype in low

    optimizer.optimize_ir(model, should_fold=lambda node: False if restores(node) else None)


def _graphs(graph: Any) -> Iterator[Any]:
    """A GraphProto and those inside its nodes' attributes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                if inner.node:
                    yield from _graphs(inner)


def _implied(node: Any, attribute: Any, opset: int) -> bool:
    """Whether the node means the same without the attribute."""
    import onnx

    if attribute.ref_attr_name or node.domain:
        return False
    value = onnx.helper.get_attribute_value(attribute)
    absent = ABSENT.get(node.op_type, {})
    if attribute.name in absent:
        wanted = absent[attribute.name]
        return wanted is None or all(v == wanted for v in value)
    default = onnx.defs.get_schema(node.op_type, opset).attributes[attribute.name].default_value
    return bool(default.name) and onnx.helper.get_attribute_value(default) == value


def _clear(message: Any, *fields: str) -> None:
    for field in fields:
        message.ClearField(field)


def slim(model: Any) -> None:
    """Removes in place what a ModelProto needs not: explanations, long names, default values.

    A small network's file would be mostly that. The names of inputs and outputs stay.
    """
    import onnx

    opset = next(o.version for o in model.opset_import if not o.domain)
    keep = {value.name for value in [*model.graph.input, *model.graph.output]} | {""}
    names: dict[str, str] = {}

    def short(name: str) -> str:
        if name in keep:
            return name
        if name not in names:
            number, text = len(names), ""
            while not text or number:
                number, digit = divmod(number, len(ALPHABET))
                text += ALPHABET[digit]
            names[name] = text
        return names[name]

    # An empty text takes room, a cleared one none.
    _clear(model, "doc_string", "producer_version", "domain", "metadata_props")
    model.producer_name = "rlcompress"
    for graph in _graphs(model.graph):
        graph.name = "g"
        _clear(graph, "doc_string", "metadata_props", "value_info", "quantization_annotation")
        for named in [*graph.input, *graph.output, *graph.initializer]:
            _clear(named, "doc_string", "metadata_props")
            named.name = short(named.name)
        for tensor in graph.initializer:
            if not tensor.HasField("raw_data"):
                array = onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        for node in graph.node:
            _clear(node, "name", "doc_string", "metadata_props", "overload")
            if not node.domain:
                _clear(node, "domain")
            node.input[:] = [short(name) for name in node.input]
            node.output[:] = [short(name) for name in node.output]
            while node.input and not node.input[-1]:
                node.input.pop()
            stated = [a for a in node.attribute if not _implied(node, a, opset)]
            del node.attribute[:]
            node.attribute.extend(stated)
            for attribute in node.attribute:
                _clear(attribute, "doc_string")


def container_bytes(model: Any) -> int:
    """Bytes of a ModelProto's initializers alone."""
    return sum(len(tensor.raw_data) for g in _graphs(model.graph) for tensor in g.initializer)
