"""Where an env runner's time goes: timers put around its parts from outside, in its own process."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from rlcompress.core.incremental import IncrementalEvaluator
from rlcompress.core.observation import Observer
from rlcompress.rl.environment import CompressionCallbacks
from rlcompress.rl.module import PolicyModule

CLOCK = "clock"
#: Seconds of this process so far.
_totals: dict[str, float] = defaultdict(float)
_running: set[str] = set()


def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function; its seconds are added to `name`, once where one of that name calls
    another."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if name in _running:
            return function(*args, **kwargs)
        _running.add(name)
        begun = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            _running.remove(name)
            _totals[name] += time.perf_counter() - begun

    return wrapper


def seconds(name: str) -> float:
    return _totals[name]


def _time_methods(name: str, owner: Any, *methods: str) -> None:
    for method in methods:
        found = getattr(owner, method)
        if not hasattr(found, "__wrapped__"):
            setattr(owner, method, timed(name, found))


class TimedRecords(CompressionCallbacks):
    """`CompressionCallbacks` that also sends, an iteration, this runner's seconds so far:

    evaluator    IncrementalEvaluator's advance and finish
    observer     observations and masks
    environment  step and reset of all environments, with the two above
    policy       forward passes that choose actions
    sample       the whole of `sample`
    """

    def on_environment_created(
        self, *, env_runner: Any, env: Any, env_context: Any, **kwargs: Any
    ) -> None:
        super().on_environment_created(env_runner=env_runner, env=env, env_context=env_context)
        _time_methods("evaluator", IncrementalEvaluator, "advance", "finish")
        _time_methods("observer", Observer, "observe")
        _time_methods("environment", env, "step", "reset")
        _time_methods("policy", PolicyModule, "forward_exploration")
        sample = env_runner.sample
        _totals.clear()  # RLlib resets the environments before it samples

        def begin(*args: Any, **kwargs: Any) -> Any:
            self.begun = time.perf_counter()
            return sample(*args, **kwargs)

        env_runner.sample = begin

    def on_sample_end(
        self, *, env_runner: Any, metrics_logger: Any, samples: Any, **kwargs: Any
    ) -> None:
        _totals["sample"] += time.perf_counter() - self.begun
        row = {"runner": env_runner.worker_index, **_totals}
        metrics_logger.log_value(CLOCK, row, reduce="item_series")
