"""What proposes schedules. One file each, one function each:

    search(problem, settings, history, measure) -> iterator of Records

`history` holds the records this searcher has already measured; the iterator goes on behind
them and numbers evaluations from `len(history) + 1`. `measure` turns schedules into
measurements, here or on a cluster.
"""

from rlcompress.searchers.base import Measure, Search, Settings, in_process

__all__ = ["SEARCHERS", "Measure", "Search", "Settings", "find", "in_process"]

SEARCHERS = ("uniform", "taylor", "random", "knapsack", "local", "evolution")


def find(name: str) -> Search:
    """The search function of a searcher that needs no Ray. Raises KeyError on another name."""
    from rlcompress.searchers import evolution, knapsack, local, random, taylor, uniform

    return {
        "uniform": uniform.search,
        "taylor": taylor.search,
        "random": random.search,
        "knapsack": knapsack.search,
        "local": local.search,
        "evolution": evolution.search,
    }[name]
