"""ONNX: the same answers in onnxruntime, at any batch size, in a file of the size of its codes;
and core stands on its own."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from rlcompress.core.artifact import ModelRef, load_artifact, pack, read_artifact
from rlcompress.core.errors import UserError
from rlcompress.core.export import export_onnx, latency
from rlcompress.core.files import save_bytes
from rlcompress.core.fold import snap
from rlcompress.core.prune import cut
from rlcompress.core.quant import fake_quantize, mse_clip, scale_of
from rlcompress.core.schedule import Schedule
from rlcompress.core.structure import build_network

TYPES = {
    **dict.fromkeys((1, 2), "INT2"),
    **dict.fromkeys((3, 4), "INT4"),
    **dict.fromkeys((5, 6, 7, 8), "INT8"),
}
WIDTHS = {"INT2": 2, "INT4": 4, "INT8": 8, "FLOAT": 32}


class Tokens(nn.Module):
    """Every kind of layer: strided, grouped, depthwise and pointwise convolutions, a Linear on
    tokens, one whose weight is used by a function, and a head. Batch norms stay where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.pointwise = nn.Conv2d(12, 6, 1)
        self.mlp = nn.Linear(6, 10)
        self.qkv = nn.Linear(10, 9, bias=False)
        self.head = nn.Linear(9, 5)

    def forward(self, x):
        x = F.relu6(self.norm(self.stem(x)))
        x = self.pointwise(F.relu(self.grouped(self.depthwise(x))))
        tokens = F.gelu(self.mlp(x.flatten(2).transpose(1, 2)))
        tokens = F.linear(tokens, self.qkv.weight)
        return self.head(tokens.mean(1))


LAYERS = ("stem", "depthwise", "grouped", "pointwise", "mlp", "qkv", "head")


@torch.no_grad()
def quantize(model: nn.Module, bits: dict[str, int]) -> dict[str, torch.Tensor]:
    """Quantizes weights in place; the scales."""
    scales = {}
    for name, width in bits.items():
        if width != 32:
            weight = model.get_submodule(name).weight
            scale = scale_of(weight, mse_clip(weight, width), width)
            weight.copy_(fake_quantize(weight, scale, width))
            scales[name] = scale
    return scales


def folded(net, folder) -> nn.Module:
    """The float network with its batch norms folded, as an artifact brings it back."""
    save_bytes(folder / "a", pack(net.model, net.network, net.ref, {}, {}))
    model = load_artifact(folder / "a")
    (folder / "a").unlink()
    return model


def run(session, images: torch.Tensor) -> np.ndarray:
    return session.run(["logits"], {"images": images.numpy()})[0]


def stored(path) -> list[tuple[str, int]]:
    """Type and bits of every tensor in the file."""
    types = onnx.TensorProto.DataType
    return [
        (types.Name(t.data_type), len(t.raw_data) * 8) for t in onnx.load(path).graph.initializer
    ]


