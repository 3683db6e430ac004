"""One compression problem: a dense network, its calibration images and what may be chosen.

`Bundle` is the problem as plain arrays: what travels to other processes, once a node.
`Problem` is what is built from it in each process: evaluator, estimates and prior.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from rlcompress.core.artifact import ModelRef
from rlcompress.core.data import Split
from rlcompress.core.errors import UserError
from rlcompress.core.evaluate import Evaluator
from rlcompress.core.evaluators import build_evaluator
from rlcompress.core.graph import Network
from rlcompress.core.prior import Losses, Prior
from rlcompress.core.process import settle_process
from rlcompress.core.schedule import Measurement
from rlcompress.core.sensitivity import Estimates
from rlcompress.core.tensors import arrays_of


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where this process sees a device, else the CPU. Raises UserError if there is
    no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    there = {
        "cuda": torch.cuda.device_count,
        "mps": lambda: int(torch.backends.mps.is_available()),
    }.get(device.type, lambda: 1)()
    if (device.index or 0) >= there:
        raise UserError(
            f"device = {name}: there are {there} such devices here; "
            "--set device=cpu --set ppo.num_gpus_per_env_runner=0 runs without"
        )
    return device


@dataclass(frozen=True)
class Bundle:
    """A problem as numpy arrays and plain values. fit_NCHW and score_NCHW are normalised. `losses`:
    what the prior goes by; None = the estimates."""

    ref: ModelRef
    network: Network
    weights: Mapping[str, np.ndarray]
    fit_NCHW: np.ndarray
    score_NCHW: np.ndarray
    labels_N: np.ndarray | None
    estimates: Estimates
    recovery: str
    score: str
    positions: int
    precision: str
    cache_bytes: int
    seed: int
    device: str = "auto"
    losses: Losses | None = None

    def model(self) -> nn.Module:
        """The dense network, in eval mode."""
        model = self.ref.build()
        model.load_state_dict({n: torch.tensor(a) for n, a in self.weights.items()})
        return model.eval()

    def problem(self) -> Problem:
        """Builds evaluator and prior. The arrays may be read-only and shared: they are copied."""
        settle_process()
        model = self.model()
        device = pick_device(self.device)
        model = model.to(device, memory_format=torch.channels_last)
        evaluator = build_evaluator(
            model,
            self.network,
            torch.tensor(self.fit_NCHW, device=device),
            torch.tensor(self.score_NCHW, device=device),
            None if self.labels_N is None else torch.tensor(self.labels_N, device=device),
            self.estimates,
            recovery=self.recovery,
            positions=self.positions,
            precision=self.precision,
            cache_bytes=self.cache_bytes,
            seed=self.seed,
        )
        refitted = self.recovery == "reconstruct"
        losses = self.losses or Losses.of(self.network, self.estimates, refitted=refitted)
        return Problem(evaluator, Prior(self.network, evaluator.costs, losses), self.score)


@dataclass(frozen=True)
class Problem:
    """What a searcher searches: measures schedules, and knows the estimates' own answer."""

    evaluator: Evaluator
    prior: Prior
    score: str = "kl"

    @property
    def network(self) -> Network:
        return self.evaluator.network

    @property
    def dense(self) -> Measurement:
        return self.evaluator.dense

    @property
    def keeps(self) -> tuple[float, ...]:
        return self.evaluator.estimates.keeps

    @property
    def bits(self) -> tuple[int, ...]:
        return self.evaluator.estimates.bits

    def with_losses(self, losses: Losses) -> Problem:
        """The same problem with a prior on other losses; the evaluator is shared."""
        mine = self.prior.losses
        if all(
            np.array_equal(a, b)
            for a, b in (
                (losses.prune_GK, mine.prune_GK),
                (losses.quantize_LB, mine.quantize_LB),
            )
        ):
            return self  # a prior takes a second to solve
        return replace(self, prior=Prior(self.network, self.evaluator.costs, losses))

    def with_recovery(self, recovery: str) -> Problem:
        """The same problem, measured after another recovery; see `Evaluator.with_recovery`."""
        return replace(self, evaluator=self.evaluator.with_recovery(recovery))

    def max_ratio(self) -> float:
        """The largest size ratio (dense bytes / artifact bytes) that the choices allow."""
        return self.dense.bytes / self.prior.smallest_bytes()

    def require_reachable(self, target: tuple[float, float]) -> None:
        """Raises UserError if the largest target is beyond what the choices allow."""
        if target[1] > self.max_ratio():
            raise UserError(
                f"search.target = {list(target)}: at most {self.max_ratio():.1f} is possible "
                f"with the smallest keep {min(self.keeps)} and bits {min(self.bits)}"
            )


def make_bundle(
    model: nn.Module,
    ref: ModelRef,
    network: Network,
    fit: Split,
    scored: Split,
    estimates: Estimates,
    *,
    recovery: str = "reconstruct",
    score: str = "kl",
    use_labels: bool = True,
    positions: int = 2048,
    precision: str = "float32",
    cache_bytes: int = 256 * 2**20,
    seed: int = 0,
    device: str = "auto",
) -> Bundle:
    """A problem's arrays from a trained network and its images."""
    return Bundle(
        ref=ref,
        network=network,
        weights=arrays_of(model),
        fit_NCHW=fit.images().numpy(),
        score_NCHW=scored.images().numpy(),
        labels_N=scored.labels_N.numpy() if use_labels else None,
        estimates=estimates,
        recovery=recovery,
        score=score,
        positions=positions,
        precision=precision,
        cache_bytes=cache_bytes,
        seed=seed,
        device=device,
    )


@dataclass(frozen=True)
class Member:
    """A network of the zoo that a policy learns on.

    target    smallest and largest size ratio
    ratios, qualities  what an episode is expected to pay at some size ratios (ascending); between
              them linearly in the ratio's logarithm
    """

    name: str
    target: tuple[float, float]
    ratios: tuple[float, ...] = (1.0,)
    qualities: tuple[float, ...] = (0.0,)

    def expected(self, target: float) -> float:
        return float(np.interp(np.log(target), np.log(self.ratios), self.qualities))
