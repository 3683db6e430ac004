"""Names and values that options may have, and how a wrong one is told."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
)

from rlcompress.core.errors import did_you_mean
from rlcompress.core.schedule import EVERY_ARM, RECOVERIES, parse_recovery

MODELS = (
    *("vgg11", "vgg16", "vgg19", "mobilenetv1", "mobilenetv2"),
    *("resnet18", "resnet20", "resnet56", "squeezenet", "cnn"),
)
DATASETS = ("digits", "fashion_mnist", "cifar10")
SEARCHERS = (
    *("ppo", "transfer", "untrained", "knapsack", "local"),
    *("evolution", "taylor", "random", "uniform"),
)
CLIPS = ("auto", "kl", "mse")

#: Of an experiment or a network: also the name of a folder.
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


def made_by(names: Sequence[str]) -> AfterValidator:
    def check(value: str) -> str:
        if value in names or re.fullmatch(r"\w+(\.\w+)*:\w+", value):
            return value
        raise ValueError(
            f'must be one of {", ".join(names)}, or your own as "package.module:function"'
            + did_you_mean(value, names)
        )

    return AfterValidator(check)


Searcher = Annotated[str, made_by(SEARCHERS)]


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("must not name a value twice")
    return values


def has_one(keeps: tuple[float, ...]) -> tuple[float, ...]:
    if 1.0 not in keeps:
        raise ValueError("must include 1.0, which keeps a group whole")
    return keeps


def size_range(target: tuple[float, float]) -> tuple[float, float]:
    low, high = target
    if not 1.0 < low <= high:
        raise ValueError("must be [low, high] with 1 < low <= high")
    return target


def known_recovery(value: str) -> str:
    try:
        parse_recovery(value)
    except ValueError:
        *names, _ = RECOVERIES
        raise ValueError(
            f"must be one of {', '.join(names)}, or steps:K with K of 1 or more"
            + did_you_mean(value, (*names, "steps:20"))
        ) from None
    return value


def known_arm(value: str) -> str:
    if value in EVERY_ARM:
        return value
    raise ValueError(f"must be of {', '.join(EVERY_ARM)}" + did_you_mean(value, EVERY_ARM))


def image_shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r" *[1-9]\d* *(, *[1-9]\d* *){2}", text):
        raise ValueError("must be C,H,W: three whole numbers of 1 or more")
    return tuple(int(part) for part in text.split(","))


def known_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        raise ValueError(
            "must be one of auto, cpu, cuda, cuda:<index>, mps"
            + did_you_mean(value, ("auto", "cpu", "cuda", "mps"))
        )
    return value


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
