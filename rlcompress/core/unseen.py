"""What `forward` reads besides what it calls, and besides what a state dict holds: found by trying,
on copies with random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from rlcompress.core.calls import Call, LayerCalls
from rlcompress.core.errors import UserError
from rlcompress.core.exactness import TOLERANCE, by_halves, random_copy
from rlcompress.core.fold import fold
from rlcompress.core.graph import LayerModule
from rlcompress.core.process import seeded
from rlcompress.core.reading import leave_out

if TYPE_CHECKING:
    from rlcompress.core.artifact import ModelRef

#: Largest difference of folded batch norms, relative to the largest output: folding rounds, and
#: `forward` may compare or round what lies between two numbers.
FOLDED = 1e-3


def _probe(model: nn.Module, example: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    """A copy with random weights and a random input; where the code takes no such numbers, with
    those that there are."""
    noise = torch.randn(example.shape, generator=torch.Generator().manual_seed(0)).to(example)
    for copied, x in ((random_copy, noise), (copy.deepcopy, noise)):
        probe = copied(model)
        with suppress(Exception):  # the user's own code raises what it likes
            _answers(probe, x)
            return probe, x
    return copy.deepcopy(model), example


def _answers(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), seeded(0):  # a forward that draws draws the same
        y: torch.Tensor = model(x.clone())
    return y


def _alike(y: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> bool:
    finite = wanted[wanted.isfinite()].abs()
    limit = tolerance * float(finite.max()) if len(finite) else 0.0
    return y.shape == wanted.shape and torch.allclose(y, wanted, 0.0, limit, equal_nan=True)


def read_elsewhere(model: nn.Module, example: torch.Tensor, layers: Sequence[str]) -> list[str]:
    """Layers whose weight or bias other code reads too: changed where the layer computes alone,
    they give other answers than changed everywhere."""
    probe, x = _probe(model, example)
    modules = dict(probe.named_modules())
    generator = torch.Generator().manual_seed(1)
    changed = {}
    for name in layers:
        for leaf in ("weight", "bias"):
            tensor = getattr(modules[name], leaf)
            if tensor is not None:
                noise = torch.randn(tensor.shape, generator=generator).to(tensor)
                changed[name, leaf] = tensor.detach() + tensor.detach().abs().mean() * noise

    def handled(network: nn.Module, handle: Callable[[Call], torch.Tensor]) -> torch.Tensor | None:
        """None where the code does not take such numbers."""
        own = dict(network.named_modules())
        with LayerCalls({name: own[name].weight for name in layers}, handle):  # type: ignore[misc]
            try:
                return _answers(network, x)
            except Exception:
                return None

    def agrees(names: Collection[str]) -> bool:
        everywhere = copy.deepcopy(probe)
        own = dict(everywhere.named_modules())
        for (name, leaf), tensor in changed.items():
            if name in names:
                getattr(own[name], leaf).data.copy_(tensor)

        def in_calls(call: Call) -> torch.Tensor:
            if call.name not in names:
                return call.run()
            weight, bias = changed[call.name, "weight"], changed.get((call.name, "bias"))
            return replace(call, weight=weight, bias=bias).run()

        y, wanted = handled(probe, in_calls), handled(everywhere, Call.run)
        if y is None or wanted is None:
            return y is wanted
        return _alike(y, wanted, TOLERANCE)

    alone = by_halves(layers, agrees)[0]
    return [name for name in layers if name not in alone]


def dispensable(model: nn.Module, example: torch.Tensor, modules: Sequence[str]) -> list[str]:
    """Those of `modules` that the network computes the very same without."""
    probe, x = _probe(model, example)
    wanted = _answers(probe, x)

    def agrees(names: Collection[str]) -> bool:
        without = copy.deepcopy(probe)
        for name in names:
            leave_out(without, name)
        try:
            return _alike(_answers(without, x), wanted, 0.0)
        except Exception:  # whatever the network makes of what is not there
            return False

    return by_halves(modules, agrees)[0]


def foldable(
    model: nn.Module, example: torch.Tensor, absorbed: Mapping[str, str], without: Sequence[str]
) -> dict[str, str]:
    """Those of `absorbed` (layer -> batch norm) that can be folded: nothing reads the layer's
    output as it is before the norm, nor the norm's own numbers. `without`: modules left out."""
    probe, x = _probe(model, example)
    for name in without:
        leave_out(probe, name)
    wanted = _answers(probe, x)

    def agrees(names: Collection[str]) -> bool:
        folded = copy.deepcopy(probe)
        modules = dict(folded.named_modules())
        for name in names:
            module = modules[name]
            assert isinstance(module, LayerModule)
            factor, bias = fold(module, modules[absorbed[name]])
            column = torch.from_numpy(factor).view(-1, *[1] * (module.weight.dim() - 1))
            module.weight.data.mul_(column.to(module.weight))
            module.bias = nn.Parameter(torch.from_numpy(bias).to(module.weight))
            leave_out(folded, absorbed[name])
        try:
            return _alike(_answers(folded, x), wanted, FOLDED)
        except Exception:  # whatever the network makes of a norm that is not there
            return False

    exact = by_halves(list(absorbed), agrees)[0]
    return {name: norm for name, norm in absorbed.items() if name in exact}


def require_drawn_alike(model: nn.Module, ref: ModelRef) -> None:
    """Raises UserError if `model`, in eval mode, answers otherwise than what `ref` builds does with
    the same state dict, as it is when a file is read."""
    (mine, x), theirs = _probe(model, ref.example()), ref.build()
    wanted = _answers(mine, x)
    try:
        theirs.load_state_dict(mine.state_dict())
        same = _alike(_answers(theirs, x), wanted, TOLERANCE)
    except Exception:  # of other names or shapes
        same = False
    if not same:
        raise UserError(
            f"model {ref.factory}: built by another seed it answers otherwise with the same state "
            "dict: its constructor draws what a file does not hold; allowed: to draw it with a "
            "generator of a fixed seed, or float buffers (register_buffer)"
        )
