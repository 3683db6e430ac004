"""Small networks with lived-in batch norms, one trained network, and random choices for them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from rlcompress.core.artifact import ModelRef, pack
from rlcompress.core.cost import CostModel
from rlcompress.core.data import Data, Split, digits
from rlcompress.core.evaluate import Evaluator
from rlcompress.core.evaluators import build_evaluator
from rlcompress.core.files import save_bytes
from rlcompress.core.fold import snap
from rlcompress.core.graph import Network
from rlcompress.core.prune import cut, kept_channels
from rlcompress.core.quant import attach_fake_quant, mse_clip, scale_of
from rlcompress.core.schedule import Schedule
from rlcompress.core.sensitivity import Estimates, estimate
from rlcompress.core.structure import build_network
from rlcompress.core.train import Recipe, train

BITS = (1, 2, 3, 4, 5, 6, 7, 8, 32)
KEEPS = (0.1, 0.25, 0.4, 0.6, 0.8, 1.0)
ZOO = {
    "vgg19": ModelRef("vgg19", {"width": 0.0625}, 10, (1, 32, 32)),
    "mobilenetv2": ModelRef("mobilenetv2", {"width": 0.25}, 10, (1, 16, 16)),
    "resnet20": ModelRef("resnet20", {"width": 0.5}, 10, (1, 16, 16)),
}


@dataclass(frozen=True)
class Net:
    """A network, its structure, a few of its inputs, and how to draw choices for it."""

    model: nn.Module
    network: Network
    images: torch.Tensor
    ref: ModelRef

    def schedules(self, bits=BITS):
        """A strategy: any keep ratio for any group, any bits for any layer."""
        return st.builds(
            Schedule,
            st.fixed_dictionaries({g: st.sampled_from(KEEPS) for g in self.network.groups}),
            st.fixed_dictionaries({n: st.sampled_from(bits) for n in self.network.layers}),
        )

    def kept(self, schedule: Schedule, seed: int) -> dict[str, np.ndarray]:
        """Masks of as many random channels as the schedule keeps."""
        rng = np.random.default_rng(seed)
        importance = {n: rng.random(g.channels) for n, g in self.network.groups.items()}
        return kept_channels(self.network, importance, self.network.counts(schedule))

    def quantized(self, small: nn.Module, schedule: Schedule):
        """Layer -> bits, and the scales of `small`'s quantized layers."""
        modules = dict(small.named_modules())
        bits = {name: schedule.width(name) for name in self.network.layers}
        scales = {}
        for name, width in bits.items():
            if width != 32:
                weight = modules[name].weight.detach()
                scales[name] = scale_of(weight, mse_clip(weight, width), width)
        return bits, scales

    def fake_quantized(self, small: nn.Module, bits, scales) -> nn.Module:
        """A copy of `small` that computes with quantized weights."""
        model = copy.deepcopy(small)
        attach_fake_quant(model, self.network, bits, scales)
        return model.eval()

    @torch.no_grad()
    def out(self, model: nn.Module) -> torch.Tensor:
        return model(self.images)


def live_in(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Random gamma (some negative) and beta, then running statistics of a few batches."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            size = module.weight.shape
            sign = torch.where(torch.rand(size, generator=generator) < 0.1, -1.0, 1.0)
            module.weight.data = sign * (0.5 + torch.rand(size, generator=generator))
            module.bias.data = 0.3 * torch.randn(size, generator=generator)
            module.momentum = None  # a plain average
    model.train()
    with torch.no_grad():
        for part in images.split(16):
            model(part)
    return model.eval()


def make_net(ref: ModelRef) -> Net:
    images = digits(ref.input_shape[-1]).train.images(slice(0, 64))
    model = live_in(ref.build(), images)
    with torch.no_grad():
        assert float(model(images).std(0).mean()) > 0.05, "a dead network proves nothing"
    return Net(model, build_network(model, ref.example()), images[:8], ref)


@pytest.fixture(scope="session", params=ZOO)
def net(request) -> Net:
    """Each of the shipped architectures, untrained."""
    return make_net(ZOO[request.param])


@pytest.fixture(scope="session")
def net_estimates(net) -> Estimates:
    return estimate(net.model, net.network, net.images, keeps=(0.1, 0.5, 1.0), bits=(2, 4, 8))


@pytest.fixture(scope="session")
def vgg() -> Net:
    return make_net(ZOO["vgg19"])


@pytest.fixture(scope="session")
def data() -> Data:
    return digits(32)


@pytest.fixture(scope="session")
def trained(data) -> Net:
    """A VGG-19 that reads digits: a few seconds of training."""
    ref = ModelRef("vgg19", {"width": 0.125}, 10, (1, 32, 32))
    model = ref.build()
    train(model, data.train, Recipe(epochs=3, batch_size=32, lr=0.05), seed=0)
    network = build_network(model, ref.example())
    return Net(model, network, data.test.images(slice(0, 8)), ref)


@pytest.fixture(scope="session")
def fit(data) -> torch.Tensor:
    return data.train.sample(128, seed=0).images()


@pytest.fixture(scope="session")
def score(data) -> Split:
    return data.validation.sample(128, seed=0)


@pytest.fixture(scope="session")
def estimates(trained, fit) -> Estimates:
    return estimate(trained.model, trained.network, fit, keeps=KEEPS, bits=(2, 3, 4, 6, 8))


@pytest.fixture(scope="session")
def make_evaluator(trained, fit, score, estimates):
    """Evaluators of the trained network; options by keyword."""

    def make(**options) -> Evaluator:
        arguments = {"fit": fit, "score": score.images(), "labels": score.labels_N} | options
        return build_evaluator(
            trained.model, trained.network, estimates=estimates, positions=1024, **arguments
        )

    return make


@pytest.fixture(scope="session")
def uniform(trained):
    """The same keep ratio and bits everywhere in the trained network."""

    def make(keep: float, bits: int) -> Schedule:
        network = trained.network
        return Schedule(dict.fromkeys(network.groups, keep), dict.fromkeys(network.layers, bits))

    return make


@pytest.fixture(scope="session")
def costs(trained) -> CostModel:
    return CostModel(trained.network)


@pytest.fixture(scope="session")
def close():
    """Equal outputs: the largest difference is a 1e-4 of the largest output."""

    def assert_close(a: torch.Tensor, b: torch.Tensor, relative: float = 1e-4) -> None:
        a, b = a.detach(), b.detach()
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= relative * float(a.abs().max())

    return assert_close


@pytest.fixture(scope="session")
def scratch(tmp_path_factory):
    """A file that property tests may write again and again."""
    return tmp_path_factory.mktemp("scratch") / "weights.safetensors"


def write(net, path, schedule, seed=0):
    """Cuts, snaps and writes; returns the network that computes what the file should."""
    small = cut(net.model, net.network, net.kept(schedule, seed))
    bits, scales = net.quantized(small, schedule)
    scales = snap(small, net.network, bits, scales)
    save_bytes(path, pack(small, net.network, net.ref, bits, scales))
    return net.fake_quantized(small, bits, scales)
