"""The packed artifact: a safetensors file in which b-bit weights take b bits.

Its data (`layout.py`) hold the records, then everything in a row: layer by layer in forward order
packed codes, scales, biases (the sizes are in `cost.py`); then the batch norms that no layer
absorbs; then every other float tensor, in the order of the state dict. Integer and complex buffers
are left to the network's constructor: a network with others is refused.

Batch norms are folded: y = gamma (W x + b - mu) / sigma + beta gives |gamma| / sigma x scale, the
sign of gamma in the codes, and one bias a channel. Scales and biases take a byte each (`codec.py`).

Loading runs no code from the file; the network's class comes from the installed package that
the manifest names, and nothing is allocated before lengths and shapes agree.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from rlcompress.core.codec import (
    pack_biases,
    pack_codes,
    pack_float,
    pack_scales,
    unpack_biases,
    unpack_codes,
    unpack_scales,
)
from rlcompress.core.cost import BIAS_BYTES, FLOAT_BYTES, SCALE_BYTES
from rlcompress.core.errors import UserError
from rlcompress.core.fold import fold
from rlcompress.core.graph import Network
from rlcompress.core.layout import ArtifactError, LayerRecord, NormRecord, Table, seal, unseal
from rlcompress.core.models import BUILT_IN, build_model
from rlcompress.core.prune import resize
from rlcompress.core.quant import encode, float_weight, learned_scales
from rlcompress.core.reading import NORMS, leave_out, rest_of
from rlcompress.core.rebuilt import require_kept, skeleton
from rlcompress.core.schedule import FULL_PRECISION, MAX_BITS, MIN_BITS

#: Of a network whose constructor must run for real.
MAX_DENSE_NUMBERS = 2**30


@dataclass(frozen=True)
class ModelRef:
    """How a network is built from nothing: what the manifest holds instead of a pickle.

    factory      one of the networks that rlcompress ships (`models.BUILT_IN`), or
                 "pkg.mod:function" that returns an `nn.Module`
    args         its keyword arguments, as JSON takes them
    num_classes  of the logits;  input_shape  one image's (C, H, W)

    Raises UserError on arguments that JSON does not take.
    """

    factory: str
    args: Mapping[str, Any]
    num_classes: int
    input_shape: tuple[int, ...]  # (C, H, W)

    def __post_init__(self) -> None:
        given = [("num_classes", self.num_classes), ("input_shape", [*self.input_shape])]
        problems = []
        for name, value in (*self.args.items(), *given):
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                problems.append(f"ModelRef {self.factory}: {name} = {value!r}: {error}")
        if problems:
            raise UserError(*problems)

    def build(self, seed: int = 0) -> nn.Module:
        """The dense network in eval mode, its weights drawn by `seed`. Raises UserError where the
        factory is not found, refuses its arguments or does not return a module."""
        return build_model(
            self.factory,
            self.args,
            num_classes=self.num_classes,
            in_channels=self.input_shape[0],
            seed=seed,
        )

    def example(self) -> torch.Tensor:
        """A zero input (1, C, H, W)."""
        return torch.zeros(1, *self.input_shape)


def pack(
    model: nn.Module,
    network: Network,
    ref: ModelRef,
    bits: Mapping[str, int],
    scales: Mapping[str, torch.Tensor],
) -> bytes:
    """The artifact of a cut network as bytes.

    model   the cut network, its weights floats (fake quantizers may still be attached: their
            learned scales are used, and `scales` is for the layers without one)
    bits    layer -> weight bits;  scales  layer -> scale_O

    Raises UserError if a number is not finite, the manifest does not fit the header, or the file
    would lose a tensor (`require_kept`).
    """
    require_kept(model, network, ref)
    scales = {**scales, **learned_scales(model)}
    modules = dict(model.named_modules())
    place = {name: i for i, name in enumerate(network.modules)}
    pieces: list[bytes] = []
    layers: list[LayerRecord] = []
    for name, layer in network.layers.items():
        module = modules[name]
        norm = modules[layer.batch_norm] if layer.batch_norm else None
        factor, bias = fold(module, norm)
        weight = float_weight(module)
        column = (-1, *[1] * (weight.dim() - 1))
        width = bits.get(name, FULL_PRECISION)
        spacing, top, step = 0, 0, 0
        if width == FULL_PRECISION:
            pieces.append(pack_float(weight.double().cpu().numpy() * factor.reshape(column), name))
            if bias is not None:
                pieces.append(pack_float(bias, name))
        else:
            scale = scales[name].to(weight)
            codes = encode(weight, scale, width).cpu().numpy()
            pieces.append(pack_codes(np.where(factor.reshape(column) < 0, -codes, codes), width))
            data, top, spacing = pack_scales(scale.double().cpu().numpy() * np.abs(factor), name)
            pieces.append(data)
            if bias is not None:
                data, step = pack_biases(bias, name)
                pieces.append(data)
        absorbed = place[layer.batch_norm] if layer.batch_norm else -1
        out, fan = weight.shape[:2]
        layers.append(LayerRecord(place[name], absorbed, out, fan, width, spacing, top, step))
    norms = []
    for free in network.norms:
        norm = modules[free.name]
        pieces += [pack_float(getattr(norm, t), free.name) for t in _float_names(norm)]
        norms.append(NormRecord(place[free.name], norm.num_features))  # type: ignore[union-attr, arg-type]
    state = model.state_dict()
    pieces += [pack_float(state[name], name) for name in network.rest]
    table = Table(tuple(layers), tuple(norms), tuple(place[name] for name in network.unused))
    built = [ref.factory, dict(ref.args), ref.num_classes, list(ref.input_shape)]
    return seal(built, table.pack() + b"".join(pieces))


def _float_names(norm: nn.Module) -> list[str]:
    return [name for name, t in norm.state_dict().items() if t.is_floating_point()]


@dataclass(frozen=True)
class Artifact:
    """What a file holds: the network (eval mode, float32, batch norms folded) and, for the layers
    below 32 bits, bits and scale_O >= 0: their weights are integer codes x scale_O."""

    model: nn.Module
    bits: Mapping[str, int]
    scales: Mapping[str, torch.Tensor]


def load_artifact(path: Path | str, *, trust: str | Collection[str] = ()) -> nn.Module:
    """The network in an artifact, in eval mode, float32, batch norms folded.

    Needs no other file. A file may only name the networks that rlcompress ships, or a
    "pkg.mod:factory" that `trust` names, one or several: importing and calling what a file says
    would run whatever its author likes. Raises ArtifactError on a file that names another, or that
    is not an intact artifact.
    """
    return read_artifact(path, trust=trust).model


def read_artifact(path: Path | str, *, trust: str | Collection[str] = ()) -> Artifact:
    """`load_artifact`, with bits and scales."""
    path = Path(path)
    manifest, data = unseal(path)
    try:
        with torch.inference_mode(False):  # plain tensors, wherever it is called from
            factory, args, num_classes, input_shape = manifest["model"]
            # A name is no collection of names: within it "in" would find any piece of it.
            trusted = {trust} if isinstance(trust, str) else {*trust}
            if factory not in BUILT_IN and factory not in trusted:
                raise ArtifactError(
                    f"{path}: it asks for the network {factory!r}; if you trust that code: "
                    f"load_artifact(path, trust=[{factory!r}])"
                )
            ref = ModelRef(str(factory), dict(args), int(num_classes), tuple(map(int, input_shape)))
            table, begin = Table.unpack(data)
            # Without memory behind it: what a file asks for may be anything.
            bare = skeleton(ref)
            artifact = None
            if bare is not None:
                dense = sum(parameter.numel() for parameter in bare.parameters())
                artifact = _fill(_shaped(bare, table), table, data, begin)
                if dense > MAX_DENSE_NUMBERS and not _whole(artifact.model):
                    raise ValueError(f"it asks for a network of {dense} parameters")
            if artifact is None or not _whole(artifact.model):
                artifact = _fill(_shaped(ref.build(), table), table, data, begin)
    except Exception as error:  # whatever a stranger's manifest makes torch or a factory raise
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path}: not an intact rlcompress artifact: {error}") from error
    return artifact


def folded(model: nn.Module, network: Network, ref: ModelRef) -> nn.Module:
    """A float network with its batch norms folded and without what its output does not need."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        path.write_bytes(pack(model, network, ref, {}, {}))
        return load_artifact(path, trust=[ref.factory])


