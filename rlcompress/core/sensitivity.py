"""What each cut and each bit-width is estimated to cost, before anything is measured: a few
backward passes over a small unlabelled batch.

The loss is the KL divergence between the dense network's predictions and the compressed one's.
Its gradient at the dense network is zero; to second order it is the Fisher quadratic form

    KL ~ 1/2 E[ <g, d>^2 ],   g = d log p(y|x) / d(...),  y drawn from the network's own p(.|x)

(Amari, 1998; used for pruning by Theis et al., 2018, and Singh & Alistarh, 2020). No labels.

Weights (quantization): with the Fisher's diagonal, KL ~ 1/2 sum_w F_ww dw^2.
Channels (pruning): d is what a consumer no longer receives. With a_c the channel and g_c its
gradient through the consumer, one image gives m_c = sum_hw g_c (a_c - mean a_c); the mean goes
because batch norms (or biases) are re-estimated after the cut. Then

    importance of channel c       1/2 E[m_c^2]          (squared first-order Taylor term,
                                                          Molchanov et al., 2019, eq. 8)
    cost of cutting the set S     1/2 E[(sum_{c in S} m_c)^2]

What both cost where layers are refitted, as reconstruction does it, `solved` says.

Shapes: N images, C channels of a group, K keep ratios, B bit-widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rlcompress.core.calls import Call, LayerCalls
from rlcompress.core.errors import UserError
from rlcompress.core.fisher import backward, readers_of, sound_logits, temperature_of
from rlcompress.core.graph import Link, Network
from rlcompress.core.inputs import (
    borrowed,
    choice_problems,
    count_of,
    count_problems,
    image_problems,
    require,
)
from rlcompress.core.positions import patches, sample_positions
from rlcompress.core.prune import kept_channels
from rlcompress.core.quant import choose_clip, fake_quantize, scale_of
from rlcompress.core.reading import all_gradients
from rlcompress.core.schedule import BITS, KEEPS
from rlcompress.core.solved import Choices, solved_costs
from rlcompress.core.tensors import load_tensors, save_tensors

CLIP_POSITIONS = 512
#: Images of one backward pass for the Fisher diagonal: with sampled labels gradients of
#: different images are uncorrelated, so a small batch's squared gradient is unbiased.
FISHER_BATCH = 8


_TABLES = (
    *("importance", "prune", "prune_solved"),
    *("quantize", "quantize_solved", "output_kl", "clip"),
)
#: Of files: others are estimated anew.
_VERSION = 2


@dataclass(frozen=True)
class Estimates:
    """Everything the searchers know of a network before they measure anything.

    importance  group -> (C,) nats: decides which channels survive at a given ratio
    prune       group -> (K,) nats: KL of cutting to each ratio, consumers not refitted
    prune_solved    group -> (K,) nats: consumers refitted as an evaluation does it (`solved`)
    quantize    layer -> (B,) nats: KL of each bit-width
    quantize_solved layer -> (B,) nats: rounded as an evaluation does it (`solved`)
    output_kl   layer -> (B,) nats: histogram KL of what the layer puts out at each bit-width
    clip        layer -> (B, O) share of the channel's largest weight that is representable
    """

    keeps: tuple[float, ...]
    bits: tuple[int, ...]
    importance: Mapping[str, np.ndarray]
    prune: Mapping[str, np.ndarray]
    prune_solved: Mapping[str, np.ndarray]
    quantize: Mapping[str, np.ndarray]
    quantize_solved: Mapping[str, np.ndarray]
    output_kl: Mapping[str, np.ndarray]
    clip: Mapping[str, np.ndarray]

    def save(self, path: Path, inputs: str = "") -> None:
        """safetensors; read back by `load`, bit for bit. `inputs` names what they were made of."""
        tensors = {
            f"{name}/{key}": torch.from_numpy(np.ascontiguousarray(value))
            for name in _TABLES
            for key, value in getattr(self, name).items()
        }
        about = {"version": _VERSION, "keeps": self.keeps, "bits": self.bits}
        save_tensors(path, tensors, **about, **({"inputs": inputs} if inputs else {}))

    @classmethod
    def load(cls, path: Path, inputs: str = "") -> Estimates | None:
        """None if an older version wrote them, or they were made of something else."""
        tensors, about = load_tensors(path)
        if about.get("version") != _VERSION or about.get("inputs", "") != inputs:
            return None
        tables: dict[str, dict[str, np.ndarray]] = {name: {} for name in _TABLES}
        for name, tensor in tensors.items():
            table, _, key = name.partition("/")
            tables[table][key] = tensor.numpy()
        return cls(tuple(about["keeps"]), tuple(about["bits"]), **tables)

    def clip_of(self, layer: str, bits: int) -> torch.Tensor:
        """Raises UserError on a width that was not estimated."""
        if bits not in self.bits:
            raise UserError(
                f"{layer}: {bits} bits; the estimates hold {', '.join(map(str, self.bits))}"
            )
        return torch.tensor(self.clip[layer][self.bits.index(bits)])


def root_activation(
    values: torch.Tensor, link: Link, channels: int, images: int, *, convolution: bool
) -> torch.Tensor:
    """(N, C, positions) of a consumer's input (or its gradient); a flattened map's features are
    positions."""
    if convolution:
        columns = values.flatten(2)
    else:
        columns = values.reshape(images, -1, values.shape[-1]).transpose(1, 2)
    picked = columns[:, torch.from_numpy(link.index)]
    order = np.argsort(link.root, kind="stable")
    return picked[:, torch.from_numpy(order)].reshape(images, channels, -1)


class _Consumers:
    """While entered, keeps each layer's input and the gradient that reaches it through that
    layer alone."""

    def __init__(self, modules: Mapping[str, nn.Module], names: Sequence[str]) -> None:
        self._calls: dict[str, Call] = {}
        self._mode = LayerCalls({name: modules[name].weight for name in names}, self._handle)  # type: ignore[misc]

    def __enter__(self) -> _Consumers:
        self._mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)

    def _handle(self, call: Call) -> torch.Tensor:
        # A fresh tensor per consumer: its .grad is not mixed with other readers' gradients.
        x = call.x.clone()
        if not x.requires_grad:
            x.requires_grad_()
        x.retain_grad()
        self._calls[call.name] = replace(call, x=x)
        return self._calls[call.name].run()

    def pair(
        self, name: str, link: Link, channels: int, images: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A group's centred channels a_NCP as this layer reads them, and their gradient g_NCP."""
        call = self._calls[name]
        assert call.x.grad is not None
        a_NCP, g_NCP = (
            root_activation(t, link, channels, images, convolution=call.window is not None)
            for t in (call.x.detach(), call.x.grad)
        )
        return a_NCP - a_NCP.mean((0, 2), keepdim=True), g_NCP


