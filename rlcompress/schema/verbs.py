"""Options of the verbs beside `run`: `tune`, `dynamic`, `train-policy`."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from rlcompress.core.errors import did_you_mean
from rlcompress.schema.stages import DataSpec, ModelSpec, PPOSpec, SearchSpec, TicketSpec
from rlcompress.schema.values import (
    NAME,
    Section,
    size_range,
)


class SpaceSpec(Section):
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


class TuneSpec(Section):
    """Ray Tune: PPO searches that differ in a few options."""

    space: Annotated[dict[str, SpaceSpec], AfterValidator(_space)] = Field(
        {}, description="option -> grid, choice, uniform or loguniform"
    )
    trials: int = Field(
        4, ge=1, description="draws, of each point of the grids; without random options one"
    )
    trial_episodes: int | None = Field(
        None, ge=1, description="schedules a trial measures; null = search.episodes"
    )
    runners: int = Field(0, ge=0, description="env runners a trial has; 0 = it plays itself")
    scheduler: Literal["none", "asha", "pbt"] = Field(
        "none", description="who stops or changes trials: none, ASHA, population-based training"
    )

    @property
    def draws(self) -> int:
        """Of each point of the grids. A point without a random option is drawn once: with the same
        options and the same seed it would be the same search."""
        return self.trials if any(space.grid is None for space in self.space.values()) else 1

    @property
    def searches(self) -> int:
        """Trials in all."""
        grids = (len(space.grid) for space in self.space.values() if space.grid is not None)
        return self.draws * math.prod(grids)


class DynamicSpec(Section):
    """Compression during one training run, from the rewind point on."""

    target: float = Field(20.0, gt=1, description="dense bytes / artifact bytes to reach")
    warmup: int = Field(101, ge=1, description="minibatches before the first decision")
    watch: int = Field(
        30, ge=2, validate_default=True, description="of them, those that a pass is prepared on"
    )
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


class ZooNetwork(Section):
    """A network that the policy learns on."""

    model: ModelSpec = Field(description="its factory and arguments")
    data: DataSpec = Field(description="the data it is trained on")


class ZooSpec(Section):
    """Networks of `rlcompress train-policy`, and what it learns on them. The experiment's
    own network is not among them: the policy is judged on it."""

    networks: dict[Annotated[str, Field(pattern=NAME)], ZooNetwork] = Field(
        {}, description="name -> model and data"
    )
    target: Annotated[tuple[float, float], Field(strict=False), AfterValidator(size_range)] = Field(
        (4.0, 100.0), description="size ratios; of each network those that it can reach"
    )
    samples: int = Field(
        40, ge=8, description="schedules measured of each network, for the losses to learn"
    )
    ppo_episodes: int = Field(0, ge=0, description="episodes that PPO plays over the zoo")
    held: int = Field(4, ge=1, description="networks that a worker keeps ready")