@settings(
    max_examples=3,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking means minutes of exports
    suppress_health_check=[HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_bits_give_the_networks_answers_at_any_batch_size(data, close, scratch):
    bits = {name: data.draw(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 32]), name) for name in LAYERS}
    torch.manual_seed(data.draw(st.integers(0, 100), "seed"))
    model = Tokens().eval()
    model.norm.running_mean.normal_()
    model.norm.weight.data.normal_()
    scales = quantize(model, bits)
    for name, scale in scales.items():  # what folding a batch norm can do to a channel
        factor = torch.ones_like(scale)
        factor[0], factor[1] = -1.0, 0.0
        scale.mul_(factor)
        weight = model.get_submodule(name).weight.data
        weight.mul_(factor.view(-1, *[1] * (weight.dim() - 1)))

    images = torch.randn(20, 1, 8, 8)
    path = scratch.with_suffix(".onnx")
    file = export_onnx(model, bits, scales, images[:4], path)
    assert file.path == path
    assert file.difference < 1e-4
    assert file.agreement == 1.0
    assert file.bytes == path.stat().st_size
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path)
    for count in (1, 3, 20):
        with torch.no_grad():
            wanted = model(images[:count])
        close(wanted, torch.from_numpy(run(session, images[:count])))

    tensors = stored(path)
    assert file.container_bytes * 8 == sum(size for _, size in tensors)
    wanted = Counter()
    for name, width in bits.items():
        if width != 32:
            kind = TYPES[width]
            count = model.get_submodule(name).weight.numel()
            wanted[kind, -(-count * WIDTHS[kind] // 8) * 8] += 1
    assert Counter(t for t in tensors if t[0].startswith("INT") and t[0] != "INT64") == wanted


@pytest.mark.parametrize(
    "ref",
    [
        ModelRef("vgg19", {"width": 0.25}, 10, (1, 32, 32)),
        ModelRef("mobilenetv2", {"width": 0.25}, 10, (1, 32, 32)),
    ],
    ids=lambda ref: ref.factory,
)
def test_the_file_is_as_small_as_its_codes(ref, tmp_path):
    model = ref.build()
    network = build_network(model, ref.example())
    save_bytes(tmp_path / "a", pack(model, network, ref, {}, {}))
    model = load_artifact(tmp_path / "a")
    bits = dict.fromkeys(network.layers, 4)
    scales = quantize(model, bits)
    file = export_onnx(model, bits, scales, torch.randn(2, *ref.input_shape), tmp_path / "m.onnx")

    layers = [model.get_submodule(name) for name in network.layers]
    codes = sum(-(-layer.weight.numel() // 2) for layer in layers)
    floats = sum(4 * len(layer.weight) * (1 if layer.bias is None else 2) for layer in layers)
    assert codes < file.container_bytes <= codes + floats + 100
    assert file.container_bytes < file.bytes <= 1.1 * file.container_bytes


def test_int8_activations_keep_the_answers_and_the_codes(trained, data, tmp_path, capfd):
    model = folded(trained, tmp_path)
    bits = {name: (8, 6)[i % 2] for i, name in enumerate(trained.network.layers)}
    bits["classifier"] = 32
    scales = quantize(model, bits)
    images = data.train.images(slice(0, 100))
    file = export_onnx(model, bits, scales, images, tmp_path / "m.onnx", activations="int8")
    assert 0 < file.difference < 0.5
    assert file.agreement >= 0.95
    assert capfd.readouterr() == ("", "")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]

    held_out = data.test.images(slice(0, 200))
    with torch.no_grad():
        wanted = model(held_out).argmax(1).numpy()
    session = onnxruntime.InferenceSession(file.path)
    assert (run(session, held_out).argmax(1) == wanted).mean() >= 0.95
    assert run(session, held_out[:1]).shape == (1, 10)

    proto = onnx.load(file.path)
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    made_by = {node.output[0]: node for node in proto.graph.node}
    convolutions = [node for node in proto.graph.node if node.op_type == "Conv"]
    quantized = [name for name, width in bits.items() if width != 32]
    assert len(convolutions) == len(quantized)
    for node, name in zip(convolutions, quantized, strict=True):
        assert made_by[node.input[0]].op_type == "DequantizeLinear"
        codes, scale = (tensors[i] for i in made_by[node.input[1]].input[:2])
        assert codes.dtype == np.int8
        weight = model.get_submodule(name).weight.numpy()
        np.testing.assert_array_equal(codes * scale.reshape(-1, 1, 1, 1), weight)


def test_int8_activations_of_tokens(tmp_path):
    torch.manual_seed(0)
    model = Tokens().eval()
    model.head.weight.data.mul_(20)  # far from ties
    bits = dict.fromkeys(LAYERS, 4)
    scales = quantize(model, bits)
    scales["stem"][0] = 0.0  # a channel that is only its bias
    model.stem.weight.data[0] = 0.0
    images = torch.randn(64, 1, 8, 8)
    file = export_onnx(model, bits, scales, images, tmp_path / "m.onnx", activations="int8")
    assert 0 < file.difference < 0.1


def test_tied_weights_are_stored_once(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    model[2].weight = model[1].weight
    bits = {"1": 4, "2": 4}
    scales = quantize(model, {"1": 4})
    scales["2"] = scales["1"]
    export_onnx(model, bits, scales, torch.randn(3, 1, 4, 4), tmp_path / "m.onnx")
    assert [t for t in stored(tmp_path / "m.onnx") if t[0] == "INT4"] == [("INT4", 16 * 16 * 4)]


class Listing(nn.Module):
    """Its control flow depends on the data."""

    def forward(self, x):
        return x if x.sum() > 0 else x.tolist()


class Random(nn.Module):
    """It never gives the same answer twice."""

    def forward(self, x):
        return x.flatten(1) + torch.rand(16)


class Pairs(nn.Module):
    """It takes an even number of images."""

    def forward(self, x):
        return x.reshape(-1, 32)


class Idle(nn.Module):
    """One of its layers is never asked."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x):
        return self.used(x.flatten(1))


class Stumbling(nn.Module):
    """It is interrupted and cannot clean up."""

    def forward(self, x):
        try:
            raise KeyboardInterrupt
        finally:
            raise AssertionError("no mode is active")


def test_an_interrupt_that_the_exporter_hides_is_one(scratch):
    with pytest.raises(KeyboardInterrupt):
        export_onnx(Stumbling(), {}, {}, torch.randn(4, 1, 4, 4), scratch / "m.onnx")
    assert not (scratch / "m.onnx").exists()


@pytest.mark.parametrize(
    ("model", "bits", "message"),
    [
        (Listing(), {}, "cannot be exported to ONNX: Could not guard on data-dependent"),
        (Random(), {}, "differs by"),
        (Pairs(), {}, "cannot run it"),
        (Idle(), {"idle": 4}, "'idle': its weight is not in the exported ONNX graph"),
        (Idle(), {"absent": 4}, "'absent': the network has no such layer"),
    ],
)
def test_what_cannot_be_exported_is_refused(model, bits, message, tmp_path, capfd):
    scales = {"idle": quantize(model, {"idle": 4})["idle"]} if "idle" in bits else {}
    with pytest.raises(UserError, match=message) as caught:
        export_onnx(model, bits, scales, torch.randn(2, 1, 4, 4), tmp_path / "model.onnx")
    assert str(tmp_path / "model.onnx") in str(caught.value)
    assert "--set export.onnx=false" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_weights_that_are_not_codes_are_refused(tmp_path):
    model = Idle()
    images = torch.randn(2, 1, 4, 4)
    with pytest.raises(UserError, match="'used': 4 channels, 0 scales"):
        export_onnx(model, {"used": 4}, {}, images, tmp_path / "model.onnx")
    with pytest.raises(UserError, match="'used': its weights are not 4-bit codes x scale"):
        export_onnx(model, {"used": 4}, {"used": torch.ones(4)}, images, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_int8_activations_that_change_the_answers_are_refused(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 50)).eval()
    model[1].bias.data.fill_(1000.0)  # 8 bits see nothing else
    bits = {"1": 8}
    scales = quantize(model, bits)
    images = torch.randn(64, 1, 4, 4)
    export_onnx(model, bits, scales, images, tmp_path / "float.onnx")
    with pytest.raises(UserError, match="of 64 images get the same answer"):
        export_onnx(model, bits, scales, images, tmp_path / "m.onnx", activations="int8")
    assert [p.name for p in tmp_path.iterdir()] == ["float.onnx"]


def test_latency_is_one_figure_a_file(tmp_path):
    torch.manual_seed(0)
    small, large = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 64, 3)
    scales = quantize(small, {"": 4})
    images = torch.randn(2, 1, 8, 8)
    files = [
        export_onnx(small, {"": 4}, scales, images, tmp_path / "small.onnx"),
        export_onnx(large, {}, {}, images, tmp_path / "large.onnx"),
    ]
    seconds = latency([file.path for file in files], (1, 8, 8), 5, runs=3)
    assert len(seconds) == 2
    assert min(seconds) > 0


def test_what_an_artifact_holds_is_what_is_exported(trained, data, tmp_path, close):
    """Cut, snapped, written, read back with its bits and scales, exported."""
    schedule = Schedule(
        dict.fromkeys(trained.network.groups, 0.6),
        {name: (2, 4, 8, 32)[i % 4] for i, name in enumerate(trained.network.layers)},
    )
    small = cut(trained.model, trained.network, trained.kept(schedule, 0))
    bits, scales = trained.quantized(small, schedule)
    scales = snap(small, trained.network, bits, scales)
    save_bytes(tmp_path / "a", pack(small, trained.network, trained.ref, bits, scales))
    read = read_artifact(tmp_path / "a")
    assert read.bits == {name: width for name, width in bits.items() if width != 32}
    images = data.test.images(slice(0, 8))
    file = export_onnx(read.model, read.bits, read.scales, images, tmp_path / "m.onnx")
    assert file.difference < 1e-4
    kinds = Counter(kind for kind, _ in stored(file.path))
    assert {"INT2", "INT4", "INT8"} <= set(kinds)


def test_core_imports_no_ray_mlflow_or_gymnasium():
    program = (
        "import importlib, pkgutil, sys, rlcompress.core as core\n"
        "names = [m.name for m in pkgutil.iter_modules(core.__path__)]\n"
        "for name in names: importlib.import_module('rlcompress.core.' + name)\n"
        "print(len(names), *({'ray', 'mlflow', 'gymnasium', 'rlcompress.rl'} & {*sys.modules}))\n"
        "assert not {'onnx', 'onnxruntime'} & {*sys.modules}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    count, *forbidden = done.stdout.split()
    assert int(count) > 15
    assert forbidden == []