def _evenly(images: torch.Tensor, most: int) -> Sequence[torch.Tensor]:
    """Chunks of `most` images or a few less: of a single one, channels have no deviation."""
    return images.tensor_split(-(-len(images) // most))


def _first_pass(
    model: nn.Module,
    network: Network,
    images: torch.Tensor,
    temperature: float,
    generator: torch.Generator,
) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
    """Layer -> E[g_w^2]; group -> importance (C,)."""
    modules = dict(model.named_modules())
    readers = readers_of(network)
    fisher = {name: torch.zeros_like(modules[name].weight) for name in network.layers}  # type: ignore[arg-type]
    importance = {n: np.zeros(g.channels) for n, g in network.groups.items()}
    names = sorted({n for pairs in readers.values() for n, _ in pairs})
    with _Consumers(modules, names) as consumers:
        for chunk in _evenly(images, FISHER_BATCH):
            backward(model, chunk, temperature, generator)
            for name in network.layers:
                gradient = modules[name].weight.grad
                if gradient is not None:
                    fisher[name] += gradient.square() / len(images)  # type: ignore[operator, union-attr]
            for name, pairs in readers.items():
                signal = torch.zeros(len(chunk), network.groups[name].channels)
                for reader, link in pairs:
                    channels = network.groups[name].channels
                    a_NCP, g_NCP = consumers.pair(reader, link, channels, len(chunk))
                    signal += (g_NCP * a_NCP).sum(2).cpu()
                importance[name] += 0.5 * signal.square().sum(0).numpy() / len(images)
    return fisher, importance


def _cut_costs(
    model: nn.Module,
    network: Network,
    images: torch.Tensor,
    kept: Mapping[str, list[np.ndarray]],
    temperature: float,
    generator: torch.Generator,
    batch: int,
) -> dict[str, np.ndarray]:
    """Group -> (K,) of 1/2 E[(sum over cut channels)^2]."""
    readers = readers_of(network)
    modules = dict(model.named_modules())
    costs = {name: np.zeros(len(masks)) for name, masks in kept.items()}
    names = sorted({n for pairs in readers.values() for n, _ in pairs})
    with _Consumers(modules, names) as consumers:
        for chunk in _evenly(images, batch):
            backward(model, chunk, temperature, generator)
            for name, masks in kept.items():
                signals = torch.zeros(len(masks), len(chunk))
                for reader, link in readers[name]:
                    channels = network.groups[name].channels
                    a_NCP, g_NCP = consumers.pair(reader, link, channels, len(chunk))
                    m_NC = (g_NCP * a_NCP).sum(2)
                    for k, mask in enumerate(masks):
                        signals[k] += m_NC[:, torch.from_numpy(~mask)].sum(1).cpu()
                costs[name] += 0.5 * signals.square().sum(1).numpy() / len(images)
    return costs


def estimate(
    model: nn.Module,
    network: Network,
    images: torch.Tensor,
    *,
    keeps: Sequence[float] = KEEPS,
    bits: Sequence[int] = BITS,
    clip: str = "auto",
    seed: int = 0,
    batch: int = 64,
    told: int | None = None,
    positions: int = 2048,
) -> Estimates:
    """Estimates from unlabelled `images` (N, C, H, W), on the model's device and normalised as the
    model was trained on; an evaluation's time or two.

    keeps      keep ratios, (0, 1], 1.0 among them
    bits       weight bits, 1 to 8
    clip       the rule of `quant.choose_clip`
    batch      images of a pass, 2 or more
    told       how many of `images`, the first ones, are estimated on: 2 or more (None: all). Layers
               are refitted on the others; where those are less than half as many, on the second
               half of the first ones, and their first half tells what is then lost
    positions  sampled output positions a layer for the refit

    The model is left as it was. Importance: first-order Taylor expansion (Molchanov et al., 2019,
    eq. 8) of the loss against the network's own answers; bits: diagonal Fisher information (Theis
    et al., 2018); channels: the same to second order, where they are read (`_cut_costs`).

    Raises UserError, a line for each thing that is wrong with what it is given.
    """
    few = {"told": told} if told is not None else {"images": count_of(images) or 2}
    require(
        [
            *choice_problems(keeps, bits),
            *image_problems("images", images, model, network),
            *count_problems(positions=positions),
            # Channels count by how far they are from their means; no image at all was told above.
            *count_problems(2, batch=batch, **few),
        ]
    )
    with borrowed(model):
        return _estimate(
            model, network, images, tuple(keeps), tuple(bits), clip, seed, batch, told, positions
        )


def _estimate(
    model: nn.Module,
    network: Network,
    images: torch.Tensor,
    keeps: tuple[float, ...],
    bits: tuple[int, ...],
    clip: str,
    seed: int,
    batch: int,
    told: int | None,
    positions: int,
) -> Estimates:
    images, rest = images.tensor_split([len(images) if told is None else told])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        logits = torch.cat([model(chunk) for chunk in images.split(batch)])
        temperature = temperature_of(sound_logits(model, logits))
    with all_gradients(model):
        fisher, importance = _first_pass(model, network, images, temperature, generator)
        kept: dict[str, list[np.ndarray]] = {name: [] for name in network.groups}
        for ratio in keeps:
            counts = {name: group.count(ratio) for name, group in network.groups.items()}
            for name, mask in kept_channels(network, importance, counts).items():
                kept[name].append(mask)
        prune = _cut_costs(model, network, images, kept, temperature, generator, batch)
        model.zero_grad(set_to_none=True)

    quantize: dict[str, np.ndarray] = {}
    output_kl: dict[str, np.ndarray] = {}
    clips: dict[str, np.ndarray] = {}

    def handle(call: Call) -> torch.Tensor:
        y = call.run()
        if call.name in quantize:
            return y
        at = sample_positions(call, y.shape, len(y), CLIP_POSITIONS, generator)
        patch = patches(call, at, call.conv_groups)
        losses, divergences, shares = [], [], []
        for width in bits:
            share_O, kl = choose_clip(call.weight, patch, width, clip)
            restored = fake_quantize(call.weight, scale_of(call.weight, share_O, width), width)
            change = restored - call.weight
            losses.append(0.5 * float((fisher[call.name] * change.square()).sum()))
            divergences.append(kl)
            shares.append(share_O.cpu().numpy())
        quantize[call.name] = np.array(losses)
        output_kl[call.name] = np.array(divergences)
        clips[call.name] = np.stack(shares).astype(np.float32)
        return y

    modules = dict(model.named_modules())
    weights = {name: modules[name].weight for name in network.layers}
    with torch.no_grad(), LayerCalls(weights, handle):  # type: ignore[arg-type]
        model(images[:batch])
    if 2 * len(rest) < len(images):
        half = max(1, len(images) // 2)
        images, rest = images[:half], images[-half:]
    solved = solved_costs(
        model,
        network,
        Choices(keeps, bits, kept, clips),
        rest,
        images,
        temperature=temperature,
        positions=positions,
        seed=seed,
    )
    return Estimates(
        keeps=keeps,
        bits=bits,
        importance=importance,
        prune=prune,
        prune_solved={g: np.minimum(prune[g], cost) for g, cost in solved[0].items()},
        quantize=quantize,
        quantize_solved=solved[1],
        output_kl=output_kl,
        clip=clips,
    )
