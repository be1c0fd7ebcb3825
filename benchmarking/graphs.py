"""Timing on a GPU without the host: CUDA graphs of many calls. Imports no bitsandbytes, so that any can be timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["copies_of", "copy_bandwidth", "graph_times", "times_of_package"]

_ROTATED_BYTES = 256 << 20  # of weights, several times a last-level cache
_REPLAYS = 15
_WARM_SECONDS = 0.1  # of work before the first timing, for the clocks to rise


def graph_times(call: Callable[[int], object], count: int) -> list[float]:
    """Seconds of one call, from replays of a graph that makes ``count``."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i)
    deadline = time.perf_counter() + _WARM_SECONDS
    while time.perf_counter() < deadline:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(_REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / count)
    return times


def copies_of(nbytes: int) -> int:
    return max(2, -(_ROTATED_BYTES // -nbytes))


def copy_bandwidth() -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.randn(
        8192, 28672, device="cuda"
    )  # no power of two, which would favour some memory channels
    target = torch.empty_like(source)
    times = sorted(graph_times(lambda i: target.copy_(source), 5))
    return 2 * source.nbytes / times[len(times) // 2]


def times_of_package(script: str, folder: str, *task: Any) -> dict[int, list[float]]:
    """What ``script --child`` prints for a task, in a process whose bitsandbytes comes from ``folder``: times by tokens."""
    environment = {**os.environ, "PYTHONPATH": folder}
    command = [sys.executable, os.path.abspath(script), "--child", json.dumps(task)]
    output = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, cwd="/"
    ).stdout
    return {int(tokens): times for tokens, times in json.loads(output.splitlines()[-1]).items()}
