"""ONNX: the ticket for onnxruntime and whatever else reads the format."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rlcompress.core.errors import UserError

TOLERANCE = 1e-3


def export_onnx(model: nn.Module, images: torch.Tensor, path: Path) -> float:
    """Writes `model` to `path` with a free batch dimension; checks it in onnxruntime on
    `images` (N, C, H, W), N >= 2. Returns the largest difference relative to the largest logit.

    Raises UserError if the network cannot be exported or gives other answers there.
    """
    import onnxruntime

    part = path.with_name(path.name + ".part")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model.eval(),
                (images,),
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        program.save(str(part), external_data=False)
    except torch.onnx.errors.OnnxExporterError as error:
        first = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{path}: the network cannot be exported to ONNX: {first}; --set export.onnx=false"
        ) from error
    session = onnxruntime.InferenceSession(str(part), providers=["CPUExecutionProvider"])
    theirs = session.run(None, {"images": images.numpy()})[0]
    with torch.inference_mode():
        ours = model(images).numpy()
    difference = float(np.abs(theirs - ours).max() / max(float(np.abs(ours).max()), 1e-6))
    if difference > TOLERANCE:
        raise UserError(f"{path}: onnxruntime differs by {difference:.2e} (allowed {TOLERANCE})")
    os.replace(part, path)
    return difference
