"""What callers of the library hand in, checked before anything is computed with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlcompress.core.errors import UserError, blame, did_you_mean
from rlcompress.core.graph import Network
from rlcompress.core.process import PRECISIONS, seeded
from rlcompress.core.schedule import MAX_BITS, MIN_BITS, RECOVERIES, parse_recovery

if TYPE_CHECKING:
    from rlcompress.core.sensitivity import Estimates


#: Of an image's values: the squares of larger ones overflow in float32 sums.
LARGEST = 1e9


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """A model that is somebody's own: in eval mode and without gradients inside, with its modes
    and gradients of before afterwards. It is called with copies: its code may change them. What it
    is called in, autocast or inference mode, is none of its business."""
    training = [module for module in model.modules() if module.training]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    model.eval().zero_grad(set_to_none=True)
    copies = model.register_forward_pre_hook(_copied)
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    try:
        with torch.inference_mode(False), torch.autocast(device, enabled=False):
            yield
    finally:
        copies.remove()
        for module in training:
            module.training = True
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _copied(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in args)


def choice_problems(keeps: Sequence[float], bits: Sequence[int]) -> list[str]:
    """What is wrong with a search's choices."""
    low = [ratio for ratio in keeps if not 0 < ratio <= 1]
    found = [f"keeps = {ratio}: a keep ratio lies in (0, 1]" for ratio in low]
    if 1.0 not in keeps:
        found.append(f"keeps = {tuple(keeps)}: 1.0 must be among them")
    allowed = f"whole numbers from {MIN_BITS} to {MAX_BITS}"
    widths = range(MIN_BITS, MAX_BITS + 1)
    for width in bits:
        if isinstance(width, bool) or width not in widths:
            found.append(f"bits = {width!r}: {allowed}")
    return found if bits else [*found, f"bits = (): at least one; {allowed}"]


def image_problems(
    name: str, images: torch.Tensor, model: nn.Module, network: Network
) -> list[str]:
    """What is wrong with `images`: they are (N, C, H, W), as many channels as the network was read
    with, of the weights' type and on their device, finite and of some size, at least one."""
    if found := tensor_problems(name, images):
        return found
    channels = network.input_shape[0]
    if images.ndim != 4 or images.shape[1] != channels or images.numel() == 0:
        return [
            f"{name}: of shape {tuple(images.shape)}; "
            f"allowed: (N, {channels}, H, W) with at least one image"
        ]
    if found := likeness_problems(name, images, model):
        return found
    if not bool(images.isfinite().all()):
        return [f"{name}: has values that are not finite"]
    most = max(map(abs, map(float, images.aminmax())))
    if most > LARGEST:
        return [f"{name}: has values of up to {most:.2g}; allowed: up to {LARGEST:.0g}, normalised"]
    return _answer_problems(name, images[:2], model)


def tensor_problems(name: str, value: object) -> list[str]:
    """Whether it is a tensor at all."""
    if isinstance(value, torch.Tensor):
        return []
    return [f"{name}: a {type(value).__name__}; allowed: a torch.Tensor"]


def likeness_problems(name: str, images: torch.Tensor, model: nn.Module) -> list[str]:
    """Whether images are of the weights' type and on their device."""
    layers = (m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    like = next(layers, images)
    if images.device != like.device:
        return [f"{name}: on {images.device}; the network is on {like.device}"]
    if images.dtype != like.dtype:
        return [f"{name}: {images.dtype}; allowed: {like.dtype}, as the network's weights"]
    return []


def _answer_problems(name: str, images: torch.Tensor, model: nn.Module) -> list[str]:
    """Whether the network takes images of this size, and answers with a row of logits for each."""
    model_name, count = type(model).__name__, len(images)
    try:
        with borrowed(model), seeded(0), torch.no_grad():
            shape = tuple(model(images).shape)
    except Exception as error:  # the user's own code raises what it likes
        size = tuple(images.shape[1:])
        return [f"{name}: images of {size}, which {model_name} cannot be run on: {blame(error)}"]
    if len(shape) == 2 and shape[0] == count:
        return []
    return [f"{model_name} returns {shape} for {count} images; allowed: logits ({count}, classes)"]


def count_of(images: object) -> int:
    """How many images there are; 0 where it is no tensor of them."""
    return len(images) if isinstance(images, torch.Tensor) and images.ndim else 0


def label_problems(labels: torch.Tensor | None, count: int) -> list[str]:
    """What is wrong with the labels (count,) of as many images."""
    if labels is None or not count:
        return []
    if found := tensor_problems("labels", labels):
        return found
    if tuple(labels.shape) != (count,):
        return [f"labels: of shape {tuple(labels.shape)}; allowed: ({count},), one a scored image"]
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        return [f"labels: {labels.dtype}; allowed: integers, the number of the class"]
    if int(labels.min()) < 0:
        return [f"labels: {int(labels.min())} among them; allowed: 0 and above"]
    return []


@torch.inference_mode()
def class_problems(labels: torch.Tensor | None, model: nn.Module, image: torch.Tensor) -> list[str]:
    """A network that does not tell two classes apart, labels beyond its classes. `image`: one that
    it takes."""
    classes = model(image.clone()).shape[1]
    if classes < 2:
        return [f"the network answers with {classes} logit; allowed: 2 or more, one a class"]
    if labels is None or int(labels.max()) < classes:
        return []
    return [f"labels: {int(labels.max())} among them; allowed: 0 to {classes - 1}"]


def option_problems(recovery: str, positions: int, precision: str) -> list[str]:
    """What is wrong with an evaluator's options."""
    found = []
    try:
        parse_recovery(recovery)
    except ValueError as error:
        found.append(str(error) + did_you_mean(recovery, RECOVERIES))
    if precision not in PRECISIONS:
        near = did_you_mean(precision, PRECISIONS)
        found.append(f"precision {precision!r}; allowed: {', '.join(PRECISIONS)}{near}")
    return found + count_problems(positions=positions)


def count_problems(least: int = 1, /, **counts: int) -> list[str]:
    """Numbers that are not whole, or below the `least` that there must be."""
    whole = {
        name: isinstance(count, Integral) and not isinstance(count, bool)
        for name, count in counts.items()
    }
    return [
        f"{name} = {count!r}: must be {'' if whole[name] else 'a whole number, '}{least} or more"
        for name, count in counts.items()
        if not whole[name] or count < least
    ]


def estimate_problems(estimates: Estimates, network: Network) -> list[str]:
    """Whether they are of this network."""
    shapes = {name: len(table) for name, table in estimates.importance.items()}
    if shapes == {name: group.channels for name, group in network.groups.items()} and (
        {*estimates.clip} == {*network.layers}
    ):
        return []
    return ["estimates: they are of another network"]


def require(problems: Sequence[str]) -> None:
    """Raises UserError with a line for each of `problems`, if there are any."""
    if problems:
        raise UserError(*dict.fromkeys(problems))  # two sets of images may have one mistake
