"""The packed artifact: a safetensors file in which b-bit weights take b bits.

One tensor, `data` (uint8), holds everything in a row: layer by layer in forward order packed
codes, scales, biases (the sizes are in `cost.py`); then the batch norms that no layer absorbs; then
every other float tensor, in the order of the state dict. The safetensors metadata holds a manifest
(JSON): how to build the network, the shape, bits and exponents of every layer, and the SHA-256 of
itself and `data`. It is padded so that the header's length is a constant of the network. Integer
buffers are left to the network's constructor.

Batch norms are folded: y = gamma (W x + b - mu) / sigma + beta gives scale * gamma / sigma and
one bias a channel. Scales and biases are float16 under one power-of-two exponent a vector, so
their relative error stays below 2^-11 whatever their range.

Loading runs no code from the file; the network's class comes from the installed package that
the manifest names, and nothing is allocated before lengths and shapes agree.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_safetensors
from torch import nn

from rlcompress.core.codec import pack_codes, pack_float, pack_half, unpack_codes, unpack_half
from rlcompress.core.cost import header_bytes
from rlcompress.core.errors import UserError
from rlcompress.core.fold import fold
from rlcompress.core.graph import Network
from rlcompress.core.models import BUILT_IN, build_model
from rlcompress.core.prune import resize
from rlcompress.core.quant import encode, float_weight, learned_scales
from rlcompress.core.reading import NORMS, rest_of
from rlcompress.core.schedule import FULL_PRECISION, MAX_BITS, MIN_BITS

FORMAT = "rlcompress/2"
MAX_FILE_BYTES = 2**31
#: Of a network whose constructor must run for real.
MAX_DENSE_NUMBERS = 2**30


class ArtifactError(UserError):
    """The file is not an artifact, or not intact."""


@dataclass(frozen=True)
class ModelRef:
    """How a network is built from nothing: what the manifest holds instead of a pickle."""

    factory: str
    args: Mapping[str, Any]
    num_classes: int
    input_shape: tuple[int, ...]  # (C, H, W)

    def build(self, seed: int = 0) -> nn.Module:
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

    Raises UserError if a number is not finite, or the manifest does not fit the header.
    """
    scales = {**scales, **learned_scales(model)}
    modules = dict(model.named_modules())
    place = {name: i for i, name in enumerate(network.modules)}
    pieces: list[bytes] = []
    layers: list[list[int]] = []
    for name, layer in network.layers.items():
        module = modules[name]
        norm = modules[layer.batch_norm] if layer.batch_norm else None
        factor, bias = fold(module, norm)
        weight = float_weight(module)
        layer_bits = bits.get(name, FULL_PRECISION)
        shifts = [0, 0]
        if layer_bits == FULL_PRECISION:
            folded = weight.double().cpu().numpy() * factor.reshape(-1, *[1] * (weight.dim() - 1))
            pieces.append(pack_float(folded, name))
            if bias is not None:
                pieces.append(pack_float(bias, name))
        else:
            scale = scales[name].to(weight)
            codes = encode(weight, scale, layer_bits).cpu().numpy()
            pieces.append(pack_codes(codes, layer_bits))
            data, shifts[0] = pack_half(scale.double().cpu().numpy() * factor, name)
            pieces.append(data)
            if bias is not None:
                data, shifts[1] = pack_half(bias, name)
                pieces.append(data)
        absorbed = place[layer.batch_norm] if layer.batch_norm else -1
        out, fan = weight.shape[:2]
        layers.append([place[name], out, fan, layer_bits, *shifts, absorbed])
    norms = []
    for free in network.norms:
        norm = modules[free.name]
        pieces += [pack_float(getattr(norm, t), free.name) for t in _float_names(norm)]
        norms.append([place[free.name], norm.num_features])  # type: ignore[union-attr]
    state = model.state_dict()
    pieces += [pack_float(state[name], name) for name in network.rest]
    data = b"".join(pieces)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "model": [ref.factory, dict(ref.args), ref.num_classes, list(ref.input_shape)],
        "layers": layers,
        "norms": norms,
        "unused": [place[name] for name in network.unused],
    }
    manifest["sha256"] = _digest(manifest, data)
    text = json.dumps(manifest, separators=(",", ":"))
    room = header_bytes(network)
    tensors = {"data": np.frombuffer(data, np.uint8)}
    spare = room - (len(save_safetensors(tensors, metadata={"rlcompress": text})) - len(data))
    if spare < 0:
        raise UserError(f"model args {dict(ref.args)} do not fit the artifact's header")
    packed = save_safetensors(tensors, metadata={"rlcompress": text + " " * spare})
    assert len(packed) == room + len(data)
    return packed


