"""Options of a run: the network, its data, and each stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    JsonValue,
    ValidationInfo,
    field_validator,
)

from rlcompress.core.schedule import ARMS, BITS, EVERY_ARM, KEEPS
from rlcompress.schema.values import (
    CLIPS,
    DATASETS,
    MODELS,
    Searcher,
    Section,
    distinct,
    has_one,
    image_shape,
    known_arm,
    known_recovery,
    made_by,
    size_range,
)


class ModelSpec(Section):
    """The network to compress."""

    factory: Annotated[str, made_by(MODELS)] = Field(
        description=f'{", ".join(MODELS)}, or "package.module:function"'
    )
    args: dict[str, JsonValue] = Field({}, description="keyword arguments of the factory")


class DataSpec(Section):
    """The data it was trained on."""

    factory: Annotated[str, made_by(DATASETS)] = Field(
        description='digits, fashion_mnist, cifar10, or "package.module:function"'
    )
    args: dict[str, JsonValue] = Field({}, description="keyword arguments of the factory")


class DenseSpec(Section):
    """Training of the dense network."""

    weights: str | None = Field(
        None,
        min_length=1,
        description="a trained state dict (.safetensors or .pt) instead of training one",
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


class CalibrationSpec(Section):
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


class SearchSpec(Section):
    """What is searched, by whom, for how long."""

    searcher: Searcher = Field(
        "ppo", description="who proposes schedules: a name, or your own package.module:function"
    )
    baselines: Annotated[tuple[Searcher, ...], Field(strict=False), AfterValidator(distinct)] = (
        Field(("uniform",), description="searchers to compare with, on the same evaluator")
    )
    episodes: int = Field(
        200, ge=1, description="compression episodes: schedules the searcher may measure"
    )
    baseline_episodes: int | None = Field(
        None, ge=1, description="schedules each baseline may measure; null = episodes"
    )
    target: Annotated[tuple[float, float], Field(strict=False), AfterValidator(size_range)] = Field(
        (8.0, 40.0), description="[low, high] of dense bytes / artifact bytes, above 1"
    )
    keeps: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1)], ...],
        Field(strict=False, min_length=1),
        AfterValidator(distinct),
        AfterValidator(has_one),
    ] = Field(
        KEEPS,
        description="keep ratios a group may take, in (0, 1], with 1.0",
    )
    bits: Annotated[
        tuple[Annotated[int, Field(ge=1, le=8)], ...],
        Field(strict=False, min_length=1),
        AfterValidator(distinct),
    ] = Field(BITS, description="weight bits a layer may take, 1 to 8")
    round_to: int = Field(
        8, ge=1, description="surviving channels come in multiples of it (or all); 1 = any number"
    )
    recovery: Annotated[str, AfterValidator(known_recovery)] = Field(
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
        description="what knapsack, local and ppo go by: estimates, or one choice at a time "
        "measured with half of the episodes, after batch norms or with readers refitted",
    )
    policy: str = Field(
        "default",
        min_length=1,
        description="whom transfer plays, ppo and dynamic begin with: default (comes with "
        "rlcompress), none, a run folder, or NAME@ALIAS in MLflow",
    )
    clip: Annotated[str, made_by(CLIPS)] = Field(
        "auto", description="rule for the clipping range: auto, kl, mse, or package.module:function"
    )
    cache_mb: int = Field(256, ge=0, description="bound of the activation cache, MiB a process")


class PPOSpec(Section):
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


class TicketSpec(Section):
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
        tuple[Annotated[str, AfterValidator(known_arm)], ...],
        Field(strict=False, min_length=1),
        AfterValidator(distinct),
    ] = Field(ARMS, description="where training begins: " + ", ".join(EVERY_ARM))


class ExportSpec(Section):
    """Files a ticket is written to."""

    onnx: bool = Field(True, description="write model.onnx, with low-bit weights")
    int8: bool = Field(
        False, description="write model.int8.onnx too: int8 activations, ranges by KL divergence"
    )
    latency: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False), AfterValidator(distinct)
    ] = Field((1, 64), description="batch sizes to time in onnxruntime, against dense; [] = none")


class TrackingSpec(Section):
    """Where MLflow keeps its records."""

    uri: str | None = Field(
        None, description="null = MLFLOW_TRACKING_URI, else mlflow.db in the run folder"
    )


class Alone(Section):
    """A network without data, as `check --model` takes it."""

    model: Annotated[str, made_by(MODELS)]
    input: Annotated[tuple[int, ...], BeforeValidator(image_shape)]
    classes: int = Field(ge=1)
