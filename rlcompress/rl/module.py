"""The policy as an RLlib module (new API stack)."""

from __future__ import annotations

from typing import Any

import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import ValueFunctionAPI
from ray.rllib.core.rl_module.torch import TorchRLModule

from rlcompress.core.policy import Policy, PolicyShape


class PolicyModule(TorchRLModule, ValueFunctionAPI):
    """`model_config["shape"]` is a `PolicyShape` as a dict; `model_config["weights"]`, if given,
    a state dict of numpy arrays to start from.

    `stream`, if set, draws the actions: torch's own generator is the learner's too where both are
    in one process, and then says other things with 0 than with 1 remote runner."""

    stream: torch.Generator | None = None

    def setup(self) -> None:
        self.policy = Policy(PolicyShape(**self.model_config["shape"]))
        weights = self.model_config.get("weights")
        if weights:
            self.policy.load_state_dict({n: torch.tensor(a) for n, a in weights.items()})

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        logits, _ = self.policy(batch[Columns.OBS])
        return {Columns.ACTION_DIST_INPUTS: logits}

    def _forward_exploration(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        output = self._forward(batch)
        if self.stream is not None:
            # On the CPU: the stream's device, and the next thing RLlib does with actions.
            chances = output[Columns.ACTION_DIST_INPUTS].cpu().log_softmax(-1)
            drawn = torch.multinomial(chances.double().exp(), 1, generator=self.stream)
            output[Columns.ACTIONS] = drawn.squeeze(-1)
            output[Columns.ACTION_LOGP] = chances.gather(-1, drawn).squeeze(-1)
        return output

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> torch.Tensor:
        return self.policy(batch[Columns.OBS])[1]
