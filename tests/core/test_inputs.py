"""The library says what is wrong with what it is given, before it computes anything."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rlcompress import DynamicCompressor
from rlcompress.core import (
    Schedule,
    UserError,
    build_evaluator,
    build_network,
    cut_network,
    estimate,
    fitted_network,
)


def refused(function, *args, **options):
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    return str(caught.value).splitlines()


def test_images_that_are_none(trained, fit):
    model, network = trained.model, trained.network
    shape = tuple(network.input_shape)
    assert refused(estimate, model, network, fit[:0]) == [
        f"images: of shape {(0, *shape)}; allowed: (N, {shape[0]}, H, W) with at least one image"
    ]
    assert "of shape (4, 3," in refused(estimate, model, network, fit[:4].expand(-1, 3, -1, -1))[0]
    assert refused(estimate, model, network, (fit[:4] * 255).to(torch.uint8)) == [
        "images: torch.uint8; allowed: torch.float32, as the network's weights"
    ]
    assert refused(estimate, model, network, fit[:4] / 0) == [
        "images: has values that are not finite"
    ]
    assert refused(estimate, model, network, fit[:4].to("meta")) == [
        "images: on meta; the network is on cpu"
    ]


def test_choices_all_at_once(trained, fit):
    choices = {"keeps": (0.5, 0.0), "bits": (0, 4, True)}
    lines = refused(estimate, trained.model, trained.network, fit, **choices)
    assert lines == [
        "keeps = 0.0: a keep ratio lies in (0, 1]",
        "keeps = (0.5, 0.0): 1.0 must be among them",
        "bits = 0: whole numbers from 1 to 8",
        "bits = True: whole numbers from 1 to 8",
    ]
    assert "at least one" in refused(estimate, trained.model, trained.network, fit, bits=())[0]
    counts = {"told": 0, "batch": 0, "positions": -1}
    assert refused(estimate, trained.model, trained.network, fit, **counts) == [
        *("positions = -1: must be 1 or more", "batch = 0: must be 2 or more"),
        "told = 0: must be 2 or more",
    ]


def test_an_evaluator_s_arguments_all_at_once(trained, estimates, fit, score):
    model, network = trained.model, trained.network
    score, labels = score.images(), torch.tensor(score.labels_N)
    lines = refused(
        build_evaluator,
        *(model, network, fit[:0], score, labels[:3], estimates),
        recovery="reconstruc",
        precision="float64",
        positions=0,
    )
    assert len(lines) == 5
    assert lines[0].startswith("fit: of shape (0, ")
    assert lines[1] == f"labels: of shape (3,); allowed: ({len(score)},), one a scored image"
    assert lines[2].endswith('; did you mean "reconstruct"?')
    assert lines[3].startswith("precision 'float64'; allowed: auto, float32, bfloat16")
    assert lines[4] == "positions = 0: must be 1 or more"
    for wrong, said in (
        (labels.float(), "torch.float32"),
        (labels - 100, "0 and above"),
        (labels + 5, "0 to 9"),
    ):
        (line,) = refused(build_evaluator, model, network, fit, score, wrong, estimates)
        assert said in line
    other = torch.nn.Sequential(torch.nn.Conv2d(network.input_shape[0], 4, 3), torch.nn.Flatten())
    theirs = build_network(other, fit[:1])
    assert refused(build_evaluator, other, theirs, fit, score, None, estimates) == [
        "estimates: they are of another network"
    ]


@pytest.mark.parametrize("bits", ["4", 4.0, 0, 9, True, None])
def test_bits_are_whole_numbers(bits):
    with pytest.raises(ValueError, match=r"weight bits are 1-8, or 32"):
        Schedule(bits={"9": bits})


@pytest.mark.parametrize("ratio", ["0.5", 0.0, 1.5, None, float("nan")])
def test_keeps_are_ratios(ratio):
    with pytest.raises(ValueError, match=r"a keep ratio lies in \(0, 1\]"):
        Schedule(keep={"9": ratio})


def test_a_training_model_trains_on(trained, fit):
    """Modes of all modules and gradients are the caller's."""
    model = copy.deepcopy(trained.model).train()
    frozen = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    frozen.eval()
    model(fit[:8]).sum().backward()
    modules = [*model.modules()]
    modes = [module.training for module in modules]
    parameters = [*model.parameters()]
    gradients = [parameter.grad.clone() for parameter in parameters]
    network = build_network(model, fit[:1])
    estimate(model, network, fit[:8], keeps=(0.5, 1.0), bits=(4,))
    DynamicCompressor(model, fit[:1], target=2.0, policy=None)
    assert [module.training for module in modules] == modes
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_one_logit_tells_no_classes_apart(fit):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(1))
    model(fit[:1])
    network = build_network(model, fit[:1])
    found = estimate(model, network, fit[:8], keeps=(0.5, 1.0), bits=(4,))
    (line,) = refused(build_evaluator, model, network, fit[:8], fit[8:16], None, found)
    assert line == "the network answers with 1 logit; allowed: 2 or more, one a class"


