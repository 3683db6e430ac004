"""What a schedule costs, in closed form: bytes on disk, parameters, MACs, BOPs.

The packed artifact (`artifact.py`) holds, for every layer,

    record    18 bytes: where it belongs, its shape, its bits and what its vectors count in
    weights   ceil(weights x bits / 8) bytes; 4 bytes each at 32 bits
    scale     1 byte an output channel, below 32 bits
    bias      1 byte an output channel (4 at 32 bits), if the layer has one after its batch
              norm has been folded in

then a record of 6 bytes for each batch norm that no layer absorbs and of 2 for each module that
is left out, and 4 bytes for each number of those norms and of every other float tensor (layer
norms, embeddings, ...). The header in front and the three counts take 518 bytes. `bytes` is exactly
the file's size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rlcompress.core.graph import Link, Network
from rlcompress.core.layout import HEADER_BYTES, table_bytes
from rlcompress.core.schedule import FULL_PRECISION, Measurement, Schedule, performance_density

ACTIVATION_BITS = 32
#: Bytes of one number in the artifact.
FLOAT_BYTES, SCALE_BYTES, BIAS_BYTES = 4, 1, 1


def header_bytes(network: Network) -> int:
    """Bytes before the first weight: the header and the records, a constant of the network."""
    norms, unused = len(network.norms), len(network.unused)
    return HEADER_BYTES + table_bytes(len(network.layers), norms, unused)


def vector_bytes(bits: np.ndarray | int, biased: np.ndarray | bool) -> np.ndarray:
    """Bytes of an output channel beside its weights; `biased`: with a bias or a batch norm."""
    biases = np.asarray(biased, dtype=np.int64)
    short = SCALE_BYTES + BIAS_BYTES * biases
    return np.where(np.asarray(bits) == FULL_PRECISION, FLOAT_BYTES * biases, short)


@dataclass(frozen=True)
class Cost:
    bytes: int
    params: int
    macs: int
    bops: int

    def measurement(
        self, accuracy: float, loss: float, kl: float, unexplained: float | None = None
    ) -> Measurement:
        return Measurement(
            accuracy=accuracy,
            loss=loss,
            kl=kl,
            bytes=self.bytes,
            params=self.params,
            macs=self.macs,
            bops=self.bops,
            density=performance_density(accuracy, self.bytes),
            unexplained=unexplained,
        )


class CostModel:
    """Costs of many schedules of one network at once.

    Rows are schedules. counts_SG: channels each group keeps; bits_SL: weight bits of each layer;
    G groups and L layers in the network's order.
    """

    def __init__(self, network: Network) -> None:
        layers, groups = list(network.layers.values()), list(network.groups)
        column = {name: i for i, name in enumerate(groups)}
        self.network = network
        self.header = header_bytes(network)
        self.full_counts_G = np.array(
            [g.channels for g in network.groups.values()], dtype=np.int64
        ).reshape(len(groups))

        def width(links: tuple[Link, ...], channels: int) -> tuple[np.ndarray, int]:
            """Surviving channels as features-per-group-channel (G,) and a constant."""
            per_channel = np.zeros(len(groups), dtype=np.int64)
            for link in links:
                g = column[link.group]
                per_channel[g] += len(link.index) // int(self.full_counts_G[g])
            return per_channel, channels - int(per_channel @ self.full_counts_G)

        def stacked(widths: list[tuple[np.ndarray, int]]) -> np.ndarray:
            rows = np.array([a for a, _ in widths], dtype=np.int64)
            return rows.reshape(len(widths), len(groups)).T

        inputs = [width(x.inputs, x.in_channels) for x in layers]
        outputs = [width(x.outputs, x.out_channels) for x in layers]
        norms = [width(x.links, x.channels) for x in network.norms]
        self._in_GL = stacked(inputs)
        self._in_const_L = np.array([c for _, c in inputs], dtype=np.int64)
        self._out_GL = stacked(outputs)
        self._out_const_L = np.array([c for _, c in outputs], dtype=np.int64)
        self._norm_GN = stacked(norms)
        self._norm_const_N = np.array([c for _, c in norms], dtype=np.int64)
        self._norm_vectors_N = np.array([x.vectors for x in network.norms], dtype=np.int64)
        self._conv_groups_L = np.array([x.conv_groups for x in layers], dtype=np.int64)
        self._depthwise_L = np.array([x.kind == "depthwise" for x in layers])
        self._kernel_L = np.array([x.kernel for x in layers], dtype=np.int64)
        self._positions_L = np.array([x.positions for x in layers], dtype=np.int64)
        #: numbers of the network that no choice changes
        self.rest = sum(math.prod(shape) for shape in network.rest.values())
        self._bias_L = np.array([x.has_bias or x.batch_norm is not None for x in layers])

    def rows(self, schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
        """counts_SG and bits_SL of one schedule (S = 1)."""
        counts = self.network.counts(schedule)
        counts_G = np.array([counts[g] for g in self.network.groups], dtype=np.int64)
        bits_L = np.array([schedule.width(name) for name in self.network.layers], dtype=np.int64)
        return counts_G[None], bits_L[None]

    def weights(self, counts_SG: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Surviving weights and output channels of every layer: two (S, L). Here and below, S may
        be several dimensions."""
        out_SL = counts_SG @ self._out_GL + self._out_const_L
        in_SL = counts_SG @ self._in_GL + self._in_const_L
        fan_SL = np.where(self._depthwise_L, 1, in_SL // self._conv_groups_L) * self._kernel_L
        return out_SL * fan_SL, out_SL

    def layer_bytes(self, counts_SG: np.ndarray, bits_SL: np.ndarray) -> np.ndarray:
        """(S, L) bytes of each layer in the artifact."""
        weights_SL, out_SL = self.weights(counts_SG)
        vectors = vector_bytes(bits_SL, self._bias_L)
        return -(-weights_SL * bits_SL // 8) + out_SL * vectors

    def bytes(self, counts_SG: np.ndarray, bits_SL: np.ndarray) -> np.ndarray:
        """(S,) size of the artifact on disk."""
        norm_SN = counts_SG @ self._norm_GN + self._norm_const_N
        rest_S = FLOAT_BYTES * ((norm_SN * self._norm_vectors_N).sum(-1) + self.rest)
        return self.header + self.layer_bytes(counts_SG, bits_SL).sum(-1) + rest_S

    def by_layer(self, schedule: Schedule) -> dict[str, dict[str, int]]:
        """Of each layer, in the network's order: its channels, bits, bytes and MACs."""
        counts_SG, bits_SL = self.rows(schedule)
        weights_SL, out_SL = self.weights(counts_SG)
        columns = {
            "channels": out_SL[0],
            "bits": bits_SL[0],
            "bytes": self.layer_bytes(counts_SG, bits_SL)[0],
            "macs": weights_SL[0] * self._positions_L,
        }
        return {
            name: {what: int(values[i]) for what, values in columns.items()}
            for i, name in enumerate(self.network.layers)
        }

    def cost(self, schedule: Schedule) -> Cost:
        """Everything about one schedule."""
        counts_SG, bits_SL = self.rows(schedule)
        weights_SL, out_SL = self.weights(counts_SG)
        macs_SL = weights_SL * self._positions_L
        norm_SN = counts_SG @ self._norm_GN + self._norm_const_N
        return Cost(
            bytes=int(self.bytes(counts_SG, bits_SL)[0]),
            params=int(
                weights_SL.sum()
                + (out_SL * self._bias_L).sum()
                + (norm_SN * self._norm_vectors_N).sum()
                + self.rest
            ),
            macs=int(macs_SL.sum()),
            bops=int((macs_SL * bits_SL).sum()) * ACTIVATION_BITS,
        )
