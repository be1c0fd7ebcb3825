"""4-bit matmul on a CPU: the fused kernel, and decoding the weight for torch's matmul, each against a dense layer.

Which of the two the CPU backend takes depends on the number of rows; this is where its border comes from. Bytes are
what must be read: activations, weight, and the output that is written.

    python benchmarking/bench_cpu.py [--threads 1] [--no-write]
"""

from __future__ import annotations

import argparse

import torch
from harness import Report, measure_pair, row

from bitsandbytes import functional as F
from bitsandbytes.backends.cpu import ops as cpu

SHAPE = (4096, 4096)
ROWS = [1, 4, 8, 16, 32, 64, 256]
PATHS = {"fused": 1 << 30, "decode, then matmul": 0}  # name -> rows up to which the fused kernel runs


def bench(report: Report, dtype: torch.dtype, rows: int) -> None:
    N, K = SHAPE
    dense = (torch.randn(SHAPE) / K**0.5).to(dtype)
    packed, state = F.quantize_4bit(dense, quant_type="nf4")
    A = torch.randn(rows, K).to(dtype)
    moved = packed.nbytes + state.absmax.nbytes + A.nbytes + rows * N * dtype.itemsize
    borders = dict(cpu._FUSED_ROWS)
    for path, border in PATHS.items():
        cpu._FUSED_ROWS[dtype] = border
        times = measure_pair(
            lambda: torch.ops.bitsandbytes.gemm_4bit(A, packed, [N, K], state.absmax, state.blocksize, "nf4"),
            lambda: torch.nn.functional.linear(A, dense),
            "cpu",
        )
        name = f"nf4 M={rows} {path}"
        report.add(row(name, "dense linear", times, shape=SHAPE, dtype=dtype, device="cpu", moved=moved))
    cpu._FUSED_ROWS.update(borders)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    report = Report("cpu")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows in ROWS:
            bench(report, dtype, rows)
    if not options.no_write:
        print(f"written to {report.write()}")


if __name__ == "__main__":
    main()
