"""Compression while the network trains: masks and fake quantization that a policy tightens or
relaxes, layer by layer, on what training shows (`signals`).

A cut channel's filter stays; only what reads it is masked. The backward pass goes through the
masks as if they were not there, so the weights behind them learn on and a channel can come back
(Lin et al., 2020, "Dynamic Model Pruning with Feedback", eq. 3).

    step 0            the user's training goes on; the last `Pace.watch` minibatches before a pass
                      over the layers tell what its choices would cost
    step `warmup`     the first layer's decision, then one every `recovery_steps` minibatches,
                      `rounds` times over all layers: round r aims at target^((r + 1) / rounds)
    afterwards        training goes on under the last choices until `finalize`
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rlcompress.core.agents import AnyPolicy, agent_of
from rlcompress.core.artifact import ModelRef
from rlcompress.core.cost import CostModel
from rlcompress.core.errors import UserError
from rlcompress.core.fitted import CutNetwork
from rlcompress.core.graph import Layer, Network
from rlcompress.core.inputs import choice_problems, require
from rlcompress.core.observation import Live, Observer, Progress, growth, in_force
from rlcompress.core.prior import Prior
from rlcompress.core.schedule import BITS, FULL_PRECISION, KEEPS, Schedule
from rlcompress.core.signals import Signals
from rlcompress.core.squeeze import Pace, Squeezed, require_called
from rlcompress.core.structure import build_network

#: Of the prior's ladder, which is solved anew before every decision.
RUNGS = 24


class DynamicCompressor:
    """Compresses `model` while your own loop trains it.

        compressor = DynamicCompressor(model, example_input, target=20.0)
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad(); loss.backward(); optimizer.step()
            compressor.step(loss)
        small = compressor.finalize()

    The loop has to take `steps_needed` steps; the target is reached a little before.

    model          changed in place: its convolutions and linear layers get a parametrization.
                   The optimizer may be made before or after: the parameters stay the same.
                   Until `finalize` its state dict has `NAME.parametrizations.weight.original`
                   for a layer's `NAME.weight`: load a checkpoint of that time into a model that
                   has a compressor already
    example_input  (N, C, H, W)
    policy         "default", the one that comes with rlcompress; the folder of another; a `Policy`
                   or `Agent`; None for the knapsack answer on the live estimates alone
    target         size ratio: dense bytes / artifact bytes
    pace           when decisions are taken; None for `Pace()`
    keeps, bits    the choices

    Raises UserError where the target is out of reach, where the policy or the pace is of another
    kind, and for a layer whose weight is used by other code than its module's call.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: torch.Tensor,
        *,
        policy: AnyPolicy = "default",
        target: float = 20.0,
        pace: Pace | None = None,
        keeps: tuple[float, ...] = KEEPS,
        bits: tuple[int, ...] = BITS,
        clip: str = "auto",
        round_to: int = 1,
        seed: int = 0,
        network: Network | None = None,
    ) -> None:
        if not isinstance(pace, Pace | None):
            raise UserError(f"pace = {pace!r}: must be a Pace, as in pace=Pace(warmup=100)")
        self.model, self.target, self.pace = model, target, pace or Pace()
        self.keeps, self.bits = tuple(keeps), tuple(bits)
        require(choice_problems(self.keeps, self.bits))
        self.network = network or build_network(model, example_input, round_to=round_to)
        self.layers = list(self.network.layers.values())
        self.costs = CostModel(self.network)
        self.use(policy)
        self.require_reachable(target)
        require_called(model, self.network, example_input)
        self.squeezed = Squeezed(model, self.network)
        self.signals = Signals(model, self.network, self.keeps, self.bits, clip, seed)
        self.steps = self.decisions = 0
        #: `_unsettled`: a pass is to begin, its samples are not all taken.
        self._frozen = self._unsettled = False
        self._begun: tuple[float, float] | None = None
        self._observer: Observer | None = None
        self._legal_A = np.empty(0, dtype=bool)
        self._progress: Progress | None = None
        self._small: CutNetwork | None = None

    # --- what a loop calls -------------------------------------------------------------------

    def step(self, loss: torch.Tensor | float) -> None:
        """After the optimizer's step and before the gradients are zeroed: takes what the
        minibatch showed and, where one is due, the policy's decision. Gradients accumulated over
        several passes are taken as those of one minibatch's mean loss.

        Raises UserError after `finalize`, and where no weight has a gradient."""
        self.read(loss)
        if self.due:
            self.decide(self.choose())

    @property
    def steps_needed(self) -> int:
        """Steps of the whole training until the last decision and its recovery are over;
        `steps` of them are taken."""
        return self.pace.steps(len(self.layers))

    def finalize(self) -> nn.Module:
        """The small network, on the model's device and in eval mode: cut for real, its weights on
        their quantizer's grid. `model` is plain again, with the float weights behind it. Called
        again it returns the same network.

        Warns where decisions are left and the target is not reached: the training was too short.
        """
        return self._release().model

    def cut_network(self) -> CutNetwork:
        """What `finalize` returns, with the scale_O of its layers."""
        return self._release()

    def save(self, path: Path | str, ref: ModelRef) -> CutNetwork:
        """Finalizes, unless that is done, and writes the packed artifact; `ref` says how the dense
        network is built. Returns a copy of the network, rounded to what the file can hold."""
        from rlcompress.core.ticket import write_network

        small = copy.deepcopy(self._release())
        write_network(path, small, self.network, ref, self.schedule)
        return small

    def _release(self) -> CutNetwork:
        if self._small is None:
            if self.ratio < self.target and not self._frozen:
                left = self.steps_needed - self.steps
                why = f"{left} more steps, or a shorter pace, reach it"
                why = "a schedule that was applied is larger" if self.finished else why
                warnings.warn(
                    f"finalized after {self.steps} of {self.steps_needed} steps: {self.ratio:.1f}x "
                    f"fewer bytes, the target is {self.target:g}x; {why}",
                    stacklevel=3,  # the line that calls `finalize` or `save`
                )
            self.signals.close()
            self._small = self.squeezed.release()
        return self._small

    def _require_open(self, verb: str) -> None:
        if self._small is not None:
            made = "finalize or save has made the model plain again"
            raise UserError(f"{verb}: {made}; a new DynamicCompressor goes on with it")

    @property
    def schedule(self) -> Schedule:
        """The choices in force."""
        return self.squeezed.schedule

    @property
    def kept(self) -> dict[str, np.ndarray]:
        """Group -> mask of the channels that are alive."""
        return self.squeezed.kept

    @property
    def unexplained(self) -> dict[str, float]:
        """Layer -> share of its outputs' variance that its last choice left unexplained."""
        return self.squeezed.unexplained

    @property
    def ratio(self) -> float:
        """Dense bytes / bytes of the artifact that `save` would write now."""
        return self.costs.cost(Schedule()).bytes / self.costs.cost(self.schedule).bytes

    def most_ratio(self) -> float:
        """The largest size ratio that the choices allow."""
        smallest = self.network.uniform(min(self.keeps), min(self.bits))
        return self.costs.cost(Schedule()).bytes / self.costs.cost(smallest).bytes

    # --- decisions ---------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether all decisions are taken."""
        return self.decisions == self.pace.rounds * len(self.layers)

    @property
    def due(self) -> bool:
        """Whether the next layer's decision may be taken now."""
        return not self.finished and self.steps >= self._time_of(self.decisions)

    @property
    def round(self) -> int:
        return self.decisions // len(self.layers)

    def _time_of(self, decision: int) -> int:
        return self.pace.warmup + decision * self.pace.recovery_steps

    @property
    def aim(self) -> float:
        """The size ratio that this round works towards."""
        last = self.pace.rounds - 1
        return float(self.target ** ((min(self.round, last) + 1) / self.pace.rounds))

    def read(self, loss: torch.Tensor | float) -> None:
        """Takes a minibatch without deciding anything. Raises UserError as `step` does."""
        self._require_open("step")
        if not self.finished:
            self.signals.require_gradients()
        self.steps += 1
        if self.finished:
            self.signals.listening = False
            return
        layers = len(self.layers)
        next_round = -(-self.decisions // layers) * layers
        begin = self._time_of(next_round) - self.pace.watch
        if next_round:
            # Not before the pass at hand has begun.
            begin = max(begin, self._time_of(next_round - layers) + 1)
        early = self.pace.warmup - 2 * self.pace.watch
        self.signals.listening = self.steps >= early
        if self.steps <= early:
            return
        if self.steps == begin and next_round < self.pace.rounds * layers:
            self.signals.wanted.update(self.network.layers)
        self.signals.read(loss)
        if self.steps == begin + 1 and next_round < self.pace.rounds * layers:
            self._unsettled = True
        if self._unsettled and not self.signals.unsampled:
            self.signals.settle()
            self._unsettled = False
        if self.steps + 1 >= self._time_of(self.decisions):
            self.signals.wanted.add(self.layers[self.decisions % layers].name)

    def observation(self) -> dict[str, np.ndarray]:
        """What the policy sees of the layer whose decision is due: actions (A, F), state (S,),
        mask (A,), float32."""
        t = self.decisions % len(self.layers)
        layer = self.layers[t]
        self.signals.update_clip(layer.name)
        estimates = self.signals.estimates()
        losses = self.agent.losses(self.network, self.costs, estimates)
        prior = Prior(self.network, self.costs, losses, RUNGS)
        self._observer = Observer(prior, estimates, self.temperature)
        if t == 0:
            self._progress = self._observer.start(1)
        assert self._progress is not None
        observation = self._observer.observe(
            self._progress, np.array([self.aim]), self._live(layer)
        )
        self._legal_A = observation["mask"][0] > 0
        return {name: array[0] for name, array in observation.items()}

    def choose(self) -> int:
        """The policy's action for the decision that is due."""
        observation = self.observation()
        if self.policy is not None:
            return self.policy.best_action(observation)
        legal, prior = observation["mask"] > 0, observation["actions"][:, -1]
        return int(np.where(legal, prior, -np.inf).argmax())

    def _live(self, layer: Layer) -> Live:
        values = self.signals.average.values
        loss, gradient = (float(values[f"{n}/fast"]) + 1e-12 for n in ("loss", "gradient"))
        slow_loss, slow_gradient = (
            float(values[f"{n}/slow"]) + 1e-12 for n in ("loss", "gradient")
        )
        if self._begun is None:
            self._begun = loss, gradient
        choice = self.choice_of(layer.name)
        total = self.pace.steps(len(self.layers)) - self.pace.warmup
        return Live(
            keep_now=float(choice["keep"]),
            bits_now=int(choice["bits"]),
            round=self.round / self.pace.rounds,
            trained=min(1.0, (self.steps - self.pace.warmup) / total),
            loss=growth(loss, self._begun[0]),
            loss_trend=growth(loss, slow_loss),
            gradient=growth(gradient, self._begun[1]),
            gradient_trend=growth(gradient, slow_gradient),
        )

    def decide(self, action: int) -> None:
        """Takes the decision that is due; actions are numbered as in `Observer`. Raises
        UserError after `finalize`, ValueError if none is due or the action is illegal."""
        self._require_open("decide")
        if not self.due:
            raise ValueError(f"no decision is due after {self.steps} steps")
        if self._observer is None:
            self.observation()
        assert self._observer is not None
        assert self._progress is not None
        if not 0 <= action < len(self._legal_A) or not self._legal_A[action]:
            raise ValueError(f"action {action} is illegal here (its mask is 0)")
        observer, t = self._observer, self.decisions % len(self.layers)
        keep = observer.keep_choices[observer.keep_A[action]]
        bits = observer.bits_choices[observer.bits_A[action]]
        layer = self.layers[t]
        if (group := self.network.owned_group(layer.name)) is not None:
            self.squeezed.cut(group.name, keep, self.signals.importance()[group.name])
        self._quantize(layer, bits)
        done_NT = np.array([[self.unexplained[x.name] for x in self.layers[: t + 1]]])
        self._progress = observer.decide(self._progress, np.array([action]), done_NT)
        self._observer = None
        self.decisions += 1

    def apply(self, schedule: Schedule, kept: Mapping[str, np.ndarray] | None = None) -> None:
        """A schedule for all layers at once; the policy, if decisions are left, goes on from
        there. `kept`: group -> mask, else the most important channels of this moment.

        Raises UserError after `finalize`, and on names that the network does not have."""
        self._require_open("apply")
        self.network.validate(schedule)
        importance = self.signals.importance()
        for name, group in self.network.groups.items():
            if kept is not None:
                self.squeezed.keep_channels(name, schedule.ratio(name), kept[name])
            elif not group.protected:
                self.squeezed.cut(name, schedule.ratio(name), importance[name])
        for layer in self.layers:
            self._quantize(layer, schedule.width(layer.name))
        if (progress := self._progress) is not None:
            choices = self.keeps, self.bits
            self._progress = in_force(
                progress, self.network, self.schedule, choices, self.unexplained
            )
        self._observer = None

    def _quantize(self, layer: Layer, bits: int) -> None:
        clip_O = self.signals.clip_of(layer.name, bits) if bits != FULL_PRECISION else None
        self.squeezed.quantize(layer, bits, clip_O, self.signals.patches.get(layer.name))

    def choice_of(self, layer: str) -> dict[str, float | int]:
        """The keep ratio of a layer's group and its bits, as they are now."""
        return {
            "keep": self.squeezed.ratios.get(self.network.layers[layer].group or "", 1.0),
            "bits": self.squeezed.bits(layer),
        }

    def use(self, policy: AnyPolicy) -> None:
        """Another policy from here on. Raises UserError where it is of another kind."""
        self.agent = agent_of(policy)
        self.policy, self.temperature = self.agent.policy, self.agent.temperature

    def freeze(self) -> None:
        """Leaves the choices as they are: no decision is due any more."""
        self.decisions, self._frozen = self.pace.rounds * len(self.layers), True

    # --- checks ------------------------------------------------------------------------------

    def require_reachable(self, target: float) -> None:
        """Raises UserError for a size ratio beyond what the choices allow."""
        most, found = self.most_ratio(), []
        if not 1.0 <= target <= most:
            found.append(
                f"target = {target:g}: from 1 to {most:.1f} with the smallest keep "
                f"{min(self.keeps)} and bits {min(self.bits)}"
            )
        require(found)

    # --- state -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only: goes into your checkpoint beside the model's and the
        optimizer's, which are to be loaded after the compressor is made."""
        progress = self._progress
        return {
            "steps": self.steps,
            "decisions": self.decisions,
            "target": self.target,
            "pace": asdict(self.pace),
            "keeps": list(self.keeps),
            "bits": list(self.bits),
            "squeezed": self.squeezed.state_dict(),
            "unsettled": self._unsettled,
            "begun": None if self._begun is None else list(self._begun),
            "progress": None
            if progress is None
            else {
                "keep": torch.from_numpy(progress.keep_NG.copy()),
                "bits": torch.from_numpy(progress.bits_NL.copy()),
                "unexplained": torch.from_numpy(progress.unexplained_NT.copy()),
            },
            "signals": self.signals.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """On any device. Raises UserError where the state is none or is of another network, target,
        pace or choices, and after `finalize`; then nothing has changed."""
        self._require_open("load_state_dict")
        mine = self.state_dict()
        if not isinstance(state, Mapping) or state.keys() != mine.keys():
            raise UserError("state: it is no DynamicCompressor's, as `state_dict` returns it")
        found = [
            f"the saved compressor's {name} is {state[name]}, this one's is {mine[name]}"
            for name in ("target", "pace", "keeps", "bits")
            if state[name] != mine[name]
        ]
        if not self.squeezed.fits(state["squeezed"]):
            found.append("the saved compressor is of a network with other layers")
        require(found)
        self.steps, self.decisions = int(state["steps"]), int(state["decisions"])
        self.squeezed.load_state_dict(state["squeezed"])
        self._unsettled = bool(state["unsettled"])
        self._begun = None if state["begun"] is None else tuple(state["begun"])
        saved = state["progress"]
        self._observer = None
        self._progress = saved and Progress(
            *(saved[name].cpu().numpy().copy() for name in ("keep", "bits", "unexplained"))
        )
        self.signals.load_state_dict(state["signals"])
