"""Networks that are legal and unusual: what is scored is what is cut, written and read back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rlcompress import core
from rlcompress.core.dynamic import DynamicCompressor
from rlcompress.core.errors import UserError
from rlcompress.core.fitted import CutNetwork
from rlcompress.core.measure import compare
from rlcompress.core.prune import cut
from rlcompress.core.squeeze import Pace
from tests.unusual import (
    HERE,
    NETWORKS,
    SHAPE,
    Auxiliary,
    ByName,
    Defaults,
    Gated,
    HeadAsked,
    InPlace,
    Interleaved,
    NormAttention,
    PartRead,
    Tied,
    Viewed,
    conv,
    head,
    neighbours,
    no_biases,
    norms_with_activations,
    norms_without_affine,
    one_convolution_twice,
)


def made(make) -> tuple[nn.Module, torch.Tensor]:
    """A network with statistics that matter, and images."""
    torch.manual_seed(0)
    model, images = make().eval(), torch.randn(48, *SHAPE)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model, images


@pytest.mark.parametrize("recovery", ["none", "bn", "reconstruct", "steps:2"])
@pytest.mark.parametrize("make", NETWORKS)
def test_scored_is_written_is_read(make, recovery, tmp_path):
    model, images = made(make)
    given = images.clone()
    network = core.build_network(model, images[:1])
    estimates = core.estimate(model, network, images)
    score = images[32:]
    evaluator = core.build_evaluator(
        model, network, images[:32], score, None, estimates, recovery=recovery
    )
    schedule = network.uniform(0.5, 6)
    measured = evaluator.evaluate(schedule)
    small = core.fitted_network(model, evaluator, schedule)
    assert torch.equal(images, given)
    with torch.no_grad():
        dense, fitted = model(score.clone()), quantized(small, schedule)(score.clone())
    if evaluator.steps == 0:
        assert evaluator.evaluate(core.Schedule()).kl == pytest.approx(0.0, abs=1e-6)
        _, _, kl = compare(fitted, dense, dense.argmax(1))
        assert kl == pytest.approx(measured.kl, rel=0.02, abs=1e-6)
    path, ref = tmp_path / "w.safetensors", core.ModelRef(f"{HERE}:{make.__name__}", {}, 4, SHAPE)
    core.write_network(path, small, network, ref, schedule)
    assert path.stat().st_size == measured.bytes
    again = core.load_artifact(path, trust=[ref.factory])
    with torch.no_grad():
        written = quantized(small, schedule)(score.clone())
        assert torch.allclose(again(score.clone()), written, atol=1e-4 * float(written.abs().max()))


def quantized(small: CutNetwork, schedule: core.Schedule) -> nn.Module:
    """With the weights that are codes x scale."""
    from rlcompress.core.quant import fake_quantize

    modules = dict(small.model.named_modules())
    with torch.no_grad():
        for name, scale in small.scales.items():
            weight = modules[name].weight
            weight.copy_(fake_quantize(weight, scale, schedule.width(name)))
    return small.model


@pytest.mark.parametrize("recovery", ["bn", "reconstruct"])
def test_scores_do_not_depend_on_what_was_scored_before(recovery):
    """In-place functions on what another branch of the same prefix still reads."""
    model, images = made(InPlace)
    network = core.build_network(model, images[:1])
    data = (model, network, images[:32], images[32:], None)
    estimates = core.estimate(model, network, images)
    evaluator = core.build_evaluator(*data, estimates, recovery=recovery)
    schedule = core.Schedule({}, {"c1": 4, "c2": 3})
    alone = evaluator.evaluate(schedule)
    for bits in (2, 4, 6, 8):
        evaluator.evaluate(core.Schedule({}, {"c1": 4, "c2": bits}))
    again = core.build_evaluator(*data, estimates, recovery=recovery)
    for bits in (8, 6, 4, 2):
        again.evaluate(core.Schedule({}, {"c1": 4, "c2": bits}))
    assert evaluator.evaluate(schedule).kl == again.evaluate(schedule).kl == alone.kl


def test_norms_that_compute_more_stay_whole():
    network = core.build_network(norms_with_activations().eval(), torch.zeros(1, *SHAPE))
    assert network.layers["0"].batch_norm is None
    assert [group.protected for group in network.groups.values()] == [
        "it meets ActiveNorm 1",
        "it meets ActiveNorm 3",
        "",
    ]


def test_groups_that_only_shapes_tie_are_not_cut_apart():
    network = core.build_network(Viewed().eval(), torch.zeros(1, *SHAPE))
    said = "a cut there changes what other channels compute"
    assert network.groups["c1"].protected == network.groups["c2"].protected == said


def test_groups_that_a_layer_reads_a_part_of_stay_whole():
    network = core.build_network(PartRead().eval(), torch.zeros(1, *SHAPE))
    assert network.groups["a"].protected.endswith("has only a part of its channels")


@pytest.mark.parametrize(("make", "norms"), [(Gated, ["b1"]), (NormAttention, ["b1"])])
def test_norms_that_a_file_cannot_fold_stay(make, norms):
    network = core.build_network(made(make)[0], torch.zeros(1, *SHAPE))
    assert [norm.name for norm in network.norms] == norms
    assert network.layers["c1"].batch_norm is None


def test_unused_modules_that_are_asked_stay():
    network = core.build_network(made(HeadAsked)[0], torch.zeros(1, *SHAPE))
    assert network.unused == ()
    assert {*network.rest} == {"old.weight", "old.bias"}


def test_layers_whose_weights_other_code_reads_stay_as_they_are():
    network = core.build_network(made(Tied)[0], torch.zeros(1, *SHAPE))
    assert [*network.layers] == ["c1", "c2", "fc"]
    assert {*network.rest} == {"f.weight", "f.bias"}
    said = "f: its weight or bias is read by other code than its module"
    assert network.groups["c2"].protected == said
    assert not network.groups["c1"].protected


class AllTied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.f(x.mean((2, 3)) @ self.f.weight.T @ self.f.weight)


def test_a_network_whose_layers_all_stay_is_told():
    with pytest.raises(UserError, match=r"^layer 'f': its weight or bias is read by .* no other"):
        core.build_network(AllTied().eval(), torch.zeros(1, *SHAPE))


class Particular(nn.Module):
    """Takes one image alone, and no weights of just any size."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b, self.fc = conv(3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.old = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.b(self.c(x))).mean((2, 3)).view(1, 8)
        if float(h.max()) > 0.3:
            raise ValueError("too large")
        return self.fc(h)


