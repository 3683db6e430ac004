"""The knapsack answer on the estimates: where the policy starts, and a schedule for any size.

For a price lambda per byte, minimise  sum of estimated losses + lambda x bytes  (Lagrange; Shoham &
Gersho, 1988). Bytes couple a layer's input and output groups, so the minimum is approached by
turns: all bit-widths given the channels, then one group at a time. A ladder of prices, solved once
per network, gives a schedule for every size; after some layers are decided, the rung whose
remainder still fits the target is the answer for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from rlcompress.core.cost import CostModel
from rlcompress.core.graph import Network
from rlcompress.core.schedule import Schedule
from rlcompress.core.sensitivity import Estimates

RUNGS = 64
_SWEEPS = 3


@dataclass(frozen=True)
class Losses:
    """Estimated KL (nats) as tables: prune_GK for group g at keep k, quantize_LB for layer l at
    bit-width b. Protected groups cost nothing at keep 1 and infinity elsewhere. In each row less
    kept, or fewer bits, never cost less."""

    keeps: tuple[float, ...]
    bits: tuple[int, ...]
    prune_GK: np.ndarray
    quantize_LB: np.ndarray

    @classmethod
    def of(cls, network: Network, estimates: Estimates, *, refitted: bool) -> Losses:
        """`refitted`: the layers around a choice are, as reconstruction does it."""
        table = estimates.prune_solved if refitted else estimates.prune
        widths = estimates.quantize_solved if refitted else estimates.quantize
        prune = np.array([table[g] for g in network.groups]).reshape(-1, len(estimates.keeps))
        for row, group in zip(prune, network.groups.values(), strict=True):
            if group.protected:
                row[:] = np.where(np.array(estimates.keeps) == 1.0, 0.0, np.inf)
        # Cutting more never costs less: noise in the estimates must not say otherwise.
        order = np.argsort(-np.array(estimates.keeps))
        prune[:, order] = np.maximum.accumulate(prune[:, order], axis=1)
        quantize = np.array([widths[name] for name in network.layers])
        wide = np.argsort(-np.array(estimates.bits))
        quantize[:, wide] = np.maximum.accumulate(quantize[:, wide], axis=1)
        return cls(estimates.keeps, estimates.bits, prune, quantize)


class Prior:
    """The ladder. Rungs go from expensive bytes (small networks) to free ones (large).

    keep_RG, bits_RL  indices into `keeps` and `bits` of each rung's answer; rung 0 is the
                      smallest schedule there is
    bytes_R           its size;  loss_R  its estimated KL;  price_R  its lambda, nats per byte
    """

    def __init__(
        self, network: Network, costs: CostModel, losses: Losses, rungs: int = RUNGS
    ) -> None:
        self.network, self.costs, self.losses = network, costs, losses
        self.keeps, self.bits = np.array(losses.keeps), np.array(losses.bits)
        #: channels of each group at each keep ratio
        self.counts_GK = np.array(
            [[g.count(k) for k in losses.keeps] for g in network.groups.values()],
            dtype=np.int64,
        ).reshape(len(network.groups), len(self.keeps))
        self._solve(rungs)

    def shaken(self, rng: np.random.Generator, deviation: float, rungs: int = RUNGS) -> Prior:
        """The answer to other losses that could be true: those of each group and each layer times
        a log-normal factor. Drawn again and again it explores schedules that hang together."""
        losses = self.losses
        factor_G = np.exp(deviation * rng.standard_normal(len(losses.prune_GK)))
        factor_L = np.exp(deviation * rng.standard_normal(len(losses.quantize_LB)))
        changed = replace(
            losses,
            prune_GK=losses.prune_GK * factor_G[:, None],
            quantize_LB=losses.quantize_LB * factor_L[:, None],
        )
        return Prior(self.network, self.costs, changed, rungs)

    def _solve(self, rungs: int) -> None:
        groups, layers = len(self.counts_GK), len(self.losses.quantize_LB)
        dense = float(self.costs.cost(Schedule()).bytes)
        finite = self.losses.prune_GK[np.isfinite(self.losses.prune_GK)]
        largest = max(float(finite.max(initial=0.0)), float(self.losses.quantize_LB.max()), 1e-9)
        price_R = np.geomspace(1e4, 1e-6, rungs) * largest / dense
        smallest = int(self.bits.argmin())
        keep_G = np.array([self._cheapest(g) for g in range(groups)], dtype=np.int64)
        bits_L = np.full(layers, smallest)
        rows_G = np.arange(groups)
        keeps, widths, sizes, losses = [], [], [], []
        for rung, price in enumerate(price_R):
            # Rung 0 keeps what `keep_G` and `bits_L` start as: the least bytes at any loss.
            for _ in range(_SWEEPS if rung else 0):
                counts_G = self.counts_GK[rows_G, keep_G]
                weights_L = self.costs.weights(counts_G[None])[0][0]
                spent_LB = weights_L[:, None] * self.bits[None, :] / 8
                bits_L = (self.losses.quantize_LB + price * spent_LB).argmin(1)
                for g in range(groups):
                    trial = np.repeat(counts_G[None], len(self.keeps), 0)
                    trial[:, g] = self.counts_GK[g]
                    size_K = self.costs.bytes(trial, self.bits[bits_L][None])
                    keep_G[g] = (self.losses.prune_GK[g] + price * size_K).argmin()
                    counts_G[g] = self.counts_GK[g, keep_G[g]]
            counts_G = self.counts_GK[rows_G, keep_G]
            keeps.append(keep_G.copy())
            widths.append(bits_L.copy())
            sizes.append(int(self.costs.bytes(counts_G[None], self.bits[bits_L][None])[0]))
            losses.append(
                float(self.losses.prune_GK[rows_G, keep_G].sum())
                + float(self.losses.quantize_LB[np.arange(layers), bits_L].sum())
            )
        self.price_R = price_R
        self.keep_RG = np.array(keeps).reshape(len(price_R), groups)
        self.bits_RL = np.array(widths)
        self.bytes_R = np.array(sizes)
        self.loss_R = np.array(losses)

    def _cheapest(self, group: int) -> int:
        finite = np.isfinite(self.losses.prune_GK[group])
        return int(np.where(finite, self.keeps, np.inf).argmin())

    def smallest_bytes(self) -> int:
        """The least that any allowed schedule takes."""
        keep_G = np.array([self._cheapest(g) for g in range(len(self.counts_GK))], dtype=np.int64)
        counts_G = self.counts_GK[np.arange(len(keep_G)), keep_G]
        bits_L = np.full(len(self.losses.quantize_LB), self.bits.min())
        return int(self.costs.bytes(counts_G[None], bits_L[None])[0])

    def rungs(self, sizes_NR: np.ndarray, max_bytes_N: np.ndarray) -> np.ndarray:
        """(N,) the least lossy rung whose size (given the choices so far) fits; else the
        smallest."""
        fits_NR = sizes_NR <= max_bytes_N[:, None]
        best_N = np.where(fits_NR, self.loss_R, np.inf).argmin(1)
        return np.where(fits_NR.any(1), best_N, sizes_NR.argmin(1))

    def schedule(self, max_bytes: float) -> Schedule:
        """The ladder's answer for a size, what it leaves of the bytes spent."""
        r = int(self.rungs(self.bytes_R[None], np.array([max_bytes]))[0])
        keep_G, bits_L = self._filled(self.keep_RG[r], self.bits_RL[r], max_bytes)
        return Schedule(
            {
                g: float(self.keeps[k])
                for (g, group), k in zip(self.network.groups.items(), keep_G, strict=True)
                if not group.protected
            },
            {name: int(self.bits[b]) for name, b in zip(self.network.layers, bits_L, strict=True)},
        )

    def _filled(
        self, keep_G: np.ndarray, bits_L: np.ndarray, max_bytes: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Again and again the one change that saves most loss per byte and fits, until there is
        none: neighbouring rungs may lie far apart."""
        rows_G, rows_L = np.arange(len(keep_G)), np.arange(len(bits_L))
        while True:
            keeps_SG = _with_one_changed(keep_G, len(self.keeps))
            widths_SL = _with_one_changed(bits_L, len(self.bits))
            keep_SG = np.concatenate([keeps_SG, np.tile(keep_G, (len(widths_SL), 1))])
            bits_SL = np.concatenate([np.tile(bits_L, (len(keeps_SG), 1)), widths_SL])
            size_S = self.costs.bytes(self.counts_GK[rows_G, keep_SG], self.bits[bits_SL])
            loss_S = self.losses.prune_GK[rows_G, keep_SG].sum(1)
            loss_S += self.losses.quantize_LB[rows_L, bits_SL].sum(1)
            # Among the options is what there is.
            now = int((widths_SL == bits_L).all(1).argmax()) + len(keeps_SG)
            saved_S, spent_S = loss_S[now] - loss_S, size_S - size_S[now]
            fits_S = (size_S <= max_bytes) & (spent_S > 0) & (saved_S > 0)
            if not fits_S.any():
                return keep_G, bits_L
            best = int(np.where(fits_S, saved_S / np.maximum(spent_S, 1), -np.inf).argmax())
            keep_G, bits_L = keep_SG[best], bits_SL[best]


def _with_one_changed(chosen_R: np.ndarray, choices: int) -> np.ndarray:
    """(R x choices, R): every choice of every row in turn, the others as they are."""
    rows = np.repeat(np.arange(len(chosen_R)), choices)
    changed_SR = np.tile(chosen_R, (len(rows), 1))
    changed_SR[np.arange(len(rows)), rows] = np.tile(np.arange(choices), len(chosen_R))
    return changed_SR
