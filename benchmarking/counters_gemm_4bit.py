"""What keeps the 4-bit matmul's main kernel from its floor: hardware counters, read by ``ncu`` one case at a time.

Shares are of what the unit could do in the time the kernel took, at the clock it ran at. Each case starts with cold
caches; the time includes what the profiler adds to a launch, about two microseconds, and leaves out the kernels that
arrange tokens and add up, so it is no benchmark: bench_gemm_4bit.py is.

    python benchmarking/counters_gemm_4bit.py [--no-write]
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

SHAPES = [(4096, 4096), (14336, 4096), (8192, 8192), (28672, 8192)]
TOKENS = [1, 8, 16, 32, 64, 128]
BLOCKSIZE = 64
_CASES = [(N, K, M) for N, K in SHAPES for M in TOKENS]
_KERNELS = "regex:gemm_4bit_(mma|wgmma)_kernel"
_WEIGHTS = 4096  # that a count of wavefronts refers to: 64 rows times 64 k

_SHARE = "avg.pct_of_peak_sustained_elapsed"
_METRICS = {
    "nanoseconds": "gpu__time_duration.sum",
    "cycles": "sm__cycles_elapsed.max",
    "memory": f"dram__throughput.{_SHARE}",
    "second_level_cache": f"lts__throughput.{_SHARE}",
    "shared_memory_pipe": f"l1tex__data_pipe_lsu_wavefronts.{_SHARE}",
    "tensor_cores": f"sm__pipe_tensor_cycles_active.{_SHARE}",
    "issue_slots": f"sm__inst_issued.{_SHARE}",
    "wavefronts": "l1tex__data_pipe_lsu_wavefronts.sum",
    "instructions": "smsp__inst_executed.sum",
}


@dataclass
class Counters:
    """One kernel. Shares lie between 0 and 1; wavefronts and instructions (of a warp) are for 4096 weights."""

    kernel: str
    shape: list[int]  # M, N, K
    device: str
    microseconds: float
    gigahertz: float
    memory: float
    second_level_cache: float
    shared_memory_pipe: float
    tensor_cores: float
    issue_slots: float
    wavefronts: float
    instructions: float


def run_cases() -> None:
    """Multiply each case once, for the profiler to watch."""
    import bitsandbytes as bnb

    for N, K, M in _CASES:
        weight = torch.randn(N, K, device="cuda", dtype=torch.bfloat16) / K**0.5
        packed, state = bnb.functional.quantize_4bit(weight, blocksize=BLOCKSIZE, quant_type="nf4")
        A = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            bnb.matmul_4bit(A, packed.t(), state)
        torch.cuda.synchronize()


def profile() -> list[dict[str, str]]:
    """What ncu says of every case, in turn."""
    command = [
        *(
            "ncu",
            "--clock-control",
            "none",
            "--kernel-name",
            _KERNELS,
            "--metrics",
            ",".join(_METRICS.values()),
        ),
        *("--page", "raw", "--csv", "--print-units", "base", sys.executable, __file__, "--child"),
    ]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line for line in output.splitlines() if line.startswith('"')]
    _units, *rows = csv.DictReader(lines)
    if len(rows) != len(_CASES):
        raise RuntimeError(f"{len(_CASES)} kernels were expected, ncu saw {len(rows)}")
    return rows


def counters(row: dict[str, str], N: int, K: int, M: int) -> Counters:
    value = {name: float(row[metric].replace(",", "")) for name, metric in _METRICS.items()}
    shares = ("memory", "second_level_cache", "shared_memory_pipe", "tensor_cores", "issue_slots")
    return Counters(
        kernel="wgmma" if "wgmma" in row["Kernel Name"] else "mma",
        shape=[M, N, K],
        device="cuda",
        microseconds=value["nanoseconds"] / 1e3,
        gigahertz=value["cycles"] / value["nanoseconds"],
        **{name: value[name] / 100 for name in shares},
        wavefronts=value["wavefronts"] / (N * K / _WEIGHTS),
        instructions=value["instructions"] / (N * K / _WEIGHTS),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_cases()
        return
    if shutil.which("ncu") is None:
        sys.exit("counters_gemm_4bit.py needs ncu on the path")

    sys.path.insert(0, str(Path(__file__).parent))
    from harness import Report

    report = Report("gemm-4bit-counters")
    print(
        "    M     N     K  kernel     us   GHz  memory     L2  shared  tensor  issue  wavefronts  instructions"
    )
    for case, row in zip(_CASES, profile(), strict=True):
        found = counters(row, *case)
        report.rows.append(found)
        M, N, K = found.shape
        print(
            f"{M:5} {N:5} {K:5}  {found.kernel:5} {found.microseconds:7.1f} {found.gigahertz:5.2f}"
            f" {found.memory:7.0%} {found.second_level_cache:6.0%} {found.shared_memory_pipe:7.0%}"
            f" {found.tensor_cores:7.0%} {found.issue_slots:6.0%} {found.wavefronts:11.0f} {found.instructions:13.0f}"
        )
    if not options.no_write:
        print(report.write())


if __name__ == "__main__":
    main()
