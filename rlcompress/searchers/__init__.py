"""What proposes schedules. One file each, one function each:

    search(problem, settings, history, measure) -> iterator of Records

`history` holds the records this searcher has already measured; the iterator goes on behind
them and numbers evaluations from `len(history) + 1`. `measure` turns schedules into
measurements, here or on a cluster. One's own is named as "package.module:function"; of what it
yields as many count as there are evaluations left.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from rlcompress.core.errors import UserError
from rlcompress.core.models import find_factory
from rlcompress.core.problem import Problem
from rlcompress.core.schedule import Record
from rlcompress.searchers.base import Measure, Search, Settings, in_process

__all__ = ["SEARCHERS", "Measure", "Search", "Settings", "find", "in_process"]

#: What a search is called with, in this order.
_GIVEN = ("problem", "settings", "history", "measure")
SEARCHERS = ("uniform", "taylor", "random", "knapsack", "local", "evolution")


def own_search(name: str) -> Callable[..., object]:
    """The function that "package.module:function" names. Raises UserError where there is none, or
    it does not take what a search is given."""
    own = find_factory(name, {})
    try:
        takes = inspect.signature(own)
    except ValueError:  # of a function that is not Python's
        return own
    try:
        takes.bind(*_GIVEN)
    except TypeError as error:
        given = ", ".join(_GIVEN)
        raise UserError(f"{name}{takes}: {error}; allowed: a function of ({given})") from error
    return own


def find(name: str) -> Search:
    """The search function of a searcher that needs no Ray, or of "package.module:function".
    Raises KeyError on another name, UserError if there is no such function."""
    if ":" in name:
        own = own_search(name)

        def search(
            problem: Problem, settings: Settings, history: Sequence[Record], measure: Measure
        ) -> Iterator[Record]:
            found, done = own(problem, settings, history, measure), len(history)
            if not isinstance(found, Iterable):
                raise UserError(f"{name}: returns {found!r}, not an iterator of Records")
            left = max(0, settings.evaluations - done)
            for number, record in enumerate(islice(found, left), start=done + 1):
                if not isinstance(record, Record):
                    raise UserError(f"{name}: yields {record!r}, not a Record")
                # The archive knows it by the name that the experiment has for it.
                yield replace(record, searcher=name, evaluation=number)

        return search
    from rlcompress.searchers import evolution, knapsack, local, random, taylor, uniform

    return {
        "uniform": uniform.search,
        "taylor": taylor.search,
        "random": random.search,
        "knapsack": knapsack.search,
        "local": local.search,
        "evolution": evolution.search,
    }[name]
