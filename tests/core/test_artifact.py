"""The file is the network: same answers read back, and nothing but an error from a broken one."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import nn

from rlcompress.core.artifact import ModelRef, load_artifact, pack, read_artifact
from rlcompress.core.cost import CostModel
from rlcompress.core.data import Split
from rlcompress.core.errors import UserError
from rlcompress.core.files import save_bytes
from rlcompress.core.fitted import fitted_network
from rlcompress.core.fold import snap
from rlcompress.core.problem import make_bundle
from rlcompress.core.prune import attach_masks, cut
from rlcompress.core.quant import attach_fake_quant, encode, fake_quantize, scale_of
from rlcompress.core.schedule import Schedule
from rlcompress.core.sensitivity import estimate
from rlcompress.core.structure import build_network
from rlcompress.core.ticket import write_network
from tests.core.conftest import write


@given(choice=st.data(), seed=st.integers(0, 2**16))
@settings(max_examples=8)
def test_masked_is_cut_is_written_is_read_back(net, close, scratch, choice, seed):
    """The whole chain, quantized, and the file as large as the cost model says."""
    schedule = choice.draw(net.schedules())
    kept = net.kept(schedule, seed)
    bits = {name: schedule.width(name) for name in net.network.layers}
    modules = dict(net.model.named_modules())
    scales = {n: scale_of(modules[n].weight, 0.8, b) for n, b in bits.items() if b != 32}

    masked = copy.deepcopy(net.model)
    attach_fake_quant(masked, net.network, bits, scales)
    attach_masks(masked, net.network, kept)
    small = cut(net.model, net.network, kept)
    for name in scales:
        layer = net.network.layers[name]
        if layer.group:
            scales[name] = scales[name][torch.from_numpy(kept[layer.group])]
    close(net.out(masked), net.out(net.fake_quantized(small, bits, scales)))

    scales = snap(small, net.network, bits, scales)
    snapped = net.out(net.fake_quantized(small, bits, scales))
    save_bytes(scratch, pack(small, net.network, net.ref, bits, scales))
    close(snapped, net.out(load_artifact(scratch)))
    assert scratch.stat().st_size == CostModel(net.network).cost(schedule).bytes


@pytest.mark.parametrize("net", ["mobilenetv2"], indirect=True)
def test_another_process_reads_the_same_network(net, close, tmp_path):
    names = [*net.network.layers]
    schedule = Schedule(
        dict.fromkeys(net.network.groups, 0.6), {n: 2 + i % 7 for i, n in enumerate(names[:-5])}
    )
    wanted = net.out(write(net, tmp_path / "a", schedule))
    save_file({"images": net.images}, tmp_path / "images")
    program = (
        "import sys; from safetensors.torch import load_file, save_file\n"
        "from rlcompress.core.artifact import load_artifact\n"
        "folder = sys.argv[1]; images = load_file(folder + '/images')['images']\n"
        "logits = load_artifact(folder + '/a')(images).detach()\n"
        "save_file({'logits': logits}, folder + '/logits')\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    close(wanted, torch.from_numpy(load_file(tmp_path / "logits")["logits"]))


def test_learned_steps_are_written(vgg):
    schedule = Schedule(bits=dict.fromkeys(vgg.network.layers, 4))
    small = copy.deepcopy(vgg.model)
    bits, scales = vgg.quantized(small, schedule)
    learned = {n: 1.5 * s for n, s in scales.items()}
    trained = vgg.fake_quantized(small, bits, learned)
    packed = pack(trained, vgg.network, vgg.ref, bits, scales)
    assert packed == pack(small, vgg.network, vgg.ref, bits, learned)
    assert packed != pack(small, vgg.network, vgg.ref, bits, scales)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_snapping_changes_answers_little(trained, close, bits):
    """A scale moves by 1.1 % at most, a bias by a 252th of the layer's largest."""
    schedule = Schedule(bits=dict.fromkeys(trained.network.layers, bits))
    small = copy.deepcopy(trained.model)
    widths, scales = trained.quantized(small, schedule)
    before = trained.out(trained.fake_quantized(small, widths, scales))
    scales = snap(small, trained.network, widths, scales)
    close(before, trained.out(trained.fake_quantized(small, widths, scales)), relative=2e-2)