def _whole(model: nn.Module) -> bool:
    """Whether nothing is left without memory: the constructor's own constants would be, in whatever
    lists, dicts and objects the network keeps them."""
    stack: list[Any] = [model]
    seen: dict[int, Any] = {}  # the values too: an id may be used again
    while stack:
        value = stack.pop()
        if isinstance(value, torch.Tensor):
            if value.is_meta:
                return False
            continue
        if id(value) in seen or isinstance(value, type | ModuleType):
            continue
        seen[id(value)] = value
        if isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            stack += value
        stack += getattr(value, "__dict__", {}).values()
    return True


@dataclass
class _Shaped:
    """A network whose layers have the file's shapes, and no weights yet."""

    model: nn.Module
    names: list[str]


def _shaped(model: nn.Module, table: Table) -> _Shaped:
    """Gives the modules of a freshly built network the shapes that the file says, in place.

    Raises ValueError if they are not this network's.
    """
    named = list(model.named_modules())
    modules = [module for _, module in named]

    def pick(index: int, *kinds: type[nn.Module]) -> nn.Module:
        if not 0 <= index < len(modules) or (kinds and not isinstance(modules[index], kinds)):
            raise ValueError(f"module {index} is not a {' or '.join(k.__name__ for k in kinds)}")
        return modules[index]

    if len({layer.module for layer in table.layers}) < len(table.layers):
        raise ValueError("a layer is named twice")
    for layer in table.layers:
        module = pick(layer.module, nn.Conv2d, nn.Linear)
        out, fan, *kernel = module.weight.shape  # type: ignore[union-attr]
        if not (1 <= layer.out <= out and 1 <= layer.fan <= fan):
            raise ValueError(f"a layer of {layer.out} x {layer.fan} where {out} x {fan} belongs")
        if layer.bits not in (FULL_PRECISION, *range(MIN_BITS, MAX_BITS + 1)):
            raise ValueError(f"bits {layer.bits}")
        weight = torch.empty(layer.out, layer.fan, *kernel, device=module.weight.device)  # type: ignore[union-attr]
        module.weight = nn.Parameter(weight, requires_grad=False)
        if layer.norm >= 0:
            pick(layer.norm, *NORMS)
        if module.bias is not None or layer.norm >= 0:
            bias = torch.empty(layer.out, device=weight.device)
            module.bias = nn.Parameter(bias, requires_grad=False)
        resize(module)
    for record in table.norms:
        norm, count = pick(record.module, *NORMS), record.channels
        if not 1 <= count <= norm.num_features:  # type: ignore[union-attr, operator]
            raise ValueError(f"{count} channels in a batch norm")
        norm.num_features = count
        for name, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
            if tensor.is_floating_point():
                short = tensor.detach()[:count].clone()
                setattr(norm, name, nn.Parameter(short) if name in norm._parameters else short)
    for index in table.unused:
        pick(index)
        leave_out(model, named[index][0])
    return _Shaped(model, [name for name, _ in named])


