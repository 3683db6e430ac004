"""One training run as an episode: from a trained beginning on, a network is compressed while it
trains, again and again.

The beginning, and the minibatches before the first decision, are the same in all episodes of a
`Trainer`: they are trained once, and every episode branches from there.

Arrays are NumPy's, so that Ray hands all processes of a node one copy.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from rlcompress.core.artifact import ModelRef
from rlcompress.core.data import Split
from rlcompress.core.dynamic import DynamicCompressor
from rlcompress.core.graph import Network
from rlcompress.core.measure import compare
from rlcompress.core.policy import PRIOR, Agent
from rlcompress.core.problem import pick_device
from rlcompress.core.process import seeded
from rlcompress.core.schedule import BITS, KEEPS, Measurement, Schedule
from rlcompress.core.squeeze import Pace
from rlcompress.core.train import descend, first_output, logits_of, one_cycle, sgd


@dataclass(frozen=True)
class Images:
    """A split as arrays; read-only ones are used in place."""

    raw_NCHW: np.ndarray
    labels_N: np.ndarray
    mean: float
    std: float

    @staticmethod
    def of(split: Split) -> Images:
        return Images(split.raw_NCHW.numpy(), split.labels_N.numpy(), split.mean, split.std)

    def split(self) -> Split:
        with warnings.catch_warnings():
            # PyTorch has no read-only tensors; nobody writes to these.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            raw, labels = torch.from_numpy(self.raw_NCHW), torch.from_numpy(self.labels_N)
        return Split(raw, labels, self.mean, self.std)


@dataclass(frozen=True)
class Training:
    """What an episode trains: goes to workers as one object.

    weights      of the network where episodes begin
    train        images of the minibatches;  validation  those a finished network is measured on
    later        takes the place of `train` from the share `drift_at` of the steps on: then
                 `validation` should be of its kind
    final_steps  minibatches behind the last decision's recovery
    lr           peak of one cycle over all steps (SGD, Nesterov momentum 0.9)
    agent       whose prior episodes are played on; its policy is for who plays without another
    """

    ref: ModelRef
    network: Network
    weights: Mapping[str, np.ndarray]
    train: Images
    validation: Images
    pace: Pace
    final_steps: int = 100
    batch_size: int = 64
    lr: float = 0.02
    weight_decay: float = 5e-4
    keeps: tuple[float, ...] = KEEPS
    bits: tuple[int, ...] = BITS
    clip: str = "auto"
    seed: int = 0
    device: str = "auto"
    later: Images | None = None
    drift_at: float = 0.5
    agent: Agent = PRIOR
    dense_logits: np.ndarray | None = None  # of the uncompressed training; see `prepared`

    def prepared(self) -> Training:
        """With the uncompressed training played once, for all who get this."""
        return replace(self, dense_logits=Trainer(self).dense_logits().numpy())

    @property
    def steps(self) -> int:
        """Minibatches of an episode."""
        return self.pace.steps(len(self.network.layers)) + self.final_steps

    def model(self) -> nn.Module:
        model = self.ref.build(self.seed)
        model.load_state_dict({n: torch.tensor(a) for n, a in self.weights.items()})
        return model.to(pick_device(self.device), memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


class Trainer:
    """Plays the episodes of a `Training` in this process. One at a time: it holds one network, the
    optimizer's state and a copy of both as they were before the first decision."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.network = training.network
        self._data = training.train.split()
        self._later = self._data if training.later is None else training.later.split()
        self.validation = training.validation.split()
        self.model = training.model()
        self._device = next(self.model.parameters()).device
        self.compressor = DynamicCompressor(
            self.model,
            training.ref.example(),
            policy=training.agent,
            target=1.0,
            pace=training.pace,
            keeps=training.keeps,
            bits=training.bits,
            clip=training.clip,
            seed=training.seed,
            network=training.network,
        )
        self._optimizer = sgd(self.model, training.lr, training.weight_decay)
        self._generator = torch.Generator().manual_seed(training.seed)
        self.step, self.loss = 0, float("nan")
        self._branch: dict[str, Any] | None = None
        known = training.dense_logits
        self._dense_logits = None if known is None else torch.tensor(known)

    # --- one episode -------------------------------------------------------------------------

    def begin(self, target: float, seed: int) -> None:
        """A new episode: back to where the first decision is due. `seed`: the order of the
        minibatches from there on."""
        if self._branch is None:
            while not self.compressor.due:
                self.minibatch()
            self._branch = self.state_dict()
        branch = {**self._branch, "compressor": {**self._branch["compressor"], "target": target}}
        self.compressor.target = target
        self.load_state_dict(branch)
        self._generator.manual_seed(seed)

    def minibatch(self) -> float:
        """One step of training; the compressor reads it. Returns the loss, also in `loss`."""
        t = self.training
        data = self._later if self.step >= t.drift_at * t.steps else self._data
        index = torch.randint(len(data), (t.batch_size,), generator=self._generator)
        images = data.images(index).to(self._device, memory_format=torch.channels_last)
        labels = data.labels_N[index].to(self._device)
        self.model.train()
        # Dropout draws from torch's own generator.
        with seeded(self._generator.initial_seed() * 1_000_003 + self.step):
            logits = first_output(self.model(images))
        loss = F.cross_entropy(logits, labels)
        descend(self._optimizer, loss, t.lr * one_cycle(self.step, t.steps))
        self.step += 1
        self.compressor.read(loss)
        self.loss = float(loss.detach())
        return self.loss

    def advance(self) -> bool:
        """Trains until the next decision is due, or to the end: whether one is due."""
        while self.step < self.training.steps:
            self.minibatch()
            if self.compressor.due:
                return True
        return False

    def measure(self) -> Measurement:
        """The network as it is now, on the validation images. Its KL is to the network that the
        same steps without compression give."""
        dense = self.dense_logits()
        cost = self.compressor.costs.cost(self.compressor.schedule)
        logits = logits_of(self.model, self.validation)
        return cost.measurement(*compare(logits, dense, self.validation.labels_N))

    def dense_logits(self) -> torch.Tensor:
        """(N, classes) of the uncompressed training; it is trained when first asked for."""
        if self._dense_logits is None:
            dense = Trainer(self.training)
            dense.compressor.freeze()
            dense.advance()
            self._dense_logits = logits_of(dense.model, self.validation)
        return self._dense_logits

    @functools.cached_property
    def dense(self) -> Measurement:
        """The uncompressed training's end."""
        logits = self.dense_logits()
        cost = self.compressor.costs.cost(Schedule())
        return cost.measurement(*compare(logits, logits, self.validation.labels_N))

    # --- state -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the episode depends on."""
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "compressor": self.compressor.state_dict(),
                "generator": self._generator.get_state(),
                "step": self.step,
            }
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.compressor.load_state_dict(state["compressor"])
        self._generator.set_state(state["generator"])
        self.step = int(state["step"])
