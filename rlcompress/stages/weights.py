"""A user's own weights: read without executing anything, and fitted to the network."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlcompress.core.attention import plain_names
from rlcompress.core.errors import UserError, first_line
from rlcompress.core.tensors import load_tensors

#: Under which trainers keep the state dict in a checkpoint.
_NESTS = ("state_dict", "model_state_dict", "model", "module", "net", "network")
#: What wraps a network puts before its names: DistributedDataParallel, torch.compile, Lightning.
_WRAPPERS = ("module.", "_orig_mod.", "model.")
_SHOWN = 3
_SAVED = "torch.save(model.state_dict(), PATH)"


def digest_of_weights(path: Path) -> str:
    """Twelve hex digits that name a file's content; "" where there is none. Raises UserError where
    it cannot be read."""
    with _reading(path):
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def load_weights(model: nn.Module, path: Path) -> None:
    """A state dict (.safetensors, or what `torch.save` wrote) into the network, in place, which is
    left in eval mode. A checkpoint that holds one under a usual name, and the prefixes of usual
    wrappers, are seen through; how many batches norms have seen may be missing.

    Raises UserError, which says what does not fit.
    """
    own = model.state_dict()
    state = plain_names(model, _named_as(own, _plain(_read(path), path)))
    odd = {name: why for name, t in state.items() if (why := _why_odd(t, own.get(name)))}
    known = {name: tensor for name, tensor in state.items() if name in own and name not in odd}
    plain = {name: tensor for name, tensor in known.items() if tensor.is_floating_point()}
    problems = [
        f"{what}: {_few(names)}"
        for what, names in (
            (
                "missing",
                [n for n in own if n not in state and not n.endswith("num_batches_tracked")],
            ),
            ("not in the network", [name for name in state if name not in own]),
            ("no plain floats", [f"{name} ({why})" for name, why in odd.items()]),
            (
                "of another shape",
                [
                    f"{name} {tuple(tensor.shape)}, the network's is {tuple(own[name].shape)}"
                    for name, tensor in known.items()
                    if tensor.shape != own[name].shape
                ],
            ),
            ("not finite", [name for name, t in plain.items() if not t.isfinite().all()]),
            (
                "below zero",
                [n for n, t in plain.items() if n.endswith("running_var") and bool((t < 0).any())],
            ),
        )
        if names
    ]
    if problems:
        raise UserError(
            f"dense.weights = {path}: do not fit the network of `model`: {'; '.join(problems)}"
            + _hint(own, known)
        )
    model.load_state_dict(state, strict=False)
    model.eval()


def _named_as(
    own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Without the prefixes that keep names from being the network's; as they are, if none does."""
    chains = (itertools.product(_WRAPPERS, repeat=depth) for depth in range(4))
    prefixes = ["".join(chain) for chain in itertools.chain(*chains)]
    best = max(prefixes, key=lambda prefix: sum(n.removeprefix(prefix) in own for n in state))
    return {name.removeprefix(best): tensor for name, tensor in state.items()}


def _why_odd(tensor: torch.Tensor, own: torch.Tensor | None) -> str:
    """Why a tensor cannot become the network's `own`; empty if it can."""
    if tensor.is_quantized:
        return "quantized; allowed: dequantized"
    if tensor.is_meta:
        return "on meta, without numbers"
    if tensor.layout != torch.strided:
        return f"{tensor.layout}; allowed: torch.strided"
    if own is not None and own.is_floating_point() and not tensor.is_floating_point():
        return f"{tensor.dtype}, the network's is {own.dtype}"
    return ""


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"dense.weights = {path}: cannot be read: {error.strerror}") from error


def _read(path: Path) -> Any:
    with _reading(path):
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "no such file"
            raise UserError(f"dense.weights = {path}: {what}")
        path.open("rb").close()
    try:
        if path.suffix == ".safetensors":
            return load_tensors(path)[0]
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what its unpickler stumbles over
        raise UserError(f"dense.weights = {path}: {_why_unreadable(error)}") from error


def _why_unreadable(error: Exception) -> str:
    """In place of torch's advice, which is to run what the file says."""
    text = str(error)
    if "TorchScript" in text:
        return f"holds a whole TorchScript module; allowed: a state dict, as {_SAVED} writes it"
    if named := re.search(r"GLOBAL (\S+)", text):
        return (
            f"holds a whole module, or other objects than tensors ({named[1]}): reading them would "
            f"run code; allowed: a state dict, as {_SAVED} writes it"
        )
    return (
        f"not readable as weights ({first_line(error)[:120]}); "
        f"allowed: .safetensors, or a state dict from {_SAVED}"
    )


def _plain(read: Any, path: Path) -> dict[str, torch.Tensor]:
    """The state dict in what was read."""
    if isinstance(read, Mapping):
        nested = [read[key] for key in _NESTS if isinstance(read.get(key), Mapping)]
        state = nested[0] if nested else read
        tensors = {str(k): v for k, v in state.items() if isinstance(v, torch.Tensor)}
        if tensors and (nested or len(tensors) == len(state)):
            return tensors
    raise UserError(
        f"dense.weights = {path}: holds a {type(read).__name__}, no state dict; allowed: what "
        f"{_SAVED} writes, or a mapping with one under {', '.join(_NESTS)}"
    )


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _hint(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> str:
    """What most often is wrong."""
    differ = [name for name in own if name in state and own[name].shape != state[name].shape]
    heads = {name.rpartition(".")[0] for name in differ}
    if len(heads) == 1 and own.keys() == state.keys():
        return f"; --set model.args.num_classes={len(state[differ[0]])} if it is the classes"
    if differ:
        return "; see model.args: is it as wide as the one that was trained?"
    return ""
