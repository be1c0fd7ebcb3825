"""``python -m bitsandbytes``: diagnostics; with a sub-command, the command line."""

from __future__ import annotations

import sys

__all__ = ["run"]


def run() -> int:
    """Exit code of the diagnostics, or of the command that the process's arguments name."""
    if len(sys.argv) > 1:
        from ._cli import main

        return main()
    from .diagnostics.main import main as diagnose

    diagnose()  # exits by itself when something is wrong
    return 0


if __name__ == "__main__":
    sys.exit(run())