def _put(module: nn.Module, name: str, values: torch.Tensor) -> None:
    if name in module._parameters:
        values = nn.Parameter(values, requires_grad=False)  # type: ignore[assignment]
    setattr(module, name, values)


def _fill(shaped: _Shaped, table: Table, data: bytes, begin: int) -> Artifact:
    """Reads all tensors, from `begin` on. Raises ValueError if the data are longer or shorter than
    they must be."""
    model, names = shaped.model, shaped.names
    modules = dict(model.named_modules())
    view, at = memoryview(data), begin

    def take(length: int) -> bytes:
        nonlocal at
        at += length
        if at > len(view):
            raise ValueError(f"{len(view)} bytes of data, the network needs more")
        return bytes(view[at - length : at])

    def floats(module: nn.Module, name: str) -> None:
        built = getattr(module, name)
        values = np.frombuffer(take(FLOAT_BYTES * built.numel()), "<f4").copy()
        _put(module, name, torch.from_numpy(values).reshape(built.shape).to(built.dtype))

    bits: dict[str, int] = {}
    scales: dict[str, torch.Tensor] = {}
    for layer in table.layers:
        name = names[layer.module]
        module = modules[name]
        if layer.bits == FULL_PRECISION:
            floats(module, "weight")
            if module.bias is not None:
                floats(module, "bias")
            continue
        shape = module.weight.shape  # type: ignore[union-attr]
        packed = take(-(-shape.numel() * layer.bits // 8))
        codes = unpack_codes(packed, shape.numel(), layer.bits).astype(np.float32)
        scale = unpack_scales(take(SCALE_BYTES * layer.out), layer.top, layer.spacing)
        scale_O = torch.from_numpy(scale)
        column = scale_O.view(-1, *[1] * (len(shape) - 1))
        _put(module, "weight", torch.from_numpy(codes).reshape(shape) * column)
        bits[name], scales[name] = layer.bits, scale_O
        if module.bias is not None:
            bias = unpack_biases(take(BIAS_BYTES * layer.out), layer.step)
            _put(module, "bias", torch.from_numpy(bias))
    for layer in table.layers:
        if layer.norm >= 0:
            leave_out(model, names[layer.norm])
    for record in table.norms:
        norm = modules[names[record.module]]
        for name in _float_names(norm):
            floats(norm, name)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = torch.tensor(0)
    own_layers = {names[layer.module] for layer in table.layers}
    own_norms = {names[record.module] for record in table.norms}
    for name in rest_of(model, own_layers, own_norms):
        module_name, _, leaf = name.rpartition(".")
        floats(modules[module_name], leaf)
    if at != len(data):
        raise ValueError(f"{len(data)} bytes of data, the network needs {at}")
    return Artifact(model.eval(), bits, scales)
