"""What the policy sees: a row per action and the running state, normalised per network.

Nothing here names a layer's index or a channel's number, so the same policy reads any network.
A change of columns is a change of `OBSERVATION_VERSION`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlcompress.core.problem import Problem

OBSERVATION_VERSION = 1

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
)
_KINDS = STATE_COLUMNS[:5]
PRIOR_FLOOR = -20.0


@dataclass
class Progress:
    """The choices so far as indices, beside what the evaluator said of them."""

    keep_G: np.ndarray  # index into keeps; -1 undecided
    bits_L: np.ndarray  # index into bits; -1 undecided
    unexplained: tuple[float, ...] = ()

    @property
    def step(self) -> int:
        return len(self.unexplained)


class Observer:
    """Computes observations, legal actions and the prior for one problem.

    Actions are numbered keep-major: action = keep index x number of bit-widths + bits index.
    """

    def __init__(self, problem: Problem, temperature: float = 1.0) -> None:
        self.problem, self.prior = problem, problem.prior
        self.temperature = temperature
        self.layers = problem.evaluator.layers
        keeps, bits = problem.keeps, problem.bits
        self.keep_A = np.repeat(np.arange(len(keeps)), len(bits))
        self.bits_A = np.tile(np.arange(len(bits)), len(keeps))
        self.full_keep = keeps.index(1.0)
        self.column = {name: i for i, name in enumerate(problem.network.groups)}
        estimates, costs = problem.evaluator.estimates, problem.evaluator.costs
        names = [x.name for x in self.layers]
        self._plain_GK = np.array([estimates.prune[g] for g in self.column])
        self._refit_GK = np.array([estimates.prune_refit[g] for g in self.column])
        self._output_LB = np.array([estimates.output_kl[n] for n in names])
        full_G = costs.full_counts_G[None]
        dense_L = costs.layer_bytes(full_G, np.full((1, len(names)), 32))[0]
        self._size_share_L = dense_L / dense_L.sum()
        self._positions_L = np.array([x.positions for x in self.layers])
        self._macs = float((costs.weights(full_G)[0][0] * self._positions_L).sum())
        self._smallest_G = problem.prior.counts_GK.min(1)
        for i, group in enumerate(problem.network.groups.values()):
            if group.protected:
                self._smallest_G[i] = group.channels

    def start(self) -> Progress:
        keep_G = np.full(len(self.column), -1)
        for i, group in enumerate(self.problem.network.groups.values()):
            if group.protected:
                keep_G[i] = self.full_keep
        return Progress(keep_G, np.full(len(self.layers), -1))

    def _with(self, values_RX: np.ndarray, decided_X: np.ndarray) -> np.ndarray:
        """`values` with decided columns replaced."""
        return np.where(decided_X >= 0, decided_X, values_RX)

    def mask(self, progress: Progress, max_bytes: float) -> np.ndarray:
        """(A,) 1 for actions that are legal: those of an undecided group, from which the target
        can still be reached. The smallest network is legal if nothing else is."""
        counts_AG, bits_AL = self._candidates(
            progress, self._smallest_G, np.full(len(self.layers), int(self.prior.bits.min()))
        )
        sizes_A = self.problem.evaluator.costs.bytes(counts_AG, bits_AL)
        free = self._owned(progress) is not None
        choosable_A = np.ones(len(self.keep_A), bool) if free else self.keep_A == self.full_keep
        legal_A = choosable_A & (sizes_A <= max_bytes)
        if not legal_A.any():
            legal_A = choosable_A & (sizes_A == sizes_A[choosable_A].min())
        return legal_A

    def _owned(self, progress: Progress) -> int | None:
        group = self.problem.network.owned_group(self.layers[progress.step].name)
        return self.column[group.name] if group else None

    def _candidates(
        self, progress: Progress, rest_G: np.ndarray, rest_L: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """counts_AG and bits_AL: decided as they are, this step as each action says, the rest
        at `rest_G` channels and `rest_L` bits."""
        prior = self.prior
        rows_G = np.arange(len(self.column))
        counts_G = np.where(progress.keep_G >= 0, prior.counts_GK[rows_G, progress.keep_G], rest_G)
        bits_L = np.where(progress.bits_L >= 0, prior.bits[progress.bits_L], rest_L)
        counts_AG = np.repeat(counts_G[None], len(self.keep_A), 0)
        bits_AL = np.repeat(bits_L[None], len(self.keep_A), 0)
        if (group := self._owned(progress)) is not None:
            counts_AG[:, group] = prior.counts_GK[group, self.keep_A]
        bits_AL[:, progress.step] = prior.bits[self.bits_A]
        return counts_AG, bits_AL

    def observe(self, progress: Progress, target: float) -> dict[str, np.ndarray]:
        """The observation before step `progress.step`, aiming at size ratio `target`."""
        problem, prior, costs = self.problem, self.prior, self.problem.evaluator.costs
        t, layer = progress.step, self.layers[progress.step]
        max_bytes = problem.dense.bytes / target
        rows_G = np.arange(len(self.column))

        keep_RG = self._with(prior.keep_RG, progress.keep_G)
        bits_RL = self._with(prior.bits_RL, progress.bits_L)
        sizes_R = costs.bytes(prior.counts_GK[rows_G, keep_RG], prior.bits[bits_RL])
        rung = prior.rung(sizes_R, max_bytes)
        counts_AG, bits_AL = self._candidates(
            progress, prior.counts_GK[rows_G, keep_RG[rung]], prior.bits[bits_RL[rung]]
        )
        sizes_A = costs.bytes(counts_AG, bits_AL)
        weights_AL, _ = costs.weights(counts_AG)
        layer_A = costs.layer_bytes(counts_AG, bits_AL)[:, t]

        group = self._owned(progress)
        actions = len(self.keep_A)
        zero_A = np.zeros(actions)
        refit_A = zero_A if group is None else self._refit_GK[group, self.keep_A]
        plain_A = zero_A if group is None else self._plain_GK[group, self.keep_A]
        cut_A = zero_A if group is None else prior.losses.prune_GK[group, self.keep_A]
        quantize_A = prior.losses.quantize_LB[t, self.bits_A]
        mask_A = self.mask(progress, max_bytes)
        scale = prior.loss_R[rung] / len(self.layers) + 1e-9
        value_A = cut_A + quantize_A + prior.price_R[rung] * sizes_A
        best = value_A[mask_A].min()
        logit_A = np.clip(-(value_A - best) / (scale * self.temperature), PRIOR_FLOOR, 0.0)

        actions_AF = np.stack(
            [
                prior.keeps[self.keep_A],
                prior.bits[self.bits_A] / 8,
                layer_A / max_bytes,
                np.log(sizes_A / max_bytes),
                np.log1p(refit_A / scale),
                np.log1p(plain_A / scale),
                np.log1p(quantize_A / scale),
                np.log1p(self._output_LB[t, self.bits_A]),
                1 - (weights_AL * self._positions_L).sum(1) / self._macs,
                logit_A,
            ],
            axis=1,
        )

        done_L = progress.bits_L >= 0
        current_L = costs.layer_bytes(
            prior.counts_GK[rows_G, keep_RG[rung]][None], prior.bits[bits_RL[rung]][None]
        )[0]
        decided_G = np.flatnonzero(progress.keep_G >= 0)
        estimate = prior.losses.prune_GK[decided_G, progress.keep_G[decided_G]].sum()
        estimate += prior.losses.quantize_LB[np.flatnonzero(done_L), progress.bits_L[done_L]].sum()
        inputs = sum(len(link.index) for link in layer.inputs)
        survived = sum(
            len(link.index)
            * prior.counts_GK[g, progress.keep_G[g]]
            / prior.counts_GK[g, self.full_keep]
            for link in layer.inputs
            if progress.keep_G[g := self.column[link.group]] >= 0
        )
        errors = progress.unexplained
        last_group = self.column.get(self.layers[t - 1].group or "") if t else None
        state_S = np.array(
            [
                *(float(layer.kind == kind) for kind in _KINDS),
                np.log10(layer.in_channels),
                np.log10(layer.out_channels),
                np.log10(layer.kernel),
                np.log10(layer.positions),
                t / len(self.layers),
                float(group is not None),
                survived / inputs if inputs and survived else 1.0,
                self._size_share_L[t],
                current_L[done_L].sum() / max_bytes,
                current_L[~done_L].sum() / max_bytes,
                errors[-1] if errors else 0.0,
                float(np.mean(errors)) if errors else 0.0,
                max(errors, default=0.0),
                np.log1p(estimate / scale),
                1.0 if last_group is None else prior.keeps[progress.keep_G[last_group]],
                1.0 if not t else prior.bits[progress.bits_L[t - 1]] / 8,
                np.log10(target),
                rung / (len(prior.price_R) - 1),
            ]
        )
        return {
            "actions": np.clip(actions_AF, -50.0, 50.0).astype(np.float32),
            "state": np.clip(state_S, -50.0, 50.0).astype(np.float32),
            "mask": mask_A.astype(np.float32),
        }
