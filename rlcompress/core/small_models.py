"""Networks for small images, of families that torchvision has only for large ones.

`width` multiplies every channel count; `stem_stride` is the stride of the first convolution.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def _conv_norm(
    before: int, after: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    conv = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU(inplace=True))


class _Classifier(nn.Module):
    """Features, global average pooling, one Linear."""

    def __init__(self, features: nn.Module, channels: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) -> logits (N, num_classes)."""
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


class _Block(nn.Module):
    """A basic residual block; a convolution of 1 x 1 where the shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = _conv_norm(before, after, stride=stride)
        self.second = _conv_norm(after, after)[:2]
        same = before == after and stride == 1
        self.skip = nn.Identity() if same else _conv_norm(before, after, 1, stride)[:2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.second(self.first(x)) + self.skip(x))


def _resnet(
    blocks: int, num_classes: int, in_channels: int, width: float, stride: int
) -> nn.Module:
    channels = _scaled(16, width)
    features: list[nn.Module] = [_conv_norm(in_channels, channels, stride=stride)]
    for stage in range(3):
        for block in range(blocks):
            before, channels = channels, _scaled(16 * 2**stage, width)
            features.append(_Block(before, channels, 2 if stage and not block else 1))
    return _Classifier(nn.Sequential(*features), channels, num_classes)


def resnet20(
    num_classes: int = 10, in_channels: int = 3, width: float = 1.0, stem_stride: int = 1
) -> nn.Module:
    """ResNet-20 for 32 x 32 images (He et al., 2016, section 4.2), projections where it widens."""
    return _resnet(3, num_classes, in_channels, width, stem_stride)


def resnet56(
    num_classes: int = 10, in_channels: int = 3, width: float = 1.0, stem_stride: int = 1
) -> nn.Module:
    """ResNet-56, likewise."""
    return _resnet(9, num_classes, in_channels, width, stem_stride)


#: MobileNetV1's separable convolutions behind the stem: output channels and stride.
_SEPARABLE = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *([(512, 1)] * 5),
    *((1024, 2), (1024, 1)),
)


def mobilenetv1(
    num_classes: int = 10, in_channels: int = 3, width: float = 1.0, stem_stride: int = 1
) -> nn.Module:
    """MobileNetV1 (Howard et al., 2017, table 1)."""
    channels = _scaled(32, width)
    features: list[nn.Module] = [_conv_norm(in_channels, channels, stride=stem_stride)]
    for wide, stride in _SEPARABLE:
        before, channels = channels, _scaled(wide, width)
        features.append(_conv_norm(before, before, stride=stride, groups=before))
        features.append(_conv_norm(before, channels, kernel=1))
    return _Classifier(nn.Sequential(*features), channels, num_classes)


class _Fire(nn.Module):
    """Squeeze to few channels, then expand by 1 x 1 and 3 x 3 side by side."""

    def __init__(self, before: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = _conv_norm(before, squeezed, kernel=1)
        self.one = _conv_norm(squeezed, expanded, kernel=1)
        self.three = _conv_norm(squeezed, expanded)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.squeeze(x)
        return torch.cat([self.one(x), self.three(x)], 1)


def squeezenet(
    num_classes: int = 10, in_channels: int = 3, width: float = 1.0, stem_stride: int = 1
) -> nn.Module:
    """SqueezeNet 1.1 (Iandola et al., 2016) with batch norms and a linear head, its first pooling
    left out."""
    channels = _scaled(64, width)
    features: list[nn.Module] = [_conv_norm(in_channels, channels, stride=stem_stride)]
    for stage in (((16, 64), (16, 64)), ((32, 128), (32, 128)), ((48, 192), (64, 256))):
        for squeezed, expanded in stage:
            wide = _scaled(expanded, width)
            features.append(_Fire(channels, _scaled(squeezed, width), wide))
            channels = 2 * wide
        features.append(nn.MaxPool2d(2, 2))
    return _Classifier(nn.Sequential(*features), channels, num_classes)


def cnn(
    num_classes: int = 10, in_channels: int = 3, width: float = 1.0, stem_stride: int = 1
) -> nn.Module:
    """Four plain convolutions of 64 to 256 channels, each but the first at stride 2."""
    channels = _scaled(64, width)
    features: list[nn.Module] = [_conv_norm(in_channels, channels, stride=stem_stride)]
    for wide in (128, 256, 256):
        before, channels = channels, _scaled(wide, width)
        features.append(_conv_norm(before, channels, stride=2))
    return _Classifier(nn.Sequential(*features), channels, num_classes)
