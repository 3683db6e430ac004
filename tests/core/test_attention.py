"""Attention as plain layers: what was trained with torch's own goes into it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlcompress import core
from rlcompress.core.errors import UserError
from rlcompress.stages.weights import load_weights


class Encoder(nn.Module):
    """Patches, torch's encoder and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 4)
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def drawn(module: nn.Module, seed: int) -> nn.Module:
    """With all parameters drawn: some of attention's begin at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module.eval()


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6, "vdim": 4}])
def test_plain_attention_loads_what_torchs_saved(close, options):
    def one(seed: int) -> nn.Module:
        return drawn(nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, **options)}), seed)

    theirs, ours = one(0), core.plain_attention(one(1))
    saved = theirs.state_dict()
    names = [*saved]
    ours.load_state_dict(saved)
    assert [*saved] == names
    widths = 8, options.get("kdim", 8), options.get("vdim", 8)
    given = [torch.randn(5, 3, width) for width in widths]
    close(theirs["a"](*given)[0], ours["a"](*given)[0])
    again = core.plain_attention(one(2))
    again.load_state_dict(ours.state_dict())
    close(theirs["a"](*given)[0], again["a"](*given)[0])


def test_weights_of_torchs_attention_are_weights_of_the_network(tmp_path, close):
    theirs, ours = drawn(Encoder(), 0), core.plain_attention(drawn(Encoder(), 1))
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    load_weights(ours, tmp_path / "w.pt")
    images = torch.randn(3, 3, 8, 8)
    close(theirs(images), ours(images))


def test_weights_of_other_attention_are_told(tmp_path):
    state = Encoder().state_dict()
    state["encoder.layers.0.self_attn.in_proj_weight"] = torch.zeros(12, 8)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"of another shape: encoder.layers.0.self_attn.q.weight"):
        load_weights(core.plain_attention(Encoder()), tmp_path / "w.pt")


def test_attention_that_is_not_plain_is_told_where_the_network_is_read():
    said = r"^'encoder.layers.0.self_attn' is an nn.MultiheadAttention.*core\.plain_attention\("
    with pytest.raises(UserError, match=said):
        core.build_network(Encoder().eval(), torch.zeros(1, 3, 8, 8))
    plain = core.plain_attention(Encoder()).eval()
    network = core.build_network(plain, torch.zeros(1, 3, 8, 8))
    assert "encoder.layers.1.self_attn.q" in network.layers
