"""Structure: which channels are coupled, what may not be cut, what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rlcompress.core.errors import UserError
from rlcompress.core.graph import Group, build_network, trace
from rlcompress.core.schedule import Schedule

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


@pytest.mark.parametrize("net", ["resnet18"], indirect=True)
def test_added_branches_share_a_group(net):
    assert net.network.groups["conv1"].layers == ("conv1", "layer1.0.conv2", "layer1.1.conv2")


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


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Twice(), "called twice"),
        (Branching(), "cannot be traced"),
        (nn.Sequential(nn.ReLU()), "no Conv2d or Linear"),
        (nn.Sequential(nn.Conv2d(5, 2, 3)), "cannot be traced"),
    ],
)
def test_refused_networks(model, says):
    with pytest.raises(UserError, match=says):
        build_network(model, EXAMPLE)


ratios = st.floats(0.001, 1.0)


@given(ratio=ratios, other=ratios, channels=st.integers(1, 600), round_to=st.integers(1, 16))
def test_count_is_legal_rounded_and_grows_with_the_ratio(ratio, other, channels, round_to):
    group = Group("g", channels, "g", ("g",), ("h",))
    count = group.count(ratio, round_to)
    assert 1 <= count <= channels
    assert count % round_to == 0 or count == channels
    assert group.count(1.0, round_to) == channels
    low, high = sorted((ratio, other))
    assert group.count(low, round_to) <= group.count(high, round_to)


def test_validate_names_everything_unknown(vgg):
    with pytest.raises(UserError) as caught:
        vgg.network.validate(Schedule({"nogroup": 0.5, "features.0": 0.5}, {"nolayer": 4}))
    assert "'nogroup'" in str(caught.value)
    assert "'nolayer'" in str(caught.value)
    assert "features.0" not in str(caught.value)