def test_one_image_is_none_to_train_on(trained, estimates, fit):
    given = (trained.model, trained.network, fit[:1], fit[1:5], None, estimates)
    (line,) = refused(build_evaluator, *given, recovery="steps:3")
    assert line == "fit: one image; allowed: 2 or more, to be trained on by steps:3"


def test_small_networks_answer_as_they_are(trained, estimates, fit, score):
    """In eval mode, whatever mode the dense one was in."""
    model = copy.deepcopy(trained.model).train()
    evaluator = build_evaluator(model, trained.network, fit, score.images(), None, estimates)
    schedule = trained.network.uniform(0.5, 4)
    assert not any(m.training for m in fitted_network(model, evaluator, schedule).model.modules())
    kept = evaluator.kept(schedule)
    model.eval()
    assert not cut_network(model, trained.network, kept, schedule).model.training


def test_logits_that_are_no_numbers(fit):
    """One that rules a class out is one; the network is named, and not what stumbles over it."""

    class Out(nn.Module):
        def __init__(self, added: list[float]) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1))
            self.register_buffer("added", torch.tensor(added))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x).mean((2, 3)) + self.added

    choices = {"keeps": (0.5, 1.0), "bits": (4,)}
    for added, bad in (([0, torch.nan, 0], 8), ([0, 0, torch.inf], 8), ([-torch.inf] * 3, 8)):
        model = Out(added).eval()
        network = build_network(Out([0.0, 0.0, 0.0]).eval(), fit[:1])
        (line,) = refused(estimate, model, network, fit[:8], **choices)
        assert line.startswith(f"Out puts out logits that are not finite, for {bad} of 8 images")
    model = Out([0.0, -torch.inf, 0.0]).eval()
    assert estimate(model, network, fit[:8], **choices).keeps == (0.5, 1.0)
    (line,) = refused(estimate, model, network, 1e30 * (fit[:8] + 2), **choices)
    assert line.endswith("; allowed: up to 1e+09, normalised")


def test_inputs_of_another_kind(trained, estimates, fit, score):
    """Arrays, lists, sizes that the network does not take: named, with what is allowed."""
    model, network = trained.model, trained.network
    images, labels = score.images(), score.labels_N
    tensor = "allowed: a torch.Tensor"
    assert refused(estimate, model, network, fit.numpy()) == [f"images: a ndarray; {tensor}"]
    assert refused(estimate, model, network, None) == [f"images: a NoneType; {tensor}"]
    for wrong in (labels.tolist(), labels.numpy()):
        (line,) = refused(build_evaluator, model, network, fit, images, wrong, estimates)
        assert line == f"labels: a {type(wrong).__name__}; {tensor}"
    assert refused(build_evaluator, model, network, fit, None, labels, estimates) == [
        f"score: a NoneType; {tensor}"
    ]
    assert refused(build_network, model, None, round_to=0) == [
        f"example: a NoneType; {tensor}",
        "round_to = 0: must be 1 or more",
    ]
    assert refused(build_network, model, fit[:1], round_to=2.5) == [
        "round_to = 2.5: must be a whole number, 1 or more"
    ]
    assert refused(build_network, model, fit[:1].half()) == [
        "example: torch.float16; allowed: torch.float32, as the network's weights"
    ]
    assert refused(build_network, "vgg19", fit[:1]) == ["model: a str; allowed: a torch.nn.Module"]
    assert refused(network.validate, {"keep": {}}) == ["schedule: a dict; allowed: a Schedule"]


def test_images_of_a_size_that_the_network_does_not_take(fit):
    flat = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)).train()
    flat(fit[:1])
    network = build_network(flat, fit[:1])
    small, choices = fit[:8, :, 1:, 1:], {"keeps": (0.5, 1.0), "bits": (4,)}
    size = tuple(small.shape[1:])
    (line,) = refused(estimate, flat, network, small, **choices)
    assert line.startswith(f"images: images of {size}, which Sequential cannot be run on: Runtime")
    found = estimate(flat, network, fit[:8], **choices)
    one, two = refused(build_evaluator, flat, network, small, small, None, found)
    assert one.startswith(f"fit: images of {size}, which")
    assert two.startswith(f"score: images of {size}, which")
    assert flat.training


ANSWERS = {
    "maps": (nn.Identity(), "(2, 3, {}, {})"),
    "one number": (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(0)), "(6,)"),
}


@pytest.mark.parametrize(("end", "shape"), ANSWERS.values(), ids=ANSWERS)
def test_answers_that_are_no_logits(fit, end, shape):
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1), end).eval()
    network, wanted = build_network(model, fit[:1]), shape.format(*fit.shape[2:])
    (line,) = refused(estimate, model, network, fit[:8], keeps=(0.5, 1.0), bits=(4,))
    assert line == f"Sequential returns {wanted} for 2 images; allowed: logits (2, classes)"