def _digest(manifest: Mapping[str, Any], data: bytes) -> str:
    """SHA-256 of a manifest (but for its own `sha256`) and the data behind it."""
    plain = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(plain, separators=(",", ":")).encode() + data).hexdigest()


def _manifest(path: Path) -> tuple[dict[str, Any], bytes]:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ArtifactError(f"{path}: {size} bytes; an artifact has at most {MAX_FILE_BYTES}")
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if list(file.keys()) != ["data"]:
                raise ArtifactError(f"{path}: not an rlcompress artifact (tensors: {file.keys()})")
            data = file.get_tensor("data")
        manifest = json.loads(metadata["rlcompress"])
    except (SafetensorError, LookupError, TypeError, ValueError, RecursionError, OSError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path}: not an intact rlcompress artifact: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(f"{path}: not in format {FORMAT}")
    if data.dtype != np.uint8 or data.ndim != 1:
        raise ArtifactError(f"{path}: `data` must be one row of uint8")
    raw = data.tobytes()
    if _digest(manifest, raw) != manifest.get("sha256"):
        raise ArtifactError(f"{path}: the content does not match its SHA-256: the file is damaged")
    return manifest, raw


def _float_names(norm: nn.Module) -> list[str]:
    return [name for name, t in norm.state_dict().items() if t.is_floating_point()]


@dataclass(frozen=True)
class _Layer:
    """A layer's line in the manifest; `out` and `fan` are its weight's first two dimensions."""

    module: int
    out: int
    fan: int
    bits: int
    scale_exponent: int
    bias_exponent: int
    norm: int


@dataclass(frozen=True)
class Artifact:
    """What a file holds: the network (eval mode, float32, batch norms folded) and, for the layers
    below 32 bits, bits and scale_O: their weights are integer codes x scale_O."""

    model: nn.Module
    bits: Mapping[str, int]
    scales: Mapping[str, torch.Tensor]


def load_artifact(path: Path | str, *, trust: Collection[str] = ()) -> nn.Module:
    """The network in an artifact, in eval mode, float32, batch norms folded.

    Needs no other file. A file may only name the networks that rlcompress ships, or a
    "pkg.mod:factory" that `trust` lists: importing and calling what a file says would run
    whatever its author likes. Raises ArtifactError on a file that names another, or that is
    not an intact artifact.
    """
    return read_artifact(path, trust=trust).model


def read_artifact(path: Path | str, *, trust: Collection[str] = ()) -> Artifact:
    """`load_artifact`, with bits and scales."""
    path = Path(path)
    manifest, data = _manifest(path)
    try:
        with torch.inference_mode(False):  # plain tensors, wherever it is called from
            factory, args, num_classes, input_shape = manifest["model"]
            if factory not in BUILT_IN and factory not in trust:
                raise ArtifactError(
                    f"{path}: it asks for the network {factory!r}; if you trust that code: "
                    f"load_artifact(path, trust=[{factory!r}])"
                )
            ref = ModelRef(str(factory), dict(args), int(num_classes), tuple(map(int, input_shape)))
            layers = [_Layer(*map(_small_int, line)) for line in manifest["layers"]]
            norms = [tuple(map(_small_int, line)) for line in manifest["norms"]]
            unused = [_small_int(i) for i in manifest["unused"]]
            # Without memory behind it: what a file asks for may be anything.
            skeleton = _skeleton(ref)
            artifact = None
            if skeleton is not None:
                dense = sum(parameter.numel() for parameter in skeleton.parameters())
                artifact = _fill(_shaped(skeleton, layers, norms, unused), layers, norms, data)
                if dense > MAX_DENSE_NUMBERS and not _whole(artifact.model):
                    raise ValueError(f"it asks for a network of {dense} parameters")
            if artifact is None or not _whole(artifact.model):
                shaped = _shaped(ref.build(), layers, norms, unused)
                artifact = _fill(shaped, layers, norms, data)
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


