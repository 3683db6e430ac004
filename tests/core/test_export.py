"""ONNX: the same answers in onnxruntime, at any batch size; and core stands on its own."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from rlcompress.core.artifact import load_artifact, pack
from rlcompress.core.errors import UserError
from rlcompress.core.export import export_onnx
from rlcompress.core.files import save_bytes
from rlcompress.core.fold import snap
from rlcompress.core.prune import cut
from rlcompress.core.schedule import Schedule


def test_onnxruntime_gives_the_artifacts_answers_at_any_batch_size(trained, data, tmp_path):
    schedule = Schedule(
        dict.fromkeys(trained.network.groups, 0.6), dict.fromkeys(trained.network.layers, 4)
    )
    small = cut(trained.model, trained.network, trained.kept(schedule, 0))
    bits, scales = trained.quantized(small, schedule)
    scales = snap(small, trained.network, bits, scales)
    save_bytes(tmp_path / "a", pack(small, trained.network, trained.ref, bits, scales))
    model = load_artifact(tmp_path / "a")

    difference = export_onnx(model, trained.images, tmp_path / "model.onnx")
    assert 0 <= difference < 1e-4
    assert {p.name for p in tmp_path.iterdir()} == {"a", "model.onnx"}
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for count in (1, 3, 20):
        images = data.test.images(slice(0, count))
        with torch.no_grad():
            wanted = model(images).numpy()
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        assert np.abs(logits - wanted).max() <= 1e-4 * np.abs(wanted).max()


class Listing(nn.Module):
    """Its control flow depends on the data."""

    def forward(self, x):
        return x if x.sum() > 0 else x.tolist()


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be exported"):
        export_onnx(Listing(), torch.randn(2, 1, 4, 4), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_core_imports_no_ray_mlflow_or_gymnasium():
    program = (
        "import importlib, pkgutil, sys, rlcompress.core as core\n"
        "names = [m.name for m in pkgutil.iter_modules(core.__path__)]\n"
        "for name in names: importlib.import_module('rlcompress.core.' + name)\n"
        "print(len(names), *({'ray', 'mlflow', 'gymnasium', 'rlcompress.rl'} & {*sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    count, *forbidden = done.stdout.split()
    assert int(count) > 15
    assert forbidden == []
