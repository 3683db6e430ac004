"""What training shows of a network that is being compressed: the estimates of `sensitivity`, live,
from the gradients of the current minibatches and the layers' current inputs.

A reader of a group has weights W_ocp (o outputs, c channels, p kernel positions, or features of a
flattened map) and their gradient G of the mean loss. Summed over a minibatch,

    M_ck = sum_op W_ocp G_okp = <dL/d(channel c, as this layer reads it), channel k>

since both sides sum the same products. M_cc is the Taylor term of channel c (Molchanov et al.,
2019, eq. 8); if the kept channels k predict channel c with coefficients P_kc, cutting c with
this reader refitted moves the loss by M_cc - sum_k P_kc M_ck. So the cost of a cut needs no
activation's gradient and no pass of its own. Losses are in nats: with B images in a minibatch,
1/2 B M^2 estimates the Fisher form 1/2 E[m^2] of single images.

In front of a batch norm a constant has no effect and needs no centring; where a layer has a bias
instead, the bias's gradient takes the channels' means out.

Shapes: B images, C channels of a group, K keep ratios, O outputs, P positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from rlcompress.core.calls import Call, as_call
from rlcompress.core.graph import Layer, Link, Network
from rlcompress.core.prune import kept_channels
from rlcompress.core.quant import choose_clip, fake_quantize, float_weight, scale_of
from rlcompress.core.reconstruct import patches, sample_positions
from rlcompress.core.sensitivity import Estimates, predictor, readers_of

#: Output positions of a layer that are looked at, and inputs that covariances are taken from.
POSITIONS, INPUTS = 256, 2048
#: Of the moving averages: the last ten minibatches, and the last fifty.
FAST, SLOW = 0.9, 0.98


class Average:
    """Named moving averages of tensors; the plain mean until there are 1 / (1 - decay) values."""

    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, value: torch.Tensor, decay: float = FAST) -> None:
        count = self.counts[name] = self.counts.get(name, 0) + 1
        if count == 1:
            self.values[name] = value.detach().clone()
        else:
            self.values[name].lerp_(value.detach(), max(1 / count, 1 - decay))

    def drop(self, prefix: str) -> None:
        for name in [n for n in self.values if n.startswith(prefix)]:
            del self.values[name], self.counts[name]


class Signals:
    """Listens to one model in training.

    keeps, bits  the choices that are estimated;  clip  the rule of `quant.choose_clip`

    Hooks take a sample of a layer's input where `wanted` names it, in the next forward pass in
    training mode. `read` takes the gradients that are there.
    """

    def __init__(
        self,
        model: nn.Module,
        network: Network,
        keeps: Sequence[float],
        bits: Sequence[int],
        clip: str = "auto",
        seed: int = 0,
    ) -> None:
        self.network, self.keeps, self.bits = network, tuple(keeps), tuple(bits)
        self.average = Average()
        self.images = 0
        self.wanted: set[str] = set()
        self._clip = clip
        self._generator = torch.Generator().manual_seed(seed)
        modules = dict(model.named_modules())
        self._modules = {name: modules[name] for name in network.layers}
        self._readers = readers_of(network)
        #: layer -> (P, G, D) what it reads at sampled positions
        self.patches: dict[str, torch.Tensor] = {}
        self._inputs: dict[str, torch.Tensor] = {}
        self._kept: dict[str, list[np.ndarray]] = {}
        self._predictors: dict[str, list[torch.Tensor]] = {}
        self._tables: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._hooks = [
            module.register_forward_hook(self._listen(network.layers[name]))
            for name, module in self._modules.items()
        ]
        self._hooks.append(model.register_forward_pre_hook(self._count))

    def close(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # --- listening ---------------------------------------------------------------------------

    def _count(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module.training and args:
            self.images = len(args[0])

    def _listen(self, layer: Layer) -> Any:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...], y: torch.Tensor) -> None:
            if layer.name not in self.wanted or not module.training:
                return
            self.wanted.discard(layer.name)
            call = as_call(layer.name, module, args[0].detach().float())
            at = sample_positions(call, y.shape, len(y), POSITIONS, self._generator)
            self.patches[layer.name] = patches(call, at, layer.conv_groups)
            if layer.kind != "depthwise":
                self._inputs[layer.name] = self._columns(call)

        return hook

    def _columns(self, call: Call) -> torch.Tensor:
        """Some entries (rows, in channels) of a layer's input."""
        x = call.x.movedim(1, -1) if call.window is not None else call.x
        rows = x.reshape(-1, x.shape[-1])
        return rows[torch.randperm(len(rows), generator=self._generator)[:INPUTS]]

    # --- gradients ---------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, loss: torch.Tensor | float) -> None:
        """Takes a minibatch: its mean loss, and the gradients of it that the weights hold.

        Raises ValueError where no weight has a gradient.
        """
        average, squares = self.average, []
        gradients: dict[str, torch.Tensor] = {}
        for name, module in self._modules.items():
            gradient = _gradient(module)
            if gradient is not None:
                gradients[name] = gradient
                square = gradient.square()
                squares.append(square.sum())
                average.add(f"fisher/{name}", square * self.images)
        if not gradients:
            raise ValueError("no weight has a gradient: call this before the gradients are zeroed")
        norm = torch.stack(squares).sum().sqrt()
        for name, value in (("loss", torch.as_tensor(loss)), ("gradient", norm)):
            value = value.detach().float().cpu()
            average.add(f"{name}/fast", value)
            average.add(f"{name}/slow", value, SLOW)
        for group, pairs in self._readers.items():
            moments = [
                self._moments(self.network.layers[reader], link, gradients[reader])
                for reader, link in pairs
                if reader in gradients
            ]
            if moments:
                self._take(group, torch.stack(moments).sum(0))

    def _moments(self, layer: Layer, link: Link, gradient: torch.Tensor) -> torch.Tensor:
        """M_ck of one reader, on the CPU."""
        module = self._modules[layer.name]
        channels = self.network.groups[link.group].channels
        order = torch.from_numpy(link.index[np.argsort(link.root, kind="stable")])

        def by_channel(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.flatten(2 if tensor.dim() > 2 else 1)[:, order.to(tensor.device)].reshape(
                len(tensor), channels, -1
            )

        weight = by_channel(float_weight(module))
        moment_CC = torch.einsum("ocp,okp->ck", weight, by_channel(gradient))
        bias = getattr(module, "bias", None)
        if layer.batch_norm is None and bias is not None and bias.grad is not None:
            mean = self.average.values.get(f"mean/{layer.name}")
            if mean is not None:
                # The kernel's positions see (nearly) the same mean; a flattened map's do not.
                means = mean[order].reshape(channels, -1)
                means = means if weight.shape[2] == means.shape[1] else means[:, :1]
                pull = (weight * bias.grad.view(-1, 1, 1)).sum(0).cpu()
                moment_CC = moment_CC.cpu() - pull @ means.expand(-1, pull.shape[1]).T
        return moment_CC.cpu()

    def _take(self, group: str, moment_CC: torch.Tensor) -> None:
        half = self.images / 2
        self.average.add(f"importance/{group}", half * moment_CC.diagonal().square())
        if group not in self._predictors:
            return
        plain, refit = [], []
        for mask, predictor_kc in zip(self._kept[group], self._predictors[group], strict=True):
            keep = torch.from_numpy(mask)
            direct = moment_CC.diagonal()[~keep].sum()
            plain.append(direct)
            refit.append(direct - (predictor_kc.T * moment_CC[~keep][:, keep]).sum())
        self.average.add(f"plain/{group}", half * torch.stack(plain).square())
        self.average.add(f"refit/{group}", half * torch.stack(refit).square())

    # --- estimates ---------------------------------------------------------------------------

    def importance(self) -> dict[str, np.ndarray]:
        """Group -> (C,) nats, of the last minibatches."""
        values = self.average.values
        return {
            name: values[f"importance/{name}"].double().numpy()
            if f"importance/{name}" in values
            else np.zeros(group.channels)
            for name, group in self.network.groups.items()
        }

    def settle(self) -> None:
        """Fixes, from the last samples of all layers, which channels each keep ratio leaves, how
        these predict the others, and where weights are clipped. What cuts cost is averaged anew
        from here on."""
        importance = self.importance()
        masks = [
            kept_channels(
                self.network,
                importance,
                {name: group.count(ratio) for name, group in self.network.groups.items()},
            )
            for ratio in self.keeps
        ]
        self._kept = {name: [mask[name] for mask in masks] for name in self._readers}
        self._predictors = {}
        for group, pairs in self._readers.items():
            covariance = self._covariance(group, pairs)
            if covariance is not None:
                self._predictors[group] = [predictor(covariance, m) for m in self._kept[group]]
        for name, rows in self._inputs.items():
            self.average.values[f"mean/{name}"] = rows.mean(0).cpu()
            self.average.counts[f"mean/{name}"] = 1
        self._inputs.clear()
        self.average.drop("plain/")
        self.average.drop("refit/")
        for name, patch in self.patches.items():
            self._clip_of(name, patch)

    def _covariance(self, group: str, pairs: Sequence[tuple[str, Link]]) -> torch.Tensor | None:
        channels = self.network.groups[group].channels
        total = None
        for reader, link in pairs:
            if reader not in self._inputs:
                continue
            order = torch.from_numpy(link.index[np.argsort(link.root, kind="stable")])
            columns = self._inputs[reader][:, order.to(self._inputs[reader].device)]
            rows = columns.reshape(len(columns), channels, -1).transpose(1, 2).flatten(0, 1)
            rows = rows - rows.mean(0)
            square = (rows.T @ rows).cpu() / len(rows)
            total = square if total is None else total + square
        return total

    @torch.no_grad()
    def _clip_of(self, name: str, patch: torch.Tensor) -> None:
        weight = float_weight(self._modules[name])
        shares, divergences = [], []
        for width in self.bits:
            share_O, kl = choose_clip(weight, patch, width, self._clip)
            shares.append(share_O.cpu().numpy())
            divergences.append(kl)
        self._tables[name] = (np.stack(shares).astype(np.float32), np.array(divergences))

    @torch.no_grad()
    def estimates(self) -> Estimates:
        """Everything as it is now. `settle` must have been called and minibatches read since."""
        network, values = self.network, self.average.values
        zero_K, zero_B = np.zeros(len(self.keeps)), np.zeros(len(self.bits))

        def table(kind: str) -> dict[str, np.ndarray]:
            return {
                name: values[f"{kind}/{name}"].double().numpy()
                if f"{kind}/{name}" in values
                else zero_K.copy()
                for name in network.groups
            }

        plain, refit = table("plain"), table("refit")
        quantize = {name: zero_B.copy() for name in network.layers}
        for name, (shares, _) in self._tables.items():
            fisher, weight = values.get(f"fisher/{name}"), float_weight(self._modules[name])
            for b, width in enumerate(self.bits if fisher is not None else ()):
                scale = scale_of(weight, torch.from_numpy(shares[b]).to(weight), width)
                change = fake_quantize(weight, scale, width) - weight
                quantize[name][b] = 0.5 * float((fisher * change.square()).sum())
        ones = np.ones(1, dtype=np.float32)
        return Estimates(
            keeps=self.keeps,
            bits=self.bits,
            importance=self.importance(),
            prune=plain,
            prune_refit={name: np.minimum(plain[name], refit[name]) for name in plain},
            quantize=quantize,
            output_kl={
                name: self._tables[name][1] if name in self._tables else zero_B
                for name in network.layers
            },
            clip={
                name: self._tables[name][0]
                if name in self._tables
                else np.broadcast_to(ones, (len(self.bits), layer.out_channels))
                for name, layer in network.layers.items()
            },
        )

    def update_clip(self, name: str) -> None:
        """Chooses a layer's clips anew, for its last sample and the weights it has now."""
        if name in self.patches:
            self._clip_of(name, self.patches[name])

    # --- state -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        return {
            "averages": dict(self.average.values),
            "counts": dict(self.average.counts),
            "patches": dict(self.patches),
            "inputs": dict(self._inputs),
            "kept": {n: torch.from_numpy(np.stack(masks)) for n, masks in self._kept.items()},
            "predictors": {n: list(p) for n, p in self._predictors.items()},
            "clips": {n: torch.from_numpy(shares) for n, (shares, _) in self._tables.items()},
            "output_kl": {n: torch.from_numpy(kl) for n, (_, kl) in self._tables.items()},
            "wanted": sorted(self.wanted),
            "images": self.images,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.average.values = {n: t.clone() for n, t in state["averages"].items()}
        self.average.counts = dict(state["counts"])
        self.patches, self._inputs = dict(state["patches"]), dict(state["inputs"])
        self._kept = {n: list(masks.numpy()) for n, masks in state["kept"].items()}
        self._predictors = {n: list(p) for n, p in state["predictors"].items()}
        self._tables = {
            n: (shares.numpy(), state["output_kl"][n].numpy())
            for n, shares in state["clips"].items()
        }
        self.wanted, self.images = set(state["wanted"]), int(state["images"])
        self._generator.set_state(state["generator"])


def _gradient(module: nn.Module) -> torch.Tensor | None:
    """Of the weight before any parametrization."""
    if "weight" in getattr(module, "parametrizations", {}):
        return module.parametrizations.weight.original.grad  # type: ignore[union-attr, return-value]
    return module.weight.grad  # type: ignore[union-attr, return-value]
