"""The networks rlcompress ships, and how a user's own is found by `"pkg.mod:factory"`.

Torchvision's architectures with three arguments added where small images need them, and those of
`small_models`, which are made for such images: `width` (multiplier of every channel count),
`stem_stride` (stride of the first convolution) and `in_channels`. torchvision takes seconds to
import, in every process: only the networks that are taken from it load it.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from rlcompress.core import small_models
from rlcompress.core.attention import plain_attention
from rlcompress.core.errors import UserError, blame, did_you_mean
from rlcompress.core.process import seeded

#: Convolutions of each of VGG's five stages (Simonyan & Zisserman, 2015, table 1: A, D, E), and
#: their output channels; a pooling ends each stage.
VGG_STAGES = {11: (1, 1, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
VGG_CHANNELS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """A VGG with batch norms (Simonyan & Zisserman, 2015) and a single linear head.

    torchvision's convolutions; global average pooling and one Linear in place of the three
    4096-wide ones, as is usual for 32 x 32 images.
    """

    def __init__(self, features: nn.Sequential, channels: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W), H and W at least 32 / stem_stride -> logits (N, num_classes)."""
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


def _replace_stem(stem: nn.Conv2d, in_channels: int, stride: int) -> nn.Conv2d:
    new = nn.Conv2d(
        in_channels,
        stem.out_channels,
        kernel_size=cast(tuple[int, int], stem.kernel_size),
        stride=stride,
        padding=cast(tuple[int, int], stem.padding),
        bias=stem.bias is not None,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    return new


def _vgg(layers: int, num_classes: int, in_channels: int, width: float, stride: int) -> nn.Module:
    features: list[nn.Module] = []
    channels = in_channels
    for count, wide in zip(VGG_STAGES[layers], VGG_CHANNELS, strict=True):
        for _ in range(count):
            before, channels = channels, max(1, round(wide * width))
            conv = nn.Conv2d(before, channels, 3, stride=stride, padding=1)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(cast(nn.Parameter, conv.bias))
            features += [conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
            stride = 1
        features.append(nn.MaxPool2d(2, 2))
    return VGG(nn.Sequential(*features), channels, num_classes)


def vgg11(
    num_classes: int = 10, in_channels: int = 3, width: float = 1.0, stem_stride: int = 1
) -> nn.Module:
    """VGG-11-BN at `width` times torchvision's channels."""
    return _vgg(11, num_classes, in_channels, width, stem_stride)


def vgg16(
    num_classes: int = 10, in_channels: int = 3, width: float = 1.0, stem_stride: int = 1
) -> nn.Module:
    """VGG-16-BN, likewise."""
    return _vgg(16, num_classes, in_channels, width, stem_stride)


def vgg19(
    num_classes: int = 10, in_channels: int = 3, width: float = 1.0, stem_stride: int = 1
) -> nn.Module:
    """VGG-19-BN, likewise."""
    return _vgg(19, num_classes, in_channels, width, stem_stride)


def mobilenetv2(
    num_classes: int = 10, in_channels: int = 3, width: float = 1.0, stem_stride: int = 1
) -> nn.Module:
    """torchvision's MobileNetV2 (Sandler et al., 2018) at `width`."""
    from torchvision.models.mobilenetv2 import MobileNetV2

    model = MobileNetV2(num_classes=num_classes, width_mult=width)
    stem = cast(nn.Sequential, model.features[0])
    stem[0] = _replace_stem(cast(nn.Conv2d, stem[0]), in_channels, stem_stride)
    return model


def resnet18(
    num_classes: int = 10, in_channels: int = 3, width: float = 1.0, stem_stride: int = 1
) -> nn.Module:
    """torchvision's ResNet-18 (He et al., 2016) at `width` times its channels; at stem stride 1
    without the first pooling."""
    from torchvision.models.resnet import BasicBlock, ResNet

    def scaled(channels: int) -> int:
        return max(1, round(channels * width))

    class Scaled(ResNet):
        def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
            if planes == 64:  # the first stage, behind the stem
                self.inplanes = scaled(64)
            return super()._make_layer(block, scaled(planes), *args, **kwargs)

    model = (ResNet if width == 1.0 else Scaled)(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
    stem = model.conv1
    if width != 1.0:
        stem = nn.Conv2d(in_channels, scaled(64), 7, padding=3, bias=False)
        model.bn1 = nn.BatchNorm2d(scaled(64))
        model.fc = nn.Linear(scaled(512), num_classes)
    model.conv1 = _replace_stem(stem, in_channels, stem_stride)
    if stem_stride == 1:
        model.maxpool = nn.Identity()  # type: ignore[assignment]
    return model


BUILT_IN: Mapping[str, Callable[..., nn.Module]] = {
    "vgg11": vgg11,
    "vgg16": vgg16,
    "vgg19": vgg19,
    "mobilenetv1": small_models.mobilenetv1,
    "mobilenetv2": mobilenetv2,
    "resnet18": resnet18,
    "resnet20": small_models.resnet20,
    "resnet56": small_models.resnet56,
    "squeezenet": small_models.squeezenet,
    "cnn": small_models.cnn,
}


def _near_module(name: str) -> str:
    """A hint at the module that may be meant by one that is not there."""
    package, dot, _ = name.rpartition(".")
    inside = getattr(sys.modules.get(package), "__path__", None) if package else None
    if package and inside is None:
        return ""
    return did_you_mean(name, [package + dot + m.name for m in pkgutil.iter_modules(inside)])


def find_factory(reference: str, built_in: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The callable that a built-in name or `"pkg.mod:factory"` names.

    Modules are looked for in the current folder too. Raises UserError with the nearest match.
    """
    if reference in built_in:
        return built_in[reference]
    if ":" not in reference:
        near = difflib.get_close_matches(reference, built_in, 1)
        hint = f'did you mean "{near[0]}"? ' if near else ""
        raise UserError(
            f'factory "{reference}": no such name; {hint}allowed: {", ".join(built_in)} '
            f'or "pkg.mod:factory"'
        )
    module_name, _, attribute = reference.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module runs
        why = error if isinstance(error, ImportError) else blame(error)
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        why = f"{why}{_near_module(absent or '')}"
        raise UserError(f'factory "{reference}": cannot import {module_name}: {why}') from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        near = difflib.get_close_matches(attribute, dir(module), 1)
        hint = f'; did you mean "{near[0]}"?' if near else ""
        raise UserError(f'factory "{reference}": {module_name} has no {attribute}{hint}')
    return cast(Callable[..., Any], factory)


def build_model(
    factory: str,
    args: Mapping[str, Any],
    *,
    num_classes: int,
    in_channels: int,
    seed: int,
) -> nn.Module:
    """The network, freshly initialised from `seed`, in eval mode, its attention as plain layers.

    `num_classes` (if known: not 0) and `in_channels` come from the data and are passed where the
    factory takes them and `args` does not name them. One that comes frozen as a whole, as trained
    networks do, is to be trained all the same. Raises UserError if the factory refuses its
    arguments.
    """
    function = find_factory(factory, BUILT_IN)
    known = inspect.signature(function).parameters
    kwargs: dict[str, Any] = {}
    for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if name in known or any(p.kind is p.VAR_KEYWORD for p in known.values()):
            kwargs[name] = value
    if "in_channels" not in known:
        kwargs.pop("in_channels", None)
    if not num_classes:
        kwargs.pop("num_classes", None)
    kwargs.update(args)
    with seeded(seed):
        try:
            model = function(**kwargs)
        except UserError:
            raise
        except Exception as error:  # the user's own code raises what it likes
            raise UserError(f'model "{factory}" with {kwargs}: {blame(error)}') from error
    if not isinstance(model, nn.Module):
        raise UserError(
            f'model "{factory}" gave a {type(model).__name__}; a factory returns a torch.nn.Module'
        )
    model = plain_attention(model).eval()
    parameters = [*model.parameters()]
    if not any(parameter.requires_grad for parameter in parameters):
        for parameter in parameters:
            parameter.requires_grad_(parameter.is_floating_point() and not parameter.is_inference())
    return model
