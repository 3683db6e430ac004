"""The alias `champion` of a registered model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlflow

CHAMPION = "champion"


def crown(
    client: mlflow.MlflowClient, name: str, needed: str, rank: Callable[[Mapping[str, str]], Any]
) -> None:
    """Gives the alias to the version whose tags have the largest `rank`, of equals to the oldest.
    Versions without the tag `needed` do not count; an alias that stands at one stays.

    MLflow cannot compare and set at once, so it looks again until the alias is where it belongs:
    whoever sets it last has seen all versions.
    """
    while True:
        now = client.get_registered_model(name).aliases.get(CHAMPION)
        ranks = {
            str(version.version): rank(version.tags)
            for version in client.search_model_versions(f"name = '{name}'")
            if needed in version.tags
        }
        if now is not None and str(now) not in ranks:
            return  # somebody's own choice, by hand
        best = max(ranks, key=lambda v: (ranks[v], -int(v)))
        if now is not None and ranks[str(now)] >= ranks[best]:
            return
        client.set_registered_model_alias(name, CHAMPION, best)
