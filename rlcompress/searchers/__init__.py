"""What proposes schedules. One file each, one function each:

    search(problem, settings, history) -> iterator of Records

`history` holds the records this searcher has already measured; the iterator goes on behind
them and numbers evaluations from `len(history) + 1`. Every record it yields was measured.
"""

from rlcompress.searchers.base import Search, Settings

__all__ = ["SEARCHERS", "Search", "Settings", "find"]

SEARCHERS = ("uniform", "random", "knapsack")


def find(name: str) -> Search:
    """The search function of a searcher that needs no Ray. Raises KeyError on another name."""
    from rlcompress.searchers import knapsack, random, uniform

    return {
        "uniform": uniform.search,
        "random": random.search,
        "knapsack": knapsack.search,
    }[name]
