"""Named tensors and plain values in one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from rlcompress.core.files import save_bytes


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], **metadata: Any) -> None:
    """safetensors with JSON metadata; whole or not there."""
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    save_bytes(path, save(plain, metadata={"json": json.dumps(metadata)}))


def arrays_of(model: nn.Module) -> dict[str, np.ndarray]:
    """Of its state; what NumPy has no numbers for in float32."""
    state = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    return {n: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for n, t in state.items()}


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The inverse of `save_tensors`."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads((file.metadata() or {}).get("json", "{}"))
