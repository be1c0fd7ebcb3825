"""A progress bar on stderr: one moving line on a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

__all__ = ["Progress", "human_bytes"]

_REDRAW_SECONDS = 0.1
_LINE_SECONDS = 5.0
_BAR = 24


def human_bytes(count: float) -> str:
    """``1234567`` as ``1.2 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class Progress:
    """Counts bytes towards a total. A context manager: the moving line is ended however the work ends."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self._total = max(total, 1)
        self._stream = sys.stderr if stream is None else stream
        self._tty = self._stream.isatty()
        self._done = 0
        self._begin = self._shown = time.monotonic()
        self._drawn = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()

    def advance(self, count: int, what: str) -> None:
        """``count`` more bytes are done; ``what`` is being worked on."""
        self._done += count
        now = time.monotonic()
        if now - self._shown < (_REDRAW_SECONDS if self._tty else _LINE_SECONDS) and self._done < self._total:
            return
        if not self._tty and now - self._begin < _LINE_SECONDS:
            return  # off a terminal, work that is over at once needs no line
        self._shown = now
        line = self._line(now - self._begin, what)
        if self._tty:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r" + line[:width].ljust(width))
            self._drawn = True
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def _line(self, seconds: float, what: str) -> str:
        share = min(self._done / self._total, 1.0)
        rate = self._done / max(seconds, 1e-9)
        left = (self._total - self._done) / max(rate, 1.0)
        filled = round(share * _BAR)
        return (
            f"{share:4.0%} [{'#' * filled}{'.' * (_BAR - filled)}] {human_bytes(self._done)}/{human_bytes(self._total)}"
            f"  {human_bytes(rate)}/s  {int(left) // 60}:{int(left) % 60:02d} left  {what}"
        )
