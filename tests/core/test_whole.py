"""Running the model's own code gives what running its trace gives; and what cannot be traced."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rlcompress.core.artifact import ModelRef, load_artifact
from rlcompress.core.data import digits
from rlcompress.core.evaluators import build_evaluator
from rlcompress.core.fitted import fitted_network
from rlcompress.core.incremental import IncrementalEvaluator
from rlcompress.core.measure import compare
from rlcompress.core.models import build_model
from rlcompress.core.quant import attach_fake_quant
from rlcompress.core.schedule import Schedule
from rlcompress.core.sensitivity import estimate
from rlcompress.core.structure import build_network
from rlcompress.core.ticket import write_network
from rlcompress.core.train import Recipe, train
from rlcompress.core.whole import WholeEvaluator

REF = ModelRef("tests.core.test_whole:Reader", {}, 10, (1, 16, 16))


class Reader(nn.Module):
    """All that a trace does not follow: a decision on the data, a weight that is read and not
    called, a layer used twice, a batch norm that no layer absorbs, windows folded into the batch,
    and a head that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, stride=2, padding=1)
        self.one, self.two = nn.Conv2d(12, 10, 3, padding=1), nn.Conv2d(12, 6, 1)
        self.norm = nn.BatchNorm2d(16)
        self.twice = nn.Conv2d(16, 16, 3, padding=1)
        self.windows = nn.Linear(16, 20)
        self.head = nn.Linear(20, 10)
        self.training_head = nn.Linear(20, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        y = nn.functional.conv2d(x, self.two.weight, self.two.bias)
        x = torch.relu(self.norm(torch.cat([self.one(x), y], 1)))
        if x.shape[0] < 0 or float(x.detach().sum()) < -1e9:
            return x
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        count, channels = x.shape[:2]
        folded = x.reshape(count, channels, 4, -1).permute(0, 2, 3, 1).flatten(0, 1)
        x = torch.relu(self.windows(folded)).unflatten(0, (count, -1)).flatten(1, -2).mean(1)
        return (self.head(x), self.training_head(x)) if self.training else self.head(x)


@pytest.fixture(scope="module")
def reader():
    data = digits(16)
    model = REF.build()
    train(model, data.train, Recipe(epochs=12, batch_size=32, lr=0.05), seed=0)
    network = build_network(model, REF.example())
    fit, score = (data.train.sample(128, 0), data.validation.sample(128, 0))
    estimates = estimate(model, network, fit.images(), keeps=(0.4, 0.7, 1.0), bits=(2, 4, 8))
    parts = (model, network, fit.images(), score.images(), score.labels_N, estimates)
    return parts, build_evaluator(*parts)


def schedules(network):
    return st.builds(
        Schedule,
        st.fixed_dictionaries({g: st.sampled_from((0.4, 0.7, 1.0)) for g in network.groups}),
        st.fixed_dictionaries({n: st.sampled_from((2, 4, 8, 32)) for n in network.layers}),
    )


def test_it_says_why_it_is_slow(reader):
    (_, network, *_), evaluator = reader
    assert isinstance(evaluator, WholeEvaluator)
    assert "cannot be traced" in evaluator.slow
    assert [*network.layers] == ["stem", "two", "one", "twice", "windows", "head"]
    assert network.unused == ("training_head",)
    assert [name for name, group in network.groups.items() if not group.protected] == ["windows"]
    assert network.layers["windows"].group == "windows"
    assert network.layers["stem"].group is None


def test_nothing_done_is_the_dense_network(reader):
    _, evaluator = reader
    assert evaluator.dense.accuracy > 0.5
    assert evaluator.evaluate(Schedule()) == evaluator.dense
    assert evaluator.dense.kl == 0


@given(choice=st.data())
@settings(max_examples=6)
def test_the_written_network_scores_as_the_evaluator_said(reader, close, tmp_path_factory, choice):
    (model, network, _, score, labels, _), evaluator = reader
    schedule = choice.draw(schedules(network))
    said = evaluator.evaluate(schedule)
    path = tmp_path_factory.mktemp("whole") / "a"
    small = fitted_network(model, evaluator, schedule)
    fake = copy.deepcopy(small.model)
    attach_fake_quant(fake, network, schedule.bits, small.scales)
    write_network(path, small, network, REF, schedule)
    back = load_artifact(path, trust=[REF.factory])
    # `small` is rounded by now to what the file holds.
    rounded = copy.deepcopy(small.model)
    attach_fake_quant(rounded, network, schedule.bits, small.scales)
    with torch.no_grad():
        exact = compare(fake.eval()(score), model(score), labels)
        close(rounded.eval()(score), back(score))
    assert exact[0] == pytest.approx(said.accuracy, abs=1.5 / len(labels))
    assert exact[2] == pytest.approx(said.kl, rel=1e-2, abs=1e-5)
    assert path.stat().st_size == said.bytes


@given(choice=st.data())
@settings(max_examples=4)
def test_steps_one_by_one_are_the_schedule_at_once(reader, choice):
    (_, network, *_), evaluator = reader
    schedule = choice.draw(schedules(network))
    prefix = evaluator.begin()
    for keep, bits in evaluator.choices(schedule):
        prefix = evaluator.advance(prefix, keep, bits)
    whole = evaluator.run(schedule)
    assert evaluator.finish(prefix) == evaluator.finish(whole)
    assert prefix.unexplained == whole.unexplained
    assert len(prefix.unexplained) == len(network.layers)


@pytest.mark.parametrize("recovery", ["reconstruct", "steps:1"])
def test_steps_one_by_one_gather_what_the_schedule_at_once_does(
    trained, fit, score, estimates, recovery
):
    """Also of layers that a batch norm is folded into."""
    data = (trained.model, trained.network, fit, score.images(), score.labels_N, estimates)
    evaluator = WholeEvaluator(*data, recovery=recovery, positions=512)
    schedule = trained.network.uniform(0.6, 4)
    prefix = evaluator.begin()
    for keep, bits in evaluator.choices(schedule):
        prefix = evaluator.advance(prefix, keep, bits, collect=True)
        assert len(prefix.fitted) == len(prefix.choices)
    assert evaluator.finish(prefix) == evaluator.evaluate(schedule)


@pytest.mark.parametrize("kind", [IncrementalEvaluator, WholeEvaluator])
def test_another_recovery_is_that_of_an_evaluator_built_with_it(
    trained, fit, score, estimates, kind
):
    data = (trained.model, trained.network, fit, score.images(), score.labels_N, estimates)
    other = kind(*data, recovery="bn", positions=512).with_recovery("reconstruct")
    schedule = trained.network.uniform(0.4, 3)
    wanted = kind(*data, recovery="reconstruct", positions=512)
    assert other.evaluate(schedule) == wanted.evaluate(schedule)


def test_a_layer_that_was_not_reached_is_not_in_the_prefix(reader):
    _, evaluator = reader
    prefix = evaluator.advance(evaluator.begin(), 0.4, 4)
    assert len(prefix.choices) == len(prefix.unexplained) == 1
    assert 0 < prefix.unexplained[0] < 1
    assert not prefix.live


@pytest.mark.parametrize("recovery", ["none", "bn", "reconstruct"])
def test_it_agrees_with_the_incremental_evaluator(trained, fit, score, estimates, recovery):
    data = (trained.model, trained.network, fit, score.images(), score.labels_N, estimates)
    options = {"recovery": recovery, "positions": 512}
    fast, slow = IncrementalEvaluator(*data, **options), WholeEvaluator(*data, **options)
    for keep, bits in ((0.6, 4), (0.8, 32), (0.4, 3)):
        schedule = trained.network.uniform(keep, bits)
        one, two = fast.run(schedule, collect=True), slow.run(schedule, collect=True)
        assert fast.finish(one).kl == pytest.approx(slow.finish(two).kl, rel=1e-2)
        assert fast.finish(one).bytes == slow.finish(two).bytes
        assert one.unexplained == pytest.approx(two.unexplained, abs=1e-2)
        assert one.fitted.keys() == two.fitted.keys()


class Free(nn.Module):
    """Batch norms before the layers, over what was concatenated: none can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(1, 8, 3, stride=2), nn.Conv2d(8, 6, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(14)
        self.head = nn.Linear(14, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.one(torch.relu(self.norm1(x)))], 1)
        return self.head(torch.relu(self.norm2(x)).mean((2, 3)))


def test_free_batch_norms_are_estimated_again_and_written(tmp_path):
    ref = ModelRef("tests.core.test_whole:Free", {}, 10, (1, 16, 16))
    data = digits(16)
    model = ref.build()
    train(model, data.train, Recipe(epochs=3, batch_size=32, lr=0.1), seed=0)
    network = build_network(model, ref.example())
    assert [norm.name for norm in network.norms] == ["norm1", "norm2"]
    fit, score = data.train.sample(128, 0).images(), data.validation.sample(128, 0)
    estimates = estimate(model, network, fit)
    parts = (model, network, fit, score.images(), score.labels_N, estimates)
    fast, slow = IncrementalEvaluator(*parts), WholeEvaluator(*parts)
    schedule = network.uniform(0.7, 6)
    said = fast.evaluate(schedule)
    assert said.kl == pytest.approx(slow.evaluate(schedule).kl, rel=1e-2)
    assert said.kl < IncrementalEvaluator(*parts, recovery="none").evaluate(schedule).kl / 2
    write_network(tmp_path / "a", fitted_network(model, fast, schedule), network, ref, schedule)
    back = load_artifact(tmp_path / "a", trust=[ref.factory])
    with torch.no_grad():
        kl = compare(back(score.images()), model(score.images()), score.labels_N)[2]
    assert kl == pytest.approx(said.kl, rel=0.05)
    assert (tmp_path / "a").stat().st_size == said.bytes


@pytest.mark.parametrize(
    ("factory", "groups"), [("shufflenet_v2_x0_5", 16), ("mobilenet_v3_small", 27)]
)
def test_torchvisions_networks_are_evaluated_as_written(factory, groups, tmp_path):
    """Channel shuffles, squeeze-and-excitation, depthwise layers."""
    ref = ModelRef(f"torchvision.models:{factory}", {}, 10, (3, 32, 32))
    model = ref.build()
    images = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        model.train()(images)
        nn.init.normal_(
            model.get_submodule("fc" if "shuffle" in factory else "classifier.3").weight
        )
    network = build_network(model.eval(), ref.example())
    assert sum(not group.protected for group in network.groups.values()) == groups
    estimates = estimate(model, network, images[:8], keeps=(0.6, 1.0), bits=(6, 8))
    labels = torch.zeros(16, dtype=torch.long)
    evaluator = build_evaluator(model, network, images[:16], images[16:], labels, estimates)
    assert not evaluator.slow
    schedule = network.uniform(0.6, 8)
    said = evaluator.evaluate(schedule)
    path = tmp_path / "a"
    write_network(path, fitted_network(model, evaluator, schedule), network, ref, schedule)
    back = load_artifact(path, trust=[ref.factory])
    with torch.no_grad():
        kl = compare(back(images[16:]), model(images[16:]), labels)[2]
    assert said.kl > 1e-3
    assert kl == pytest.approx(said.kl, rel=0.15)
    assert path.stat().st_size == said.bytes


class Shifted(nn.Module):
    """Changes its input in place, and decides on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 6, 3), nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x -= 0.5
        y = torch.relu(self.conv(x))
        return self.head(y.mean((2, 3)) if float(y.sum()) >= 0 else y.amax((2, 3)))