def _small_int(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > 2**24:
        raise ValueError(f"{value!r} where a number belongs")
    return value


def _skeleton(ref: ModelRef) -> nn.Module | None:
    """The network without memory; None if its constructor needs real numbers."""
    try:
        with torch.device("meta"):
            return ref.build()
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        if ref.factory in BUILT_IN:
            raise
        return None


def _whole(model: nn.Module) -> bool:
    """Whether nothing is left without memory: the constructor's own constants would be."""
    return not any(
        isinstance(value, torch.Tensor) and value.is_meta
        for module in model.modules()
        for value in (
            *module._parameters.values(),
            *module._buffers.values(),
            *vars(module).values(),
        )
    )


@dataclass
class _Shaped:
    """A network whose layers have the file's shapes, and no weights yet."""

    model: nn.Module
    names: list[str]
    absorbed: list[int]


def _shaped(
    model: nn.Module, layers: list[_Layer], norms: list[tuple[int, ...]], unused: list[int]
) -> _Shaped:
    """Gives the modules of a freshly built network the shapes that the manifest says, in place.

    Raises ValueError if they are not this network's.
    """
    named = list(model.named_modules())
    modules = [module for _, module in named]

    def pick(index: int, *kinds: type[nn.Module]) -> nn.Module:
        if not 0 <= index < len(modules) or (kinds and not isinstance(modules[index], kinds)):
            raise ValueError(f"module {index} is not a {' or '.join(k.__name__ for k in kinds)}")
        return modules[index]

    if len({layer.module for layer in layers}) < len(layers):
        raise ValueError("a layer is named twice")
    for layer in layers:
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
    for index, count in norms:
        norm = pick(index, *NORMS)
        if not 1 <= count <= norm.num_features:  # type: ignore[union-attr, operator]
            raise ValueError(f"{count} channels in a batch norm")
        norm.num_features = count
        for name, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
            if tensor.is_floating_point():
                short = tensor.detach()[:count].clone()
                setattr(norm, name, nn.Parameter(short) if name in norm._parameters else short)
    for index in unused:
        pick(index)
        model.set_submodule(named[index][0], nn.Identity())
    return _Shaped(model, [name for name, _ in named], [la.norm for la in layers if la.norm >= 0])


def _put(module: nn.Module, name: str, values: torch.Tensor) -> None:
    if name in module._parameters:
        values = nn.Parameter(values, requires_grad=False)  # type: ignore[assignment]
    setattr(module, name, values)


def _fill(
    shaped: _Shaped, layers: list[_Layer], norms: list[tuple[int, ...]], data: bytes
) -> Artifact:
    """Reads all tensors. Raises ValueError if the data are longer or shorter than they must be."""
    model, names = shaped.model, shaped.names
    modules = dict(model.named_modules())
    view, at = memoryview(data), 0

    def take(length: int) -> bytes:
        nonlocal at
        at += length
        if at > len(view):
            raise ValueError(f"{len(view)} bytes of data, the network needs more")
        return bytes(view[at - length : at])

    def floats(module: nn.Module, name: str) -> None:
        shape = getattr(module, name).shape
        values = np.frombuffer(take(4 * shape.numel()), "<f4").copy()
        _put(module, name, torch.from_numpy(values).reshape(shape))

    bits: dict[str, int] = {}
    scales: dict[str, torch.Tensor] = {}
    for layer in layers:
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
        scale_O = torch.from_numpy(unpack_half(take(2 * layer.out), layer.scale_exponent))
        column = scale_O.view(-1, *[1] * (len(shape) - 1))
        _put(module, "weight", torch.from_numpy(codes).reshape(shape) * column)
        bits[name], scales[name] = layer.bits, scale_O
        if module.bias is not None:
            bias = unpack_half(take(2 * layer.out), layer.bias_exponent)
            _put(module, "bias", torch.from_numpy(bias))
    for index in shaped.absorbed:
        model.set_submodule(names[index], nn.Identity())
    for index, _ in norms:
        norm = modules[names[index]]
        for name in _float_names(norm):
            floats(norm, name)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = torch.tensor(0)
    own_layers = {names[layer.module] for layer in layers}
    own_norms = {names[index] for index, _ in norms}
    for name in rest_of(model, own_layers, own_norms):
        module_name, _, leaf = name.rpartition(".")
        floats(modules[module_name], leaf)
    if at != len(data):
        raise ValueError(f"{len(data)} bytes of data, the network needs {at}")
    return Artifact(model.eval(), bits, scales)
