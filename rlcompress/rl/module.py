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
    a state dict of numpy arrays to start from."""

    def setup(self) -> None:
        self.policy = Policy(PolicyShape(**self.model_config["shape"]))
        weights = self.model_config.get("weights")
        if weights:
            self.policy.load_state_dict({n: torch.tensor(a) for n, a in weights.items()})

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        logits, _ = self.policy(batch[Columns.OBS])
        return {Columns.ACTION_DIST_INPUTS: logits}

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> torch.Tensor:
        return self.policy(batch[Columns.OBS])[1]
