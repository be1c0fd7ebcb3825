"""Experts4bit against a decoded stack, on the layers of a mixture of 128 experts of which a token takes 8.

The baseline decodes the whole stack and multiplies with torch's grouped matmul, on a CPU expert by expert; it has a buffer
for the decoded stack, and on both sides the rows are sorted already. "with routing" is the module's forward, which sorts
and puts back, against the same around the baseline. "decode one by one" is the operator in plain torch, which decodes the
chosen experts alone. Bytes are what must be read and written: the packed weights of those experts, and activations.

    python benchmarking/bench_experts.py [--device cpu|cuda] [--threads 2] [--seconds 0.5] [--no-write]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from harness import Report, measure_pair, row
from torch import Tensor

from bitsandbytes._ops import OPERATORS
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Experts4bit

EXPERTS, TOP_K = 128, 8
SHAPES = [(768, 2048), (2048, 768)]  # (N, K) of the projections up and down
TOKENS = [1, 8, 64, 512]


def grouped_dense(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """``rows @ weight[e]`` for the experts that rows are sorted by."""
    if rows.is_cuda:
        return torch._grouped_mm(rows, weight, offs=offsets)
    out, start = rows.new_empty(rows.shape[0], weight.shape[2]), 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(rows[start:end], weight[expert], out=out[start:end])
        start = end
    return out


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes that a call allocates at most, its results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


class Problem:
    """One layer and the tokens that meet it. ``buffer`` has room for the decoded stack."""

    def __init__(self, layer: Experts4bit, tokens: int, buffer: Tensor) -> None:
        N, K = layer.out_features, layer.in_features
        self.layer, self.tokens, self.buffer, self.device = layer, tokens, buffer, buffer.device.type
        self.x = torch.randn(tokens, K, device=self.device, dtype=buffer.dtype)
        self.experts = torch.rand(tokens, EXPERTS, device=self.device).topk(TOP_K).indices
        self.order, self.offsets = layer.route(self.experts)
        self.rows = self.x[self.order // TOP_K]
        self.gradient = torch.randn(self.rows.shape[0], N, device=self.device, dtype=buffer.dtype)

    def decoded(self) -> Tensor:
        return dequantize_4bit(self.layer.weight.data, self.layer.quant_state, out=self.buffer)

    def forward(self) -> Tensor:
        return self.layer.forward_sorted(self.rows, self.offsets)

    def dense_forward(self) -> Tensor:
        return grouped_dense(self.rows, self.decoded().transpose(1, 2), self.offsets)

    def one_by_one(self) -> Tensor:
        state = self.layer.quant_state
        packed, shape = self.layer.weight.data, list(state.shape)
        return OPERATORS["gemm_4bit_grouped"].run_with(
            "default", self.rows, packed, shape, state.absmax, state.blocksize, state.quant_type, self.offsets
        )

    def with_routing(self) -> Tensor:
        return self.layer(self.x, self.experts)

    def dense_with_routing(self) -> Tensor:
        order, offsets = self.layer.route(self.experts)
        rows = self.x.index_select(0, order // TOP_K)
        out = grouped_dense(rows, self.decoded().transpose(1, 2), offsets)
        return torch.empty_like(out).index_copy_(0, order, out).view(self.tokens, TOP_K, -1)

    def training(self) -> Tensor:
        rows = self.rows.detach().requires_grad_()
        with torch.enable_grad():
            out = self.layer.forward_sorted(rows, self.offsets)
        return torch.autograd.grad(out, rows, self.gradient)[0]

    def dense_training(self) -> Tensor:
        self.dense_forward()
        return grouped_dense(self.gradient, self.decoded(), self.offsets)

    def read_and_written(self) -> int:
        one = (self.layer.weight.nbytes + self.layer.quant_state.absmax.nbytes) // EXPERTS
        return self.experts.unique().numel() * one + self.rows.nbytes + self.gradient.nbytes

    def bench(self, report: Report, what: str, baseline: str, seconds: float) -> None:
        dense = "decode all, grouped matmul"
        call, other = {
            ("forward", dense): (self.forward, self.dense_forward),
            ("forward", "decode one by one"): (self.forward, self.one_by_one),
            ("with routing", dense): (self.with_routing, self.dense_with_routing),
            ("forward + dX", dense): (self.training, self.dense_training),
        }[what, baseline]
        cold = self.device == "cuda"
        measured = row(
            f"{what} T={self.tokens}{' nested' if self.layer.quant_state.nested else ''}",
            baseline,
            measure_pair(call, other, self.device, cold=cold, seconds=seconds),
            shape=tuple(self.buffer.shape),
            dtype=self.buffer.dtype,
            device=self.device,
            moved=self.read_and_written() * (2 if what == "forward + dX" else 1),
            cold=cold,
        )
        if what == "forward" and self.device == "cuda":
            measured.memory = peak_memory(call) - self.gradient.nbytes
        report.add(measured)


def bench_layer(report: Report, layer: Experts4bit, buffer: Tensor, seconds: float) -> None:
    dense = "decode all, grouped matmul"
    for tokens in TOKENS:
        problem = Problem(layer, tokens, buffer)
        problem.bench(report, "forward", dense, seconds)
        if not layer.quant_state.nested:
            problem.bench(report, "forward", "decode one by one", seconds)
            problem.bench(report, "with routing", dense, seconds)
    if not layer.quant_state.nested:
        problem.bench(report, "forward + dX", dense, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each row")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    report = Report("experts")
    with torch.no_grad():
        for shape in SHAPES:
            for nested in (False, True):
                buffer = torch.randn(EXPERTS, *shape, device=options.device, dtype=torch.bfloat16)
                layer = Experts4bit.from_dense(buffer.div_(shape[1] ** 0.5), compress_statistics=nested)
                bench_layer(report, layer, buffer, options.seconds)
    if not options.no_write:
        print(f"written to {report.write()}")


if __name__ == "__main__":
    main()
