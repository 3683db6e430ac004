"""The options of an experiment: each with its range, its default and what it means.

`spec` reads them from a file; this module only says what is allowed, and what an
experiment's hash is.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from rlcompress.core.errors import did_you_mean
from rlcompress.core.schedule import ARMS, BITS, EVERY_ARM, KEEPS, RECOVERIES, parse_recovery

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

# What a run may change without invalidating its results: where it runs and what it is called.
_UNHASHED: Any = {
    "tracking": True,
    "description": True,
    "device": True,
    "threads": True,
    "storage": True,
    "ppo": {
        "address",
        "num_env_runners",
        "num_envs_per_env_runner",
        "num_gpus_per_env_runner",
    },
}


def _factory(names: Sequence[str]) -> AfterValidator:
    def check(value: str) -> str:
        if value in names or re.fullmatch(r"\w+(\.\w+)*:\w+", value):
            return value
        raise ValueError(
            f'must be one of {", ".join(names)}, or your own as "package.module:function"'
            + did_you_mean(value, names)
        )

    return AfterValidator(check)


Searcher = Annotated[str, _factory(SEARCHERS)]


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("must not name a value twice")
    return values


def _has_one(keeps: tuple[float, ...]) -> tuple[float, ...]:
    if 1.0 not in keeps:
        raise ValueError("must include 1.0, which keeps a group whole")
    return keeps


def _size_range(target: tuple[float, float]) -> tuple[float, float]:
    low, high = target
    if not 1.0 < low <= high:
        raise ValueError("must be [low, high] with 1 < low <= high")
    return target


def _recovery(value: str) -> str:
    try:
        parse_recovery(value)
    except ValueError:
        *names, _ = RECOVERIES
        raise ValueError(
            f"must be one of {', '.join(names)}, or steps:K with K of 1 or more"
            + did_you_mean(value, (*names, "steps:20"))
        ) from None
    return value


def _arm(value: str) -> str:
    if value in EVERY_ARM:
        return value
    raise ValueError(f"must be of {', '.join(EVERY_ARM)}" + did_you_mean(value, EVERY_ARM))


def _image_shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r" *[1-9]\d* *(, *[1-9]\d* *){2}", text):
        raise ValueError("must be C,H,W: three whole numbers of 1 or more")
    return tuple(int(part) for part in text.split(","))


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        raise ValueError(
            "must be one of auto, cpu, cuda, cuda:<index>, mps"
            + did_you_mean(value, ("auto", "cpu", "cuda", "mps"))
        )
    return value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSpec(_Section):
    """The network to compress."""

    factory: Annotated[str, _factory(MODELS)] = Field(
        description=f'{", ".join(MODELS)}, or "package.module:function"'
    )
    args: dict[str, JsonValue] = Field({}, description="keyword arguments of the factory")


class DataSpec(_Section):
    """The data it was trained on."""

    factory: Annotated[str, _factory(DATASETS)] = Field(
        description='digits, fashion_mnist, cifar10, or "package.module:function"'
    )
    args: dict[str, JsonValue] = Field({}, description="keyword arguments of the factory")


class DenseSpec(_Section):
    """Training of the dense network."""

    weights: str | None = Field(
        None, description="a trained state dict (.safetensors or .pt) instead of training one"
    )
    epochs: int = Field(12, ge=1, description="passes over the training images")
    batch_size: int = Field(128, ge=1, description="images a step")
    lr: float = Field(0.1, gt=0, description="peak learning rate of SGD")
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty on the weights")
    rewind_epoch: int = Field(
        1,
        ge=0,
        validate_default=True,
        description="theta_k: weights after this many epochs; below epochs, 0 = initial weights",
    )
    augment: bool = Field(False, description="random crops and flips of the training images")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the label spread evenly")

    @field_validator("rewind_epoch")
    @classmethod
    def _before_the_end(cls, value: int, info: ValidationInfo) -> int:
        epochs = info.data.get("epochs")
        if epochs is not None and value >= epochs:
            raise ValueError(f"must be below dense.epochs ({epochs})")
        return value


class CalibrationSpec(_Section):
    """Images that schedules are recovered and scored on."""

    fit_images: int = Field(256, ge=1, description="images the reconstruction is fitted on")
    score_images: int = Field(256, ge=1, description="other images, which give the score")
    final_images: int = Field(
        1024, ge=0, description="more of them for the finalists, at most half of what is left"
    )
    labels: bool = Field(
        True, description="false = no labels: accuracy is agreement with the dense network"
    )
    positions: int = Field(
        2048, ge=1, description="output positions sampled a layer for the reconstruction"
    )
    estimate_images: int = Field(128, ge=1, description="images of the Fisher and Taylor estimates")


class SearchSpec(_Section):
    """What is searched, by whom, for how long."""

    searcher: Searcher = Field(
        "ppo", description="who proposes schedules: a name, or your own package.module:function"
    )
    baselines: Annotated[tuple[Searcher, ...], Field(strict=False), AfterValidator(_distinct)] = (
        Field(("uniform",), description="searchers to compare with, on the same evaluator")
    )
    episodes: int = Field(
        200, ge=1, description="compression episodes: schedules the searcher may measure"
    )
    baseline_episodes: int | None = Field(
        None, ge=1, description="schedules each baseline may measure; null = episodes"
    )
    target: Annotated[tuple[float, float], Field(strict=False), AfterValidator(_size_range)] = (
        Field((8.0, 40.0), description="[low, high] of dense bytes / artifact bytes, above 1")
    )
    keeps: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1)], ...],
        Field(strict=False, min_length=1),
        AfterValidator(_distinct),
        AfterValidator(_has_one),
    ] = Field(
        KEEPS,
        description="keep ratios a group may take, in (0, 1], with 1.0",
    )
    bits: Annotated[
        tuple[Annotated[int, Field(ge=2, le=8)], ...],
        Field(strict=False, min_length=1),
        AfterValidator(_distinct),
    ] = Field(BITS, description="weight bits a layer may take, 2 to 8")
    round_to: int = Field(
        8, ge=1, description="surviving channels come in multiples of it (or all); 1 = any number"
    )
    recovery: Annotated[str, AfterValidator(_recovery)] = Field(
        "reconstruct",
        description="before scoring: none; bn = batch norms; reconstruct = and least squares; "
        "steps:K = bn and K steps of distillation",
    )
    score: Literal["kl", "accuracy", "unexplained"] = Field(
        "kl", description="KL of the logits to dense's, accuracy, or unexplained variance"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of a candidate's pass; auto = bfloat16 where that is fast"
    )
    finalists: int = Field(
        8, ge=1, description="schedules a searcher that are measured again on more images"
    )
    sensitivity: Literal["estimated", "measured", "refitted"] = Field(
        "estimated",
        description="what knapsack and local solve on: estimates, or one choice at a time measured "
        "with half of the episodes, after batch norms or with readers refitted",
    )
    policy: str = Field(
        "none",
        min_length=1,
        description="whom transfer plays and ppo begins with: default (comes with rlcompress), "
        "none, a run folder, or NAME@ALIAS in MLflow",
    )
    clip: Annotated[str, _factory(CLIPS)] = Field(
        "auto", description="rule for the clipping range: auto, kl, mse, or package.module:function"
    )
    cache_mb: int = Field(256, ge=0, description="bound of the activation cache, MiB a process")


class PPOSpec(_Section):
    """Proximal policy optimization (Schulman et al., 2017)."""

    num_env_runners: int = Field(
        2, ge=0, description="Ray workers that play, measure and retrain; 0 = the driver"
    )
    num_envs_per_env_runner: int = Field(1, ge=1, description="episodes in lockstep a PPO worker")
    num_gpus_per_env_runner: float = Field(0.0, ge=0, description="share of a GPU a worker")
    episodes_per_iteration: int = Field(16, ge=1, description="episodes between two updates")
    epochs: int = Field(6, ge=1, description="passes over the episodes an update")
    minibatch_size: int = Field(128, ge=1, description="steps a gradient")
    lr: float = Field(1e-3, gt=0, description="learning rate of Adam")
    gamma: float = Field(1.0, gt=0, le=1, description="discount factor")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="lambda of the advantage estimate")
    clip: float = Field(0.2, gt=0, lt=1, description="bound on the probability ratio")
    entropy: float = Field(0.003, ge=0, description="coefficient of the entropy bonus")
    vf_coeff: float = Field(0.5, ge=0, description="coefficient of the value loss")
    hidden: int = Field(64, ge=1, description="hidden units a layer")
    temperature: float = Field(0.3, gt=0, description="temperature of the prior")
    explore: float = Field(
        0.3, ge=0, description="deviation of the factors that shake the prior of training episodes"
    )
    kl_weight: float = Field(1.0, ge=0, description="reward for each decade of KL to dense")
    accuracy_weight: float = Field(0.1, ge=0, description="reward for each point of accuracy")
    shaping: float = Field(1.0, ge=0, description="weight of the potential-based shaping")
    address: str | None = Field(
        None, description="Ray cluster; null = RAY_ADDRESS, else one on this machine"
    )


class TicketSpec(_Section):
    """Retraining of the best schedules."""

    top: int = Field(1, ge=1, description="schedules of the front that become tickets")
    floor: float = Field(1.0, ge=0, le=100, description="points of accuracy below dense allowed")
    epochs: int = Field(6, ge=1, description="passes over the training images")
    batch_size: int = Field(128, ge=1, description="images a step")
    lr: float = Field(0.02, gt=0, description="peak learning rate of SGD")
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty on the weights")
    distill: bool = Field(True, description="learn from the dense network's logits")
    fit_images: int = Field(1024, ge=1, description="images of the final reconstruction")
    arms: Annotated[
        tuple[Annotated[str, AfterValidator(_arm)], ...],
        Field(strict=False, min_length=1),
        AfterValidator(_distinct),
    ] = Field(ARMS, description="where training begins: " + ", ".join(EVERY_ARM))


class SpaceSpec(_Section):
    """Values of one option: exactly one of the four."""

    grid: tuple[JsonValue, ...] | None = Field(None, strict=False, min_length=1)
    choice: tuple[JsonValue, ...] | None = Field(None, strict=False, min_length=1)
    uniform: tuple[float, float] | None = Field(None, strict=False)
    loguniform: tuple[float, float] | None = Field(None, strict=False)

    @model_validator(mode="after")
    def _is_one(self) -> SpaceSpec:
        kinds = ("grid", "choice", "uniform", "loguniform")
        if sum(getattr(self, kind) is not None for kind in kinds) != 1:
            raise ValueError(f"must be exactly one of {', '.join(kinds)}")
        for kind in kinds[2:]:
            limits = getattr(self, kind)
            low = 0.0 if kind == "loguniform" else -math.inf
            if limits is not None and not low < limits[0] < limits[1]:
                raise ValueError(f"{kind} must be [low, high], low below high")
        return self

    def extremes(self) -> tuple[Any, ...]:
        """Values that stand for all."""
        values = self.grid or self.choice or self.uniform or self.loguniform
        assert values is not None
        return tuple(values)


#: Options that trials may differ in, beside those of `ppo`: the problem stays the same.
TUNED = ("search.target", "ticket.floor")
#: Those of `ppo` that say where it runs.
_PLACES = ("num_env_runners", "num_gpus_per_env_runner", "address")


def tunable() -> list[str]:
    """Keys that `tune.space` may have."""
    names = [name for name in PPOSpec.model_fields if name not in _PLACES]
    return [*(f"ppo.{name}" for name in names), *TUNED]


def _space(space: dict[str, SpaceSpec]) -> dict[str, SpaceSpec]:
    found: list[str] = []
    sections: dict[str, type[BaseModel]] = {
        "ppo": PPOSpec,
        "search": SearchSpec,
        "ticket": TicketSpec,
    }
    for key, values in space.items():
        if key not in tunable():
            near = did_you_mean(key, tunable())
            found.append(f"{key}: no option that trials may differ in{near}")
            continue
        section, name = key.split(".")
        for value in values.extremes():
            try:
                sections[section].model_validate({name: value})
            except ValidationError as error:
                found.append(f"{key} = {value}: {error.errors()[0]['msg']}")
    if found:
        raise ValueError("; ".join(found))
    return space


class TuneSpec(_Section):
    """Ray Tune: PPO searches that differ in a few options."""

    space: Annotated[dict[str, SpaceSpec], AfterValidator(_space)] = Field(
        {}, description="option -> grid, choice, uniform or loguniform"
    )
    trials: int = Field(4, ge=1, description="draws, of each point of the grids")
    trial_episodes: int | None = Field(
        None, ge=1, description="schedules a trial measures; null = search.episodes"
    )
    runners: int = Field(0, ge=0, description="env runners a trial has; 0 = it plays itself")
    scheduler: Literal["none", "asha", "pbt"] = Field(
        "none", description="who stops or changes trials: none, ASHA, population-based training"
    )


class DynamicSpec(_Section):
    """Compression during one training run, from the rewind point on."""

    target: float = Field(20.0, gt=1, description="dense bytes / artifact bytes to reach")
    warmup: int = Field(101, ge=1, description="minibatches before the first decision")
    watch: int = Field(30, ge=2, description="of them, those that a pass is prepared on")
    recovery_steps: int = Field(10, ge=1, description="minibatches behind each decision")
    rounds: int = Field(2, ge=1, description="passes over the layers")
    final_steps: int = Field(400, ge=0, description="minibatches behind the last decision")
    batch_size: int = Field(64, ge=2, description="images a minibatch")
    lr: float = Field(0.05, gt=0, description="peak learning rate of SGD")
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty on the weights")
    policy_episodes: int = Field(
        0, ge=0, description="training runs that PPO plays first; 0 = the search's policy as it is"
    )

    @field_validator("watch")
    @classmethod
    def _within_warmup(cls, watch: int, info: ValidationInfo) -> int:
        warmup = info.data.get("warmup")
        if warmup is not None and warmup < 2 * watch + 1:
            raise ValueError(f"must be less than half of dynamic.warmup = {warmup}")
        return watch


class ZooNetwork(_Section):
    """A network that the policy learns on."""

    model: ModelSpec = Field(description="its factory and arguments")
    data: DataSpec = Field(description="the data it is trained on")


class ZooSpec(_Section):
    """Networks of `rlcompress train-policy`, and what it learns on them. The experiment's
    own network is not among them: the policy is judged on it."""

    networks: dict[Annotated[str, Field(pattern=NAME)], ZooNetwork] = Field(
        {}, description="name -> model and data"
    )
    target: Annotated[tuple[float, float], Field(strict=False), AfterValidator(_size_range)] = (
        Field((4.0, 100.0), description="size ratios; of each network those that it can reach")
    )
    samples: int = Field(
        40, ge=8, description="schedules measured of each network, for the losses to learn"
    )
    ppo_episodes: int = Field(0, ge=0, description="episodes that PPO plays over the zoo")
    held: int = Field(4, ge=1, description="networks that a worker keeps ready")


class ExportSpec(_Section):
    """Files a ticket is written to."""

    onnx: bool = Field(True, description="write model.onnx, with low-bit weights")
    int8: bool = Field(
        False, description="write model.int8.onnx too: int8 activations, ranges by KL divergence"
    )
    latency: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False), AfterValidator(_distinct)
    ] = Field((1, 64), description="batch sizes to time in onnxruntime, against dense; [] = none")


class TrackingSpec(_Section):
    """Where MLflow keeps its records."""

    uri: str | None = Field(
        None, description="null = MLFLOW_TRACKING_URI, else mlflow.db in the run folder"
    )


class Alone(_Section):
    """A network without data, as `check --model` takes it."""

    model: Annotated[str, _factory(MODELS)]
    input: Annotated[tuple[int, ...], BeforeValidator(_image_shape)]
    classes: int = Field(ge=1)


class Experiment(_Section):
    """One resolved experiment: everything a run depends on."""

    model: ModelSpec = Field(description="the network to compress")
    data: DataSpec = Field(description="the data it was trained on")
    dense: DenseSpec = Field(DenseSpec(), description="training of the dense network")
    calibration: CalibrationSpec = Field(CalibrationSpec(), description="calibration images")
    search: SearchSpec = Field(SearchSpec(), description="what is searched, by whom, how long")
    ppo: PPOSpec = Field(PPOSpec(), description="the policy and how it learns")
    ticket: TicketSpec = Field(TicketSpec(), description="retraining of the best schedules")
    dynamic: DynamicSpec = Field(DynamicSpec(), description="compression during training")
    zoo: ZooSpec = Field(ZooSpec(), description="networks of `rlcompress train-policy`")
    tune: TuneSpec = Field(TuneSpec(), description="trials of `rlcompress tune`")
    export: ExportSpec = Field(ExportSpec(), description="files a ticket is written to")
    tracking: TrackingSpec = Field(TrackingSpec(), description="where MLflow keeps its records")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of every random number")
    device: Annotated[str, AfterValidator(_device)] = Field(
        "auto", description="auto, cpu, cuda, cuda:<index> or mps"
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads of PyTorch; null = half the cores"
    )
    storage: str | None = Field(
        None,
        description="folder, s3:// or gs:// that keeps a copy of the run folder, to go on from",
    )
    description: str = Field("", description="one line for `rlcompress ls`")


def spec_hash(experiment: Experiment, *sections: str) -> str:
    """Twelve hex digits that name what an experiment computes, or what `sections` of it do.

    Options at their default stay out, so that a new option orphans no old run. So does what
    changes no result: tracking, storage, description, device, threads, ppo.address and the number
    and share of the env runners. Raises ValueError on a section that does not exist.
    """
    unknown = [name for name in sections if name not in Experiment.model_fields]
    if unknown:
        raise ValueError(f"no such section: {', '.join(unknown)}")
    values = experiment.model_dump(mode="json", exclude_defaults=True, exclude=_UNHASHED)
    # A section whose only changed options are left out must hash like one that is untouched.
    values = {
        name: value
        for name, value in values.items()
        if value != {} and (not sections or name in sections)
    }
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
