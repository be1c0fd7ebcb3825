"""What a command tells its user instead of a traceback."""

from __future__ import annotations

__all__ = ["CliError", "Terminated"]


class CliError(Exception):
    """A command cannot go on; the text is one line that names what was given and what would help."""


class Terminated(BaseException):
    """The process was asked to stop (SIGTERM). Not an ``Exception``: nothing but clean-up may catch it."""
