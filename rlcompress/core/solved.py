"""What a choice costs where the layers around it are refitted, without trying it.

As in `sensitivity`, KL ~ 1/2 E[<g, d>^2]. Here d is what remains in a layer's outputs behind the
evaluator's own recovery (`reconstruct`): the reader of cut channels refitted to those that are
kept, a quantized layer rounded with compensation; rows scaled back where a batch norm will be
re-estimated, inputs centred where means are refitted as well (`free_means`). All of that is a
change D of one layer's weight, and an image's <g, d> is <G, D>, G that weight's gradient for this
image. So one backward pass tells of all choices.

Layers are refitted on other images than the gradients are of. Readers further on would make up for
some more; that is not seen.

Shapes: N images, K keep ratios, B bit-widths, X choices of one layer, D inputs per group x kernel,
o outputs per group, P output positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from rlcompress.core.calls import Call, LayerCalls
from rlcompress.core.fisher import backward, readers_of
from rlcompress.core.graph import Network, kept_mask
from rlcompress.core.moments import Sample
from rlcompress.core.positions import enough_positions, patches, sample_positions
from rlcompress.core.reading import all_gradients
from rlcompress.core.reconstruct import free_means, grouped, refit_sample, unfitted

#: Bytes of weight changes held at a time; what is beyond takes another pass.
MOST_BYTES = 256 * 2**20
#: Images of one backward pass, and bytes of their unfolded inputs held at a time.
BATCH, UNFOLDED_BYTES = 8, 64 * 2**20
#: What a re-estimated batch norm may scale a row by, either way.
MOST_SCALE = 10.0


@dataclass(frozen=True)
class Choices:
    """keeps (K,), bits (B,);  kept  group -> K masks;  clip  layer -> (B, O)"""

    keeps: tuple[float, ...]
    bits: tuple[int, ...]
    kept: Mapping[str, Sequence[np.ndarray]]
    clip: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class _Choice:
    """Of a layer: the keep ratio of a group that it reads, or (group None) its own bit-width."""

    group: str | None
    index: int


@dataclass(frozen=True)
class _Changes:
    """(X, weights) what each choice makes of a layer's weight, minus the weight; and the (groups,
    D) means of its inputs, zeros where the layer has to keep its output's."""

    weights: torch.Tensor
    mean_GD: torch.Tensor


