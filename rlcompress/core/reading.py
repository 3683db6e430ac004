"""What one forward pass shows of a network: which layers are used, in which order, how their
outputs go on, and what is never reached.

The connections are read off autograd's graph, so any Python control flow will do; what is seen is
the path that the example takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rlcompress.core.calls import Call, LayerCalls, layer_weights
from rlcompress.core.errors import UserError, first_line

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def estimated(module: object) -> TypeGuard[nn.BatchNorm1d | nn.BatchNorm2d]:
    """Whether it is a batch norm with statistics of its own, and nothing else: some of their
    subclasses end in an activation, which would be lost where a norm is folded."""
    if not isinstance(module, NORMS) or type(module).forward is not _BatchNorm.forward:
        return False
    return module.running_mean is not None


def rest_of(
    model: nn.Module, layers: Collection[str], norms: Collection[str]
) -> dict[str, torch.Tensor]:
    """Name in the state dict -> every float tensor that is neither weight nor bias of one of
    `layers` nor in one of `norms`, in the state dict's order; of a module with several names under
    the first of them alone."""
    known, rest = {name for name, _ in model.named_modules()}, {}
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        mine = module in norms or (module in layers and leaf in ("weight", "bias"))
        if tensor.is_floating_point() and not mine and module in known:
            rest[name] = tensor
    return rest


def leave_out(model: nn.Module, name: str) -> None:
    """Puts `nn.Identity` in a module's place, in place, under all the names that it has."""
    module = model.get_submodule(name)
    every = [n for n, m in model.named_modules(remove_duplicate=False) if m is module]
    for alias in every:
        model.set_submodule(alias, nn.Identity())


@dataclass(frozen=True)
class Reading:
    """
    order      layers in the order in which they are first used
    uses       layer -> how often
    positions  layer -> output positions of one image, of all its uses
    last       layers whose outputs reach the network's output through no other layer
    absorbed   layer -> the batch norm that alone reads it
    norm_uses  batch norm with running statistics -> how often it is used
    reached    ids of the parameters that the output depends on
    output     what the network returned
    """

    order: tuple[str, ...]
    uses: Counter[str]
    positions: Counter[str]
    last: frozenset[str]
    absorbed: dict[str, str]
    norm_uses: Counter[str]
    reached: frozenset[int]
    output: Any


@contextmanager
def all_gradients(model: nn.Module):  # type: ignore[no-untyped-def]
    """Gradients on, for every parameter; as before afterwards."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    with torch.inference_mode(False), torch.enable_grad():
        for parameter in frozen:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """What a layer or norm is called with, by place or by name."""
    x: torch.Tensor = next(iter(args or kwargs.values()))
    return x


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for part in value for t in _tensors(part)] if isinstance(value, list | tuple) else []


def read(model: nn.Module, inputs: tuple[Any, ...]) -> Reading:
    """Runs `model`, in eval mode, once on `inputs`. Raises UserError if it cannot be run."""
    order: list[str] = []
    uses: Counter[str] = Counter()
    positions: Counter[str] = Counter()
    images = len(inputs[0])
    layer_of: dict[Any, str] = {}  # autograd node of a layer's output -> the layer
    norm_of: dict[Any, list[str]] = {}  # autograd node of a norm's input -> norms
    norm_dims: dict[str, int] = {}  # of that input
    norm_uses: Counter[str] = Counter()

    def on_layer(call: Call) -> torch.Tensor:
        y = call.run()
        if call.name not in uses:
            order.append(call.name)
        uses[call.name] += 1
        channels = y.shape[-1] if call.window is None else y.shape[1]
        # Attention folds windows of an image into the first dimension.
        positions[call.name] += y.numel() // channels // images
        layer_of[y.grad_fn] = call.name
        return y

    def on_norm(name: str) -> Callable[..., None]:
        def pre(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            norm_uses[name] += 1
            x = first_input(args, kwargs)
            norm_of.setdefault(x.grad_fn, []).append(name)
            norm_dims[name] = x.dim()

        return pre

    weights = layer_weights(model)
    with ExitStack() as stack:
        stack.enter_context(all_gradients(model))
        for name, module in model.named_modules():
            if estimated(module):
                handle = module.register_forward_pre_hook(on_norm(name), with_kwargs=True)
                stack.callback(handle.remove)
        stack.enter_context(LayerCalls(weights, on_layer))
        try:
            output = model(*inputs)
        except Exception as error:
            shapes = ", ".join(str(tuple(t.shape)) for t in _tensors(list(inputs)))
            raise UserError(
                f"{type(model).__name__} cannot be run on an input of shape {shapes}: "
                f"{first_line(error)}"
            ) from error

    readers, reached, last = _walk([t.grad_fn for t in _tensors(output)], layer_of)
    absorbed = {}
    for node, names in norm_of.items():
        layer = layer_of.get(node)
        if (
            layer is not None
            and uses[layer] == len(names) == norm_uses[names[0]] == 1
            and readers[node] == 1
            # Else the channels of one are not the outputs of the other: a linear layer's are the
            # last dimension, whatever lies before it.
            and norm_dims[names[0]] == weights[layer].dim()
        ):
            absorbed[layer] = names[0]
    return Reading(
        tuple(order),
        uses,
        positions,
        frozenset(last),
        absorbed,
        norm_uses,
        frozenset(reached),
        output,
    )


def _walk(roots: list[Any], layer_of: dict[Any, str]) -> tuple[Counter[Any], set[int], set[str]]:
    """Over autograd's graph: how many read each node, ids of the parameters reached, and the
    layers met before any other."""
    readers: Counter[Any] = Counter(root for root in roots if root is not None)
    seen: set[Any] = set()
    reached: set[int] = set()
    stack = [root for root in roots if root is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            reached.add(id(variable))
        for following, _ in node.next_functions:
            if following is not None:
                readers[following] += 1
                stack.append(following)
    last: set[str] = set()
    stack, seen = [root for root in roots if root is not None], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in layer_of:
            last.add(layer_of[node])
            continue
        stack += [following for following, _ in node.next_functions if following is not None]
    return readers, reached, last
