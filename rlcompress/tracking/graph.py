"""A network as an MLflow model in pt2 format, which loads without unpickling."""

from __future__ import annotations

import copy
from pathlib import Path

import mlflow.pytorch
import torch
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec


def save_pt2(model: torch.nn.Module, example: torch.Tensor, folder: Path, about: Model) -> None:
    """Write a copy of `model` as an MLflow model in pt2 format, with a free batch size."""
    model = copy.deepcopy(model).cpu().eval()
    # torch.export takes a size of 1 for a constant, so the example needs two rows.
    pair = example[:1].detach().cpu().repeat_interleave(2, dim=0)
    with torch.no_grad():
        output = model(pair)
    specs = (TensorSpec(t.numpy().dtype, (-1, *t.shape[1:])) for t in (pair, output))
    given, made = (Schema([spec]) for spec in specs)
    mlflow.pytorch.save_model(
        model,
        str(folder),
        mlflow_model=about,
        signature=ModelSignature(inputs=given, outputs=made),
        input_example=pair.numpy(),
        pip_requirements=[f"torch=={torch.__version__.split('+')[0]}"],
        serialization_format="pt2",
    )
    graph = torch.export.load(folder / "data" / "model.pt2")
    (name,) = graph.graph_signature.user_inputs
    (node,) = (node for node in graph.graph.nodes if node.name == name)
    if not isinstance(node.meta["val"].shape[0], torch.SymInt):
        kind = type(model).__name__
        raise ValueError(f"{kind} exports only with a batch of 2: its forward fixes the batch size")
