"""What the shell completes: names of experiments, keys for --set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlcompress.core.errors import UserError


def names(ctx: Any, incomplete: str) -> list[tuple[str, str]]:
    """(name, description) of the experiments in the file that the line names."""
    from rlcompress import spec

    try:
        found = spec.load_experiments(Path(ctx.params.get("file") or "experiments.yaml"))
    except UserError:
        return []  # the command itself will say what is wrong
    return [
        (name, str(keys.get("description", "")))
        for name, keys in found.experiments.items()
        if name.startswith(incomplete)
    ]


def keys(incomplete: str) -> list[tuple[str, str]]:
    """(KEY=, what it means) of every option."""
    from rlcompress.schema import Experiment

    found: dict[str, str] = {}
    for name, field in Experiment.model_fields.items():
        inner = getattr(field.annotation, "model_fields", {})
        for key, option in inner.items():
            found[f"{name}.{key}="] = option.description or ""
        if not inner:
            found[f"{name}="] = field.description or ""
    return [(key, words) for key, words in found.items() if key.startswith(incomplete)]
