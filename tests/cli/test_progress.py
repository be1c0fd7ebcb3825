"""The progress bar: one moving line on a terminal, rare plain lines elsewhere."""

from __future__ import annotations

import io

import pytest

from bitsandbytes._cli import progress
from bitsandbytes._cli.progress import Progress, human_bytes


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def run(stream: io.StringIO, clock: list[float], seconds: float) -> list[str]:
    with Progress(1000, stream) as bar:
        for _ in range(10):
            clock[0] += seconds
            bar.advance(100, "a.weight")
    return stream.getvalue().replace("\r", "\n").splitlines()


def test_a_terminal_shows_one_line_that_moves(clock):
    stream = Terminal()
    lines = run(stream, clock, 0.2)
    assert stream.getvalue().count("\n") == 1 and stream.getvalue().endswith("\n")
    assert len(lines) == 11 and "100%" in lines[-1] and "a.weight" in lines[-1]
    assert len({len(line) for line in lines[1:]}) == 1


def test_a_terminal_is_not_redrawn_for_every_piece(clock):
    assert len(run(Terminal(), clock, 0.01)) <= 3


@pytest.mark.parametrize(("seconds", "lines"), [(0.1, 0), (1.0, 2), (6.0, 10)])
def test_elsewhere_there_is_a_line_now_and_then(clock, seconds, lines):
    assert len(run(io.StringIO(), clock, seconds)) == lines


def test_an_error_ends_the_moving_line(clock):
    stream = Terminal()
    with pytest.raises(KeyError), Progress(10, stream) as bar:
        clock[0] += 1
        bar.advance(1, "x")
        raise KeyError
    assert stream.getvalue().endswith("\n")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1234567, "1.2 MB"), (2e9, "2.0 GB"), (5.5e12, "5.5 TB")]
)
def test_sizes(count, text):
    assert human_bytes(count) == text
