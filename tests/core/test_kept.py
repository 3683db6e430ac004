"""What a written file would lose is told before it is written; what it keeps comes back."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from rlcompress import core
from rlcompress.core.errors import UserError
from rlcompress.core.unseen import require_drawn_alike

SHAPE = (3, 8, 8)
HERE = "tests.core.test_kept"


class Permuted(nn.Module):
    """Features in an order that the seed draws."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 16, 3), nn.Linear(16, 4)
        self.register_buffer("perm", torch.randperm(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.conv(x)).mean((2, 3))[:, self.perm])


def python_order() -> torch.Tensor:
    return torch.tensor(random.sample(range(16), 16))


#: Who draws an order that no state dict holds.
DRAWN = {
    "torch": lambda: torch.randperm(16),
    "numpy": lambda: torch.from_numpy(np.random.permutation(16)),
    "python": python_order,
    "nobody": lambda: torch.from_numpy(np.random.default_rng().permutation(16)),
    "fixed": lambda: torch.randperm(16, generator=torch.Generator().manual_seed(0)),
}


class Drawn(nn.Module):
    """Features in an order that is drawn and not kept."""

    def __init__(
        self, by: str, buffer: bool = False, num_classes: int = 4, in_channels: int = 3
    ) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(in_channels, 64, 3), nn.Conv2d(64, 16, 3)
        self.fc = nn.Linear(16, num_classes)
        order = DRAWN[by]()
        if buffer:
            self.register_buffer("order", order, persistent=False)
        else:
            self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.conv(self.stem(x))).mean((2, 3))[:, self.order])


class Turned(nn.Module):
    """Channels turned by complex phases, as rotary embeddings are."""

    def __init__(self, drawn: bool = False) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 16, 3), nn.Linear(16, 4)
        angles = torch.rand(8) if drawn else torch.arange(8.0)
        self.register_buffer("phases", torch.polar(torch.ones(8), angles))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.conv(x)).mean((2, 3)).reshape(-1, 8, 2)
        return self.fc(torch.view_as_real(torch.view_as_complex(h) * self.phases).flatten(1))


class Learned(Turned):
    """Phases that are learned."""

    def __init__(self) -> None:
        super().__init__()
        phases = self.phases
        del self.phases
        self.phases = nn.Parameter(phases)


class Holder:
    """An object that is no module and knows itself."""

    def __init__(self, kernel: torch.Tensor) -> None:
        self.kernel, self.me = kernel, self


#: Where a constructor may keep its constants -> how they are found there again.
PLACES = {
    "list": (lambda k: [k], lambda kept: kept[0]),
    "tuple": (lambda k: ("k", k), lambda kept: kept[1]),
    "dict": (lambda k: {"k": [k]}, lambda kept: kept["k"][0]),
    "object": (Holder, lambda kept: kept.kernel),
    "objects": (lambda k: [{"k": Holder(k)}], lambda kept: kept[0]["k"].kernel),
}


class Smoothed(nn.Module):
    """Smooths its input with constants of its own."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.conv, self.fc, self.place = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), place
        self.kept = PLACES[place][0](torch.tensor([0.25, 0.5, 0.25]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, middle, right = PLACES[self.place][1](self.kept)
        x = left * x.roll(1, -1) + middle * x + right * x.roll(-1, -1)
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


def written(path, ref: core.ModelRef, seed: int) -> nn.Module:
    """The network of a seed, as it was written to `path`."""
    model = ref.build(seed)
    network = core.build_network(model, ref.example())
    schedule = core.Schedule(bits=dict.fromkeys(network.layers, 8))
    small = core.cut_network(model, network, {}, schedule)
    core.write_network(path, small, network, ref, schedule)
    return small.model


@pytest.mark.parametrize(
    ("factory", "args", "tensor"),
    [
        ("Permuted", {}, "perm (torch.int64)"),
        ("Turned", {"drawn": True}, "phases (torch.complex64)"),
    ],
)
def test_constants_that_the_constructor_would_draw_anew_are_told(tmp_path, factory, args, tensor):
    ref = core.ModelRef(f"{HERE}:{factory}", args, 4, SHAPE)
    with pytest.raises(UserError) as caught:
        written(tmp_path / "w", ref, seed=1)
    assert str(caught.value).startswith(f"{tensor}: not what {HERE}:{factory} builds")
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("factory", "args"),
    [("Turned", {}), *(("Smoothed", {"place": place}) for place in PLACES)],
)
def test_constants_that_every_constructor_makes_come_back(tmp_path, close, factory, args):
    ref = core.ModelRef(f"{HERE}:{factory}", args, 4, SHAPE)
    model = written(tmp_path / "w", ref, seed=1)
    images = torch.randn(4, *SHAPE)
    again = core.load_artifact(tmp_path / "w", trust=[ref.factory])
    close(model(images), again(images))


def test_complex_parameters_are_told():
    with pytest.raises(UserError, match=r"^parameter 'phases' is of torch.complex64.*allowed: "):
        core.build_network(Learned().eval(), torch.zeros(1, *SHAPE))


@pytest.mark.parametrize("buffer", [False, True])
@pytest.mark.parametrize("by", DRAWN)
def test_what_the_constructor_draws_and_no_state_dict_holds_is_told(by, buffer):
    ref = core.ModelRef(f"{HERE}:Drawn", {"by": by, "buffer": buffer}, 4, SHAPE)
    if by == "fixed":
        require_drawn_alike(ref.build(1), ref)
        return
    with pytest.raises(UserError, match=rf"^model {HERE}:Drawn: .*; allowed: ") as told:
        require_drawn_alike(ref.build(1), ref)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("by", ["torch", "numpy", "python", "fixed"])
def test_a_seed_is_everyones_and_the_callers_draws_are_not_moved(by):
    ref = core.ModelRef(f"{HERE}:Drawn", {"by": by}, 4, SHAPE)
    np.random.seed(3)
    random.seed(3)
    first = ref.build(1).order
    drawn = np.random.random(), random.random()
    assert torch.equal(ref.build(1).order, first)
    np.random.seed(3)
    random.seed(3)
    assert (np.random.random(), random.random()) == drawn
