"""The packed artifact: a safetensors file in which b-bit weights take b bits.

One tensor, `data` (uint8), holds everything layer by layer in forward order: packed codes,
then scales, then biases (the sizes are in `cost.py`). The safetensors metadata holds a manifest
(JSON): how to build the network, channels per group, bits and exponents per layer, and the
SHA-256 of itself and `data`. It is padded so that the header's length is a constant of the network.

Batch norms are folded: y = gamma (W x + b - mu) / sigma + beta gives scale * gamma / sigma and
one bias a channel. Scales and biases are float16 under one power-of-two exponent a vector, so
their relative error stays below 2^-11 whatever their range.

Loading runs no code from the file; the network's class comes from the installed package that
the manifest names, and nothing is allocated before lengths and shapes agree.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_safetensors
from torch import nn

from rlcompress.core.cost import CostModel, header_bytes
from rlcompress.core.errors import UserError
from rlcompress.core.graph import Network, build_network
from rlcompress.core.models import BUILT_IN, build_model
from rlcompress.core.prune import cut, first_channels
from rlcompress.core.quant import encode, float_weight, learned_scales, max_code
from rlcompress.core.schedule import FULL_PRECISION

FORMAT = "rlcompress/1"
MAX_FILE_BYTES = 2**31


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


def pack_codes(codes: np.ndarray, bits: int) -> bytes:
    """Codes (any shape) as a bit string, least significant bit first, padded to a byte."""
    unsigned = codes.ravel().astype(np.int32)
    top = max_code(bits)
    unsigned = (unsigned + top) // 2 if bits <= 3 else unsigned + top
    rows = (unsigned[:, None] >> np.arange(bits)) & 1
    return np.packbits(rows.astype(np.uint8).ravel(), bitorder="little").tobytes()


def unpack_codes(data: bytes, count: int, bits: int) -> np.ndarray:
    """The inverse of `pack_codes`: int32 (count,)."""
    flat = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits, bitorder="little")
    unsigned = flat.reshape(count, bits).astype(np.int32) @ (1 << np.arange(bits, dtype=np.int32))
    top = max_code(bits)
    return 2 * unsigned - top if bits <= 3 else unsigned - top


def _pack_half(values: np.ndarray) -> tuple[bytes, int]:
    """float16 bytes and the exponent e: value = float16 x 2^e, the largest one in [0.5, 1)."""
    largest = float(np.abs(values).max(initial=0.0))
    if not math.isfinite(largest):
        raise ValueError("a scale or bias is not finite")
    exponent = math.frexp(largest)[1] if largest else 0
    return np.ldexp(values.astype(np.float64), -exponent).astype("<f2").tobytes(), exponent


def _unpack_half(data: bytes, exponent: int) -> np.ndarray:
    return np.ldexp(np.frombuffer(data, "<f2").astype(np.float64), exponent).astype(np.float32)


def _norm_tensors(module: nn.Module) -> list[torch.Tensor]:
    state = module.state_dict()
    return [t for name, t in state.items() if name != "num_batches_tracked"]


def _fold(module: nn.Module, norm: nn.Module | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Factor and bias (float64, per output channel) of a layer with its batch norm folded in."""
    out = module.weight.shape[0]  # type: ignore[union-attr]
    bias = module.bias.detach().double() if module.bias is not None else None  # type: ignore[union-attr, operator]
    if norm is None:
        return np.ones(out), None if bias is None else bias.cpu().numpy()
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gamma = norm.weight.detach().double() if norm.affine else torch.ones(out, dtype=torch.double)
    beta = norm.bias.detach().double() if norm.affine else torch.zeros(out, dtype=torch.double)
    factor = gamma / (norm.running_var.double() + norm.eps).sqrt()
    shift = beta - norm.running_mean.double() * factor
    if bias is not None:
        shift = shift + bias * factor
    return factor.cpu().numpy(), shift.cpu().numpy()


def _half(values: torch.Tensor) -> torch.Tensor:
    """What `_pack_half` makes of them."""
    return torch.from_numpy(_unpack_half(*_pack_half(values.double().cpu().numpy()))).double()


