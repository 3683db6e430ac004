"""A network as a graph of operations (torch.fx), where its Python code allows that."""

from __future__ import annotations

import copy
import inspect
import operator
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from rlcompress.core.errors import UserError, first_line
from rlcompress.core.reading import NORMS

#: The trace computes what the model does, but for the order of float operations.
TOLERANCE = 1e-4
#: `x += y` and the like -> `x + y`.
_IN_PLACE_OPERATORS = {
    getattr(operator, f"i{name}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
}


class TraceError(UserError):
    """torch.fx cannot follow the network's Python code."""


class _Tracer(fx.Tracer):
    """Layers and norms stay whole, whatever package they come from."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, (nn.Conv2d, nn.Linear, *NORMS)) or super().is_leaf_module(
            module, qualified_name
        )


def trace(model: nn.Module, example: torch.Tensor, layers: Collection[str] = ()) -> fx.GraphModule:
    """The network as an fx graph with the shapes of `example` (N, C, H, W) on its nodes.

    Other arguments of `forward` are at their defaults. In-place operations are made out-of-place,
    so that earlier activations stay valid, and what is computed for nothing is left out. Raises
    `TraceError` if the control flow cannot be traced, if one of `layers` is not called as a module
    exactly once, or if the graph computes something else than the model.
    """
    name = type(model).__name__
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of defaults that are no plain numbers
            graph = _Tracer().trace(model, concrete_args=_defaults(model) or None)
        _, *others = (node for node in graph.nodes if node.op == "placeholder")
        for node in others:
            _erase(node)
        traced = fx.GraphModule(model, graph)
    except Exception as error:
        raise TraceError(f"{name} cannot be traced by torch.fx: {first_line(error)}") from error
    calls = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    for layer in layers:
        if calls.count(layer) != 1:
            raise TraceError(
                f"{name} cannot be traced by torch.fx: {layer} is not called just once"
            )
    with torch.inference_mode():
        probe = torch.randn(example.shape, generator=torch.Generator().manual_seed(0))
        probe = probe.to(example)
        wanted = model(probe.clone())
        try:
            _out_of_place(traced)
            ShapeProp(traced).propagate(probe)
            got = traced(probe)
            same = bool((got - wanted).abs().max() <= TOLERANCE * wanted.abs().max())
        except Exception as error:
            raise TraceError(f"{name} cannot be traced by torch.fx: {first_line(error)}") from error
    if not same:
        raise TraceError(f"{name} cannot be traced by torch.fx: the graph gives other answers")
    return traced


def _defaults(model: nn.Module) -> dict[str, Any]:
    """What the arguments of `forward` behind the first are, where nobody says."""
    _, *others = inspect.signature(model.forward).parameters.values()
    return {p.name: p.default for p in others if p.default is not p.empty}


def _erase(node: fx.Node) -> None:
    """Takes out a node and what only asks whether it is what it was said to be."""
    for user in list(node.users):
        _erase(user)
    node.graph.erase_node(node)


def _out_of_place(traced: fx.GraphModule) -> None:
    """Raises AttributeError where an in-place operation has no other form."""
    for node in traced.graph.nodes:
        if node.op == "call_module":
            module = traced.get_submodule(node.target)
            if getattr(module, "inplace", False):
                # The graph shares its modules with the model, which stays as it is.
                module = copy.copy(module)
                module.inplace = False  # type: ignore[assignment]
                traced.set_submodule(node.target, module)
        elif node.op == "call_function":
            _function_out_of_place(node)
        elif node.op == "call_method" and node.target.endswith("_"):
            node.target = node.target.rstrip("_")
    traced.graph.eliminate_dead_code()
    traced.recompile()


def _function_out_of_place(node: fx.Node) -> None:
    function: Any = node.target
    name = getattr(function, "__name__", "")
    if function in _IN_PLACE_OPERATORS:
        node.target = _IN_PLACE_OPERATORS[function]
    elif name.endswith("_") and getattr(operator, name, None) is not function:
        plain = name.rstrip("_")
        node.target = getattr(torch, plain, None) or getattr(F, plain)
    elif node.kwargs.get("out") is not None:
        raise AttributeError(f"{name} writes into a tensor (out=)")
    else:
        try:
            said = inspect.signature(function).bind(*node.args, **node.kwargs)
        except (TypeError, ValueError):  # torch's own in C++, which have no such argument
            return
        if said.arguments.get("inplace"):
            said.arguments["inplace"] = False
            node.args, node.kwargs = said.args, said.kwargs