def test_a_network_that_changes_its_input_changes_no_score():
    torch.manual_seed(0)
    model, images = Shifted().eval(), torch.randn(24, 1, 8, 8)
    given = images.clone()
    network = build_network(model, images[:1])
    estimates = estimate(model, network, images)
    evaluator = build_evaluator(model, network, images[:16], images[16:], None, estimates)
    assert isinstance(evaluator, WholeEvaluator)
    assert [evaluator.evaluate(Schedule()).kl for _ in range(3)] == [0.0] * 3
    assert torch.equal(images, given)


def test_attention_of_two_names_is_one_and_draws_no_random_numbers():
    from rlcompress.core.attention import Attention, plain_attention

    torch.manual_seed(0)
    shared = nn.MultiheadAttention(8, 2, batch_first=True)
    model = nn.ModuleList([shared, shared])
    before = torch.get_rng_state()
    plain = plain_attention(model)
    assert isinstance(plain[0], Attention)
    assert plain[0] is plain[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_attention_becomes_plain_layers_that_compute_the_same():
    from torchvision.models import VisionTransformer

    from rlcompress.core.attention import plain_attention

    sizes = {"image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 2}
    sizes |= {"hidden_dim": 8, "mlp_dim": 12, "num_classes": 5}
    model = VisionTransformer(**sizes).eval()
    nn.init.normal_(model.heads.head.weight)
    x = torch.randn(3, 3, 16, 16)
    wanted = model(x)
    plain = plain_attention(model).eval()
    assert torch.allclose(plain(x), wanted, atol=1e-5)
    network = build_network(plain, x[:1])
    assert sum(name.endswith(".q") for name in network.layers) == 2
    cuttable = [name for name, group in network.groups.items() if not group.protected]
    assert cuttable == [f"encoder.layers.encoder_layer_{i}.mlp.0" for i in range(2)]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_with_masks_is_torchs(batch_first, need_weights):
    from rlcompress.core.attention import Attention

    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(8, 2, batch_first=batch_first, kdim=6, vdim=4).eval()
    ours = Attention(theirs).eval()
    query, key, value = torch.randn(3, 5, 8), torch.randn(3, 7, 6), torch.randn(3, 7, 4)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 4:] = True
    mask = torch.randn(5, 7)
    if not batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    added = torch.zeros(3, 7).masked_fill(padding, float("-inf"))
    wanted = theirs(query, key, value, added, need_weights, mask)
    got = ours(query, key, value, padding, need_weights, mask)
    assert torch.allclose(got[0], wanted[0], atol=1e-5)
    assert (got[1] is None) == (wanted[1] is None)
    if need_weights:
        assert torch.allclose(got[1], wanted[1], atol=1e-5)


def test_factories_give_plain_attention():
    model = build_model(
        "torch.nn:TransformerEncoderLayer",
        {"d_model": 8, "nhead": 2, "dim_feedforward": 12, "batch_first": True},
        num_classes=2,
        in_channels=1,
        seed=0,
    )
    assert not any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
    assert model(torch.randn(2, 3, 8)).shape == (2, 3, 8)
