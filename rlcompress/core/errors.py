"""The one exception that the command line shows as plain lines."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user: shown as plain lines, exit code 2."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
