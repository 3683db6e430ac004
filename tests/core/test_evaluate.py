"""What the evaluator says of a schedule is what the written network does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from rlcompress.core.artifact import load_artifact
from rlcompress.core.data import digits
from rlcompress.core.errors import UserError
from rlcompress.core.evaluate import Evaluator
from rlcompress.core.evaluators import build_evaluator
from rlcompress.core.fitted import fitted_network
from rlcompress.core.measure import WORST, compare
from rlcompress.core.quant import attach_fake_quant
from rlcompress.core.schedule import Schedule
from rlcompress.core.sensitivity import estimate
from rlcompress.core.structure import build_network
from rlcompress.core.ticket import write_network

RECOVERIES = ("none", "bn", "reconstruct")
WIDTHS = (2, 3, 4, 6, 8, 32)


@pytest.fixture(scope="module")
def evaluator(make_evaluator) -> Evaluator:
    return make_evaluator()


def uncached(evaluator: Evaluator, schedule: Schedule):
    """`collect` goes past the cache."""
    return evaluator.finish(evaluator.run(schedule, collect=True))


@pytest.mark.parametrize("recovery", RECOVERIES)
def test_nothing_done_is_the_dense_network(make_evaluator, trained, score, recovery):
    evaluator = make_evaluator(recovery=recovery)
    measured = evaluator.evaluate(Schedule())
    with torch.no_grad():
        logits = trained.model(score.images())
    right = float((logits.argmax(1) == score.labels_N).float().mean())
    assert measured.accuracy == evaluator.dense.accuracy == pytest.approx(right)
    assert measured.kl == evaluator.dense.kl == pytest.approx(0, abs=1e-6)
    assert measured.bytes == evaluator.dense.bytes == evaluator.costs.cost(Schedule()).bytes


@given(choice=st.data())
@settings(max_examples=8)
def test_the_cache_changes_no_measurement(evaluator, trained, choice):
    schedule = choice.draw(trained.schedules(WIDTHS))
    first = evaluator.evaluate(schedule)
    hits = evaluator.cache.hits
    assert evaluator.evaluate(schedule) == first
    assert evaluator.cache.hits > hits
    assert uncached(evaluator, schedule) == first


def test_a_common_beginning_is_computed_once(make_evaluator, trained):
    evaluator = make_evaluator()
    names = [*trained.network.layers]
    evaluator.evaluate(Schedule(bits=dict.fromkeys(names, 4)))
    misses = evaluator.cache.misses
    evaluator.evaluate(Schedule(bits=dict.fromkeys(names, 4) | {names[-2]: 3}))
    assert evaluator.cache.misses == misses + 2


@pytest.mark.parametrize("max_bytes", [0, 10**5, 3 * 10**7])
def test_the_cache_stays_within_its_bytes(make_evaluator, uniform, max_bytes):
    roomy, tight = make_evaluator(), make_evaluator(cache_bytes=max_bytes)
    for keep, bits in ((0.6, 4), (0.6, 3), (0.25, 4), (0.6, 4)):
        assert tight.evaluate(uniform(keep, bits)) == roomy.evaluate(uniform(keep, bits))
        assert tight.cache.bytes <= max_bytes
    assert roomy.cache.bytes > max_bytes or max_bytes > 10**5


def test_a_prefix_stays_valid_after_advancing(evaluator):
    prefix = evaluator.advance(evaluator.begin(), 0.6, 4)
    before = {node: tensor.clone() for node, tensor in prefix.live.items()}
    evaluator.advance(prefix, 0.25, 2)
    evaluator.advance(prefix, 1.0, 8)
    assert all(torch.equal(tensor, before[node]) for node, tensor in prefix.live.items())
    assert len(prefix.choices) == len(prefix.unexplained) == 1


@given(choice=st.data())
@settings(max_examples=5)
def test_a_finished_prefix_says_the_schedule_it_ran(evaluator, trained, choice):
    schedule = choice.draw(trained.schedules(WIDTHS))
    assert evaluator.schedule(evaluator.run(schedule)) == schedule


@pytest.mark.parametrize("recovery", RECOVERIES)
@pytest.mark.parametrize(("keep", "bits"), [(0.8, 8), (0.6, 3), (0.6, 32)])
def test_the_written_network_scores_as_the_evaluator_said(
    make_evaluator, trained, uniform, score, tmp_path, recovery, keep, bits
):
    evaluator, schedule = make_evaluator(recovery=recovery), uniform(keep, bits)
    said = evaluator.evaluate(schedule)
    small = fitted_network(trained.model, evaluator, schedule)
    write_network(tmp_path / "a", small, trained.network, trained.ref, schedule)
    with torch.no_grad():
        dense = trained.model(score.images())
        logits = load_artifact(tmp_path / "a")(score.images())
    accuracy, loss, kl = compare(logits, dense, score.labels_N)
    assert (tmp_path / "a").stat().st_size == said.bytes
    # Scales and biases of a byte each may tip an image or two.
    assert accuracy == pytest.approx(said.accuracy, abs=2.5 / len(score))
    assert loss == pytest.approx(said.loss, rel=0.03)
    assert kl == pytest.approx(said.kl, rel=0.06)


def test_reconstruction_beats_batch_norms_beat_nothing(make_evaluator, uniform):
    kl = {r: make_evaluator(recovery=r).evaluate(uniform(0.8, 4)).kl for r in RECOVERIES}
    assert kl["reconstruct"] < kl["bn"] / 2
    assert kl["bn"] < kl["none"] / 2


def test_weights_keep_the_mean_that_nothing_else_makes_up_for():
    """A batch norm somewhere in the network is no reason to leave it to."""

    def network(*first: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 12, 3, bias=False), nn.ReLU()]
        layers += [nn.Conv2d(12, 12, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
        return nn.Sequential(*first, *layers, nn.Flatten(), nn.Linear(12, 5, bias=False)).eval()

    def kl(model: nn.Module) -> float:
        images = torch.rand(96, 3, 10, 10, generator=torch.Generator().manual_seed(1))
        structure = build_network(model, images[:1], round_to=1)
        found = estimate(model, structure, images[:64], keeps=(0.4, 1.0), bits=(4,))
        evaluator = build_evaluator(model, structure, images[:64], images[64:], None, found)
        return evaluator.evaluate(structure.uniform(0.4, 32)).kl

    identity = nn.BatchNorm2d(3, eps=0.0)
    assert kl(network(identity)) == pytest.approx(kl(network()), rel=1e-2)


def test_scored_images_never_touch_the_fit(make_evaluator, uniform, score):
    schedule = uniform(0.6, 3)
    plain = make_evaluator().run(schedule, collect=True).fitted
    noise = torch.randn(score.images().shape, generator=torch.Generator().manual_seed(0))
    other = make_evaluator(score=100 * noise).run(schedule, collect=True).fitted
    for name, layer in plain.items():
        for field in ("weight", "bias", "scale_O", "mean_O", "variance_O"):
            ours, theirs = getattr(layer, field), getattr(other[name], field)
            assert (ours is None and theirs is None) or torch.equal(ours, theirs), (name, field)


def test_fitted_images_do_change_the_fit(make_evaluator, uniform, fit):
    schedule = uniform(0.6, 3)
    plain = make_evaluator().run(schedule, collect=True).fitted
    other = make_evaluator(fit=fit.flip(-1)).run(schedule, collect=True).fitted
    assert not torch.equal(plain["features.3"].weight, other["features.3"].weight)


def test_unexplained_is_zero_until_something_is_done(evaluator, trained):
    changed = [*trained.network.layers][5]
    shares = evaluator.run(Schedule(bits={changed: 2})).unexplained
    assert shares[:5] == (0.0,) * 5
    assert all(0 < share <= 1 for share in shares[5:])


def test_what_cannot_be_evaluated_is_refused(evaluator, make_evaluator):
    with pytest.raises(UserError, match="nolayer"):
        evaluator.evaluate(Schedule(bits={"nolayer": 4}))
    with pytest.raises(ValueError, match="reconstruct"):
        make_evaluator(recovery="magic")


@pytest.mark.parametrize("net", ["mobilenetv2", "resnet20"], indirect=True)
def test_depthwise_and_residual_networks_are_written_as_scored(net, net_estimates, tmp_path):
    images, labels = net.images, torch.arange(4)
    fit = digits(net.ref.input_shape[-1]).train.images(slice(8, 64))
    evaluator = build_evaluator(net.model, net.network, fit, images[4:], labels, net_estimates)
    assert evaluator.evaluate(Schedule()).kl == pytest.approx(0, abs=1e-6)
    schedule = Schedule(
        dict.fromkeys(net.network.groups, 0.5), dict.fromkeys(net.network.layers, 4)
    )
    said = evaluator.evaluate(schedule)
    small = fitted_network(net.model, evaluator, schedule)
    fake = net.fake_quantized(small.model, schedule.bits, small.scales)
    dense = net.out(net.model)[4:]
    assert compare(net.out(fake)[4:], dense, labels)[2] == pytest.approx(said.kl, rel=1e-3)
    write_network(tmp_path / "a", small, net.network, net.ref, schedule)
    # Scales and biases of a byte each in up to 53 untrained layers, four images.
    back = net.out(load_artifact(tmp_path / "a"))[4:]
    assert compare(back, dense, labels)[2] == pytest.approx(said.kl, rel=0.15)


def test_compare_against_its_definitions():
    torch.manual_seed(0)
    logits, dense, labels = torch.randn(50, 4), torch.randn(50, 4), torch.randint(4, (50,))
    accuracy, loss, kl = compare(logits, dense, labels)
    p, q = dense.softmax(1), logits.softmax(1)
    assert accuracy == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert loss == pytest.approx(float(nn.functional.nll_loss(q.log(), labels)), rel=1e-5)
    assert kl == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-5)
    assert compare(dense, dense, labels)[2] == 0.0


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_the_worst_there_is(broken):
    dense, labels = torch.eye(4) * 5, torch.arange(4)
    logits = dense.clone()
    logits[0, 0] = broken
    _, loss, kl = compare(logits, dense, labels)
    assert loss == kl == WORST
    assert compare(dense, dense, labels)[2] == 0


@pytest.mark.parametrize("recovery", ["bn", "reconstruct"])
def test_low_precision_says_nearly_the_same(make_evaluator, trained, uniform, score, recovery):
    schedule = uniform(0.6, 4)
    exact = make_evaluator(recovery=recovery).evaluate(schedule)
    rough_evaluator = make_evaluator(recovery=recovery, precision="bfloat16")
    rough = rough_evaluator.evaluate(schedule)
    assert rough.kl == pytest.approx(exact.kl, rel=0.4)
    assert rough.bytes == exact.bytes
    # What it fitted is a network of its own, in full precision.
    small = fitted_network(trained.model, rough_evaluator, schedule)
    with torch.no_grad():
        dense, logits = trained.model(score.images()), small.model(score.images())
    assert compare(logits, dense, score.labels_N)[2] == pytest.approx(exact.kl, rel=0.4)


def test_training_steps_recover_more_than_batch_norms(make_evaluator, uniform):
    schedule = uniform(0.6, 3)
    kl = {
        recovery: make_evaluator(recovery=recovery).evaluate(schedule).kl
        for recovery in ("bn", "steps:1", "steps:30")
    }
    assert kl["steps:30"] < kl["bn"] / 1.5
    assert kl["steps:30"] < kl["steps:1"]


@pytest.mark.parametrize("recovery", ["steps:0", "steps:", "step:3", "full"])
def test_unknown_recoveries_are_refused(make_evaluator, recovery):
    with pytest.raises(ValueError, match="allowed: none, bn, reconstruct, steps:K"):
        make_evaluator(recovery=recovery)


def test_without_labels_the_dense_network_is_the_judge(make_evaluator, uniform):
    evaluator = make_evaluator(labels=None)
    assert evaluator.dense.accuracy == 1.0
    measured = evaluator.evaluate(uniform(0.6, 4))
    assert measured.accuracy < 1.0
    assert measured.kl == make_evaluator().evaluate(uniform(0.6, 4)).kl


class Fronted(nn.Module):
    """Computes with numbers of its own before its first layer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        fronts = {"prelu": nn.PReLU(1), "transposed": nn.ConvTranspose2d(1, 1, 2)}
        self.front = fronts.get(kind, nn.Identity())
        self.register_buffer("blur", torch.full((1, 1, 3, 3), 1 / 9))
        self.conv, self.norm, self.head = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        x = F.conv2d(self.front(x), self.blur)
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("kind", ["plain", "prelu", "transposed"])
def test_low_precision_reaches_what_comes_before_the_first_layer(kind):
    torch.manual_seed(0)
    model, x = Fronted(kind).eval(), torch.randn(48, 1, 10, 10)
    network = build_network(model, x[:1])
    found = estimate(model, network, x[:32], keeps=(1.0, 0.5), bits=(4, 8))
    schedule = network.uniform(0.5, 4)
    low, high = (
        build_evaluator(model, network, x[:32], x[32:], None, found, precision=p).evaluate(schedule)
        for p in ("bfloat16", "float32")
    )
    assert low.kl == pytest.approx(high.kl, rel=0.3)


def test_what_training_steps_made_is_what_is_handed_over(make_evaluator, trained, score):
    """And a frozen network is trained as another is."""
    evaluator = make_evaluator(recovery="steps:4")
    schedule = trained.network.uniform(0.5, 4)
    measured = evaluator.evaluate(schedule)
    small = fitted_network(trained.model, evaluator, schedule)
    attach_fake_quant(small.model, trained.network, schedule.bits, small.scales)
    with torch.no_grad():
        dense, logits = trained.model(score.images()), small.model(score.images())
    assert compare(logits, dense, score.labels_N)[2] == pytest.approx(measured.kl, rel=1e-3)

    trained.model.requires_grad_(False)
    try:
        assert evaluator.evaluate(schedule).kl == pytest.approx(measured.kl, rel=1e-3)
        assert evaluator.evaluate(Schedule()).kl < measured.kl
    finally:
        trained.model.requires_grad_(True)
