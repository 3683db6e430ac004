"""Structure: which channels are coupled, what may not be cut, what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rlcompress.core.errors import UserError
from rlcompress.core.graph import Group
from rlcompress.core.schedule import Schedule
from rlcompress.core.structure import build_network
from rlcompress.core.trace import TraceError, trace

EXAMPLE = torch.zeros(1, 4, 8, 8)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(self.conv(x))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.one(x)
        y += self.two(x)
        return self.relu(y)


def test_every_layer_but_the_head_belongs_to_a_group(net):
    grouped = [layer for group in net.network.groups.values() for layer in group.layers]
    assert len(grouped) == len(set(grouped))
    assert {*net.network.layers} - {*grouped} == {[*net.network.layers][-1]}


def test_each_group_is_decided_at_one_layer_the_first_of_its_own(net):
    owned = [g.name for n in net.network.layers if (g := net.network.owned_group(n))]
    assert owned == [*net.network.groups]
    order = [*net.network.layers]
    for group in net.network.groups.values():
        assert group.owner == min(group.layers, key=order.index)


def test_layers_carry_the_networks_own_weights_and_order(net):
    modules = dict(net.model.named_modules())
    for name, layer in net.network.layers.items():
        assert layer.weights == modules[name].weight.numel()
    called = [n.target for n in trace(net.model, net.images[:1]).graph.nodes]
    assert [n for n in called if n in net.network.layers] == [*net.network.layers]


@pytest.mark.parametrize("net", ["resnet20"], indirect=True)
def test_added_branches_share_a_group(net):
    stem = "features.0.0"
    added = tuple(f"features.{block}.second.0" for block in (1, 2, 3))
    assert net.network.groups[stem].layers == (stem, *added)


@pytest.mark.parametrize("net", ["mobilenetv2"], indirect=True)
def test_depthwise_layer_is_cut_with_what_it_reads(net):
    depthwise = [layer for layer in net.network.layers.values() if layer.kind == "depthwise"]
    assert len(depthwise) == 17
    for layer in depthwise:
        assert net.network.groups[layer.group].owner != layer.name


def test_neighbours_of_a_grouped_convolution_are_protected():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)
    )
    network = build_network(model, EXAMPLE)
    protected = {name for name, group in network.groups.items() if group.protected}
    assert protected == {"0", "1"}
    assert network.groups["0"].count(0.1) == 8
    assert network.owned_group("0") is None


def test_flattened_map_gives_a_channel_several_features():
    model = nn.Sequential(nn.Conv2d(4, 3, 7), nn.Flatten(), nn.Linear(12, 2))
    (link,) = build_network(model, EXAMPLE).layers["2"].inputs
    assert dict(zip(link.index.tolist(), link.root.tolist(), strict=True)) == {
        feature: feature // 4 for feature in range(12)
    }


def test_tracing_keeps_earlier_activations_valid():
    class Recorder(torch.fx.Interpreter):
        def run_node(self, node):
            seen.append(super().run_node(node))
            copies.append(seen[-1].clone())
            return seen[-1]

    model, x = InPlace().eval(), torch.randn(2, 4, 8, 8)
    wanted, seen, copies = model(x), [], []
    assert torch.equal(Recorder(trace(model, EXAMPLE)).run(x), wanted)
    assert all(torch.equal(a, b) for a, b in zip(seen, copies, strict=True))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.conv(x), x


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.one(x))


class TiedTo(nn.Module):
    """A linear layer whose weight is the parameter of something that is no layer."""

    def __init__(self, make):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(4, 4, 3), nn.Linear(4, 4)
        self.other = make(self.fc.weight)

    def forward(self, x):
        (shared,) = self.other.parameters()
        return self.fc(self.conv(x).mean((2, 3)) + shared[0])


def embedding(weight):
    other = nn.Embedding(4, 4)
    other.weight = weight
    return other


class Sees(nn.Module):
    """Reads the weight of a layer that it never calls; sums over channels behind another; carries
    a head that only training uses; and looks at the data before it decides."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 1)
        self.mixed, self.head = nn.Conv2d(6, 6, 1), nn.Linear(6, 3)
        self.training_head = nn.Sequential(nn.Linear(6, 3))

    def forward(self, x):
        x = nn.functional.conv2d(x, self.read.weight, self.read.bias)
        x = torch.relu(self.called(x)) if x.sum() > -1e9 else x
        x = self.mixed(x)
        x = self.head((x - x.mean(1, keepdim=True)).mean((2, 3)))
        return x + self.training_head(x) if self.training else x


def test_what_is_read_or_decided_in_python_is_found():
    network = build_network(Sees(), EXAMPLE)
    assert [*network.layers] == ["read", "called", "mixed", "head"]
    assert network.unused == ("training_head",)
    protected = {name: group.protected for name, group in network.groups.items()}
    # Its channels' mean is taken: cut, it would be another mean.
    assert "changes what other channels compute" in protected["mixed"]
    assert protected["called"] == ""
    assert network.layers["head"].protected == "it is the network's output"


