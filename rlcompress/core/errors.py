"""The one exception that the command line shows as plain lines, and others in a line."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class UserError(ValueError):
    """A mistake of the user: shown as plain lines, exit code 2."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))


class OutsideError(Exception):
    """The world outside failed, a cluster say: shown as plain lines, exit code 3."""


def first_line(error: BaseException) -> str:
    """The first line of what it says; its class where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def did_you_mean(word: object, allowed: Sequence[str]) -> str:
    """`; did you mean "NEAREST"?`, or nothing when no allowed word is near."""
    matches = difflib.get_close_matches(str(word), allowed, n=1)
    return f'; did you mean "{matches[0]}"?' if matches else ""
