"""LLM.int8() on a CPU: the layer against a dense bfloat16 one, and the quantization operators against copying.

Bytes are what must be moved once: activations, weight and output for a layer, input and result for an operator. The
default backend's border between our product and torch's (backends/cpu/int8.py) comes from `--products`.

    python benchmarking/bench_int8.py [--threads 1] [--products] [--no-write]
"""

from __future__ import annotations

import argparse

import torch
from harness import Report, measure_pair, row

from bitsandbytes import functional as F, nn
from bitsandbytes._ops import OPERATORS

SHAPES = [(4096, 4096), (14336, 4096)]
ROWS = [1, 4, 16, 64, 256, 1024]
OUTLIER_COLUMNS = 16  # of the activations, where a threshold is set


def bench_layer(report: Report, shape: tuple[int, int], rows: int, threshold: float) -> None:
    N, K = shape
    dense = torch.nn.Linear(K, N, bias=False, dtype=torch.bfloat16)
    layer = nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False, threshold=threshold)
    layer.load_state_dict(dense.state_dict())
    layer = layer.to("cpu").eval()
    x = torch.randn(rows, K).clamp(-5, 5)
    if threshold:
        x[:, torch.randperm(K)[:OUTLIER_COLUMNS]] *= 20
    x = x.bfloat16()
    times = measure_pair(lambda: layer(x), lambda: dense(x), "cpu", seconds=0.4)
    name = f"int8 linear M={rows} threshold={threshold:g}"
    moved = N * K + 2 * rows * (N + K)
    report.add(
        row(
            name,
            "dense bfloat16 linear",
            times,
            shape=shape,
            dtype=torch.bfloat16,
            device="cpu",
            moved=moved,
        )
    )


def bench_quantization(report: Report, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    A = torch.randn(shape).to(dtype)
    codes, stats, _ = F.int8_vectorwise_quant(A)
    product = torch.randint(-(10**6), 10**6, shape, dtype=torch.int32)
    columns = torch.rand(shape[1])
    numel = A.numel()
    calls = {
        "int8_vectorwise_quant": (lambda: F.int8_vectorwise_quant(A), A.nbytes + numel),
        "int8_vectorwise_quant threshold=6": (lambda: F.int8_vectorwise_quant(A, 6.0), A.nbytes + numel),
        "int8_double_quant": (lambda: F.int8_double_quant(A), A.nbytes + 2 * numel),
        "int8_double_quant threshold=6": (
            lambda: F.int8_double_quant(A, threshold=6.0),
            A.nbytes + 2 * numel,
        ),
        "int8_vectorwise_dequant": (lambda: F.int8_vectorwise_dequant(codes, stats), 5 * numel),
        "int8_mm_dequant": (lambda: F.int8_mm_dequant(product, stats, columns), 6 * numel),
    }
    for name, (call, moved) in calls.items():
        times = measure_pair(call, lambda: A.clone(), "cpu", seconds=0.2)
        report.add(row(name, "clone of A", times, shape=shape, dtype=dtype, device="cpu", moved=moved))


def bench_product(report: Report, rows: int) -> None:
    """Ours and torch's; run with BNB_CPU_ISA set to see the other instruction sets."""
    N, K = SHAPES[0]
    A, B = (torch.randint(-127, 128, (m, K), dtype=torch.int8) for m in (rows, N))
    out = torch.empty(rows, N, dtype=torch.int32)
    moved = N * K + rows * (K + 4 * N)
    rivals = {
        "torch's": lambda: torch._int_mm(A, B.t(), out=out),
        "default": lambda: OPERATORS["int8_linear_matmul"].kernels["default"](A, B, out),
    }
    for name, rival in rivals.items():
        times = measure_pair(
            lambda: torch.ops.bitsandbytes.int8_linear_matmul.out(A, B, out), rival, "cpu", seconds=0.2
        )
        label = f"int8_linear_matmul M={rows}"
        report.add(row(label, name, times, shape=(N, K), dtype=torch.int8, device="cpu", moved=moved))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--products", action="store_true", help="only the integer product, against torch's")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    report = Report("cpu-int8" if options.threads == 1 else f"cpu-int8-{options.threads}-threads")
    with torch.inference_mode():
        if options.products:
            for rows in ROWS[:-1]:
                bench_product(report, rows)
            return
        for shape in SHAPES:
            for threshold in (0.0, 6.0):
                for rows in ROWS:
                    bench_layer(report, shape, rows, threshold)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            bench_quantization(report, dtype, (1024, 4096))
    if not options.no_write:
        print(f"written to {report.write()}")


if __name__ == "__main__":
    main()