def test_a_head_of_zeros_hides_no_wrong_cut():
    model = Sees()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    protected = build_network(model, EXAMPLE).groups["mixed"].protected
    assert "changes what other channels compute" in protected


class Normalized(nn.Module):
    """Features of length one: without a bias, a filter of zeros leaves the others' length alone."""

    def __init__(self):
        super().__init__()
        self.conv, self.embed = nn.Conv2d(4, 4, 3), nn.Linear(4, 8, bias=False)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        h = torch.relu(self.conv(x)).mean((2, 3))
        return self.head(nn.functional.normalize(self.embed(h), dim=1))


def test_channels_that_others_are_measured_by_are_not_cut():
    """In training what is cut still computes: only its readers are masked."""
    groups = build_network(Normalized().eval(), EXAMPLE).groups
    assert groups["embed"].protected == "a cut there changes what other channels compute"
    assert groups["conv"].protected == ""


class Halved(nn.Module):
    """Each half of a convolution's channels is read by a convolution of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.one, self.two = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        one, two = torch.relu(self.norm(self.conv(x))).chunk(2, 1)
        return self.head((self.one(one) + self.two(two)).mean((2, 3)))


def test_halves_that_are_read_apart_are_not_cut():
    """As many of each half may be left, by chance: that says nothing of others."""
    groups = build_network(Halved().eval(), EXAMPLE).groups
    assert groups["conv"].protected == "two has only a part of its channels"
    assert groups["one"].protected == ""


def test_a_layer_that_is_used_twice_is_not_cut():
    network = build_network(nn.Sequential(nn.Conv2d(4, 4, 1), Twice(), nn.Conv2d(4, 2, 1)), EXAMPLE)
    assert all("is used 2 times" in group.protected for group in network.groups.values())
    assert network.layers["1.conv"].kind == "conv"


def test_channels_of_a_layer_norm_are_not_cut():
    """It would normalise over fewer numbers."""
    model = nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 10), nn.Linear(10, 2))
    network = build_network(model, torch.zeros(1, 8))
    assert network.groups["0"].protected == "it meets LayerNorm 1"
    assert network.groups["2"].protected == ""
    assert network.rest == {"1.weight": (12,), "1.bias": (12,)}


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Sequential(nn.ReLU()), "no Conv2d or Linear"),
        (nn.Sequential(nn.Conv2d(5, 2, 3)), r"cannot be run on an input of shape \(1, 4, 8, 8\)"),
        (Pair(), "returns a tuple"),
        (
            nn.Sequential(nn.Conv2d(4, 4, 3), Tied()),
            r"^'1.one.weight' and '1.two.weight' share one parameter: not supported$",
        ),
        (TiedTo(embedding), "'fc.weight' and 'other.weight' share"),
        (TiedTo(lambda w: nn.Embedding(4, 4, _weight=w)), "'fc.weight' and 'other.weight' share"),
        (TiedTo(lambda weight: nn.ParameterList([weight])), "'fc.weight' and 'other.0' share"),
    ],
)
def test_refused_networks(model, says):
    with pytest.raises(UserError, match=says):
        build_network(model, EXAMPLE)


@pytest.mark.parametrize("model", [Twice(), Branching(), Sees()])
def test_what_cannot_be_traced_says_so(model):
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    with pytest.raises(TraceError, match="cannot be traced"):
        trace(model.eval(), EXAMPLE, layers)


class Reread(nn.Module):
    """An in-place activation whose input is read again: out of place it would mean another."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.conv(x)
        return self.relu(y) + y


def test_a_trace_that_computes_something_else_is_refused():
    model = Reread().eval()
    with pytest.raises(TraceError, match="other answers"):
        trace(model, EXAMPLE)
    assert model.relu.inplace


ratios = st.floats(0.001, 1.0)


@given(ratio=ratios, other=ratios, channels=st.integers(1, 600), round_to=st.integers(1, 16))
def test_count_is_legal_rounded_and_grows_with_the_ratio(ratio, other, channels, round_to):
    group = Group("g", channels, "g", ("g",), ("h",), round_to=round_to)
    count = group.count(ratio)
    assert 1 <= count <= channels
    assert count % round_to == 0 or count == channels
    assert group.count(1.0) == channels
    low, high = sorted((ratio, other))
    assert group.count(low) <= group.count(high)


def test_validate_names_everything_unknown(vgg):
    with pytest.raises(UserError) as caught:
        vgg.network.validate(Schedule({"nogroup": 0.5, "features.0": 0.5}, {"nolayer": 4}))
    assert "'nogroup'" in str(caught.value)
    assert "'nolayer'" in str(caught.value)
    assert "features.0" not in str(caught.value)