@torch.no_grad()
def snap(
    model: nn.Module,
    network: Network,
    bits: Mapping[str, int],
    scales: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Rounds `model` in place to what an artifact can hold; returns the rounded scale_O.

    After it, packing and loading change nothing but the order of float operations. The batch
    norms' gamma and beta take up the rounding; without one, the scale and the bias do.
    """
    modules = dict(model.named_modules())
    rounded = dict(scales)
    for name, layer in network.layers.items():
        if bits.get(name, FULL_PRECISION) == FULL_PRECISION:
            continue
        module = modules[name]
        norm = modules[layer.batch_norm] if layer.batch_norm else None
        factor_np, bias_np = _fold(module, norm)
        factor, scale = torch.from_numpy(factor_np), scales[name].double().cpu()
        target = _half(scale * factor)
        bias = None if bias_np is None else _half(torch.from_numpy(bias_np))
        if norm is None:
            rounded[name] = target.to(scales[name])
            if bias is not None:
                module.bias.copy_(bias)  # type: ignore[union-attr, operator]
            continue
        assert isinstance(norm, nn.BatchNorm2d)
        assert bias is not None
        ratio = torch.where(scale * factor != 0, target / (scale * factor), torch.ones_like(scale))
        norm.weight.mul_(ratio.to(norm.weight))
        norm.bias.zero_()
        norm.bias.copy_(bias - torch.from_numpy(_fold(module, norm)[1]))
    return rounded


def pack(
    model: nn.Module,
    network: Network,
    ref: ModelRef,
    counts: Mapping[str, int],
    bits: Mapping[str, int],
    scales: Mapping[str, torch.Tensor],
) -> bytes:
    """The artifact of a cut network as bytes.

    model   the cut network, its weights floats (fake quantizers may still be attached: their
            learned scales are used, and `scales` is for the layers without one)
    counts  group -> channels in it;  bits  layer -> weight bits;  scales  layer -> scale_O
    """
    scales = {**scales, **learned_scales(model)}
    modules = dict(model.named_modules())
    pieces: list[bytes] = []
    exponents: list[list[int]] = []
    for name, layer in network.layers.items():
        module = modules[name]
        norm = modules[layer.batch_norm] if layer.batch_norm else None
        factor, bias = _fold(module, norm)
        weight = float_weight(module)
        layer_bits = bits.get(name, FULL_PRECISION)
        shifts = [0, 0]
        if layer_bits == FULL_PRECISION:
            folded = weight.double().cpu().numpy() * factor.reshape(-1, *[1] * (weight.dim() - 1))
            pieces.append(folded.astype("<f4").tobytes())
            if bias is not None:
                pieces.append(bias.astype("<f4").tobytes())
        else:
            scale = scales[name].to(weight)
            codes = encode(weight, scale, layer_bits).cpu().numpy()
            pieces.append(pack_codes(codes, layer_bits))
            data, shifts[0] = _pack_half(scale.double().cpu().numpy() * factor)
            pieces.append(data)
            if bias is not None:
                data, shifts[1] = _pack_half(bias)
                pieces.append(data)
        exponents.append(shifts)
    for rest in network.norms:
        pieces += [
            t.float().cpu().numpy().astype("<f4").tobytes()
            for t in _norm_tensors(modules[rest.name])
        ]
    data = b"".join(pieces)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "model": [ref.factory, dict(ref.args), ref.num_classes, list(ref.input_shape)],
        "keep": [int(counts[g]) for g in network.groups],
        "bits": [int(bits.get(n, FULL_PRECISION)) for n in network.layers],
        "exponents": exponents,
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


def load_artifact(path: Path | str, *, trust: Collection[str] = ()) -> nn.Module:
    """The network in an artifact, in eval mode, float32, batch norms folded.

    Needs no other file. A file may only name the networks that rlcompress ships, or a
    "pkg.mod:factory" that `trust` lists: importing and calling what a file says would run
    whatever its author likes. Raises ArtifactError on a file that names another, or that is
    not an intact artifact.
    """
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
            model = ref.build()
            network = build_network(model, ref.example())
            counts = dict(zip(network.groups, manifest["keep"], strict=True))
            bits = dict(zip(network.layers, manifest["bits"], strict=True))
            allowed = {FULL_PRECISION, *range(2, 9)}
            for group, count in counts.items():
                if not 1 <= count <= network.groups[group].channels:
                    raise ValueError(f"{count} channels in group {group!r}")
            if not set(bits.values()) <= allowed:
                raise ValueError(f"bits {sorted(set(bits.values()) - allowed)}")
            costs = CostModel(network)
            size = costs.bytes(np.array([list(counts.values())]), np.array([list(bits.values())]))
            if int(size[0]) - costs.header != len(data):
                raise ValueError(f"{len(data)} bytes of data, the manifest needs {int(size[0])}")
            small = cut(model, network, first_channels(network, counts))
            _fill(small, network, bits, manifest["exponents"], data)
    except Exception as error:  # whatever a stranger's manifest makes torch or a factory raise
        raise ArtifactError(f"{path}: not an intact rlcompress artifact: {error}") from error
    return small.eval()


def _fill(
    model: nn.Module,
    network: Network,
    bits: Mapping[str, int],
    exponents: list[list[int]],
    data: bytes,
) -> None:
    modules = dict(model.named_modules())
    view, at = memoryview(data), 0

    def take(length: int) -> bytes:
        nonlocal at
        at += length
        return bytes(view[at - length : at])

    for (name, layer), shifts in zip(network.layers.items(), exponents, strict=True):
        module = modules[name]
        shape = module.weight.shape
        out, count = shape[0], shape.numel()
        has_bias = layer.has_bias or layer.batch_norm is not None
        if bits[name] == FULL_PRECISION:
            weight = np.frombuffer(take(4 * count), "<f4").reshape(shape)
            bias = np.frombuffer(take(4 * out), "<f4") if has_bias else None
        else:
            packed = take(-(-count * bits[name] // 8))
            codes = unpack_codes(packed, count, bits[name]).reshape(shape)
            scale = _unpack_half(take(2 * out), shifts[0])
            weight = codes.astype(np.float32) * scale.reshape(-1, *[1] * (len(shape) - 1))
            bias = _unpack_half(take(2 * out), shifts[1]) if has_bias else None
        module.weight = nn.Parameter(torch.from_numpy(weight.copy()), requires_grad=False)
        if bias is not None:
            module.bias = nn.Parameter(torch.from_numpy(bias.copy()), requires_grad=False)
        if layer.batch_norm:
            parent, _, child = layer.batch_norm.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Identity())
    for norm in network.norms:
        for tensor in _norm_tensors(modules[norm.name]):
            tensor.copy_(torch.from_numpy(np.frombuffer(take(4 * tensor.numel()), "<f4").copy()))
