"""What a network is made of: layers, the groups that must be cut together, and how they connect.

torch.fx gives the order of execution and the shapes, torch-pruning's dependency graph (Fang et
al., CVPR 2023, "DepGraph") the coupled channels. A worked example, two residual blocks' ends:

    conv1 (64) ──┐
                 add ── conv3          group "conv1": channels 64, owner conv1
    conv2 (64) ──┘                       outputs: conv1, conv2 (and their batch norms)
                                         inputs:  conv3 (in-channel j reads group channel j)

Cutting channel j of the group cuts output j of conv1 and conv2 and input j of conv3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
import torch_pruning as tp
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from rlcompress.core.errors import UserError
from rlcompress.core.schedule import Schedule

LayerModule: TypeAlias = nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class Link:
    """A module's channels that belong to a group: module channel `index[i]` is group channel
    `root[i]`. `root` repeats where one channel spans several features (a flattened map)."""

    group: str
    root: np.ndarray
    index: np.ndarray

    def kept(self, size: int, keep_group: np.ndarray) -> np.ndarray:
        """Mask (size,) of the module's channels that survive this group's mask."""
        mask = np.ones(size, dtype=bool)
        mask[self.index] = keep_group[self.root]
        return mask


@dataclass(frozen=True)
class Layer:
    """One weight-carrying module. `kind`: conv, pointwise, depthwise, grouped or linear."""

    name: str
    kind: str
    group: str | None  # None: the output is protected (it is the network's own output)
    inputs: tuple[Link, ...]
    outputs: tuple[Link, ...]
    in_channels: int
    out_channels: int
    conv_groups: int
    kernel: int  # kernel positions: 9 for 3 x 3
    positions: int  # output positions of one image
    batch_norm: str | None
    has_bias: bool

    @property
    def weights(self) -> int:
        return self.out_channels * (self.in_channels // self.conv_groups) * self.kernel

    @property
    def macs(self) -> int:
        return self.weights * self.positions


@dataclass(frozen=True)
class Group:
    """Coupled output channels. `owner` is the first of its layers in forward order: its step
    decides `keep`. `protected` says why nothing may be cut, or is empty."""

    name: str
    channels: int
    owner: str
    layers: tuple[str, ...]
    consumers: tuple[str, ...]
    protected: str = ""

    def count(self, ratio: float, round_to: int = 1) -> int:
        """Channels that survive at `ratio`: at least one, rounded to a multiple of `round_to`."""
        if self.protected or ratio >= 1.0:
            return self.channels
        count = math.floor(ratio * self.channels / round_to + 0.5) * round_to
        return min(self.channels, max(1, min(round_to, self.channels), count))


@dataclass(frozen=True)
class Norm:
    """A normalisation that no layer can absorb: its vectors are stored beside the weights."""

    name: str
    vectors: int
    channels: int
    links: tuple[Link, ...]


@dataclass(frozen=True)
class Network:
    """The structure of one network, in forward order. Holds no weights."""

    layers: Mapping[str, Layer]
    groups: Mapping[str, Group]
    norms: tuple[Norm, ...]
    input_shape: tuple[int, ...]  # (C, H, W)

    def owned_group(self, layer: str) -> Group | None:
        """The group whose `keep` is decided at this layer, if any may be cut there."""
        name = self.layers[layer].group
        group = self.groups[name] if name else None
        return group if group and group.owner == layer and not group.protected else None

    def counts(self, schedule: Schedule, round_to: int = 1) -> dict[str, int]:
        """Group -> channels that survive."""
        return {g.name: g.count(schedule.ratio(g.name), round_to) for g in self.groups.values()}

    def validate(self, schedule: Schedule) -> None:
        """Raises UserError naming every group and layer the network does not have."""
        problems = [
            f"schedule {part}: no {part_name} {name!r} in the network"
            for part, part_name, names, known in (
                ("keep", "group", schedule.keep, self.groups),
                ("bits", "layer", schedule.bits, self.layers),
            )
            for name in names
            if name not in known
        ]
        if problems:
            raise UserError(*problems)


class _Tracer(fx.Tracer):
    """Layers and norms stay whole, whatever package they come from."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, nn.Conv2d | nn.Linear) or super().is_leaf_module(
            module, qualified_name
        )


def trace(model: nn.Module, example: torch.Tensor) -> fx.GraphModule:
    """The network as an fx graph with the shapes of `example` (N, C, H, W) on its nodes.

    In-place operations are made out-of-place, so that earlier activations stay valid.
    Raises UserError if the network's Python control flow cannot be traced.
    """
    try:
        graph = _Tracer().trace(model)
        traced = fx.GraphModule(model, graph)
        ShapeProp(traced).propagate(example)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{type(model).__name__} cannot be traced by torch.fx: {first}") from error
    for module in traced.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    for node in traced.graph.nodes:
        if node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
        if node.op == "call_function" and node.target.__name__ in ("iadd", "imul"):
            import operator

            node.target = getattr(operator, node.target.__name__[1:])
    traced.recompile()
    return traced


def _output_layers(traced: fx.GraphModule) -> set[str]:
    """Layers whose output channels are the network's output channels."""
    found, seen = set(), set()
    stack = [node for node in traced.graph.nodes if node.op == "output"]
    while stack:
        node = stack.pop()
        for source in node.all_input_nodes:
            if source in seen:
                continue
            seen.add(source)
            if source.op == "call_module" and isinstance(
                traced.get_submodule(source.target), LayerModule
            ):
                found.add(source.target)
            else:
                stack.append(source)
    return found


