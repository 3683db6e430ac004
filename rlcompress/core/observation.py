"""What the policy sees: a row per action and the running state, normalised per network.

The environments and a user's own training loop read it from here: a policy means nothing without
its observation. Nothing here names a layer's index or a channel's number, so the same policy reads
any network.
A change of columns is a change of `OBSERVATION_VERSION`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from rlcompress.core.graph import Layer, Network
from rlcompress.core.prior import Prior
from rlcompress.core.schedule import FULL_PRECISION, Schedule
from rlcompress.core.sensitivity import Estimates

OBSERVATION_VERSION = 2

ACTION_COLUMNS = (
    "keep",  # keep ratio of the layer's group
    "bits",  # weight bits / 8
    "layer_bytes",  # this layer's bytes, share of the target's
    "total_bytes",  # whole network's if the prior chose the rest, log ratio to the target's
    "prune_refit",  # log(1 + estimated KL of the cut, readers refitted / scale)
    "prune",  # the same, not refitted
    "quantize",  # log(1 + estimated KL of the bit-width / scale)
    "output_kl",  # log(1 + histogram KL of the layer's outputs)
    "macs_saved",  # MACs of this layer and its readers saved, share of the network's
    "prior",  # the prior's logit, 0 for its best action, at least -20; always the last column
)
STATE_COLUMNS = (
    "conv",
    "pointwise",
    "depthwise",
    "grouped",
    "linear",
    "log_inputs",  # log10
    "log_outputs",
    "log_kernel",
    "log_positions",
    "depth",  # layers decided / layers
    "owns_group",  # 1 if this step decides `keep`
    "inputs_kept",  # share of the layer's inputs that survived
    "size_share",  # layer's share of the dense bytes
    "bytes_decided",  # bytes of the layers decided, share of the target's
    "bytes_to_come",  # bytes of the rest if the prior chose it, share of the target's
    "unexplained_last",  # output error of the layer before: share of unexplained variance
    "unexplained_mean",
    "unexplained_max",
    "estimate_decided",  # log(1 + estimated KL so far / scale)
    "last_keep",
    "last_bits",  # / 8
    "log_target",  # log10 of the size ratio aimed at
    "price",  # rung of the prior's ladder, 0 (bytes dear) to 1 (bytes free)
    "keep_now",  # what the layer's group has at this moment: 1 until something is decided
    "bits_now",  # / 8; 2 in full precision
    # Of a network in training; 0 where its weights stay as they are. Logarithms of ratios are 0
    # where nothing changes.
    "round",  # passes over the layers that are complete, share of all
    "trained",  # minibatches since compression began, share of all until its last step
    "loss",  # log(loss of the last minibatches / loss when compression began)
    "loss_trend",  # log(loss of the last minibatches / of the last fifty)
    "gradient",  # the same of the gradient's norm
    "gradient_trend",
)
_KINDS = STATE_COLUMNS[:5]
#: `Live` where nothing trains.
_STILL = (1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
PRIOR_FLOOR = -20.0


@dataclass
class Progress:
    """The choices of N episodes so far as indices, beside what the evaluator said of them. All
    episodes are before the same step, so the same groups are decided in all."""

    keep_NG: np.ndarray  # index into keeps; -1 undecided
    bits_NL: np.ndarray  # index into bits; -1 undecided
    unexplained_NT: np.ndarray  # of the T layers done

    @property
    def step(self) -> int:
        return self.unexplained_NT.shape[1]


def in_force(
    progress: Progress,
    network: Network,
    schedule: Schedule,
    choices: tuple[Sequence[float], Sequence[int]],
    unexplained: Mapping[str, float],
) -> Progress:
    """One episode's `progress` if what it has decided were as `schedule` says: of each the nearest
    of the `choices` (keep ratios, bits)."""
    done = [*network.layers][: progress.step]
    keep_NG, bits_NL = progress.keep_NG.copy(), progress.bits_NL.copy()
    keeps, bits = map(np.asarray, choices)
    for g, name in enumerate(network.groups):
        if keep_NG[0, g] >= 0:
            keep_NG[0, g] = np.abs(keeps - schedule.ratio(name)).argmin()
    for t, name in enumerate(done):
        bits_NL[0, t] = np.abs(bits - schedule.width(name)).argmin()
    return Progress(keep_NG, bits_NL, np.array([[unexplained[name] for name in done]]))


def growth(now: float, then: float) -> float:
    """log(now / then); 0 where a loss has changed its sign."""
    return float(np.log(now / then)) if now * then > 0 else 0.0


@dataclass(frozen=True)
class Live:
    """What training shows before a step; see the last of `STATE_COLUMNS`."""

    keep_now: float = 1.0
    bits_now: int = FULL_PRECISION
    round: float = 0.0
    trained: float = 0.0
    loss: float = 0.0
    loss_trend: float = 0.0
    gradient: float = 0.0
    gradient_trend: float = 0.0

    def columns(self) -> tuple[float, ...]:
        return (self.keep_now, min(self.bits_now, 16) / 8, *astuple(self)[2:])


@dataclass(frozen=True)
class _Aim:
    """Where N episodes want to get and what the prior would do with the rest of them."""

    target_N: np.ndarray  # size ratios
    max_bytes_N: np.ndarray
    rung_N: np.ndarray  # of the prior's ladder
    counts_NG: np.ndarray  # channels: what is decided, else the rung's
    bits_NL: np.ndarray
    scale_N: np.ndarray  # the rung's loss, a layer's share of it, in nats: the unit of losses


class Observer:
    """Computes observations, legal actions and the prior for episodes of one network in lockstep.

    prior        the answer on the estimates;  estimates  what the columns say of each choice
    temperature  of the prior's logits

    Actions are numbered keep-major: action = keep index x number of bit-widths + bits index.
    Shapes: N episodes, A actions, F action columns, S state columns, G groups, L layers, R rungs.
    """

    def __init__(self, prior: Prior, estimates: Estimates, temperature: float = 1.0) -> None:
        self.prior, self.network, self.costs = prior, prior.network, prior.costs
        self.temperature = temperature
        self.layers = list(self.network.layers.values())
        self.dense_bytes = self.costs.cost(Schedule()).bytes
        self.keep_choices, self.bits_choices = keeps, bits = estimates.keeps, estimates.bits
        self.keep_A = np.repeat(np.arange(len(keeps)), len(bits))
        self.bits_A = np.tile(np.arange(len(bits)), len(keeps))
        self.full_keep = keeps.index(1.0)
        self.column = {name: i for i, name in enumerate(self.network.groups)}
        costs = self.costs
        names = [x.name for x in self.layers]
        self._plain_GK = np.array([estimates.prune[g] for g in self.column])
        self._refit_GK = np.array([estimates.prune_solved[g] for g in self.column])
        self._output_LB = np.array([estimates.output_kl[n] for n in names])
        full_G = costs.full_counts_G[None]
        dense_L = costs.layer_bytes(full_G, np.full((1, len(names)), 32))[0]
        self._size_share_L = dense_L / dense_L.sum()
        self._positions_L = np.array([x.positions for x in self.layers])
        self._macs = float((costs.weights(full_G)[0][0] * self._positions_L).sum())
        self._rows_G = np.arange(len(self.column))
        self._smallest_G = prior.counts_GK.min(1)
        for i, group in enumerate(self.network.groups.values()):
            if group.protected:
                self._smallest_G[i] = group.channels
        #: the first action of each layer that does the same: equal channels, equal bits
        self.effect_LA = np.stack([self._effect(step) for step in range(len(self.layers))])

    def _effect(self, step: int) -> np.ndarray:
        keep_A, group = np.full(len(self.keep_A), self.full_keep), self._owned(step)
        if group is not None:
            counts_K = self.prior.counts_GK[group]
            keep_A = (counts_K[:, None] == counts_K).argmax(1)[self.keep_A]
        return keep_A * len(self.bits_choices) + self.bits_A

    def start(self, count: int) -> Progress:
        """`count` episodes of which nothing is decided."""
        keep_G = np.full(len(self.column), -1)
        for i, group in enumerate(self.network.groups.values()):
            if group.protected:
                keep_G[i] = self.full_keep
        bits_NL = np.full((count, len(self.layers)), -1)
        return Progress(np.repeat(keep_G[None], count, 0), bits_NL, np.empty((count, 0)))

    def decide(
        self, progress: Progress, actions_N: np.ndarray, unexplained_NT: np.ndarray
    ) -> Progress:
        """`progress` after an action in each episode, the layers' unexplained shares then."""
        keep_NG, bits_NL = progress.keep_NG.copy(), progress.bits_NL.copy()
        if (group := self._owned(progress.step)) is not None:
            keep_NG[:, group] = self.keep_A[actions_N]
        bits_NL[:, progress.step] = self.bits_A[actions_N]
        return Progress(keep_NG, bits_NL, unexplained_NT)

    def schedules(self, progress: Progress) -> list[Schedule]:
        """What finished episodes have chosen."""
        network, keeps, bits = self.network, self.keep_choices, self.bits_choices
        owned = [network.owned_group(layer.name) for layer in self.layers]
        groups = [(group.name, self.column[group.name]) for group in owned if group]
        names = [layer.name for layer in self.layers]
        return [
            Schedule(
                {name: keeps[keep_G[g]] for name, g in groups},
                {name: bits[b] for name, b in zip(names, bits_L, strict=True)},
            )
            for keep_G, bits_L in zip(progress.keep_NG, progress.bits_NL, strict=True)
        ]

    def observe(
        self, progress: Progress, targets_N: np.ndarray, live: Live | None = None
    ) -> dict[str, np.ndarray]:
        """The observations before step `progress.step`, aiming at the size ratios `targets_N`:
        actions (N, A, F), state (N, S), mask (N, A), float32. `live`: of a network in training.
        """
        aim = self._aim(progress, targets_N)
        mask_NA = self._mask(progress, aim.max_bytes_N)
        actions_NAF = self._actions(progress.step, aim, mask_NA)
        state_NS = self._state(progress, aim, _STILL if live is None else live.columns())
        return {
            "actions": np.clip(actions_NAF, -50.0, 50.0).astype(np.float32),
            "state": np.clip(state_NS, -50.0, 50.0).astype(np.float32),
            "mask": mask_NA.astype(np.float32),
        }

    def _aim(self, progress: Progress, target_N: np.ndarray) -> _Aim:
        prior = self.prior
        max_bytes_N = self.dense_bytes / target_N
        keep_NRG = _decided_or(progress.keep_NG[:, None], prior.keep_RG)
        bits_NRL = _decided_or(progress.bits_NL[:, None], prior.bits_RL)
        counts_NRG, widths_NRL = self._schedules(keep_NRG, bits_NRL)
        sizes_NR = self.costs.bytes(counts_NRG, widths_NRL)
        rung_N = prior.rungs(sizes_NR, max_bytes_N)
        at_N = np.arange(len(rung_N)), rung_N
        scale_N = prior.loss_R[rung_N] / len(self.layers) + 1e-9
        return _Aim(target_N, max_bytes_N, rung_N, counts_NRG[at_N], widths_NRL[at_N], scale_N)

    def _schedules(self, keep_XG: np.ndarray, bits_XL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Channels and bits of indices."""
        return self.prior.counts_GK[self._rows_G, keep_XG], self.prior.bits[bits_XL]

    def _owned(self, step: int) -> int | None:
        group = self.network.owned_group(self.layers[step].name)
        return self.column[group.name] if group else None

    def _candidates(
        self, step: int, counts_NG: np.ndarray, bits_NL: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """counts_NAG and bits_NAL: this step as each action says, all else as it is."""
        counts_NAG = np.repeat(counts_NG[:, None], len(self.keep_A), 1)
        bits_NAL = np.repeat(bits_NL[:, None], len(self.keep_A), 1)
        if (group := self._owned(step)) is not None:
            counts_NAG[:, :, group] = self.prior.counts_GK[group, self.keep_A]
        bits_NAL[:, :, step] = self.prior.bits[self.bits_A]
        return counts_NAG, bits_NAL

    def _mask(self, progress: Progress, max_bytes_N: np.ndarray) -> np.ndarray:
        """(N, A) true for actions that are legal: those of an undecided group, from which the
        target can still be reached. The smallest network is legal if nothing else is."""
        counts_NG, bits_NL = self._schedules(progress.keep_NG, progress.bits_NL)
        rest_NG = np.where(progress.keep_NG >= 0, counts_NG, self._smallest_G)
        rest_NL = np.where(progress.bits_NL >= 0, bits_NL, int(self.prior.bits.min()))
        candidates = self._candidates(progress.step, rest_NG, rest_NL)
        sizes_NA = self.costs.bytes(*candidates).astype(np.float64)
        if self._owned(progress.step) is None:
            sizes_NA[:, self.keep_A != self.full_keep] = np.inf
        return sizes_NA <= np.maximum(max_bytes_N, sizes_NA.min(1))[:, None]

    def _actions(self, step: int, aim: _Aim, mask_NA: np.ndarray) -> np.ndarray:
        """(N, A, F)."""
        prior, costs = self.prior, self.costs
        counts_NAG, bits_NAL = self._candidates(step, aim.counts_NG, aim.bits_NL)
        sizes_NA = costs.bytes(counts_NAG, bits_NAL)
        layer_NA = costs.layer_bytes(counts_NAG, bits_NAL)[:, :, step]
        macs_NA = (costs.weights(counts_NAG)[0] * self._positions_L).sum(-1)

        group = self._owned(step)
        refit_A, plain_A, cut_A = (
            np.zeros(len(self.keep_A)) if group is None else table_GK[group, self.keep_A]
            for table_GK in (self._refit_GK, self._plain_GK, prior.losses.prune_GK)
        )
        quantize_A = prior.losses.quantize_LB[step, self.bits_A]
        max_bytes_N1, scale_N1 = aim.max_bytes_N[:, None], aim.scale_N[:, None]
        value_NA = cut_A + quantize_A + prior.price_R[aim.rung_N][:, None] * sizes_NA
        best_N1 = np.where(mask_NA, value_NA, np.inf).min(1, keepdims=True)
        logit_NA = -(value_NA - best_N1) / (scale_N1 * self.temperature)
        columns = (
            prior.keeps[self.keep_A],
            prior.bits[self.bits_A] / 8,
            layer_NA / max_bytes_N1,
            np.log(sizes_NA / max_bytes_N1),
            np.log1p(refit_A / scale_N1),
            np.log1p(plain_A / scale_N1),
            np.log1p(quantize_A / scale_N1),
            np.log1p(self._output_LB[step, self.bits_A]),
            1 - macs_NA / self._macs,
            np.clip(logit_NA, PRIOR_FLOOR, 0.0),
        )
        return np.stack(np.broadcast_arrays(*columns), -1)

    def _state(self, progress: Progress, aim: _Aim, live: tuple[float, ...]) -> np.ndarray:
        """(N, S)."""
        prior, t = self.prior, progress.step
        layer, keep_NG = self.layers[t], progress.keep_NG
        bytes_NL = self.costs.layer_bytes(aim.counts_NG, aim.bits_NL)
        decided_G = np.flatnonzero(keep_NG[0] >= 0)
        estimate_N = prior.losses.prune_GK[decided_G, keep_NG[:, decided_G]].sum(1)
        done_T = np.arange(t)
        estimate_N += prior.losses.quantize_LB[done_T, progress.bits_NL[:, done_T]].sum(1)
        errors_NT = progress.unexplained_NT
        last = self.column.get(self.layers[t - 1].group or "") if t else None
        columns = (
            *(float(layer.kind == kind) for kind in _KINDS),
            np.log10(layer.in_channels),
            np.log10(layer.out_channels),
            np.log10(layer.kernel),
            np.log10(layer.positions),
            t / len(self.layers),
            float(self._owned(t) is not None),
            self._inputs_kept(layer, keep_NG),
            self._size_share_L[t],
            bytes_NL[:, :t].sum(1) / aim.max_bytes_N,
            bytes_NL[:, t:].sum(1) / aim.max_bytes_N,
            errors_NT[:, -1] if t else 0.0,
            errors_NT.mean(1) if t else 0.0,
            errors_NT.max(1) if t else 0.0,
            np.log1p(estimate_N / aim.scale_N),
            1.0 if last is None else prior.keeps[keep_NG[:, last]],
            prior.bits[progress.bits_NL[:, t - 1]] / 8 if t else 1.0,
            np.log10(aim.target_N),
            aim.rung_N / (len(prior.price_R) - 1),
            *live,
        )
        return np.stack(np.broadcast_arrays(*columns), -1)

    def _inputs_kept(self, layer: Layer, keep_NG: np.ndarray) -> np.ndarray:
        """(N,) share of the layer's inputs that survive the groups decided; 1 where it has no
        such inputs."""
        counts_GK = self.prior.counts_GK
        inputs = sum(len(link.index) for link in layer.inputs)
        kept_N = np.zeros(len(keep_NG))
        for link in layer.inputs:
            g = self.column[link.group]
            if keep_NG[0, g] >= 0:
                share_N = counts_GK[g, keep_NG[:, g]] / counts_GK[g, self.full_keep]
                kept_N += len(link.index) * share_N
        return np.where(kept_N > 0, kept_N / max(inputs, 1), 1.0)


def _decided_or(decided_X: np.ndarray, values_X: np.ndarray) -> np.ndarray:
    """`values` with the decided ones replaced."""
    return np.where(decided_X >= 0, decided_X, values_X)
