"""A user's own weights: read without executing anything, and fitted to the network."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlcompress.core.attention import plain_names
from rlcompress.core.errors import UserError, first_line
from rlcompress.core.tensors import load_tensors

#: Under which trainers keep the state dict in a checkpoint.
_NESTS = ("state_dict", "model_state_dict", "model", "module", "net", "network")
_SHOWN = 3


def digest_of_file(path: Path) -> str:
    """Twelve hex digits that name a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def load_weights(model: nn.Module, path: Path) -> None:
    """A state dict (.safetensors, or what `torch.save` wrote) into the network, in place, which is
    left in eval mode. A checkpoint that holds one under a usual name, and DistributedDataParallel's
    prefix, are seen through.

    Raises UserError, which says what does not fit.
    """
    state = plain_names(model, _plain(_read(path), path))
    own = model.state_dict()
    problems = [
        f"{what}: {_few(names)}"
        for what, names in (
            ("missing", [name for name in own if name not in state]),
            ("not in the network", [name for name in state if name not in own]),
            (
                "of another shape",
                [
                    f"{name} {tuple(tensor.shape)}, the network's is {tuple(own[name].shape)}"
                    for name, tensor in state.items()
                    if name in own and tensor.shape != own[name].shape
                ],
            ),
            (
                "not finite",
                [
                    name
                    for name, t in state.items()
                    if t.is_floating_point() and not t.isfinite().all()
                ],
            ),
        )
        if names
    ]
    if problems:
        raise UserError(
            f"dense.weights = {path}: do not fit the network of `model`: {'; '.join(problems)}"
            + _hint(own, state)
        )
    model.load_state_dict(state)
    model.eval()


def _read(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"dense.weights = {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_tensors(path)[0]
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what its unpickler stumbles over
        raise UserError(
            f"dense.weights = {path}: not readable as weights ({first_line(error)[:120]}); "
            "allowed: .safetensors, or a state dict from torch.save(model.state_dict(), PATH)"
        ) from error


def _plain(read: Any, path: Path) -> dict[str, torch.Tensor]:
    """The state dict in what was read."""
    if isinstance(read, Mapping):
        nested = [read[key] for key in _NESTS if isinstance(read.get(key), Mapping)]
        state = nested[0] if nested else read
        tensors = {str(k): v for k, v in state.items() if isinstance(v, torch.Tensor)}
        if tensors and (nested or len(tensors) == len(state)):
            if all(name.startswith("module.") for name in tensors):
                tensors = {name.removeprefix("module."): t for name, t in tensors.items()}
            return tensors
    raise UserError(
        f"dense.weights = {path}: holds a {type(read).__name__}, no state dict; allowed: what "
        "torch.save(model.state_dict(), PATH) writes, or a mapping with one under "
        f"{', '.join(_NESTS)}"
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
