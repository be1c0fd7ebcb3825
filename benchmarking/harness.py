"""Measuring kernels: warm-up, cold or warm caches, medians and spread, a baseline in the same run, JSON rows.

Machines differ and are shared, so every row carries its ratio to a named baseline that was timed alternately with it;
compare ratios across runs, not times. On a GPU, events measure the device; on a CPU, the clock measures the call.
"""

from __future__ import annotations

import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bitsandbytes._native import has_native, lib

__all__ = ["RESULTS", "Report", "Row", "measure_pair", "row"]

RESULTS = Path(__file__).parent / "results"
_LEAD_CYCLES = (
    2_000_000  # the device is busy for about a millisecond while the host enqueues, so that is not measured
)
_FLUSH_BYTES = 256 << 20  # larger than any last-level cache here


@dataclass
class Row:
    """One measurement. Times are seconds, ``bytes`` what the operation must move, ``ratio`` baseline / median."""

    operation: str
    shape: list[int]
    dtype: str
    device: str
    threads: int
    cold: bool
    median: float
    spread: float  # half the distance between the quartiles, relative to the median
    bytes: int
    gigabytes_per_second: float
    baseline: str
    baseline_median: float
    ratio: float
    memory: int | None = None  # bytes allocated at most beside the results, where that was measured


@dataclass
class Report:
    """Rows of one run on one machine, written as ``results/<date>-<name>-<device>.json``."""

    name: str
    rows: list[Any] = field(default_factory=list)  # dataclasses with a `device`

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(
            f"{row.operation:32} {'x'.join(map(str, row.shape)):>12} {row.dtype:9} "
            f"{'cold' if row.cold else 'warm'} {row.median * 1e3:9.3f} ms ±{row.spread:4.0%} "
            f"{row.gigabytes_per_second:8.2f} GB/s   {row.ratio:5.2f} of {row.baseline}"
            + ("" if row.memory is None else f"   {row.memory / 2**20:.1f} MiB beside the results"),
            flush=True,
        )

    def write(self) -> Path:
        RESULTS.mkdir(exist_ok=True)
        on_gpu = any(row.device != "cpu" for row in self.rows)
        device = torch.cuda.get_device_name() if on_gpu else _processor()
        slug = re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")
        path = RESULTS / f"{date.today().isoformat()}-{self.name}-{slug}.json"
        head = {
            "device": device,
            "driver": _driver() if on_gpu else "none",
            "platform": platform.platform(),
            "torch": torch.__version__,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cpu_kernels": lib.bnb_cpu_isa().decode() if has_native("bnb_cpu_isa") else "torch",
            "commit": _commit(),
            "rows": [asdict(row) for row in self.rows],
        }
        path.write_text(json.dumps(head, indent=1) + "\n")
        return path


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _driver() -> str:
    return _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]


def _commit() -> str:
    return _run("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD")


def _time_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _time_cuda(call: Callable[[], object]) -> float:
    torch.cuda._sleep(_LEAD_CYCLES)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure_pair(
    call: Callable[[], object],
    baseline: Callable[[], object],
    device: str,
    *,
    cold: bool = False,
    seconds: float = 0.5,
) -> tuple[list[float], list[float]]:
    """Times of ``call`` and ``baseline``, taken in turn so that a busy machine slows both.

    ``cold`` overwrites a buffer larger than the caches before every timing.
    """
    timer = _time_cuda if device == "cuda" else _time_cpu
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device) if cold else None
    for _ in range(3):
        call()
        baseline()
    times: tuple[list[float], list[float]] = ([], [])
    deadline = time.perf_counter() + 2 * seconds
    while len(times[0]) < 7 or (time.perf_counter() < deadline and len(times[0]) < 1000):
        for run, kept in zip((call, baseline), times, strict=True):
            if flush is not None:
                flush.fill_(0)
            kept.append(timer(run))
    return times


def row(
    operation: str,
    baseline_name: str,
    times: tuple[list[float], list[float]],
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    moved: int,
    cold: bool = False,
) -> Row:
    """Summarise the two lists of times of :func:`measure_pair`."""
    median, other = (statistics.median(kept) for kept in times)
    quartiles = statistics.quantiles(times[0], n=4)
    return Row(
        operation=operation,
        shape=list(shape),
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        threads=torch.get_num_threads() if device == "cpu" else 0,
        cold=cold,
        median=median,
        spread=(quartiles[2] - quartiles[0]) / 2 / median,
        bytes=moved,
        gigabytes_per_second=moved / median / 1e9,
        baseline=baseline_name,
        baseline_median=other,
        ratio=other / median,
    )
