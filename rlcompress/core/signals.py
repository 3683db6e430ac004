"""What training shows of a network that is being compressed: the estimates of `sensitivity`, live,
from the backward passes of the current minibatches and the layers' current inputs.

A layer that reads a group has, for each image, its input a_CP and the gradient g_CP of the loss
that comes back through this layer alone. Of a few images of every minibatch,

    M_ck = sum_p g_cp (a_kp - mean a_k)

M_cc is the Taylor term of channel c (Molchanov et al., 2019, eq. 8). If the kept channels k predict
channel c with coefficients P_kc, cutting c with this reader refitted moves the image's loss by
M_cc - sum_k P_kc M_ck. Losses are in nats: 1/2 E[(sum over cut channels)^2] over images.

Sums over a minibatch cannot stand for its images here: behind each layer a batch norm makes the
sum over all channels zero, whatever they are worth.

Shapes: B images in a minibatch, N of them looked at, C channels of a group, K keep ratios,
O outputs, P positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from rlcompress.core.average import Average
from rlcompress.core.calls import Call, as_call
from rlcompress.core.errors import UserError
from rlcompress.core.fisher import readers_of
from rlcompress.core.gradients import GradientScale, leaf
from rlcompress.core.graph import Layer, Network
from rlcompress.core.passes import Passes
from rlcompress.core.positions import patches, sample_positions
from rlcompress.core.predictor import covariance, predictor
from rlcompress.core.prune import kept_channels
from rlcompress.core.quant import choose_clip, fake_quantize, float_weight, mse_clip, scale_of
from rlcompress.core.reading import first_input
from rlcompress.core.sensitivity import Estimates, root_activation

#: Output positions of a layer that are looked at, and inputs that covariances are taken from.
POSITIONS, INPUTS = 256, 2048
#: Of a minibatch that backward passes are looked at for.
IMAGES = 32
#: Of the slow moving averages: the last fifty minibatches.
SLOW = 0.98


class Signals:
    """Listens to one model in training.

    keeps, bits  the choices that are estimated;  clip  the rule of `quant.choose_clip`

    While the model is in training mode (single modules need not be), hooks take a sample of a
    layer's input where `wanted` names it, in the next forward pass, and while `listening` the
    backward pass of the readers. `read` ends a minibatch; until then the loss may be scaled, and
    the gradients clipped.
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
        #: Of the last forward pass of training.
        self.images = 0
        #: Whether the forward pass at hand, or the last one, is one of training.
        self._live = False
        #: Whether minibatches are looked at.
        self.listening = False
        self._passes = Passes()
        self._scale = GradientScale()
        self.wanted: set[str] = set()
        #: Of these, whose input was not finite: another minibatch's is taken.
        self.unsampled: set[str] = set()
        self._clip = clip
        self._device = next(model.parameters()).device
        self._generator = torch.Generator().manual_seed(seed)
        modules = dict(model.named_modules())
        self._modules = {name: modules[name] for name in network.layers}
        self._readers = readers_of(network)
        #: layer -> (P, G, D) what it reads at sampled positions
        self.patches: dict[str, torch.Tensor] = {}
        self._inputs: dict[str, torch.Tensor] = {}
        #: group -> (K, C) 1 where a channel is cut;  (K, C, C) what predicts it (last) of the kept
        self._gone: dict[str, torch.Tensor] = {}
        self._predictors: dict[str, torch.Tensor] = {}
        self._tables: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._hooks = [
            module.register_forward_hook(self._listen(network.layers[name]), with_kwargs=True)
            for name, module in self._modules.items()
        ]
        self._hooks.append(model.register_forward_pre_hook(self._count, with_kwargs=True))
        self._hooks += [
            self._modules[name].register_forward_pre_hook(
                self._watch(network.layers[name]), with_kwargs=True
            )
            for name in sorted({n for pairs in self._readers.values() for n, _ in pairs})
        ]

    def close(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._scale.let_go()

    # --- listening ---------------------------------------------------------------------------

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._live = module.training and torch.is_grad_enabled()
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        if self._live and tensors:
            self.images = len(tensors[0])
            if self.listening:
                self._passes.begin(self.images)
                self._scale.catch(self._modules.values())

    def _listen(self, layer: Layer) -> Any:
        @torch.no_grad()
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: torch.Tensor
        ) -> None:
            if layer.name not in self.wanted or not self._live:
                return
            x = first_input(args, kwargs).detach().float()
            if not bool(x.isfinite().all()):
                self.unsampled.add(layer.name)
                return
            self.wanted.discard(layer.name)
            self.unsampled.discard(layer.name)
            call = as_call(layer.name, module, x)
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

    def _watch(self, layer: Layer) -> Any:
        """Gives the layer its input under another name, whose gradient is this reader's own."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            x = first_input(args, kwargs)
            if not (self.listening and self._live):
                return None
            if not x.requires_grad:  # the network's own input
                return None
            mine = x.view_as(x)
            # The hook must not hold the tensor it hangs on: no collector would find that cycle.
            seen, place = mine.detach(), self._passes.place
            mine.register_hook(lambda gradient: self._take(layer, place, seen, gradient))
            if args:
                return (mine, *args[1:]), kwargs
            return (), {**kwargs, next(iter(kwargs)): mine}

        return hook

    @torch.no_grad()
    def _take(self, layer: Layer, place: int, x: torch.Tensor, gradient: torch.Tensor) -> None:
        images = self._passes.images_of(place)
        if not images or len(x) % images:
            return
        few = min(IMAGES, images)
        entries = few * (len(x) // images)  # attention folds windows into images
        for link in layer.inputs:
            if any(name == layer.name for name, _ in self._readers[link.group]):
                channels = self.network.groups[link.group].channels
                convolution = isinstance(self._modules[layer.name], nn.Conv2d)
                a_NCP, g_NCP = (
                    root_activation(
                        t[:entries].float(), link, channels, few, convolution=convolution
                    )
                    for t in (x, gradient)
                )
                a_NCP = a_NCP - a_NCP.mean((0, 2), keepdim=True)
                self._add(link.group, place, a_NCP, g_NCP)

    def _add(self, group: str, place: int, a_NCP: torch.Tensor, g_NCP: torch.Tensor) -> None:
        """Moments are large: of each reader, what is linear in them is kept."""
        moment_NCC = g_NCP @ a_NCP.transpose(1, 2)
        predicted_NK = None
        if group in self._predictors:
            predicted_NK = moment_NCC.flatten(1) @ self._predictors[group].flatten(1).T
        taylor_NC = moment_NCC.diagonal(dim1=1, dim2=2).clone()
        self._passes.add(group, place, taylor_NC, predicted_NK)

    def require_gradients(self) -> None:
        """Raises UserError where no weight has a gradient, or none came of the model's training."""
        if not self.images:
            raise UserError(
                "step: the model was not called in training mode: call model.train(), and freeze "
                "single norms with norm.eval()"
            )
        if all(leaf(module).grad is None for module in self._modules.values()):
            raise UserError("no weight has a gradient: call step before the gradients are zeroed")

    @torch.no_grad()
    def read(self, loss: torch.Tensor | float) -> None:
        """Takes a minibatch: its mean loss, and the gradients of it that the weights hold. One
        whose gradients are not finite, as a gradient scaler's first ones, is passed over.

        Raises UserError where no weight has a gradient.
        """
        self.require_gradients()
        average = self.average
        gradients = {name: leaf(module).grad for name, module in self._modules.items()}
        squares = {name: g.float().square() for name, g in gradients.items() if g is not None}
        norm = torch.stack([square.sum() for square in squares.values()]).sum().sqrt()
        if not bool(norm.isfinite()):
            self._forget()
            return
        # The gradients are those of a mean over all that went through since the last one.
        images = self._passes.images() or self.images
        for name, square in squares.items():
            average.add(f"fisher/{name}", square * images)
        for name, value in (("loss", torch.as_tensor(loss)), ("gradient", norm)):
            value = value.detach().float().cpu()
            average.add(f"{name}/fast", value)
            average.add(f"{name}/slow", value, SLOW)
        scale = self._scale.value() * images
        for group, taylor_NC, predicted_NK in self._passes.terms():
            if predicted_NK is not None:
                predicted_NK = predicted_NK * scale
            self._average(group, taylor_NC * scale, predicted_NK)
        self._forget()

    def _forget(self) -> None:
        """The minibatch."""
        self._passes.clear()
        self._scale.let_go()

    def _average(
        self, group: str, taylor_NC: torch.Tensor, predicted_NK: torch.Tensor | None
    ) -> None:
        self.average.add(f"importance/{group}", 0.5 * taylor_NC.square().mean(0).cpu())
        if predicted_NK is None:
            return
        direct_NK = taylor_NC @ self._gone[group].T
        self.average.add(f"plain/{group}", 0.5 * direct_NK.square().mean(0).cpu())
        left_NK = direct_NK - predicted_NK
        self.average.add(f"refit/{group}", 0.5 * left_NK.square().mean(0).cpu())

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
        self._gone, self._predictors = {}, {}
        for group, pairs in self._readers.items():
            channels = self.network.groups[group].channels
            found = covariance(self._inputs, pairs, channels)
            if found is None:
                continue
            kept_KC = torch.from_numpy(np.stack([mask[group] for mask in masks]))
            whole = torch.zeros(len(self.keeps), *found.shape)
            for full, mask in zip(whole, kept_KC, strict=True):
                full[(~mask).nonzero(), mask.nonzero().T] = predictor(found, mask.numpy()).T
            self._gone[group] = (~kept_KC).float().to(self._device)
            self._predictors[group] = whole.to(self._device)
        self._inputs.clear()
        self.average.drop("plain/")
        self.average.drop("refit/")
        for name, patch in self.patches.items():
            self._clip_of(name, patch)

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
        refit = {name: np.minimum(plain[name], refit[name]) for name in plain}
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
            prune_solved=refit,
            quantize=quantize,
            quantize_solved=quantize,
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

    def clip_of(self, name: str, bits: int) -> torch.Tensor:
        """(O,) of a layer; by its weights alone where nothing was sampled yet."""
        if name not in self._tables or bits not in self.bits:
            return mse_clip(float_weight(self._modules[name]), bits)
        return torch.from_numpy(self._tables[name][0][self.bits.index(bits)])

    def update_clip(self, name: str) -> None:
        """Chooses a layer's clips anew, for its last sample and the weights it has now."""
        if name in self.patches:
            self._clip_of(name, self.patches[name])

    # --- state -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        return {
            "averages": {n: t.clone() for n, t in self.average.values.items()},
            "counts": dict(self.average.counts),
            "patches": dict(self.patches),
            "inputs": dict(self._inputs),
            "gone": dict(self._gone),
            "predictors": dict(self._predictors),
            "clips": {n: torch.from_numpy(shares) for n, (shares, _) in self._tables.items()},
            "output_kl": {n: torch.from_numpy(kl) for n, (_, kl) in self._tables.items()},
            "wanted": sorted(self.wanted),
            "unsampled": sorted(self.unsampled),
            "images": self.images,
            "listening": self.listening,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Whatever device `state` is on."""
        # Of weights beside the weights, of groups and scalars on the CPU: as they are made.
        self.average.values = {
            n: t.to(self._device if n.startswith("fisher/") else "cpu", copy=True)
            for n, t in state["averages"].items()
        }
        self.average.counts = dict(state["counts"])
        self.patches, self._inputs, self._gone, self._predictors = (
            {n: t.to(self._device) for n, t in state[kind].items()}
            for kind in ("patches", "inputs", "gone", "predictors")
        )
        self._tables = {
            n: (shares.cpu().numpy(), state["output_kl"][n].cpu().numpy())
            for n, shares in state["clips"].items()
        }
        self.wanted, self.unsampled = set(state["wanted"]), set(state["unsampled"])
        self.images = int(state["images"])
        self.listening = bool(state["listening"])
        self._generator.set_state(state["generator"].cpu())
