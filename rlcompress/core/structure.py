"""Reads the structure of a network: layers, groups, what is protected and why.

Four parts: one forward pass (`reading`); what it does not show (`unseen`); coupled channels
(`coupling`); and a check (`exactness`): whatever is cut, the network must compute what it computes
under masks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from rlcompress.core.attention import Attention, replaceable
from rlcompress.core.calls import layer_weights
from rlcompress.core.coupling import Coupling, Member, couple
from rlcompress.core.errors import UserError, blame
from rlcompress.core.exactness import checked
from rlcompress.core.graph import Group, Layer, LayerModule, Link, Network, Norm
from rlcompress.core.inputs import (
    borrowed,
    count_problems,
    likeness_problems,
    require,
    tensor_problems,
)
from rlcompress.core.ordinary import require_ordinary
from rlcompress.core.reading import (
    Reading,
    all_gradients,
    estimated,
    read,
    rest_of,
)
from rlcompress.core.unseen import dispensable, foldable, read_elsewhere

#: Why a layer stays as it is: its weights would not be those that are scored.
READ_ELSEWHERE = "its weight or bias is read by other code than its module"


def build_network(model: nn.Module, example: torch.Tensor, *, round_to: int = 1) -> Network:
    """Reads a network's structure. `example` is one input (1, C, H, W).

    round_to  kept channels are multiples of it (or all there are)

    The model is left as it was. Coupled channels: torch-pruning's dependency graph (DepGraph,
    Fang et al., 2023).

    Raises UserError if it cannot be copied or run, does not return one tensor, has no layer, has
    attention that `plain_attention` replaces, is not in float32, has complex parameters, computes
    layers that its output does depend on without gradients, or reads all layers' weights elsewhere
    too.
    """
    require_ordinary(model)
    require(tensor_problems("example", example) + count_problems(round_to=round_to))
    weights = layer_weights(model)
    _refuse_attention(model)
    _refuse_shared(model)
    _refuse_other_types(weights)
    _refuse_complex(model)
    require(likeness_problems("example", example, model))
    with borrowed(model):
        # Whole it is called with copies; its parts, where they are read, are not.
        return _read_and_checked(model, example.clone(), round_to)


def _read_and_checked(model: nn.Module, example: torch.Tensor, round_to: int) -> Network:
    reading = read(model, (example,))
    if not isinstance(reading.output, torch.Tensor):
        raise UserError(
            f"{type(model).__name__} returns a {type(reading.output).__name__}; "
            "allowed: one tensor of logits (N, classes)"
        )
    if not reading.order:
        raise UserError(f"{type(model).__name__} has no Conv2d or Linear layer to compress")
    unused = _unused(model, reading)
    spare = tuple(dispensable(model, example, unused))
    reading = _without_dead_layers(reading, unused, spare)
    elsewhere = read_elsewhere(model, example, reading.order)
    if len(elsewhere) == len(reading.order):
        name = elsewhere[0]
        raise UserError(f"layer {name!r}: {READ_ELSEWHERE}; there is no other layer to compress")
    reading = _without_layers(reading, elsewhere)
    reading = replace(reading, absorbed=foldable(model, example, reading.absorbed, spare))
    with all_gradients(model):
        coupling = couple(model, example, reading.order, reading.last)
    network = _assemble(model, example, reading, coupling, round_to, spare, elsewhere)
    return checked(model, network)


@torch.inference_mode()
def require_logits(model: nn.Module, example: torch.Tensor, classes: int) -> None:
    """Raises UserError unless the network, which `build_network` could read, answers one image
    (1, C, H, W), and two, with a row of `classes` logits or more for each."""
    name = type(model).__name__
    for count, words in ((1, "one image"), (2, "two images")):
        try:
            with borrowed(model):
                shape = tuple(model(example.expand(count, -1, -1, -1)).shape)
        except Exception as error:  # the user's own code raises what it likes
            raise UserError(f"{name} cannot be run on {words}: {blame(error)}") from error
        if len(shape) != 2 or shape[0] != count or shape[1] < classes:
            raise UserError(
                f"{name} returns {shape} for {words}; "
                f"allowed: logits ({count}, {classes}), one for each class of the data"
            )


def _refuse_attention(model: nn.Module) -> None:
    """A file of it could not be read: whoever builds the network for that replaces them."""
    for name, module in model.named_modules():
        if replaceable(name, module):
            raise UserError(
                f"{name!r} is an nn.MultiheadAttention, whose weights no layer holds; allowed: "
                "model = rlcompress.core.plain_attention(model) before"
            )


def _refuse_shared(model: nn.Module) -> None:
    """Whoever else holds a layer's numbers would compute with those that the file rounds."""
    layers = {*layer_weights(model)}
    holders: dict[int, tuple[str, bool]] = {}  # memory -> its name, whether a layer's
    # Each module once: one under several names shares nothing.
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            mine, own = f"{name}.{leaf}".lstrip("."), name in layers
            memory = parameter.data_ptr() or id(parameter)
            other, others = holders.setdefault(memory, (mine, own))
            if other != mine and (own or others):
                raise UserError(f"{other!r} and {mine!r} share one parameter: not supported")


