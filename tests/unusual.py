"""Networks that are legal and unusual."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

SHAPE = (3, 8, 8)
HERE = "tests.unusual"


def head(channels: int = 8) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4)]


def conv(channels: int = 8, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels, 8, 3, padding=1, bias=bias)


def norms_without_affine() -> nn.Module:
    norms = [nn.BatchNorm2d(8, affine=False) for _ in range(2)]
    layers = [conv(3, bias=False), norms[0], nn.ReLU(), conv(), norms[1], nn.ReLU()]
    return nn.Sequential(*layers, *head())


def norms_without_statistics() -> nn.Module:
    norm = nn.BatchNorm2d(8, track_running_stats=False)
    return nn.Sequential(conv(3), norm, nn.ReLU(), conv(), nn.ReLU(), *head())


def one_norm_twice() -> nn.Module:
    norm = nn.BatchNorm2d(8)
    return nn.Sequential(conv(3), norm, nn.ReLU(), conv(), norm, nn.ReLU(), *head())


def one_convolution_twice() -> nn.Module:
    twice = conv()
    layers = [conv(3), nn.ReLU(), twice, nn.ReLU(), twice, nn.ReLU()]
    return nn.Sequential(*layers, *head()[:2], nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def one_prelu_twice() -> nn.Module:
    slope = nn.PReLU()
    return nn.Sequential(conv(3), slope, conv(), slope, *head())


def no_biases() -> nn.Module:
    layers = [conv(3, bias=False), nn.ReLU(), conv(bias=False), nn.ReLU()]
    return nn.Sequential(*layers, *head()[:2], nn.Linear(8, 4, bias=False))


class TwoNames(nn.Module):
    """A layer norm under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.a, self.fc = conv(3), nn.Linear(8, 8), nn.Linear(8, 4)
        self.n1 = self.n2 = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.n1(F.relu(self.c(x)).mean((2, 3)))
        return self.fc(self.n2(F.relu(self.a(h))))


class Interleaved(nn.Module):
    """Both convolutions, then both of their norms; of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = conv(3), nn.Conv2d(3, 6, 3, padding=1)
        self.b1, self.b2 = nn.BatchNorm2d(8), nn.BatchNorm2d(6)
        self.c3, self.fc = nn.Conv2d(14, 8, 1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p, q = self.c1(x), self.c2(x)
        p, q = self.b1(p), self.b2(q)
        return self.fc(self.c3(F.relu(torch.cat([p, q], 1))).mean((2, 3)))


class Defaults(nn.Module):
    """Arguments that nobody gives, one of which decides."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.fc = conv(3), conv(), nn.Linear(8, 4)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, pooled: bool = True
    ) -> torch.Tensor:
        h = F.relu(self.c2(F.relu(self.c1(x))))
        if mask is not None:
            h = h * mask
        h = h.mean((2, 3)) if pooled else h.amax((2, 3))
        return self.fc(h)


class Auxiliary(nn.Module):
    """A head that is computed always and returned in training."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = conv(3), conv()
        self.aux, self.fc = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        h = F.relu(self.c1(x))
        other = self.aux(h.mean((2, 3)))
        y = self.fc(F.relu(self.c2(h)).mean((2, 3)))
        return (y, other) if self.training else y


class Functions(nn.Module):
    """Sums, products and clamps as torch's functions, whose C++ has several forms."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.fc = conv(3), conv(), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.clamp(self.c1(x), -2.0, 2.0)
        h = torch.add(h, torch.mul(self.c2(torch.where(h > 0, h, 0.1 * h)), 0.5))
        return self.fc(torch.max(h, -h).mean((2, 3)))


class InPlace(nn.Module):
    """Functions that change what earlier branches hand over, operators and the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3, self.fc = conv(3), conv(3), conv(), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x -= 0.25
        a, b = self.c1(x), F.relu(self.c2(x), True)
        a *= 2.0
        a = F.leaky_relu_(a, 0.5)
        return self.fc(torch.tanh_(self.c3(a + b)).mean((2, 3)))


class ActiveNorm(nn.BatchNorm2d):
    """With its activation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(super().forward(x))


