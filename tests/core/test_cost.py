"""Closed-form costs against the networks and files themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rlcompress.core.artifact import pack
from rlcompress.core.cost import CostModel, header_bytes
from rlcompress.core.layout import HEADER_BYTES
from rlcompress.core.prune import cut
from rlcompress.core.schedule import Schedule
from rlcompress.core.structure import build_network


@given(choice=st.data(), seed=st.integers(0, 2**16))
@settings(max_examples=8)
def test_bytes_parameters_and_macs_are_those_of_the_cut_network(net, choice, seed):
    schedule = choice.draw(net.schedules())
    small = cut(net.model, net.network, net.kept(schedule, seed))
    bits, scales = net.quantized(small, schedule)
    packed = pack(small, net.network, net.ref, bits, scales)
    cost = CostModel(net.network).cost(schedule)
    assert len(packed) == cost.bytes
    assert 8 + int.from_bytes(packed[:8], "little") == HEADER_BYTES

    structure = build_network(small, net.images[:1])
    assert cost.macs == sum(layer.macs for layer in structure.layers.values())
    assert cost.bops == 32 * sum(n.macs * schedule.width(n.name) for n in structure.layers.values())
    modules = dict(small.named_modules())
    wanted = 0
    for name, layer in structure.layers.items():
        has_bias = layer.batch_norm is not None or layer.has_bias
        wanted += layer.weights + (modules[name].weight.shape[0] if has_bias else 0)
    assert cost.params == wanted


@given(choice=st.data())
@settings(max_examples=10)
def test_many_rows_at_once_cost_what_they_cost_alone(vgg, choice):
    costs = CostModel(vgg.network)
    schedules = choice.draw(st.lists(vgg.schedules(), min_size=1, max_size=4))
    counts, bits = zip(*(costs.rows(s) for s in schedules), strict=True)
    together = costs.bytes(np.concatenate(counts), np.concatenate(bits))
    assert together.tolist() == [costs.cost(s).bytes for s in schedules]


def test_dense_bytes_are_four_a_number_and_the_header(net):
    cost = CostModel(net.network).cost(Schedule())
    assert cost.bytes == header_bytes(net.network) + 4 * cost.params


def test_a_layer_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 10, 3, bias=False), nn.BatchNorm2d(10), nn.Conv2d(10, 2, 1))
    costs = CostModel(build_network(model, torch.zeros(1, 3, 6, 6)))
    schedule = Schedule({"0": 0.5}, {"0": 3})
    layers = costs.layer_bytes(*costs.rows(schedule))
    # ceil(5 x 27 weights x 3 bits / 8) and 5 scales and biases of 1; 2 x 5 floats and 2 biases
    assert layers.tolist() == [[51 + 10, 40 + 8]]
    # The header, three counts, and two records
    assert costs.cost(schedule).bytes == 512 + 6 + 2 * 18 + 61 + 48
    assert costs.cost(schedule).macs == 5 * 27 * 16 + 10 * 16


def test_numbers_of_a_norm_that_no_layer_absorbs_are_counted():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
    costs = CostModel(build_network(model, torch.zeros(1, 3, 6, 6)))
    whole, half = costs.cost(Schedule()), costs.cost(Schedule({"0": 0.5}))
    assert whole.params == (24 + 8) + 4 * 8 + (16 + 2)
    assert whole.bytes - half.bytes == 4 * (12 + 4 + 4 * 4 + 8)


def test_measurement_carries_the_cost_and_the_density(vgg):
    measured = CostModel(vgg.network).cost(Schedule()).measurement(0.5, 1.0, 0.1)
    assert measured.density == pytest.approx(50 / (measured.bytes / 1e6))