def _refuse_other_types(weights: dict[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        if weight.dtype != torch.float32:
            raise UserError(
                f"layer {name!r} has weights of {weight.dtype}; "
                "allowed: torch.float32, as model.float() makes them"
            )


def _refuse_complex(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_complex():
            raise UserError(
                f"parameter {name!r} is of {parameter.dtype}, which no file holds; "
                "allowed: a real one, read by torch.view_as_complex in forward"
            )


def _without_dead_layers(reading: Reading, unused: Sequence[str], spare: Sequence[str]) -> Reading:
    """Without the layers that are computed for nothing (an auxiliary head whose output only
    training returns). `spare`: those of `unused` that the output does without."""
    dead = [name for name in reading.order if _inside(name, unused)]
    for name in dead:
        if not _inside(name, spare):
            raise UserError(
                f"layer {name!r}: the output depends on it, but no gradient comes back to it, so "
                "nothing can be read; allowed: no torch.no_grad() and no detach() behind it in "
                "forward"
            )
    return _without_layers(reading, dead)


def _without_layers(reading: Reading, names: Collection[str]) -> Reading:
    return replace(
        reading,
        order=tuple(name for name in reading.order if name not in names),
        absorbed={layer: n for layer, n in reading.absorbed.items() if layer not in names},
    )


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


def _why_whole(
    members: Sequence[Member],
    channels: int,
    consumers: Sequence[str],
    reading: Reading,
    heads: Sequence[str],
    elsewhere: Collection[str],
) -> str:
    """Why a group's channels may not be cut; empty if they may. `heads`: attention modules;
    `elsewhere`: layers whose weights other code reads."""
    for member in members:
        module = member.module
        if module is None:
            return f"it meets {member.name}"
        if member.output and any(member.name.startswith(f"{name}.") for name in heads):
            return f"it is split into attention heads ({member.name})"
        if isinstance(module, nn.Conv2d | nn.Linear):
            if member.name not in reading.uses:
                return f"{member.name} computes its weight"
            if member.name in elsewhere:
                return f"{member.name}: {READ_ELSEWHERE}"
            if _kind(module) == "grouped":
                return f"it meets the grouped convolution {member.name}"
            if reading.uses[member.name] != 1:
                return f"{member.name} is used {reading.uses[member.name]} times"
        elif not estimated(module):
            return f"it meets {type(module).__name__} {member.name}"
    for member in members:
        # How many of a part survive, and so a file's size, no keep ratio says.
        features_C = np.bincount(member.root, minlength=channels)
        if member.module is not None and (features_C != features_C[0]).any():
            return f"{member.name} has only a part of its channels"
    return "" if consumers else "nothing reads it"


def _assemble(
    model: nn.Module,
    example: torch.Tensor,
    reading: Reading,
    coupling: Coupling,
    round_to: int,
    unused: tuple[str, ...],
    elsewhere: Collection[str],
) -> Network:
    modules = dict(model.named_modules())
    order, place = reading.order, {name: i for i, name in enumerate(reading.order)}
    inputs: dict[str, list[Link]] = {name: [] for name in modules}
    outputs: dict[str, list[Link]] = {name: [] for name in modules}
    group_of: dict[str, str] = {}
    groups: dict[str, Group] = {}
    heads = [name for name, module in modules.items() if isinstance(module, Attention)]
    for members in coupling.groups:
        layers = sorted({m.name for m in members if m.output and m.name in place}, key=place.get)  # type: ignore[arg-type]
        consumers = sorted(
            {m.name for m in members if not m.output and m.name in place},
            key=place.get,  # type: ignore[arg-type]
        )
        if not layers:
            continue  # their weights are computed, by code that no cut reaches
        owner = layers[0]
        for member in members:
            if member.module is None:
                continue
            side = outputs if member.output else inputs
            side[member.name].append(Link(owner, member.root, member.index))
            if member.output and member.name in place:
                group_of[member.name] = owner
        channels = 1 + max(int(m.root.max()) for m in members)
        groups[owner] = Group(
            name=owner,
            channels=channels,
            owner=owner,
            layers=tuple(layers),
            consumers=tuple(consumers),
            protected=_why_whole(members, channels, consumers, reading, heads, elsewhere),
            round_to=round_to,
        )
    layers_out = {}
    for name in order:
        module = modules[name]
        assert isinstance(module, LayerModule)
        in_channels, out_channels = _channels(module)
        kind = _kind(module)
        group = group_of.get(name)
        if group is not None:
            protected = groups[group].protected
        elif name in reading.last:
            protected = "it is the network's output"
        else:
            protected = "its channels could not be read"
        layers_out[name] = Layer(
            name=name,
            kind=kind,
            group=group,
            # A depthwise layer's input channels are its output channels.
            inputs=tuple(outputs[name] if kind == "depthwise" else inputs[name]),
            outputs=tuple(outputs[name]),
            in_channels=in_channels,
            out_channels=out_channels,
            conv_groups=module.groups if isinstance(module, nn.Conv2d) else 1,
            kernel=math.prod(module.kernel_size) if isinstance(module, nn.Conv2d) else 1,
            positions=reading.positions[name],
            batch_norm=reading.absorbed.get(name),
            has_bias=module.bias is not None,
            protected=protected,
        )
    norms = tuple(
        Norm(
            name,
            sum(t.is_floating_point() for t in module.state_dict().values()),
            module.num_features,
            tuple(outputs[name]),
            reading.norm_uses[name],
        )
        for name, module in modules.items()
        if estimated(module) and name not in reading.absorbed.values() and not _inside(name, unused)
    )
    network = Network(
        layers=layers_out,
        groups={g: groups[g] for g in sorted(groups, key=place.get)},  # type: ignore[arg-type]
        norms=norms,
        input_shape=tuple(example.shape[1:]),
        unused=unused,
        unread=coupling.unread,
        modules=tuple(modules),
    )
    return replace(network, rest=_rest(model, network))


def _inside(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def _unused(model: nn.Module, reading: Reading) -> tuple[str, ...]:
    """The outermost modules that have parameters, none of which the output depends on."""
    found: list[str] = []
    for name, module in model.named_modules():
        parameters = list(module.parameters())
        if (
            name
            and parameters
            and not _inside(name, found)
            and not any(id(p) in reading.reached for p in parameters)
        ):
            found.append(name)
    return tuple(found)


def _rest(model: nn.Module, network: Network) -> dict[str, tuple[int, ...]]:
    norms = {norm.name for norm in network.norms}
    norms |= {layer.batch_norm for layer in network.layers.values() if layer.batch_norm}
    return {
        name: tuple(tensor.shape)
        for name, tensor in rest_of(model, network.layers, norms).items()
        if not _inside(name.rpartition(".")[0], network.unused)
    }
