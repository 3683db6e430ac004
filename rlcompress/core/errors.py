"""The one exception that the command line shows as plain lines, and others in a line."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user: shown as plain lines, exit code 2."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))


def first_line(error: BaseException) -> str:
    """The first line of what it says; its class where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
