"""The commands of ``python -m bitsandbytes``: arguments in, exit code out.

A user's mistake, a damaged file or a full disk ends in one line on stderr; a traceback is for ``--debug`` alone.
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 and 143 interrupted by SIGINT and SIGTERM.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence

from .errors import CliError, Terminated

__all__ = ["main"]

_COMMANDS = {
    "quantize": "write a 4-bit or 8-bit copy of a Hugging Face model folder",
    "inspect": "show formats, sizes and errors of the tensors in a model",
    "selftest": "check every operator on every device against the oracle",
}
_MODULES = {"quantize": "quantize", "inspect": "inspect_command", "selftest": "selftest"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; ``arguments`` default to the process's own."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser(arguments).parse_args(arguments)
    try:
        return options.run(options)
    except CliError as error:
        return _fail(options, str(error), 1)
    except KeyboardInterrupt:
        return _fail(options, "interrupted", 130)
    except Terminated:
        return _fail(options, "terminated", 143)
    except BrokenPipeError:
        # Whoever read our output has seen enough; keep the interpreter from failing on it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        text = "no space left on the device" if full else f"{type(error).__name__}: {error}"
        return _fail(options, text.splitlines()[0], 1)


def _fail(options: argparse.Namespace, text: str, code: int) -> int:
    """Report from within an ``except``; with ``--debug`` its exception goes on."""
    if options.debug:
        raise  # noqa: PLE0704
    print(f"bitsandbytes {options.command}: {text}", file=sys.stderr)
    return code


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    from .. import __version__

    parser = argparse.ArgumentParser(
        prog="python -m bitsandbytes",
        description="Without a command: what bitsandbytes finds on this machine.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        if name in arguments:  # only the chosen command's module is loaded
            module = importlib.import_module(f".{_MODULES[name]}", __package__)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser
