"""Learned losses: what the estimates of one backward pass miss, learned on many networks.

An estimated loss is of one choice in a dense network. What a choice costs in a small one, with
everything around it cut, quantized and refitted, differs by factors that networks share. A small
network predicts the logarithm of that factor for each choice from what the estimates show of it.
It learns from whole schedules: the sum of the corrected losses must order schedules of one size as
their measured KL does. No column names a kind of layer or a width: with such columns it fits its
own networks better and those of other families worse.

Shapes: G groups, K keep ratios, L layers, B bit-widths, F columns, S schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn

from rlcompress.core.cost import CostModel
from rlcompress.core.errors import UserError
from rlcompress.core.graph import Network
from rlcompress.core.prior import Losses
from rlcompress.core.process import seeded
from rlcompress.core.schedule import FULL_PRECISION, Record
from rlcompress.core.sensitivity import Estimates
from rlcompress.core.tensors import load_tensors, save_tensors

COLUMNS = (
    "keep",  # a choice of a group: 1; of a layer: 0
    "quantize",  # the other way round
    "log_kernel",  # log10; of a group, its first layer's
    "depth",  # how far into the network, 0-1
    "owners",  # layers whose channels a group cuts / 3; 0 for a layer
    "readers",  # layers that read them / 3
    "log_share",  # log10 of the dense bytes that the choice touches, share of the network's
    "ratio",  # keep ratio
    "bits",  # / 8
    "loss",  # log10 of the estimate, refitted, over the geometric mean of all
    "plain_loss",  # the same, not refitted
    "output_kl",  # log(1 + histogram KL of the layer's outputs)
    "rank",  # share of the groups (or layers) that lose less by the same choice
)
VERSION = 2
#: Largest logarithm of a factor, either way.
MOST = 3.0
#: Measured KLs below it are noise; what is added to a sum of losses for the same reason.
KL_FLOOR, LOSS_FLOOR = 1e-4, 1e-5
_FLOOR = 1e-9


def columns_of(
    network: Network, costs: CostModel, estimates: Estimates
) -> tuple[np.ndarray, np.ndarray]:
    """(G, K, F) of the keep ratios and (L, B, F) of the bit-widths, float32."""
    layers, groups = list(network.layers.values()), list(network.groups.values())
    keeps, bits = np.array(estimates.keeps), np.array(estimates.bits)
    refit_GK, plain_GK = (
        np.array([table[g.name] for g in groups]).reshape(-1, len(keeps))
        for table in (estimates.prune_solved, estimates.prune)
    )
    quantize_LB, plain_LB = (
        np.array([table[layer.name] for layer in layers])
        for table in (estimates.quantize_solved, estimates.quantize)
    )
    output_LB = np.array([estimates.output_kl[layer.name] for layer in layers])
    positive = np.concatenate([refit_GK[refit_GK > 0], quantize_LB[quantize_LB > 0]])
    scale = np.exp(np.log(np.maximum(positive, _FLOOR)).mean()) if len(positive) else _FLOOR

    def level(table: np.ndarray) -> np.ndarray:
        return np.log10(np.maximum(table, _FLOOR) / scale)

    def rank(table_RC: np.ndarray) -> np.ndarray:
        if not len(table_RC):
            return table_RC  # a network without groups
        return (table_RC[None] < table_RC[:, None]).mean(1)

    full_L = np.full((1, len(layers)), FULL_PRECISION)
    bytes_L = costs.layer_bytes(costs.full_counts_G[None], full_L)[0]
    share_L = bytes_L / bytes_L.sum()
    place = {layer.name: i for i, layer in enumerate(layers)}
    of_groups = np.zeros((len(groups), len(keeps), len(COLUMNS)), np.float32)
    for g, group in enumerate(groups):
        owners = [layer for layer in layers if layer.group == group.name]
        readers = [x for x in layers if any(link.group == group.name for link in x.inputs)]
        first = owners[0] if owners else layers[0]
        share = sum(share_L[place[layer.name]] for layer in (*owners, *readers))
        fixed = (1, 0, np.log10(first.kernel), place[first.name] / len(layers))
        of_groups[g, :, :4] = fixed
        of_groups[g, :, 4:7] = len(owners) / 3, len(readers) / 3, np.log10(share + 1e-4)
    of_groups[..., 7] = keeps
    of_groups[..., 9], of_groups[..., 10] = level(refit_GK), level(plain_GK)
    of_groups[..., 12] = rank(refit_GK)
    of_layers = np.zeros((len(layers), len(bits), len(COLUMNS)), np.float32)
    for i, layer in enumerate(layers):
        of_layers[i, :, :4] = 0, 1, np.log10(layer.kernel), i / len(layers)
        of_layers[i, :, 6] = np.log10(share_L[i] + 1e-4)
    of_layers[..., 8] = bits / 8
    of_layers[..., 9], of_layers[..., 10] = level(quantize_LB), level(plain_LB)
    of_layers[..., 11] = np.log1p(output_LB)
    of_layers[..., 12] = rank(quantize_LB)
    return of_groups, of_layers


class LearnedLosses(nn.Module):
    """The mean of a few networks that differ in their beginnings: columns -> log factors."""

    def __init__(self, hidden: int = 16, members: int = 3) -> None:
        super().__init__()
        self.hidden, self.members = hidden, members
        self.nets = nn.ModuleList(self._net(hidden) for _ in range(members))
        self.register_buffer("mean", torch.zeros(len(COLUMNS)))
        self.register_buffer("deviation", torch.ones(len(COLUMNS)))

    @staticmethod
    def _net(hidden: int) -> nn.Module:
        net = nn.Sequential(
            *(nn.Linear(len(COLUMNS), hidden), nn.SiLU()),
            *(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1)),
        )
        nn.init.zeros_(net[-1].weight)  # the estimates as they are
        nn.init.zeros_(net[-1].bias)
        return net

    def one(self, member: int, columns_XF: torch.Tensor) -> torch.Tensor:
        normal = (columns_XF - self.mean) / self.deviation
        return MOST * torch.tanh(self.nets[member](normal).squeeze(-1) / MOST)

    def forward(self, columns_XF: torch.Tensor) -> torch.Tensor:
        """(..., F) -> (...) logarithms of factors."""
        return torch.stack([self.one(i, columns_XF) for i in range(self.members)]).mean(0)

    @torch.no_grad()
    def corrected(self, network: Network, costs: CostModel, estimates: Estimates) -> Losses:
        """The refitted estimates, each times its factor."""
        losses = Losses.of(network, estimates, refitted=True)
        of_groups, of_layers = (
            self(torch.from_numpy(x)).double().exp().numpy()
            for x in columns_of(network, costs, estimates)
        )
        return replace(
            losses,
            prune_GK=_rising(losses.prune_GK * of_groups, losses.keeps),
            quantize_LB=_rising(losses.quantize_LB * of_layers, losses.bits),
        )

    def save(self, path: Path) -> None:
        about = {"version": VERSION, "hidden": self.hidden, "members": self.members}
        save_tensors(path, self.state_dict(), **about)


def load_learned(path: Path) -> LearnedLosses:
    """Raises UserError if the file is missing, damaged or of another version."""
    try:
        tensors, about = load_tensors(path)
        if about["version"] != VERSION:
            raise UserError(
                f"{path}: learned losses of version {about['version']}, this rlcompress reads "
                f"version {VERSION}; train the policy again"
            )
        with seeded(0):  # weights that are replaced
            learned = LearnedLosses(about["hidden"], about["members"])
        learned.load_state_dict(tensors)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: no intact learned losses: {error}") from error
    return learned.eval()


def _rising(losses_RC: np.ndarray, choices: Sequence[float]) -> np.ndarray:
    """Less kept, or fewer bits, never costs less."""
    order = np.argsort(-np.array(choices))
    result = np.empty_like(losses_RC)
    result[:, order] = np.maximum.accumulate(losses_RC[:, order], axis=1)
    return result


@dataclass(frozen=True)
class Lessons:
    """Measured schedules of one network: what is fitted."""

    group_columns: torch.Tensor  # (G, K, F)
    layer_columns: torch.Tensor  # (L, B, F)
    prune_GK: torch.Tensor
    quantize_LB: torch.Tensor
    keep_SG: torch.Tensor  # indices
    bits_SL: torch.Tensor
    kl_S: torch.Tensor  # log10, what the size explains removed
    remove_SS: torch.Tensor  # removes it

    @classmethod
    def of(
        cls, network: Network, costs: CostModel, estimates: Estimates, records: Sequence[Record]
    ) -> Lessons:
        losses = Losses.of(network, estimates, refitted=True)
        keep = {value: i for i, value in enumerate(estimates.keeps)}
        bits = {value: i for i, value in enumerate(estimates.bits)}
        keep_SG = [[keep[r.schedule.ratio(g)] for g in network.groups] for r in records]
        bits_SL = [[bits[r.schedule.width(name)] for name in network.layers] for r in records]
        size_S = np.log([r.measurement.bytes for r in records])
        kl_S = np.log10([max(r.measurement.kl, KL_FLOOR) for r in records])
        by_size = np.stack([np.ones_like(size_S), size_S, size_S**2], 1)
        remove_SS = np.eye(len(records)) - by_size @ np.linalg.pinv(by_size)
        group_columns, layer_columns = columns_of(network, costs, estimates)
        finite = np.where(np.isfinite(losses.prune_GK), losses.prune_GK, 0.0)

        def real(array: np.ndarray) -> torch.Tensor:
            return torch.tensor(array, dtype=torch.float32)

        return cls(
            real(group_columns),
            real(layer_columns),
            real(finite),
            real(losses.quantize_LB),
            torch.tensor(keep_SG, dtype=torch.long).reshape(len(records), len(network.groups)),
            torch.tensor(bits_SL),
            real(remove_SS @ kl_S),
            real(remove_SS),
        )

    def rows(self) -> torch.Tensor:
        return torch.cat([self.group_columns.flatten(0, 1), self.layer_columns.flatten(0, 1)])

    def order(self, group_factors: torch.Tensor, layer_factors: torch.Tensor) -> torch.Tensor:
        """(S,) log10 of the sum of losses times exp(factors), what the size explains removed."""
        prune_GK = self.prune_GK * group_factors.exp()
        quantize_LB = self.quantize_LB * layer_factors.exp()
        total_S = prune_GK[torch.arange(len(prune_GK)), self.keep_SG].sum(1)
        total_S = total_S + quantize_LB[torch.arange(len(quantize_LB)), self.bits_SL].sum(1)
        return self.remove_SS @ torch.log10(total_S + LOSS_FLOOR)


def fit(
    networks: Sequence[Lessons],
    *,
    epochs: int = 120,
    lr: float = 6e-3,
    penalty: float = 0.2,
    hidden: int = 16,
    members: int = 3,
    seed: int = 0,
) -> LearnedLosses:
    """Every network weighs the same, whatever the spread of its KLs.

    penalty  on the mean square of the log factors: what is not learned stays as it is estimated
    """
    rows = torch.cat([network.rows() for network in networks])
    with seeded(seed):
        learned = LearnedLosses(hidden, members)
        learned.mean.copy_(rows.mean(0))
        learned.deviation.copy_(rows.std(0) + 1e-3)
        for member in range(members):
            _fit_one(learned, member, networks, epochs, lr, penalty)
    return learned.eval()


def _fit_one(
    learned: LearnedLosses,
    member: int,
    networks: Sequence[Lessons],
    epochs: int,
    lr: float,
    penalty: float,
) -> None:
    # KL may grow as a power of the losses' sum.
    power = nn.Parameter(torch.zeros(()))
    parameters = [*learned.nets[member].parameters(), power]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-2)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs)
    for _ in range(epochs):
        loss = torch.zeros(())
        for known in networks:
            factors = [learned.one(member, x) for x in (known.group_columns, known.layer_columns)]
            error_S = known.kl_S - power.exp() * known.order(factors[0], factors[1])
            spread = known.kl_S.var() + 0.01
            squares = sum((x**2).mean() for x in factors)
            loss = loss + (error_S**2).mean() / spread + penalty * squares
        optimizer.zero_grad()
        (loss / len(networks)).backward()
        optimizer.step()
        plan.step()


@torch.no_grad()
def agreement(known: Lessons, learned: LearnedLosses | None) -> float:
    """Correlation of summed losses (corrected, or as estimated) with measured KLs, what the size
    explains removed from both."""
    factors: list[Any] = [torch.zeros(()), torch.zeros(())]
    if learned is not None:
        factors = [learned(known.group_columns), learned(known.layer_columns)]
    order_S = known.order(factors[0], factors[1]).numpy()
    return float(np.corrcoef(order_S, known.kl_S.numpy())[0, 1])
