"""Printing for the diagnostics, and asking another program."""

from __future__ import annotations

import shlex
import subprocess
import textwrap

__all__ = ["execute_and_return", "print_dedented", "print_header"]

HEADER_WIDTH = 60


def print_header(text: str, width: int = HEADER_WIDTH, filler: str = "=") -> None:
    """``text`` in the middle of a line of ``filler``; an empty text gives a plain line."""
    print(f" {text} ".center(width, filler) if text else filler * width)


def print_dedented(text: str) -> None:
    """A text block without its common indent and without blank lines."""
    print("\n".join(line for line in textwrap.dedent(text).strip("\n").split("\n") if line.strip()))


def execute_and_return(command_string: str) -> tuple[str, str]:
    """Run a program, split as a shell would but without one; ``(stdout, stderr)`` as stripped text."""
    result = subprocess.run(shlex.split(command_string), capture_output=True, check=False)
    return result.stdout.decode("utf-8").strip(), result.stderr.decode("utf-8").strip()