def test_networks_that_take_no_random_weights_are_read():
    torch.manual_seed(0)
    model = Particular().eval()
    with torch.no_grad():
        model.b.weight.fill_(0.1)
    network = core.build_network(model, torch.zeros(1, *SHAPE))
    assert [*network.layers] == ["c", "fc"]
    assert network.layers["c"].batch_norm == "b"
    assert network.unused == ("old",)


def test_channels_that_are_divided_by_their_neighbours_are_not_cut():
    network = core.build_network(neighbours().eval(), torch.zeros(1, *SHAPE))
    assert network.groups["0"].protected == "a cut there changes what other channels compute"
    assert not network.groups["3"].protected


def test_norms_that_the_code_calls_later_belong_to_their_layers():
    model, images = made(Interleaved)
    network = core.build_network(model, images[:1])
    estimates = core.estimate(model, network, images)
    data = (model, network, images[:32], images[32:], None, estimates)
    evaluator = core.build_evaluator(*data, recovery="none")
    assert not evaluator.slow
    schedule = core.Schedule({"c1": 0.3, "c2": 0.7})
    with torch.no_grad():
        small = cut(model, network, evaluator.kept(schedule))(images[32:])
        dense = model(images[32:])
    _, _, kl = compare(small, dense, dense.argmax(1))
    assert evaluator.evaluate(schedule).kl == pytest.approx(kl, rel=1e-3)


def test_arguments_with_defaults_are_at_their_defaults():
    model, images = made(Defaults)
    network = core.build_network(model, images[:1])
    estimates = core.estimate(model, network, images)
    evaluator = core.build_evaluator(model, network, images[:32], images[32:], None, estimates)
    assert not evaluator.slow


def test_layers_that_are_computed_for_nothing_are_none():
    model, images = made(Auxiliary)
    network = core.build_network(model, images[:1])
    assert list(network.layers) == ["c1", "c2", "fc"]
    assert network.unused == ("aux",)
    assert not any(group.protected for group in network.groups.values())


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.back, self.fc = conv(3), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            h = self.back(x).mean((2, 3))
        return self.fc(h)


def test_what_gradients_cannot_reach_is_told():
    with pytest.raises(UserError, match=r"layer 'back'.*no gradient comes back to it"):
        core.build_network(Frozen(), torch.zeros(1, *SHAPE))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_of_weights_are_told(dtype):
    with pytest.raises(UserError, match=rf"'0' has weights of {dtype}; allowed: torch.float32"):
        core.build_network(no_biases().to(dtype), torch.zeros(1, *SHAPE, dtype=dtype))


def test_macs_are_those_of_all_uses():
    network = core.build_network(one_convolution_twice().eval(), torch.zeros(1, *SHAPE))
    pixels, kernel = 64, 9
    once = {"0": 3 * 8 * kernel * pixels, "2": 8 * 8 * kernel * pixels, "8": 64, "10": 32}
    assert {n: x.macs for n, x in network.layers.items()} == {**once, "2": 2 * once["2"]}