def test_a_channel_that_never_varies_does_not_take_the_others_scales(trained, close):
    """Its gain is its gamma over the root of epsilon, thousands of times theirs."""
    small = copy.deepcopy(trained.model)
    convs = [m for m in small.modules() if isinstance(m, torch.nn.Conv2d)]
    norms = [m for m in small.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        norms[0].weight[0] = norms[0].bias[0] = 0  # an input that is dead
        convs[1].weight[0] = 0
        convs[1].weight[0, 0] = convs[1].weight[1].abs().max()
        norms[1].running_mean[0] = norms[1].running_var[0] = 0
        norms[1].weight[0] = 20
    schedule = Schedule(bits=dict.fromkeys(trained.network.layers, 4))
    widths, scales = trained.quantized(small, schedule)
    before = trained.out(trained.fake_quantized(small, widths, scales))
    scales = snap(small, trained.network, widths, scales)
    close(before, trained.out(trained.fake_quantized(small, widths, scales)), relative=2e-2)


def test_snapping_keeps_every_code(trained):
    """Encoded again with a rounded scale, a weight between two codes would change sides."""
    schedule = Schedule(bits={n: (2, 4, 8)[i % 3] for i, n in enumerate(trained.network.layers)})
    small = copy.deepcopy(trained.model)
    bits, scales = trained.quantized(small, schedule)

    def codes(scales):
        return {
            n: encode(small.get_submodule(n).weight.detach(), scale, bits[n])
            for n, scale in scales.items()
        }

    before = codes(scales)
    after = codes(snap(small, trained.network, bits, scales))
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_negative_gamma_goes_into_the_codes(vgg, tmp_path):
    gammas = [m.weight for m in vgg.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert any(bool((gamma < 0).any()) for gamma in gammas)
    write(vgg, tmp_path / "a", Schedule(bits=dict.fromkeys(vgg.network.layers, 4)))
    read = read_artifact(tmp_path / "a")
    assert {*read.scales} == {*vgg.network.layers}
    for name, scale in read.scales.items():
        assert bool((scale >= 0).all())
        weight = read.model.get_submodule(name).weight
        assert torch.equal(fake_quantize(weight, scale, 4), weight)


def test_snapping_twice_is_snapping_once(vgg):
    schedule = Schedule(bits=dict.fromkeys(vgg.network.layers, 3))
    model = copy.deepcopy(vgg.model)
    bits, scales = vgg.quantized(model, schedule)
    scales = snap(model, vgg.network, bits, scales)
    first = pack(model, vgg.network, vgg.ref, bits, scales)
    scales = snap(model, vgg.network, bits, scales)
    assert pack(model, vgg.network, vgg.ref, bits, scales) == first


def test_files_are_read_where_gradients_are_off(vgg, tmp_path):
    write(vgg, tmp_path / "a", Schedule())
    wanted = vgg.out(load_artifact(tmp_path / "a"))
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert torch.equal(load_artifact(tmp_path / "a")(vgg.images), wanted)


def test_writing_leaves_no_other_file(vgg, tmp_path):
    write(vgg, tmp_path / "a", Schedule())
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_arguments_that_do_not_fit_the_header_are_refused(vgg):
    ref = ModelRef("vgg19", {"width": 0.0625, "note": "x" * 4000}, 10, (1, 32, 32))
    with pytest.raises(UserError, match="do not fit"):
        pack(vgg.model, vgg.network, ref, {}, {})


class Constants(nn.Module):
    """Computes with numbers of other types than its weights'."""

    def __init__(self, classes: int = 4, kind: str = "float64") -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 6, 3), nn.Linear(6, classes)
        self.register_buffer("mix", 1.25 * torch.eye(classes, dtype=getattr(torch, kind)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.conv(x).relu().mean((2, 3)))
        return (logits.to(self.mix.dtype) @ self.mix).float()


def constants(num_classes: int, in_channels: int, kind: str) -> nn.Module:
    return Constants(num_classes, kind)


@pytest.mark.parametrize("kind", ["float64", "float16", "bfloat16"])
def test_buffers_come_back_in_their_type(tmp_path, kind):
    ref = ModelRef(f"{__name__}:constants", {"kind": kind}, 4, (1, 6, 6))
    model, images = ref.build(0).eval(), torch.randn(24, 1, 6, 6)
    network = build_network(model, images[:1])
    found = estimate(model, network, images, keeps=(1.0, 0.5), bits=(4, 8))
    plain = Split(images, torch.arange(24) % 4)
    problem = make_bundle(model, ref, network, plain, plain, found).problem()
    schedule = network.uniform(0.5, 8)
    small = fitted_network(problem.evaluator._model, problem.evaluator, schedule)
    write_network(tmp_path / "x", small, network, ref, schedule)
    again = load_artifact(tmp_path / "x", trust=[ref.factory])
    assert again.mix.dtype == getattr(torch, kind)
    with torch.no_grad():
        assert torch.allclose(again(images), small.model(images), atol=1e-2)
