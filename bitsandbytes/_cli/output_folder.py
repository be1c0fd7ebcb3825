"""A result folder that is there whole or not at all.

Everything is written into a hidden folder beside the result, flushed to disk, and renamed at the end. A failed or
interrupted run removes that folder; one that was killed leaves it behind under a name that says so, and the next run
tells the user.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from .errors import CliError, Terminated

__all__ = ["OutputFolder", "leftovers"]

_MARK = ".bnb-partial-"
_FORMER = "former-"


def leftovers(target: Path) -> list[str]:
    """What to tell the user about folders that killed runs for ``target`` left behind."""
    found = []
    for path in sorted(target.parent.glob(f".{target.name}{_MARK}*")):
        number = path.name.rpartition("-")[2]
        if number.isdigit() and _alive(int(number)):
            continue
        content = (
            f"holds what was at {target} before" if f"{_MARK}{_FORMER}" in path.name else "is incomplete"
        )
        found.append(
            f"{path} is left over from a run that was killed and {content}; delete it if you do not need it"
        )
    return found


def _handle(number: signal.Signals, handler: Any) -> Any:
    """Set a signal's handler and return the one before; only a program's main thread has a say in that."""
    if threading.current_thread() is threading.main_thread():
        return signal.signal(number, handler)
    return None


def _alive(process: int) -> bool:
    if os.name == "nt":  # there, the call below would end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


class OutputFolder:
    """Context manager: write into ``self.path``; leaving without an exception makes that the folder ``target``.

    While it is open, SIGTERM raises :class:`Terminated`, so that clean-up runs.

    Raises:
        CliError: ``target`` is there already and ``overwrite`` is False, or cannot be made.
    """

    def __init__(self, target: Path, overwrite: bool) -> None:
        self.target = target
        self.path = target.parent / f".{target.name}{_MARK}{os.getpid()}"
        occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
        if occupied and not overwrite:
            raise CliError(f"{target} exists; --overwrite replaces it")
        if target.exists() and not target.is_dir():
            raise CliError(f"{target} is not a folder")

    def __enter__(self) -> OutputFolder:
        self._handler = _handle(signal.SIGTERM, _terminate)
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir()
        except OSError as error:
            _handle(signal.SIGTERM, self._handler)
            raise CliError(f"cannot write beside {self.target}: {error.strerror}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            shutil.rmtree(self.path, ignore_errors=True)
            _handle(signal.SIGTERM, self._handler)

    def _publish(self) -> None:
        for path in self.path.rglob("*"):
            _flush(path)
        _flush(self.path)
        retired = self.target.parent / f".{self.target.name}{_MARK}{_FORMER}{os.getpid()}"
        handlers = {number: _handle(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            replaced = self.target.exists()
            if replaced:
                os.rename(self.target, retired)
            try:
                os.rename(self.path, self.target)
            except OSError:
                if replaced:
                    os.rename(retired, self.target)
                raise
        finally:
            for number, handler in handlers.items():
                _handle(number, handler)
        _flush(self.target.parent)
        shutil.rmtree(retired, ignore_errors=True)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _flush(path: Path) -> None:
    """To the disk: the content of a file, the names in a folder."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