def solved_costs(
    model: nn.Module,
    network: Network,
    choices: Choices,
    fit: torch.Tensor,
    images: torch.Tensor,
    *,
    temperature: float = 1.0,
    positions: int = 2048,
    seed: int = 0,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Group -> (K,) nats of each cut; layer -> (B,) nats of each bit-width. 0 where nothing is cut,
    and of groups that nothing reads.

    fit     (M, C, H, W) unlabelled images that layers are refitted on
    images  (N, C, H, W) others, that tell what is lost; softened by `temperature`
    """
    signals = {g: np.zeros((len(choices.keeps), len(images))) for g in network.groups}
    quantize = {n: np.zeros(len(choices.bits)) for n in network.layers}
    for part in _parts(model, network, choices):
        changes = _solve(model, network, choices, part, fit, positions, seed)
        # The same labels in every part: a group's readers may be in several.
        generator = torch.Generator().manual_seed(seed)
        told = _signals(model, changes, images, temperature, generator)
        for name, signal_XN in told.items():
            for choice, signal_N in zip(part[name], signal_XN, strict=True):
                if choice.group is None:
                    quantize[name][choice.index] = 0.5 * np.square(signal_N).mean()
                else:
                    signals[choice.group][choice.index] += signal_N
    return {g: 0.5 * np.square(s).mean(1) for g, s in signals.items()}, quantize


def _parts(
    model: nn.Module, network: Network, choices: Choices
) -> Iterator[dict[str, list[_Choice]]]:
    """Layer -> choices, in parts whose weight changes are held together."""
    modules = dict(model.named_modules())
    wanted = {n: [_Choice(None, b) for b in range(len(choices.bits))] for n in network.layers}
    for group, readers in readers_of(network).items():
        for name, _ in readers:
            wanted[name] += [
                _Choice(group, k) for k, mask in enumerate(choices.kept[group]) if not mask.all()
            ]
    part: dict[str, list[_Choice]] = {}
    held = 0
    for name, mine in wanted.items():
        size = modules[name].weight.nbytes  # type: ignore[union-attr, operator]
        for choice in mine:
            if part and held + size > MOST_BYTES:
                yield part
                part, held = {}, 0
            part.setdefault(name, []).append(choice)
            held += size  # type: ignore[operator]
    if part:
        yield part


def _solve(
    model: nn.Module,
    network: Network,
    choices: Choices,
    part: Mapping[str, list[_Choice]],
    fit: torch.Tensor,
    positions: int,
    seed: int,
) -> dict[str, _Changes]:
    modules, order = dict(model.named_modules()), list(network.layers)
    free = free_means(model, network)
    found: dict[str, _Changes] = {}

    def handle(call: Call) -> torch.Tensor:
        y = call.run()
        if call.name not in found:
            count = enough_positions(call.weight[0].numel(), positions)
            generator = torch.Generator().manual_seed(seed + order.index(call.name))
            at = sample_positions(call, y.shape, len(y), count, generator)
            patch_PGD = patches(call, at, call.conv_groups).float()
            sample = Sample.of(patch_PGD, at.outputs(y).float(), centred=call.name in free)
            solver = _Solver(network, choices, call, sample)
            changed = torch.stack([solver.change(choice).flatten() for choice in part[call.name]])
            found[call.name] = _Changes(changed, sample.mean_GD)
        return y

    weights = {name: modules[name].weight for name in part}
    with torch.no_grad(), LayerCalls(weights, handle):  # type: ignore[arg-type]
        model(fit)
    return found


class _Solver:
    """Refits and rounds one layer at the sampled positions of its dense inputs and outputs. All
    keep ratios of what it reads are parts of one `Sample`."""

    def __init__(
        self,
        network: Network,
        choices: Choices,
        call: Call,
        sample: Sample,
    ) -> None:
        self.layer, self.choices = network.layers[call.name], choices
        self.weight = call.weight.detach().float()
        self.sample, self.sums = sample, sample.whole
        self.whole = unfitted(self.sample, self.weight)
        self.energy_Go = self.sums.energy(grouped(self.weight, len(self.sample.mean_GD)))

    def change(self, choice: _Choice) -> torch.Tensor:
        made = (
            self._rounded(choice.index)
            if choice.group is None
            else self._refitted(choice.group, choice.index)
        )
        if self.layer.batch_norm:
            now_Go = self.sums.energy(grouped(made, len(self.sample.mean_GD))).clamp_min(1e-24)
            scale_O = (self.energy_Go / now_Go).sqrt().clamp(1 / MOST_SCALE, MOST_SCALE).flatten()
            made = made * scale_O.view(-1, *[1] * (made.dim() - 1))
        return made - self.weight

    def _rounded(self, column: int) -> torch.Tensor:
        bits = self.choices.bits[column]
        clip_O = torch.tensor(self.choices.clip[self.layer.name][column]).to(self.weight)
        out = torch.arange(len(self.weight), device=self.weight.device)
        return self.whole.quantize(out, self.whole.scale(out, clip_O, bits), bits)

    def _refitted(self, group: str, column: int) -> torch.Tensor:
        layer = self.layer
        mask = kept_mask(layer.inputs, layer.in_channels, {group: self.choices.kept[group][column]})
        kept = torch.from_numpy(np.flatnonzero(mask)).to(self.weight.device)
        kernel = self.weight[0, 0].numel()
        inputs_D = (kept[:, None] * kernel + torch.arange(kernel, device=kept.device)).flatten()
        fitted = refit_sample(self.sample.part(inputs_D), self.weight[:, kept])
        whole = torch.zeros_like(self.weight)
        whole[:, kept] = fitted.weight
        return whole


def _signals(
    model: nn.Module,
    changes: Mapping[str, _Changes],
    images: torch.Tensor,
    temperature: float,
    generator: torch.Generator,
) -> dict[str, np.ndarray]:
    """Layer -> (X, N) of <G, D>."""
    modules = dict(model.named_modules())
    weights = {name: modules[name].weight for name in changes}
    signals = {name: np.zeros((len(c.weights), len(images))) for name, c in changes.items()}
    with all_gradients(model):
        for start in range(0, len(images), BATCH):
            batch = images[start : start + BATCH]
            used: list[tuple[Call, list[torch.Tensor]]] = []

            def handle(call: Call, used: list[tuple[Call, list[torch.Tensor]]] = used):  # type: ignore[no-untyped-def]
                y, gradients = call.run(), []  # type: ignore[var-annotated]
                # A hook, because what follows may change `y` in place.
                y.register_hook(gradients.append)
                used.append((call, gradients))
                return y

            with LayerCalls(weights, handle):  # type: ignore[arg-type]
                backward(model, batch, temperature, generator)
            with torch.no_grad():
                for call, gradients in used:
                    for gradient in gradients:
                        signal_XN = _products(call, gradient, changes[call.name], len(batch))
                        signals[call.name][:, start : start + len(batch)] += signal_XN
    model.zero_grad(set_to_none=True)
    return signals


def _products(call: Call, gradient: torch.Tensor, changes: _Changes, images: int) -> np.ndarray:
    """(X, N) of one use of a layer. Its first dimension may hold several entries an image."""
    x, groups = call.x.detach(), len(changes.mean_GD)
    if call.window is None:
        x, gradient = (t.reshape(images, -1, t.shape[-1]).transpose(1, 2) for t in (x, gradient))
        step = images
    else:
        gradient = gradient.flatten(2)
        size = call.weight[0].numel() * groups * gradient.shape[2] * x.element_size()
        entries = len(x) // images
        step = max(1, UNFOLDED_BYTES // max(1, size * entries)) * entries
    signals = []
    for some_x, some_g in zip(x.split(step), gradient.split(step), strict=True):
        inputs = some_x
        if (w := call.window) is not None:
            inputs = F.unfold(some_x, w.kernel, w.dilation, w.padding, w.stride)
        x_NGDP = inputs.reshape(len(inputs), groups, -1, inputs.shape[-1])
        g_NGoP = some_g.reshape(len(inputs), groups, -1, inputs.shape[-1])
        G_NGoD = g_NGoP @ x_NGDP.transpose(2, 3)
        G_NGoD -= g_NGoP.sum(3, keepdim=True) * changes.mean_GD.unsqueeze(1)
        signals.append(changes.weights @ G_NGoD.flatten(1).T)
    whole_XN = torch.cat(signals, 1)
    return whole_XN.unflatten(1, (images, -1)).sum(2).cpu().numpy()
