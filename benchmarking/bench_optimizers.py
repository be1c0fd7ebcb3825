"""Optimizer steps against the bytes they must move, and against torch's fused AdamW.

Every step is timed in turn with a device copy of the same number of bytes (half read, half written), so its ratio is its
share of the copy's bandwidth; a second row of AdamW names torch.optim.AdamW(fused=True) as the baseline. The last row is
the host's time for a step on 1000 small tensors, with torch's as baseline.

On a CPU every optimizer is timed in turn with torch's fused AdamW, on one tensor and on 200 of 4096 elements.

    python benchmarking/bench_optimizers.py [--device cuda|cpu] [--threads 2] [--elements 500000000] [--no-write]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from harness import Report, measure_pair, row

import bitsandbytes.optim as optim


class Case(NamedTuple):
    name: str
    state_bytes: float  # per element, read and written
    reads_twice: bool = False  # a norm limit reads gradient, parameter and state once more
    settings: dict = {}


_SCALE = 4 / 256  # an absmax for 256 elements
EIGHT = 2 * (1 + _SCALE)
CASES_8BIT = [
    Case("AdamW8bit", 2 * EIGHT),
    Case("Lion8bit", EIGHT),
    Case("SGD8bit", EIGHT, settings={"lr": 1e-3, "momentum": 0.9}),
    Case("RMSprop8bit", EIGHT),
    Case("Adagrad8bit", EIGHT),
    Case("AdEMAMix8bit", 3 * EIGHT),
    Case("LAMB8bit", 2 * EIGHT, reads_twice=True),
]
CASES_32BIT = [Case("AdamW32bit", 16), Case("Lion32bit", 8)]


def moved_by(case: Case, params: list[torch.nn.Parameter]) -> int:
    n, size = sum(p.numel() for p in params), params[0].element_size()
    moved = n * (3 * size + case.state_bytes)
    if case.reads_twice:
        moved += n * (2 * size + case.state_bytes / 2)
    return int(moved)


def copy_of(moved: int) -> Callable[[], object]:
    source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def parameters(sizes: list[int], dtype: torch.dtype, device: str = "cuda") -> list[torch.nn.Parameter]:
    params = []
    for size in sizes:
        p = torch.nn.Parameter(torch.randn(size, device=device, dtype=dtype))
        p.grad = torch.randn_like(p) * 0.01
        params.append(p)
    return params


def bench(
    report: Report, case: Case, sizes: list[int], dtype: torch.dtype, beside_torch: bool = False
) -> None:
    params = parameters(sizes, dtype)
    optimizer = getattr(optim, case.name)(params, **case.settings)
    about = {
        "shape": (len(params), sum(sizes)),
        "dtype": dtype,
        "device": "cuda",
        "moved": moved_by(case, params),
    }
    copy = copy_of(about["moved"])
    report.add(
        row(case.name, "device copy", measure_pair(optimizer.step, copy, "cuda", seconds=0.15), **about)
    )
    del copy
    if beside_torch:
        reference = torch.optim.AdamW(params, fused=True)
        times = measure_pair(optimizer.step, reference.step, "cuda", seconds=0.15)
        report.add(row(case.name, "torch AdamW fused", times, **about))


def host_time(optimizer: torch.optim.Optimizer) -> float:
    """Of one call of step(), which returns before the device is done."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


def bench_host(report: Report, name: str, count: int = 1000, size: int = 4096) -> None:
    params = parameters([size] * count, torch.bfloat16)
    optimizers = getattr(optim, name)(params), torch.optim.AdamW(params, fused=True)
    for optimizer in optimizers:
        for _ in range(3):
            optimizer.step()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(50):
        for kept, optimizer in zip(times, optimizers, strict=True):
            kept.append(host_time(optimizer))
    about = {"shape": (count, count * size), "dtype": torch.bfloat16, "device": "cuda", "moved": 0}
    report.add(row(f"{name} host", "torch AdamW fused host", times, **about))


def bench_cpu(report: Report, case: Case, sizes: list[int], dtype: torch.dtype) -> None:
    """Beside torch's fused AdamW, whatever the rule: it is what a step on a CPU is compared with."""
    params = parameters(sizes, dtype, "cpu")
    optimizer = getattr(optim, case.name)(params, **case.settings)
    times = measure_pair(optimizer.step, torch.optim.AdamW(params, fused=True).step, "cpu", seconds=0.4)
    about = {"shape": (len(params), sum(sizes)), "dtype": dtype, "device": "cpu"}
    report.add(row(case.name, "torch AdamW fused", times, **about, moved=moved_by(case, params)))


def main_cpu(report: Report, n: int, only: str) -> None:
    for case in CASES_8BIT + CASES_32BIT:
        if only not in case.name or case.reads_twice:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            bench_cpu(report, case, [n], dtype)
            bench_cpu(report, case, [4096] * 200, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--elements", type=int, help="500 million, on a CPU 50 million")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()

    if options.device == "cpu":
        torch.set_num_threads(options.threads)
        report = Report("optimizers" if options.threads == 2 else f"optimizers-{options.threads}-thread")
        main_cpu(report, options.elements or 50_000_000, options.only)
    else:
        report = Report("optimizers")
        main_cuda(report, options.elements or 500_000_000, options.only)
    if not options.no_write:
        print(report.write())


def main_cuda(report: Report, n: int, only: str) -> None:
    many = [n * 11 // 1000] * 200
    for case in CASES_8BIT:
        if only in case.name:
            first = case.name == "AdamW8bit"
            bench(report, case, [n], torch.bfloat16, beside_torch=first)
            bench(report, case, many, torch.bfloat16, beside_torch=first)
    for case in CASES_32BIT:
        for dtype in (torch.bfloat16, torch.float32):
            if only in case.name:
                bench(report, case, [n], dtype, beside_torch=case.name == "AdamW32bit")
    if only in "AdamW8bit":
        bench(report, CASES_8BIT[0], [n], torch.float32)
    bench_host(report, "AdamW8bit")
    bench_host(report, "AdamW32bit")


if __name__ == "__main__":
    main()
