"""What each cut and each bit-width is estimated to cost, before anything is measured: two backward
passes over a small unlabelled batch.

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
    the same when consumers are
    refitted                      a_c is replaced by what the kept channels do not predict of it
                                  linearly (their covariance says so)

Shapes: N images, C channels of a group, K keep ratios, B bit-widths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from rlcompress.core.calls import Call, LayerCalls
from rlcompress.core.errors import UserError
from rlcompress.core.graph import Link, Network
from rlcompress.core.prune import kept_channels
from rlcompress.core.quant import choose_clip, fake_quantize, scale_of
from rlcompress.core.reading import all_gradients
from rlcompress.core.reconstruct import patches, sample_positions
from rlcompress.core.schedule import BITS, KEEPS
from rlcompress.core.tensors import load_tensors, save_tensors

CLIP_POSITIONS = 512
#: Images of one backward pass for the Fisher diagonal: with sampled labels gradients of
#: different images are uncorrelated, so a small batch's squared gradient is unbiased.
FISHER_BATCH = 8
ENTROPY_SHARE = 0.25


_TABLES = ("importance", "prune", "prune_refit", "quantize", "output_kl", "clip")


@dataclass(frozen=True)
class Estimates:
    """Everything the searchers know of a network before they measure anything.

    importance  group -> (C,) nats: decides which channels survive at a given ratio
    prune       group -> (K,) nats: KL of cutting to each ratio, consumers not refitted
    prune_refit group -> (K,) nats: the same, consumers refitted
    quantize    layer -> (B,) nats: KL of each bit-width
    output_kl   layer -> (B,) nats: histogram KL of what the layer puts out at each bit-width
    clip        layer -> (B, O) share of the channel's largest weight that is representable
    """

    keeps: tuple[float, ...]
    bits: tuple[int, ...]
    importance: Mapping[str, np.ndarray]
    prune: Mapping[str, np.ndarray]
    prune_refit: Mapping[str, np.ndarray]
    quantize: Mapping[str, np.ndarray]
    output_kl: Mapping[str, np.ndarray]
    clip: Mapping[str, np.ndarray]

    def save(self, path: Path) -> None:
        """safetensors; read back by `load`, bit for bit."""
        tensors = {
            f"{name}/{key}": torch.from_numpy(np.ascontiguousarray(value))
            for name in _TABLES
            for key, value in getattr(self, name).items()
        }
        save_tensors(path, tensors, keeps=self.keeps, bits=self.bits)

    @classmethod
    def load(cls, path: Path) -> Estimates:
        tensors, about = load_tensors(path)
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


def _temperature(logits: torch.Tensor) -> float:
    """At least 1: what brings the mean entropy up to `ENTROPY_SHARE` of its maximum.

    A network that is sure of every calibration image has no gradient; softened predictions
    rank its weights all the same.
    """
    wanted = ENTROPY_SHARE * math.log(logits.shape[1])

    def entropy(temperature: float) -> float:
        logp = (logits / temperature).log_softmax(1)
        return -float((logp.exp() * logp).sum(1).mean())

    if entropy(1.0) >= wanted:
        return 1.0
    low, high = 0.0, 10.0  # log2 of the temperature
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if entropy(2**middle) < wanted else (low, middle)
    return 2**high


def _sampled_labels(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    probabilities = logits.detach().softmax(1).cpu()
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1).to(logits.device)


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


def readers_of(network: Network) -> dict[str, list[tuple[str, Link]]]:
    """Group -> the layers that read it (depthwise ones pass it on, they are not readers); none
    of a protected group."""
    readers: dict[str, list[tuple[str, Link]]] = {g: [] for g in network.groups}
    for layer in network.layers.values():
        for link in layer.inputs if layer.kind != "depthwise" else ():
            if not network.groups[link.group].protected:
                readers[link.group].append((layer.name, link))
    return readers


def _backward(
    model: nn.Module, chunk: torch.Tensor, temperature: float, generator: torch.Generator
) -> None:
    logits = model(chunk) / temperature
    model.zero_grad(set_to_none=True)
    labels = _sampled_labels(logits, generator)
    F.cross_entropy(logits, labels, reduction="sum").backward()


def _first_pass(
    model: nn.Module,
    network: Network,
    images: torch.Tensor,
    temperature: float,
    generator: torch.Generator,
) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray], dict[str, torch.Tensor]]:
    """Layer -> E[g_w^2]; group -> importance (C,); group -> covariance (C, C)."""
    modules = dict(model.named_modules())
    readers = readers_of(network)
    fisher = {name: torch.zeros_like(modules[name].weight) for name in network.layers}  # type: ignore[arg-type]
    importance = {n: np.zeros(g.channels) for n, g in network.groups.items()}
    covariance = {n: torch.zeros(g.channels, g.channels) for n, g in network.groups.items()}
    names = sorted({n for pairs in readers.values() for n, _ in pairs})
    with _Consumers(modules, names) as consumers:
        for chunk in images.split(FISHER_BATCH):
            _backward(model, chunk, temperature, generator)
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
                    flat = a_NCP.transpose(0, 1).flatten(1)
                    covariance[name] += (flat @ flat.T).cpu() / flat.shape[1]
                importance[name] += 0.5 * signal.square().sum(0).numpy() / len(images)
    return fisher, importance, covariance


def predictor(covariance: torch.Tensor, kept: np.ndarray) -> torch.Tensor:
    """(kept, cut): the ridge regression of the cut channels on the kept ones."""
    keep, gone = torch.from_numpy(np.flatnonzero(kept)), torch.from_numpy(np.flatnonzero(~kept))
    a = covariance[keep][:, keep].double()
    ridge = 1e-2 * a.diagonal().mean() + 1e-12
    identity = torch.eye(len(keep), dtype=a.dtype)
    return torch.linalg.solve(a + ridge * identity, covariance[keep][:, gone].double()).float()


def _cut_costs(
    model: nn.Module,
    network: Network,
    images: torch.Tensor,
    kept: Mapping[str, list[np.ndarray]],
    covariance: Mapping[str, torch.Tensor],
    temperature: float,
    generator: torch.Generator,
    batch: int,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Group -> (K,) of 1/2 E[(sum over cut channels)^2]: plain, and with consumers refitted."""
    readers = readers_of(network)
    modules = dict(model.named_modules())
    device = images.device
    predictors = {
        name: [predictor(covariance[name], mask).to(device) for mask in masks]
        for name, masks in kept.items()
    }
    plain = {name: np.zeros(len(masks)) for name, masks in kept.items()}
    refitted = {name: np.zeros(len(masks)) for name, masks in kept.items()}
    names = sorted({n for pairs in readers.values() for n, _ in pairs})
    with _Consumers(modules, names) as consumers:
        for chunk in images.split(batch):
            _backward(model, chunk, temperature, generator)
            for name, masks in kept.items():
                signals = torch.zeros(2, len(masks), len(chunk))
                for reader, link in readers[name]:
                    channels = network.groups[name].channels
                    a_NCP, g_NCP = consumers.pair(reader, link, channels, len(chunk))
                    for k, mask in enumerate(masks):
                        keep = torch.from_numpy(mask).to(device)
                        g_gone = g_NCP[:, ~keep]
                        predicted = predictors[name][k].T @ a_NCP[:, keep]
                        direct = (g_gone * a_NCP[:, ~keep]).sum((1, 2))
                        signals[0, k] += direct.cpu()
                        signals[1, k] += (direct - (g_gone * predicted).sum((1, 2))).cpu()
                halves = 0.5 * signals.square().sum(2).numpy() / len(images)
                plain[name] += halves[0]
                refitted[name] += halves[1]
    return plain, {name: np.minimum(plain[name], refitted[name]) for name in plain}


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
) -> Estimates:
    """Estimates from unlabelled `images` (N, C, H, W); about five forwards' time.

    `clip` is the rule of `quant.choose_clip`. The model is left as it was.
    """
    model = model.eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        temperature = _temperature(torch.cat([model(chunk) for chunk in images.split(batch)]))
    with all_gradients(model):
        fisher, importance, covariance = _first_pass(model, network, images, temperature, generator)
        kept: dict[str, list[np.ndarray]] = {name: [] for name in network.groups}
        for ratio in keeps:
            counts = {name: group.count(ratio) for name, group in network.groups.items()}
            for name, mask in kept_channels(network, importance, counts).items():
                kept[name].append(mask)
        prune, refit = _cut_costs(
            model, network, images, kept, covariance, temperature, generator, batch
        )
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
        model(images[:batch].clone())
    return Estimates(
        tuple(keeps), tuple(bits), importance, prune, refit, quantize, output_kl, clips
    )
