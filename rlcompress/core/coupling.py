"""Which channels must be cut together: torch-pruning's groups (Fang et al., CVPR 2023, "DepGraph").

Its dependency graph fails on some networks and on others takes all the memory there is. Then the
network's parts are asked one by one: what is coupled inside a part that can be read (an attention
block's feed-forward layers, a residual branch) may still be cut, and the rest is left whole. Every
attempt has a bound on its time and memory.
"""

from __future__ import annotations

import ctypes
import threading
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import psutil
import torch
import torch_pruning as tp
from torch import nn

from rlcompress.core.reading import read

WHOLE_SECONDS, PART_SECONDS = 20.0, 4.0
MAX_GROWTH_BYTES = 2 * 2**30


class LimitError(Exception):
    """An attempt took more time or memory than it may."""


@contextmanager
def bounded(seconds: float, growth_bytes: int = MAX_GROWTH_BYTES) -> Iterator[None]:
    """Raises `LimitError` in the calling thread, between two of its Python instructions, once the
    process has worked for `seconds` of CPU time (a busy machine changes no result) or has grown by
    `growth_bytes`."""
    process, caller = psutil.Process(), threading.get_ident()
    ceiling = process.memory_info().rss + growth_bytes
    done, raised = threading.Event(), threading.Event()

    def watch() -> None:
        deadline = time.process_time() + seconds
        while not done.wait(0.05):
            if time.process_time() > deadline or process.memory_info().rss > ceiling:
                raised.set()
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(caller), ctypes.py_object(LimitError)
                )
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        if raised.is_set():
            # It may still be on its way: give it an instruction to arrive at.
            with suppress(LimitError):
                time.sleep(0.01)


@dataclass(frozen=True)
class Member:
    """Channels of one module that belong to a group: its channel `index[i]` is group channel
    `root[i]`, on its output or its input side. `module` is None for a bare parameter."""

    name: str
    module: nn.Module | None
    output: bool
    root: np.ndarray
    index: np.ndarray


@dataclass
class Coupling:
    """The groups found, and in which modules nothing could be read."""

    groups: list[list[Member]] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)


def _groups(
    model: nn.Module, inputs: tuple[Any, ...], protected: Collection[nn.Module]
) -> list[list[Member]]:
    names = {module: name for name, module in model.named_modules()}
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=inputs, verbose=False)
    coupled = []
    for group in graph.get_all_groups(
        ignored_layers=list(protected), root_module_types=[nn.Conv2d, nn.Linear]
    ):
        members = []
        for item in group:
            module = item.dep.target.module
            bare = isinstance(module, nn.Parameter)
            if module not in names and not bare:
                continue  # an operation between modules
            members.append(
                Member(
                    "a bare parameter" if bare else names[module],
                    None if bare else module,
                    "out" in item.dep.handler.__name__,
                    np.asarray(item.root_idxs, dtype=np.int64),
                    np.asarray(item.idxs, dtype=np.int64),
                )
            )
        coupled.append(members)
    return coupled


def _reason(error: BaseException) -> str:
    if isinstance(error, LimitError | MemoryError):
        return "it takes too much time or memory"
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _inputs_of_children(module: nn.Module, inputs: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    """Child -> what it is first called with; only children that are given one tensor."""
    seen: dict[str, tuple[Any, ...]] = {}

    def hook(name: str):  # type: ignore[no-untyped-def]
        def pre(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if len(args) == 1 and isinstance(args[0], torch.Tensor) and not kwargs:
                seen.setdefault(name, (args[0].detach().clone(),))

        return pre

    # A module list is never called itself: its entries are.
    handles = [
        child.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, child in _parts(module)
    ]
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _parts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    parts = []
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            parts += [(f"{name}.{inner}", part) for inner, part in _parts(child)]
        else:
            parts.append((name, child))
    return parts


def couple(
    model: nn.Module, example: torch.Tensor, layers: Sequence[str], protected: Collection[str]
) -> Coupling:
    """The coupled channels of `model`, in eval mode; gradients must be enabled.

    layers     names of its layers;  protected  those whose output is the network's output
    """
    modules = dict(model.named_modules())
    found = Coupling()
    culprits: set[type[nn.Module]] = set()

    def attempt(path: str, inputs: tuple[Any, ...], seconds: float) -> bool:
        """True if the module, or all of its parts that matter, could be read."""
        part = modules[path]
        inside = [n for n in layers if n == path or n.startswith(path + ".") or not path]
        if len(inside) < 2:
            return True  # nothing inside reads what something inside puts out
        reason = "it contains what cannot be read"
        if not any(type(module) in culprits for module in part.modules()):
            try:
                with bounded(seconds), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of what fails here others are told
                    outputs = _last_layers(part, inputs, path, inside) if path else protected
                    groups = _groups(part, inputs, [modules[n] for n in outputs])
            except Exception as error:
                reason = _reason(error)
            else:
                dot = f"{path}." if path else ""
                found.groups += [
                    [replace(m, name=dot + m.name) if m.module else m for m in members]
                    for members in groups
                ]
                return True
        found.unread[path] = reason
        whole = True
        for name, given in _inputs_of_children(part, inputs).items():
            whole &= attempt(f"{path}.{name}" if path else name, given, PART_SECONDS)
        if whole and type(part) is not nn.Sequential:
            # Each of its parts can be read: the trouble is in how it joins them.
            culprits.add(type(part))
        return False

    attempt("", (example,), WHOLE_SECONDS)
    return found


def _last_layers(
    part: nn.Module, inputs: tuple[Any, ...], path: str, inside: Sequence[str]
) -> list[str]:
    last = read(part, inputs).last
    return [name for name in inside if name.removeprefix(f"{path}.") in last]