def _kind(module: LayerModule) -> str:
    if isinstance(module, nn.Linear):
        return "linear"
    if module.groups == module.in_channels == module.out_channels and module.groups > 1:
        return "depthwise"
    if module.groups > 1:
        return "grouped"
    return "pointwise" if module.kernel_size == (1, 1) else "conv"


def _channels(module: LayerModule) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.in_channels, module.out_channels


@dataclass
class _Member:
    name: str
    output: bool
    root: np.ndarray
    index: np.ndarray


def _coupled(model: nn.Module, example: torch.Tensor, ignored: set[str]) -> list[list[_Member]]:
    """torch-pruning's groups as plain members: which module, which side, which channels."""
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    try:
        # The dependency graph is read off autograd's, even where the caller has turned that off.
        with torch.inference_mode(False):
            graph = tp.DependencyGraph().build_dependency(model, example_inputs=example)
            groups = list(
                graph.get_all_groups(
                    ignored_layers=[modules[name] for name in ignored],
                    root_module_types=[nn.Conv2d, nn.Linear],
                )
            )
    except Exception as error:
        raise UserError(
            f"{type(model).__name__}: channels cannot be grouped ({type(error).__name__}: {error})"
        ) from error
    coupled = []
    for group in groups:
        members = []
        for item in group:
            name = names.get(item.dep.target.module)
            if name is None:
                continue
            handler = item.dep.handler.__name__
            members.append(
                _Member(
                    name,
                    "out" in handler,
                    np.asarray(item.root_idxs, dtype=np.int64),
                    np.asarray(item.idxs, dtype=np.int64),
                )
            )
        coupled.append(members)
    return coupled


def build_network(model: nn.Module, example: torch.Tensor) -> Network:
    """Reads a network's structure. `example` is one input (1, C, H, W).

    Raises UserError if it cannot be traced or grouped, calls a layer twice, or has no layer.
    """
    model = model.eval()
    traced = trace(model, example)
    modules = dict(model.named_modules())
    order: list[str] = []
    positions: dict[str, int] = {}
    absorbed: dict[str, str] = {}
    for node in traced.graph.nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], LayerModule):
            continue
        if node.target in positions:
            raise UserError(f"layer {node.target!r} is called twice; shared layers cannot be cut")
        order.append(node.target)
        shape = node.meta["tensor_meta"].shape
        positions[node.target] = (
            math.prod(shape[2:])
            if isinstance(modules[node.target], nn.Conv2d)
            else math.prod(shape[1:-1])
        )
        users = list(node.users)
        if (
            len(users) == 1
            and users[0].op == "call_module"
            and isinstance(modules[users[0].target], nn.BatchNorm2d)
        ):
            absorbed[node.target] = users[0].target
    if not order:
        raise UserError(f"{type(model).__name__} has no Conv2d or Linear layer to compress")
    protected = _output_layers(traced)

    inputs: dict[str, list[Link]] = {name: [] for name in modules}
    outputs: dict[str, list[Link]] = {name: [] for name in modules}
    group_of: dict[str, str] = {}
    groups: dict[str, Group] = {}
    for members in _coupled(model, example, protected):
        layers = [m.name for m in members if m.output and m.name in positions]
        owner = min(layers, key=order.index)
        consumers = [m.name for m in members if not m.output and m.name in positions]
        channels = 1 + max(int(m.root.max()) for m in members)
        reason = ""
        touched = {*layers, *consumers}
        if any(_kind(modules[name]) == "grouped" for name in touched):  # type: ignore[arg-type]
            reason = "it meets a grouped convolution"
        elif not consumers:
            reason = "nothing reads it"
        for member in members:
            side = outputs if member.output else inputs
            side[member.name].append(Link(owner, member.root, member.index))
            if member.output and member.name in positions:
                group_of[member.name] = owner
        groups[owner] = Group(
            owner,
            channels,
            owner,
            tuple(sorted(set(layers), key=order.index)),
            tuple(sorted(set(consumers), key=order.index)),
            reason,
        )

    layers_out = {}
    for name in order:
        module = modules[name]
        assert isinstance(module, LayerModule)
        in_channels, out_channels = _channels(module)
        kind = _kind(module)
        layers_out[name] = Layer(
            name=name,
            kind=kind,
            group=group_of.get(name),
            # A depthwise layer's input channels are its output channels.
            inputs=tuple(outputs[name] if kind == "depthwise" else inputs[name]),
            outputs=tuple(outputs[name]),
            in_channels=in_channels,
            out_channels=out_channels,
            conv_groups=module.groups if isinstance(module, nn.Conv2d) else 1,
            kernel=math.prod(module.kernel_size) if isinstance(module, nn.Conv2d) else 1,
            positions=positions[name],
            batch_norm=absorbed.get(name),
            has_bias=module.bias is not None,
        )
    norms = tuple(
        Norm(
            name,
            len(module.state_dict()) - ("num_batches_tracked" in module.state_dict()),
            next(iter(module.parameters())).numel(),
            tuple(outputs[name]),
        )
        for name, module in modules.items()
        if isinstance(module, nn.BatchNorm2d) and name not in absorbed.values()
    )
    ordered = {g: groups[g] for g in sorted(groups, key=order.index)}
    return Network(layers_out, ordered, norms, tuple(example.shape[1:]))


def kept_mask(links: Sequence[Link], size: int, kept: Mapping[str, np.ndarray]) -> np.ndarray:
    """Mask (size,) of a module's channels when each group keeps its mask in `kept`."""
    mask = np.ones(size, dtype=bool)
    for link in links:
        if link.group in kept:
            mask &= link.kept(size, kept[link.group])
    return mask