def norms_with_activations() -> nn.Module:
    layers = [conv(3), ActiveNorm(8), conv(), ActiveNorm(8), conv(), nn.ReLU()]
    return nn.Sequential(*layers, *head())


class Mixer(nn.Module):
    """A linear layer over the width, a norm over the channels behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.fc = conv(3), conv(), nn.Linear(8, 4)
        self.over, self.norm = nn.Linear(8, 10), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.norm(self.over(F.relu(self.c1(x)))))
        return self.fc(F.relu(self.c2(h)).mean((2, 3)))


def computed_weights() -> nn.Module:
    normed = nn.utils.parametrizations.weight_norm(conv())
    layers = [conv(3), nn.ReLU(), normed, nn.ReLU(), conv(), nn.ReLU(), conv(), nn.ReLU()]
    return nn.Sequential(*layers, *head())


class OtherName(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class ByName(nn.Module):
    """Layers and norms that are called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1, self.fc = conv(3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.c2 = OtherName(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.c2(x=F.relu(self.b1(input=self.c1(input=x)))))
        return self.fc(input=h.mean((2, 3)))


class Viewed(nn.Module):
    """Two groups that only their shapes tie: both need the same number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.over, self.fc = conv(3), conv(), nn.Linear(64, 64), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.c1(x))
        h = F.relu(self.over(self.c2(h).flatten(2)).view_as(h))
        return self.fc(h.mean((2, 3)))


def neighbours() -> nn.Module:
    """Each channel is divided by what is in those beside it, where that is large."""
    layers = [conv(3), nn.ReLU(), nn.LocalResponseNorm(5), conv(), nn.ReLU()]
    return nn.Sequential(*layers, *head())


class PartRead(nn.Module):
    """Channels that are joined by others and summed with them: the second layer reads a quarter of
    a group."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = conv(3), nn.Conv2d(8, 24, 3, padding=1)
        self.d, self.fc = nn.Conv2d(32, 32, 3, padding=1), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.a(x))
        h = torch.cat([h, F.relu(self.c(h))], 1)
        return self.fc((h + F.relu(self.d(h))).mean((2, 3)))


class Gated(nn.Module):
    """A comparison, which no gradient passes, reads a convolution's output before its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1 = conv(3, bias=False), nn.BatchNorm2d(8)
        self.c2, self.b2, self.fc = conv(), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.c1(x)
        h = self.b1(h) * (h > 0)
        return self.fc(F.relu(self.b2(self.c2(h))).mean((2, 3)))


class NormAttention(nn.Module):
    """Channels weighted by their batch norm's own weights (Liu et al., 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1, self.c2, self.fc = conv(3), nn.BatchNorm2d(8), conv(), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.b1(self.c1(x))
        weight = self.b1.weight.data.abs()
        h = h * (weight / weight.sum()).view(-1, 1, 1).sigmoid()
        return self.fc(F.relu(self.c2(h)).mean((2, 3)))


class HeadAsked(nn.Module):
    """A head that is never called says how many features there are."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b, self.old = conv(3), nn.BatchNorm2d(8), nn.Linear(8, 9)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.b(self.c(x))).mean((2, 3))
        return self.fc(h.view(-1, self.old.in_features))


class Tied(nn.Module):
    """A layer's weight, transposed, leads back."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.f, self.fc = conv(3), conv(), nn.Linear(8, 12), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.c2(F.relu(self.c1(x))).mean((2, 3))
        return self.fc(h + F.relu(self.f(h)) @ self.f.weight)


NETWORKS = (
    norms_without_affine,
    norms_without_statistics,
    one_norm_twice,
    one_convolution_twice,
    one_prelu_twice,
    no_biases,
    TwoNames,
    Interleaved,
    Defaults,
    Auxiliary,
    Functions,
    InPlace,
    norms_with_activations,
    Mixer,
    computed_weights,
    ByName,
    Viewed,
    neighbours,
    PartRead,
    Gated,
    NormAttention,
    HeadAsked,
    Tied,
)