class Windows(nn.Module):
    """Windows of 4 x 4 pixels in the first dimension, as attention folds them."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.l, self.fc = conv(3), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.c(x).unfold(2, 4, 4).unfold(3, 4, 4)  # (N, 8, 2, 2, 4, 4)
        h = h.permute(0, 2, 3, 4, 5, 1).reshape(-1, 16, 8)
        return self.fc(F.relu(self.l(h)).reshape(len(x), -1, 16).mean(1))


@pytest.mark.parametrize("images", [1, 2])
def test_macs_of_windows(images):
    network = core.build_network(Windows().eval(), torch.zeros(images, *SHAPE))
    assert network.layers["l"].macs == 8 * 16 * 64


def test_the_cache_counts_all_that_it_keeps_alive():
    """A prefix of steps:K keeps the weights of all layers before it."""
    convolutions = [nn.Conv2d(n, 192, 3, padding=1) for n in (3, 192, 192)]
    wide = nn.Sequential(*(x for c in convolutions for x in (c, nn.ReLU())), *head(192))
    model, images = made(lambda: wide)
    network = core.build_network(model, images[:1])
    estimates = core.estimate(model, network, images[:8])
    data = (model, network, images[:2], images[2:3], None, estimates)
    evaluator = core.build_evaluator(*data, recovery="steps:1", cache_bytes=16 * 2**20)
    rng = np.random.default_rng(0)
    for _ in range(12):
        bits = {name: int(rng.choice([2, 3, 4, 5, 6, 8])) for name in network.layers}
        evaluator.evaluate(core.Schedule({}, bits))
    held = {}
    for prefix, _ in evaluator.cache._entries.values():
        for tensor in [*prefix.live.values(), *(f.weight for f in prefix.fitted.values())]:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    assert len(evaluator.cache._entries) > 1
    assert sum(held.values()) <= evaluator.cache.bytes <= evaluator.cache.max_bytes


def train(model: nn.Module, images: torch.Tensor, **how: bool) -> DynamicCompressor:
    pace = Pace(warmup=9, recovery_steps=2, rounds=1, watch=2)
    compressor = DynamicCompressor(model, images[:1], target=1.3, pace=pace)
    model.train(how.get("training", True))
    if how.get("frozen"):
        model[0].eval()
        model[1].eval()
    labels = torch.randint(0, 4, (len(images),), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(compressor.steps_needed):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        compressor.step(loss)
    return compressor


def test_compression_in_training_sees_layers_that_are_in_eval_mode():
    model, images = made(norms_without_affine)
    compressor = train(model, images, frozen=True)
    assert {"0", "3", "8"} <= compressor.signals.patches.keys()
    assert compressor.ratio < 3  # the target is 1.3: no reason for two bits


def test_compression_in_training_sees_layers_that_are_called_by_name():
    model, images = made(ByName)
    assert {"c1", "c2", "fc"} <= train(model, images).signals.patches.keys()


class SharingNorms(nn.Module):
    """Batch norms with the same weights, each with statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.fc = conv(3, bias=False), conv(bias=False), nn.Linear(8, 4)
        self.b1, self.b2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.b2.weight, self.b2.bias = self.b1.weight, self.b1.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.b1(self.c1(x)))
        return self.fc(F.relu(self.b2(self.c2(h))).mean((2, 3)))


def test_norms_that_share_their_weights_are_rounded_apart(tmp_path):
    model, images = made(SharingNorms)
    network = core.build_network(model, images[:1])
    schedule = network.uniform(1.0, 8)
    small = core.cut_network(model, network, {}, schedule)
    path, ref = tmp_path / "w", core.ModelRef(f"{__name__}:SharingNorms", {}, 4, SHAPE)
    core.write_network(path, small, network, ref, schedule)
    with torch.no_grad():
        read = core.load_artifact(path, trust=[ref.factory])(images)
        wanted = quantized(small, schedule)(images)
    assert torch.allclose(read, wanted, atol=1e-4 * float(wanted.abs().max()))
    assert model.b1.weight is model.b2.weight


def test_a_model_that_is_not_in_training_is_told():
    model, images = made(norms_without_affine)
    with pytest.raises(UserError, match=r"not called in training mode: call model\.train\(\)"):
        train(model, images, training=False)


def test_equal_schedules_are_one():
    one = core.Schedule({"g": 1}, {"a": np.int64(4)})
    other = core.Schedule({"g": np.float32(1.0)}, {"a": 4})
    assert one == other
    assert one.to_json() == other.to_json()
    assert hash(one) == hash(other)
