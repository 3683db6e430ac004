"""What must be said to Ray before it is imported."""

from __future__ import annotations

import os
import subprocess
import sys


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
