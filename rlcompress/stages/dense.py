"""Stage 1: the dense network and the points of its training that tickets return to."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rlcompress.core.cost import CostModel
from rlcompress.core.files import read_json, save_json
from rlcompress.core.schedule import Schedule
from rlcompress.core.tensors import save_tensors
from rlcompress.core.train import Recipe, logits_of, measure, train
from rlcompress.live import stage
from rlcompress.stages.weights import load_weights
from rlcompress.stages.workspace import Workspace


def train_dense(run: Workspace) -> dict[str, Any]:
    """Trains the dense network, loads `dense.weights`, or finds it; its metrics. Loaded weights are
    their own rewind point: an earlier one is not known."""
    e, folder = run.experiment, run.folder / "dense"
    inputs = run.inputs.dense
    path = folder / "metrics.json"
    run.exchange(folder, inputs, path.name)
    if path.exists():
        known: dict[str, Any] = read_json(path)
        return known
    # What cannot be compressed need not be trained.
    network = run.structure
    begun, d = time.monotonic(), e.dense
    model = run.ref.build(e.seed)
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if d.weights:
        load_weights(model, Path(d.weights))
    # Before it is trained: cut off, it is told from what other options make.
    run.claim(folder, inputs, path.name)
    save_tensors(folder / "init.safetensors", initial)
    if d.weights or d.rewind_epoch == 0:
        save_tensors(folder / "rewind.safetensors", model.state_dict())
    model.to(run.device)
    recipe = Recipe(d.epochs, d.batch_size, d.lr, d.weight_decay, d.label_smoothing, d.augment)
    selection, checkpoint = run.splits[2], folder / "checkpoint.safetensors"
    curve: list[dict[str, Any]] = []
    with stage("dense", d.epochs) as shown:

        def on_epoch(epoch: int, row: dict[str, Any]) -> None:
            if epoch == d.rewind_epoch:
                save_tensors(folder / "rewind.safetensors", model.state_dict())
            shown.update(
                epoch,
                f"loss {row['loss']:.3f}  validation {row['validation_accuracy']:.1%}",
            )

        if not d.weights:
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
    cost = CostModel(network).cost(Schedule())
    metrics = {
        "inputs": inputs,
        "weights": run.weights_digest(),
        "data": run.given.summary(),
        "labelled": run.data.labelled,
        "seed": e.seed,
        "seconds": round(time.monotonic() - begun, 2),
        "curve": curve,
        "validation": measure(model, selection, logits, cost).to_dict(),
    }
    save_json(path, metrics)
    checkpoint.unlink(missing_ok=True)
    return metrics
