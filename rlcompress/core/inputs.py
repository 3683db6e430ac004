"""What callers of the library hand in, checked before anything is computed with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlcompress.core.errors import UserError, did_you_mean
from rlcompress.core.graph import Network
from rlcompress.core.process import PRECISIONS
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
    channels = network.input_shape[0]
    if images.ndim != 4 or images.shape[1] != channels or images.numel() == 0:
        return [
            f"{name}: of shape {tuple(images.shape)}; "
            f"allowed: (N, {channels}, H, W) with at least one image"
        ]
    like = next(p for p in model.parameters() if p.is_floating_point())
    if images.device != like.device:
        return [f"{name}: on {images.device}; the network is on {like.device}"]
    if images.dtype != like.dtype:
        return [f"{name}: {images.dtype}; allowed: {like.dtype}, as the network's weights"]
    if not bool(images.isfinite().all()):
        return [f"{name}: has values that are not finite"]
    most = max(map(abs, map(float, images.aminmax())))
    if most > LARGEST:
        return [f"{name}: has values of up to {most:.2g}; allowed: up to {LARGEST:.0g}, normalised"]
    return []


def label_problems(labels: torch.Tensor | None, count: int) -> list[str]:
    """What is wrong with the labels (count,) of as many images."""
    if labels is None:
        return []
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
    """Numbers below the `least` that there must be."""
    return [
        f"{name} = {count}: must be {least} or more"
        for name, count in counts.items()
        if count < least
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
        raise UserError(*problems)
