"""What must be said to Ray before it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlcompress import spec
from rlcompress.core.errors import UserError
from rlcompress.rl.cluster import require_gpus
from rlcompress.schema import PPOSpec

ROOT = Path(__file__).parents[2]


def test_workers_share_the_environment_of_a_driver_started_by_uv_run():
    """Otherwise every worker is a `uv run` of its own: a minute a process."""
    code = (
        "import rlcompress.rl.cluster;"
        "from ray._private import ray_constants;"
        "print(ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV)"
    )
    clean = {k: v for k, v in os.environ.items() if k != "RAY_ENABLE_UV_RUN_RUNTIME_ENV"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(
    ("runners", "share", "there", "needed", "fitting"),
    [(8, 0.25, 1, 2, 0.125), (3, 0.6, 2, 3, 0.5), (8, 1.0, 3, 8, 0.3333), (2, 2.0, 2, 4, 1.0)],
)
def test_too_few_gpus_are_told_with_the_share_that_fits(runners, share, there, needed, fitting):
    def ppo(share: float) -> PPOSpec:
        return PPOSpec(num_env_runners=runners, num_gpus_per_env_runner=share)

    require_gpus(ppo(share), needed)
    require_gpus(ppo(fitting), there)
    with pytest.raises(UserError) as told:
        require_gpus(ppo(share), there)
    assert str(told.value) == (
        f"ppo.num_gpus_per_env_runner = {share:g}: {runners} env runners need {needed} GPUs, this "
        f"machine has {there}; enough with --set ppo.num_gpus_per_env_runner={fitting:g}"
    )


def test_no_gpu_at_all_is_told_with_the_way_without():
    with pytest.raises(
        UserError, match=r"; --set device=cpu --set ppo\.num_gpus\S+=0 runs without"
    ):
        require_gpus(PPOSpec(num_env_runners=1, num_gpus_per_env_runner=0.5), 0)
    require_gpus(PPOSpec(num_env_runners=0, num_gpus_per_env_runner=0.5), 0)
    require_gpus(PPOSpec(num_env_runners=4), 0)


@pytest.mark.parametrize("name", ["vgg19-cifar10", "mobilenetv2-cifar10"])
def test_descriptions_of_the_gpu_experiments_say_how_many(name):
    experiment = spec.resolve(spec.load_experiments(ROOT / "experiments.yaml"), name)
    require_gpus(experiment.ppo, 2)
    assert "needs two GPUs" in experiment.description
    with pytest.raises(UserError) as told:
        require_gpus(experiment.ppo, 1)
    words = str(told.value).partition("; enough with ")[2]
    assert words in experiment.description
    assert words in " ".join((ROOT / "README.md").read_text().split())
