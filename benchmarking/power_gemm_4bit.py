"""Clock and power while the 4-bit matmul and the dense layer run call after call, as ``nvidia-smi`` samples them.

Many large products of a power-hungry kind make the card lower its clock: then neither bytes nor a unit of the processor
is the limit, and what costs less energy is faster. The last lines estimate what every call pays whatever its size: how
far the times of 8192 x 8192 lie above what 28672 x 8192 takes for as many weights. They run at different clocks, so there
are two estimates: as if times did not depend on the clock, and as if they were inversely proportional to it.

    python benchmarking/power_gemm_4bit.py [--no-write]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from statistics import median

import torch
from graphs import copies_of, graph_times

SHAPES = [(4096, 4096), (14336, 4096), (8192, 8192), (28672, 8192)]
TOKENS = [1, 8, 16, 32, 64, 128]
SMALLER, LARGER = SHAPES[2:]
BLOCKSIZE = 64
DTYPE = torch.bfloat16
_SECONDS, _EVERY = 0.4, 20  # of a loop; milliseconds between two samples
_FIELDS = "clocks.sm,power.draw.instant,clocks_event_reasons.sw_power_cap"


@dataclass
class Loop:
    """Medians; ``capped`` is the share of samples in which the driver held the clock down for power."""

    kernel: str
    shape: list[int]  # M, N, K
    device: str
    microseconds: float
    gigahertz: float
    watts: float
    capped: float


class Sampler:
    """What ``nvidia-smi`` says while the block runs."""

    def __enter__(self) -> Sampler:
        command = [
            *("nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"),
            *("-lms", str(_EVERY), "-i", f"GPU-{torch.cuda.get_device_properties(0).uuid}"),
        ]
        self.samples: list[tuple[float, float, bool]] = []
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        return self

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            clock, watts, capped = line.split(", ")
            self.samples.append((float(clock) / 1e3, float(watts), capped.strip() == "Active"))

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._thread.join()
        if not self.samples:
            raise RuntimeError("nvidia-smi gave no sample")


def looped(kernel: str, shape: tuple[int, int, int], call, count: int) -> Loop:
    times = graph_times(call, count)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i)
    with Sampler() as sampler:
        deadline = time.perf_counter() + _SECONDS
        while time.perf_counter() < deadline:
            graph.replay()
            torch.cuda.synchronize()
    settled = sampler.samples[len(sampler.samples) // 2 :]
    return Loop(
        kernel=kernel,
        shape=list(shape),
        device="cuda",
        microseconds=median(times) * 1e6,
        gigahertz=median(sample[0] for sample in settled),
        watts=median(sample[1] for sample in settled),
        capped=sum(sample[2] for sample in settled) / len(settled),
    )


def loops_of(N: int, K: int) -> list[Loop]:
    import bitsandbytes as bnb

    dense = [torch.randn(N, K, device="cuda", dtype=DTYPE) / K**0.5 for _ in range(copies_of(N * K * 2))]
    packed = [
        bnb.functional.quantize_4bit(dense[i % len(dense)], blocksize=BLOCKSIZE, quant_type="nf4")
        for i in range(copies_of(N * K // 2))
    ]
    loops = []
    for M in TOKENS:
        A = torch.randn(M, K, device="cuda", dtype=DTYPE)

        def ours(i: int, A: torch.Tensor = A) -> None:
            weight, state = packed[i % len(packed)]
            bnb.matmul_4bit(A, weight.t(), state)

        def theirs(i: int, A: torch.Tensor = A) -> None:
            torch.nn.functional.linear(A, dense[i % len(dense)])

        with torch.no_grad():
            loops.append(looped("matmul_4bit", (M, N, K), ours, max(20, len(packed))))
            loops.append(looped("dense", (M, N, K), theirs, max(20, len(dense))))
    return loops


def fixed_costs(smaller: Loop, larger: Loop) -> list[float]:
    """Microseconds that a call takes beside what grows with the weights: with times as they are, and at one clock."""
    weights = larger.shape[1] * larger.shape[2] / (smaller.shape[1] * smaller.shape[2])
    clocks = larger.gigahertz / smaller.gigahertz
    times = (larger.microseconds, larger.microseconds * clocks)
    return [smaller.microseconds - (time - smaller.microseconds) / (weights - 1) for time in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    if shutil.which("nvidia-smi") is None:
        sys.exit("power_gemm_4bit.py needs nvidia-smi on the path")
    from harness import Report

    report = Report("gemm-4bit-power")
    print("     M     N     K  kernel            us   GHz    W  capped")
    for N, K in SHAPES:
        for loop in loops_of(N, K):
            report.rows.append(loop)
            print(
                f"{loop.shape[0]:6} {N:5} {K:5}  {loop.kernel:12} {loop.microseconds:7.1f} {loop.gigahertz:5.2f}"
                f" {loop.watts:4.0f} {loop.capped:7.0%}",
                flush=True,
            )
        torch.cuda.empty_cache()
    of_case = {(loop.kernel, tuple(loop.shape)): loop for loop in report.rows}
    for kernel in ("matmul_4bit", "dense"):
        print(f"fixed cost of {kernel}, us:", end="")
        for M in TOKENS:
            costs = fixed_costs(of_case[kernel, (M, *SMALLER)], of_case[kernel, (M, *LARGER)])
            print(f"  M={M} {costs[0]:.1f} to {costs[1]:.1f}", end="")
        print()
    if not options.no_write:
        print(report.write())


if __name__ == "__main__":
    main()
