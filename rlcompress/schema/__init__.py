"""The options of an experiment: each with its range, its default and what it means.

`spec` reads them from a file; this module only says what is allowed, and what an
experiment's hash is.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from rlcompress.schema.stages import (
    Alone,
    CalibrationSpec,
    DataSpec,
    DenseSpec,
    ExportSpec,
    ModelSpec,
    PPOSpec,
    SearchSpec,
    TicketSpec,
    TrackingSpec,
)
from rlcompress.schema.values import NAME, Section, known_device
from rlcompress.schema.verbs import DynamicSpec, SpaceSpec, TuneSpec, ZooSpec

__all__ = [
    "NAME",
    "Alone",
    "CalibrationSpec",
    "DataSpec",
    "DenseSpec",
    "DynamicSpec",
    "Experiment",
    "ExportSpec",
    "ModelSpec",
    "PPOSpec",
    "SearchSpec",
    "SpaceSpec",
    "TicketSpec",
    "TrackingSpec",
    "TuneSpec",
    "ZooSpec",
    "spec_hash",
]

# What a run may change without invalidating its results: where it runs and what it is called.
_UNHASHED: Any = {
    "tracking": True,
    "description": True,
    "device": True,
    "threads": True,
    "storage": True,
    "search": {"cache_mb"},
    "ppo": {
        "address",
        "num_env_runners",
        "num_envs_per_env_runner",
        "num_gpus_per_env_runner",
    },
}


class Experiment(Section):
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
    device: Annotated[str, AfterValidator(known_device)] = Field(
        "auto", description="auto, cpu, cuda, cuda:<index> or mps"
    )
    threads: int | None = Field(
        None, ge=1, le=4096, description="CPU threads of PyTorch; null = half the cores"
    )
    storage: str | None = Field(
        None,
        description="folder, s3:// or gs:// that keeps a copy of the run folder, to go on from",
    )
    description: str = Field("", description="one line for `rlcompress ls`")


def spec_hash(experiment: Experiment, *sections: str) -> str:
    """Twelve hex digits that name what an experiment computes, or what `sections` of it do.

    Options at their default stay out, so that a new option orphans no old run. So does what
    changes no result: tracking, storage, description, device, threads, search.cache_mb, ppo.address
    and the number and share of the env runners. Raises ValueError on a section that does not exist.
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
