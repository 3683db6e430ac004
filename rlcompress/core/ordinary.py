"""Modules that cannot be copied, read or cut: told before anything is tried with them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import jit, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from rlcompress.core.errors import UserError

#: Hooks that put a computed tensor in a weight's place, which no copy can hold.
_HOOKS: dict[type, tuple[str, str]] = {
    WeightNorm: (
        "torch.nn.utils.weight_norm",
        "torch.nn.utils.parametrizations.weight_norm, or remove_weight_norm",
    ),
    SpectralNorm: (
        "torch.nn.utils.spectral_norm",
        "torch.nn.utils.parametrizations.spectral_norm, or remove_spectral_norm",
    ),
    BasePruningMethod: ("torch.nn.utils.prune", "torch.nn.utils.prune.remove(module, name)"),
}


def require_ordinary(model: nn.Module) -> None:
    """Raises UserError, a line for each kind, for what is no module, TorchScript, lazy modules that
    have seen no image, and weights under hooks of before parametrizations."""
    if not isinstance(model, nn.Module):
        raise UserError(f"model: a {type(model).__name__}; allowed: a torch.nn.Module")
    scripted, lazy = list[str](), list[str]()
    hooked: dict[type, list[str]] = {kind: [] for kind in _HOOKS}
    for name, module in model.named_modules():
        if isinstance(module, jit.ScriptModule) and (
            not name or next(module.parameters(), None) is not None
        ):
            scripted.append(name)
            continue
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            lazy.append(name)
        for hook in module._forward_pre_hooks.values():
            for kind, names in hooked.items():
                if isinstance(hook, kind) and name not in names:
                    names.append(name)
    found = []
    if scripted:
        found.append(
            f"{_few(scripted)} TorchScript, whose layers cannot be read; "
            "allowed: the torch.nn.Module that it was made from"
        )
    if lazy:
        found.append(
            f"{_few(lazy)} lazy, without shapes yet; allowed: the network after a first "
            "forward pass, which its factory can make"
        )
    for kind, names in hooked.items():
        if names:
            what, instead = _HOOKS[kind]
            found.append(f"{_few(names)} under {what}, which no copy holds; allowed: {instead}")
    if found:
        raise UserError(*found)


def _few(names: Sequence[str]) -> str:
    """A subject and its verb."""
    if not names[0]:
        return "the network is"
    if len(names) == 1:
        return f"module {names[0]!r} is"
    return f"module {names[0]!r} and {len(names) - 1} more are"
