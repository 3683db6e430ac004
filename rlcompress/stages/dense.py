"""Stage 1: the dense network and the points of its training that tickets return to."""

from __future__ import annotations

import json
import time
from typing import Any

from rlcompress.core.cost import CostModel
from rlcompress.core.files import save_json
from rlcompress.core.schedule import Schedule
from rlcompress.core.tensors import save_tensors
from rlcompress.core.train import Recipe, logits_of, measure, train
from rlcompress.live import stage
from rlcompress.spec import spec_hash
from rlcompress.stages.workspace import DENSE_INPUTS, Workspace


def train_dense(run: Workspace) -> dict[str, Any]:
    """Trains the dense network, or finds it; its metrics."""
    e, folder = run.experiment, run.folder / "dense"
    inputs = spec_hash(e, *DENSE_INPUTS)
    path = folder / "metrics.json"
    if path.exists():
        metrics: dict[str, Any] = json.loads(path.read_text())
        if metrics["inputs"] == inputs:
            return metrics
        run.set_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    model = run.ref.build(e.seed)
    save_tensors(folder / "init.safetensors", model.state_dict())
    if e.dense.rewind_epoch == 0:
        save_tensors(folder / "rewind.safetensors", model.state_dict())
    model.to(run.device)
    d = e.dense
    recipe = Recipe(d.epochs, d.batch_size, d.lr, d.weight_decay, d.label_smoothing, d.augment)
    selection, checkpoint = run.splits[1], folder / "checkpoint.safetensors"
    with stage("dense", d.epochs) as shown:

        def on_epoch(epoch: int, row: dict[str, Any]) -> None:
            if epoch == d.rewind_epoch:
                save_tensors(folder / "rewind.safetensors", model.state_dict())
            shown.update(
                epoch,
                f"loss {row['loss']:.3f}  validation {row['validation_accuracy']:.1%}",
            )

        curve = train(
            model,
            run.data.train,
            recipe,
            seed=e.seed,
            validation=selection,
            checkpoint=checkpoint,
            key=inputs,
            on_epoch=on_epoch,
        )
    save_tensors(folder / "trained.safetensors", model.state_dict())
    logits = logits_of(model, selection)
    cost = CostModel(run.structure).cost(Schedule())
    metrics = {
        "inputs": inputs,
        "seed": e.seed,
        "seconds": round(time.monotonic() - begun, 2),
        "curve": curve,
        "validation": measure(model, selection, logits, cost).to_dict(),
    }
    save_json(path, metrics)
    checkpoint.unlink()
    return metrics
