"""4-bit and 8-bit block-wise quantization and their inverses against a torch copy of the same unquantized tensor.

The copy moves the wide tensor twice, quantization reads it once and writes a quarter of it or less, so memory alone
would let a ratio exceed 1. GB/s counts what the operation must move: the wide tensor, the codes and the statistics.

    python benchmarking/bench_fourbit.py [--device cpu] [--threads 1] [--no-write]
"""

from __future__ import annotations

import argparse

import torch
from harness import Report, measure_pair, row

import bitsandbytes._ops  # noqa: F401  defines torch.ops.bitsandbytes
from bitsandbytes import functional as F

SHAPES = [(1024, 1024), (4096, 4096)]
LARGE = (8192, 28672)  # on a GPU, where the others fit the cache
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BLOCKSIZE = 64


def bench(report: Report, device: str, shape: tuple[int, int], dtype: torch.dtype, quant_type: str) -> None:
    values = torch.randn(shape, device=device).to(dtype)
    copy = torch.empty_like(values)
    packed, state = F.quantize_4bit(values, blocksize=BLOCKSIZE, quant_type=quant_type)
    moved = values.nbytes + packed.nbytes + state.absmax.nbytes
    # Into memory that exists: page faults would hide the kernel.
    arguments = (packed, state.absmax, BLOCKSIZE, quant_type, list(shape), dtype)
    nested_packed, nested = F.quantize_4bit(
        values, blocksize=BLOCKSIZE, quant_type=quant_type, compress_statistics=True
    )
    calls = {
        "quantize_4bit": lambda: torch.ops.bitsandbytes.quantize_4bit(
            values, BLOCKSIZE, quant_type, torch.uint8
        ),
        "dequantize_4bit.out": lambda: torch.ops.bitsandbytes.dequantize_4bit.out(*arguments, copy),
        "dequantize_4bit nested": lambda: F.dequantize_4bit(nested_packed, nested, out=copy),
    }
    for name, call in calls.items():
        times = measure_pair(call, lambda: copy.copy_(values), device)
        report.add(
            row(
                f"{name} {quant_type}",
                "torch copy",
                times,
                shape=shape,
                dtype=dtype,
                device=device,
                moved=moved,
            )
        )


def bench_8bit(report: Report, device: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    values = torch.randn(shape, device=device).to(dtype)
    copy = torch.empty_like(values)
    codes, state = F.quantize_blockwise(values, blocksize=256)
    about = {"shape": shape, "dtype": dtype, "device": device}
    about["moved"] = values.nbytes + codes.nbytes + state.absmax.nbytes
    calls = {
        "quantize_blockwise": lambda: torch.ops.bitsandbytes.quantize_blockwise(values, state.code, 256),
        "dequantize_blockwise out=": lambda: F.dequantize_blockwise(codes, state, out=copy),
    }
    for name, call in calls.items():
        times = measure_pair(call, lambda: copy.copy_(values), device)
        report.add(row(name, "torch copy", times, **about))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    report = Report("fourbit")
    for shape in [*SHAPES, LARGE] if options.device == "cuda" else SHAPES:
        for dtype in DTYPES:
            for quant_type in ("nf4", "fp4"):
                bench(report, options.device, shape, dtype, quant_type)
            bench_8bit(report, options.device, shape, dtype)
    if not options.no_write:
        print(f"written to {report.write()}")


if __name__ == "__main__":
    main()
