"""What ``selftest`` runs: for each operator, random inputs and a judgement of its results in float64.

The oracles are written from the meaning of the formats, not from the kernels: a quantizer is judged by how far its
choice is from the nearest value there is, everything else by the distance to the exact result. So the plain-torch
kernels are checked as well, and a tie that falls the other way is no error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Generator, Tensor

from .._formats.codebooks import create_dynamic_map
from .._formats.table import FORMATS, NESTED_BLOCKSIZE

__all__ = ["Case", "cases", "excess", "table_of"]

# Half a unit in the last place, and a little for the float32 product that is rounded.
_ROUNDING = {torch.float32: 1.3e-7, torch.float16: 4.9e-4, torch.bfloat16: 3.95e-3}
# Relative error of a product in the 2-norm: inputs and weights rounded to the dtype, sums in float32.
_MATMUL = {torch.float32: 2e-3, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
_NEAREST = 1e-6  # of a block's absmax: what float32 scaling may shift a tie by
_INT8_ROUNDING = 1e-3  # of a step
_SIGNED = create_dynamic_map


@dataclass(frozen=True)
class Case:
    """One call: ``make`` its arguments, ``error`` of its results given those arguments, and the error allowed.

    An operator that works in place has its arguments after the call for results.
    """

    operator: str
    label: str
    make: Callable[[Generator], tuple]
    error: Callable[[tuple, Sequence[Any]], float]
    limit: float
    in_place: bool = False


def table_of(quant_type: str) -> Tensor:
    """The format's values by code, in float64."""
    return torch.tensor(FORMATS[quant_type].values, dtype=torch.float32).double()


def excess(values: Tensor, chosen: Tensor, table: Tensor) -> float:
    """How much farther ``chosen`` is from ``values`` than the nearest value in ``table``, at worst."""
    ascending = table.unique()
    above = torch.searchsorted(ascending, values).clamp(max=ascending.numel() - 1)
    below = (above - 1).clamp(min=0)
    nearest = torch.minimum((ascending[above] - values).abs(), (ascending[below] - values).abs())
    return _worst((chosen - values).abs() - nearest)


def cases(quick: bool) -> list[Case]:
    """All cases; ``quick`` ones are small."""
    from .selftest_optimizers import optimizer_cases

    numel = (1 << 17) + 37 if quick else (1 << 22) + 37
    N, K = (256, 512) if quick else (2048, 2048)
    found = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for quant_type in FORMATS:
            found += _fourbit_cases(quant_type, 64, dtype, numel, (N, K))
        found += [_quantize_blockwise(dtype, numel), _dequantize_blockwise(dtype, numel)]
        found += _int8_quantize_cases(dtype, (N, K))
    found += _fourbit_cases("nf4", 4096, torch.bfloat16, numel, (N, K))[:2]
    found += [
        _gemm_4bit_transposed((N, K)),
        *_grouped_cases((4, N // 4, K)),
        _dequantize_4bit_nested(numel),
        _embedding_4bit((N, K)),
        _embedding_8bit((N, K)),
    ]
    return found + _int8_product_cases((64, N, K)) + optimizer_cases(numel)


# --- judging ---------------------------------------------------------------------------------------------------


def _worst(errors: Tensor) -> float:
    return float("inf") if errors.isnan().any() else errors.max().clamp(min=0.0).item()


def _relative(result: Tensor, exact: Tensor) -> float:
    """Largest elementwise relative error; for results that never come near zero without being zero."""
    difference = (result.double() - exact).abs()
    return _worst(torch.where(difference == 0, 0.0, difference / exact.abs()))


def _norm_error(result: Tensor, exact: Tensor) -> float:
    error = (result.double() - exact).norm() / exact.norm()
    return float("inf") if error.isnan() else error.item()


def _equal(result: Tensor, exact: Tensor) -> float:
    same = result.shape == exact.shape and bool((result.double() == exact.double()).all())
    return 0.0 if same else float("inf")


def _per_value(absmax: Tensor, blocksize: int, numel: int) -> Tensor:
    return absmax.double().repeat_interleave(blocksize)[:numel]


def _block_absmax(values: Tensor, blocksize: int) -> Tensor:
    padded = torch.nn.functional.pad(values.abs(), (0, -values.numel() % blocksize))
    return padded.view(-1, blocksize).amax(dim=1)


def _decode_4bit(packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, numel: int) -> Tensor:
    codes = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), dim=1).view(-1)[:numel].long()
    return table_of(quant_type)[codes] * _per_value(absmax, blocksize, numel)


def _expanded(absmax: Tensor, codes: Tensor, code: Tensor, offset: Tensor) -> Tensor:
    return code.double()[codes.long()] * _per_value(absmax, NESTED_BLOCKSIZE, codes.numel()) + offset


def _nested_scales(generator: Generator, blocks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(absmax, codes, code, offset)`` of ``blocks`` scales."""
    second = _scales(generator, -(blocks // -NESTED_BLOCKSIZE))
    return second, _random_bytes(generator, blocks), _SIGNED(), torch.tensor(1.5)


def _random(generator: Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def _random_bytes(generator: Generator, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def _scales(generator: Generator, count: int) -> Tensor:
    return torch.rand(count, generator=generator) + 0.5


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


# --- 4-bit -----------------------------------------------------------------------------------------------------


def _fourbit_cases(
    quant_type: str, blocksize: int, dtype: torch.dtype, numel: int, shape: tuple[int, int]
) -> list[Case]:
    blocks = -(numel // -blocksize)
    N, K = shape

    def quantize_error(args: tuple, results: Sequence[Tensor]) -> float:
        values, (packed, absmax) = args[0].double(), results
        if _equal(absmax, _block_absmax(values, blocksize)):
            return float("inf")
        scale = _per_value(absmax, blocksize, numel)
        codes = _decode_4bit(packed, torch.ones(blocks), blocksize, quant_type, numel)
        return excess(values / scale, codes, table_of(quant_type))

    def dequantize_error(args: tuple, results: Sequence[Tensor]) -> float:
        return _relative(results[0], _decode_4bit(args[0], args[1], blocksize, quant_type, numel))

    def weight(generator: Generator) -> tuple[Tensor, Tensor]:
        return _random_bytes(generator, N * K // 2, 1), _scales(generator, N * K // blocksize)

    def product_error(args: tuple, results: Sequence[Tensor]) -> float:
        absmax = _expanded(args[3], *args[7:]) if len(args) > 7 else args[3]
        exact = args[0].double() @ _decode_4bit(args[1], absmax, blocksize, quant_type, N * K).view(N, K).t()
        if len(args) > 6 and args[6] is not None:
            exact += args[6].double()
        return _norm_error(results[0], exact)

    def gemm_arguments(rows: int, nested: bool) -> Callable[[Generator], tuple]:
        def make(generator: Generator) -> tuple:
            packed, absmax = weight(generator)
            A, bias = _random(generator, rows, K, dtype=dtype), _random(generator, N, dtype=dtype)
            if not nested:
                return A, packed, [N, K], absmax, blocksize, quant_type
            second, *first = _nested_scales(generator, absmax.numel())
            return A, packed, [N, K], second, blocksize, quant_type, bias, *first

        return make

    def gemv_arguments(generator: Generator) -> tuple:
        packed, absmax = weight(generator)
        A = _random(generator, 1, K, dtype=dtype)
        return A, packed, [N, K], absmax, table_of(quant_type).float(), blocksize

    def gemv_error(args: tuple, results: Sequence[Tensor]) -> float:
        exact = args[0].double() @ _decode_4bit(args[1], args[3], blocksize, quant_type, N * K).view(N, K).t()
        return _norm_error(results[0], exact)

    label = f"{quant_type}/{blocksize} {_short(dtype)}"
    limit = _MATMUL[dtype]
    return [
        Case(
            "quantize_4bit", label,
            lambda g: (_random(g, numel, dtype=dtype), blocksize, quant_type, torch.uint8), quantize_error, _NEAREST,
        ),
        Case(
            "dequantize_4bit", label,
            lambda g: (_random_bytes(g, (numel + 1) // 2, 1), _scales(g, blocks), blocksize, quant_type, [numel], dtype),
            dequantize_error, _ROUNDING[dtype],
        ),
        Case("gemm_4bit", f"{label} M=1", gemm_arguments(1, nested=False), product_error, limit),
        Case("gemm_4bit", f"{label} M=64 nested", gemm_arguments(64, nested=True), product_error, limit),
        Case("gemv_4bit", label, gemv_arguments, gemv_error, limit),
    ]  # fmt: skip


def _gemm_4bit_transposed(shape: tuple[int, int]) -> Case:
    (N, K), blocksize, quant_type, dtype = shape, 64, "nf4", torch.bfloat16

    def make(generator: Generator) -> tuple:
        packed = _random_bytes(generator, N * K // 2, 1)
        nested = _nested_scales(generator, N * K // blocksize)
        A = _random(generator, 32, N, dtype=dtype)
        return A, packed, [N, K], nested[0], blocksize, quant_type, *nested[1:]

    def error(args: tuple, results: Sequence[Tensor]) -> float:
        absmax = _expanded(args[3], *args[6:])
        weight = _decode_4bit(args[1], absmax, blocksize, quant_type, N * K).view(N, K)
        return _norm_error(results[0], args[0].double() @ weight)

    label = f"{quant_type}/{blocksize} {_short(dtype)} nested"
    return Case("gemm_4bit_transposed", label, make, error, _MATMUL[dtype])


def _grouped_cases(shape: tuple[int, int, int]) -> list[Case]:
    (E, N, K), blocksize, quant_type, dtype = shape, 64, "nf4", torch.bfloat16
    ends = [7, 7, 48, 64]  # of the rows of four experts; the second has none

    def make_with(columns: int, with_bias: bool) -> Callable[[Generator], tuple]:
        def make(generator: Generator) -> tuple:
            packed = _random_bytes(generator, E * N * K // 2, 1)
            nested = _nested_scales(generator, E * N * K // blocksize)
            A, offsets = _random(generator, ends[-1], columns, dtype=dtype), torch.tensor(ends).int()
            bias = (_random(generator, E, N, dtype=dtype),) if with_bias else ()
            return A, packed, [E, N, K], nested[0], blocksize, quant_type, offsets, *bias, *nested[1:]

        return make

    def error(args: tuple, results: Sequence[Tensor]) -> float:
        has_bias = len(args) == 11
        scales = _expanded(args[3], *args[-3:])
        weight = _decode_4bit(args[1], scales, blocksize, quant_type, E * N * K).view(E, N, K)
        parts = args[0].double().tensor_split(ends[:-1])
        exact = [
            part @ w.t() + b.double() if has_bias else part @ w
            for part, w, b in zip(parts, weight, args[7] if has_bias else weight, strict=True)
        ]
        return _norm_error(results[0], torch.cat(exact))

    label = f"{quant_type}/{blocksize} {_short(dtype)} nested"
    limit = _MATMUL[dtype]
    return [
        Case("gemm_4bit_grouped", f"{label} E={E}", make_with(K, True), error, limit),
        Case("gemm_4bit_grouped_transposed", f"{label} E={E}", make_with(N, False), error, limit),
    ]


def _dequantize_4bit_nested(numel: int) -> Case:
    blocksize, quant_type, dtype = 64, "nf4", torch.float32

    def make(generator: Generator) -> tuple:
        packed = _random_bytes(generator, (numel + 1) // 2, 1)
        nested = _nested_scales(generator, -(numel // -blocksize))
        return packed, *nested, blocksize, quant_type, [numel], dtype

    def error(args: tuple, results: Sequence[Tensor]) -> float:
        return _norm_error(
            results[0], _decode_4bit(args[0], _expanded(*args[1:5]), blocksize, quant_type, numel)
        )

    return Case("dequantize_4bit_nested", f"{quant_type}/{blocksize} fp32", make, error, 1e-6)


# --- look-ups --------------------------------------------------------------------------------------------------


def _embedding_4bit(shape: tuple[int, int]) -> Case:
    rows, columns = shape
    blocksize, quant_type, dtype = 64, "nf4", torch.bfloat16

    def make(generator: Generator) -> tuple:
        table = (
            _random_bytes(generator, rows * columns // 2, 1),
            _scales(generator, rows * columns // blocksize),
        )
        indices = torch.randint(rows, (4 * rows,), generator=generator)
        return indices, *table, blocksize, quant_type, rows, columns, dtype

    def error(args: tuple, results: Sequence[Tensor]) -> float:
        table = _decode_4bit(args[1], args[2], blocksize, quant_type, rows * columns)
        return _relative(results[0], table.view(rows, columns)[args[0]])

    return Case("embedding_4bit", f"{quant_type}/{blocksize} {_short(dtype)}", make, error, _ROUNDING[dtype])


def _embedding_8bit(shape: tuple[int, int]) -> Case:
    rows, columns = shape
    dtype = torch.bfloat16

    def make(generator: Generator) -> tuple:
        table = _random_bytes(generator, rows, columns).view(torch.int8)
        return torch.randint(rows, (4 * rows,), generator=generator), table, _scales(generator, rows), dtype

    def error(args: tuple, results: Sequence[Tensor]) -> float:
        return _relative(results[0], (args[1].double() * args[2].double().unsqueeze(1) / 127.0)[args[0]])

    return Case("embedding_8bit", _short(dtype), make, error, _ROUNDING[dtype])


# --- 8-bit block-wise ------------------------------------------------------------------------------------------


def _quantize_blockwise(dtype: torch.dtype, numel: int, blocksize: int = 256) -> Case:
    def error(args: tuple, results: Sequence[Tensor]) -> float:
        values, (codes, absmax) = args[0].double(), results
        if _equal(absmax, _block_absmax(values, blocksize)):
            return float("inf")
        table = args[1].double()
        return excess(values / _per_value(absmax, blocksize, numel), table[codes.long()], table)

    def make(generator: Generator) -> tuple:
        return _random(generator, numel, dtype=dtype), _SIGNED(), blocksize

    return Case("quantize_blockwise", f"dynamic/{blocksize} {_short(dtype)}", make, error, _NEAREST)


def _dequantize_blockwise(dtype: torch.dtype, numel: int, blocksize: int = 256) -> Case:
    def error(args: tuple, results: Sequence[Tensor]) -> float:
        exact = args[2].double()[args[0].long()] * _per_value(args[1], blocksize, numel)
        # Below float16's normal range a relative error means nothing: count what is lost against the scale.
        return _worst((results[0].double() - exact).abs() / exact.abs().clamp(min=1e-4))

    def make(generator: Generator) -> tuple:
        scales = _scales(generator, -(numel // -blocksize))
        return _random_bytes(generator, numel), scales, _SIGNED(), blocksize, dtype

    return Case("dequantize_blockwise", f"dynamic/{blocksize} {_short(dtype)}", make, error, _ROUNDING[dtype])


# --- LLM.int8() ------------------------------------------------------------------------------------------------


def _judge_int8(values: Tensor, kept: Tensor, codes: Tensor, stats: Tensor, dim: int) -> float:
    """``values`` are exact, ``kept`` those that count for the scale along ``dim``."""
    exact_stats = torch.where(kept, values, 0.0).abs().amax(dim=dim)
    if _equal(stats, exact_stats):
        return float("inf")
    steps = values * 127.0 / exact_stats.unsqueeze(dim)
    return _worst((codes.double() - steps).abs() - 0.5)


def _int8_quantize_cases(dtype: torch.dtype, shape: tuple[int, int]) -> list[Case]:
    threshold = 3.5

    def make(limit: float) -> Callable[[Generator], tuple]:
        def arguments(generator: Generator) -> tuple:
            values = _random(generator, *shape, dtype=dtype).clamp(-3.25, 3.25)
            values[:: shape[0] // 4, 5] = 8.0
            return (values, limit) if limit else (values,)

        return arguments

    def plain_error(args: tuple, results: Sequence[Any]) -> float:
        values = args[0].double()
        return _judge_int8(values, torch.ones_like(values, dtype=torch.bool), results[0], results[1], 1)

    def outlier_error(args: tuple, results: Sequence[Any]) -> float:
        values = args[0].double()
        kept = values.abs() < threshold
        columns = (~kept).any(dim=0)
        wrong = _equal(results[-1], columns.nonzero().view(-1)) or bool(results[0][:, columns].any())
        inside = torch.where(columns, 0.0, values)
        stats = torch.where(kept, values, 0.0).abs().amax(dim=1)
        steps = inside * 127.0 / stats.unsqueeze(1)
        error = _worst((results[0].double() - steps).abs() - 0.5)
        return float("inf") if wrong or _equal(results[1], stats) else error

    def both_error(args: tuple, results: Sequence[Any]) -> float:
        values = args[0].double()
        kept = values.abs() < threshold
        by_row = outlier_error(args, (results[0], results[2], results[4]))
        by_column = _judge_int8(torch.where(kept, values, 0.0), kept, results[1], results[3], 0)
        return max(by_row, by_column)

    label = _short(dtype)
    return [
        Case("int8_vectorwise_quant", label, make(0.0), plain_error, _INT8_ROUNDING),
        Case("int8_vectorwise_quant", f"{label} outliers", make(threshold), outlier_error, _INT8_ROUNDING),
        Case("int8_double_quant", f"{label} outliers", make(threshold), both_error, _INT8_ROUNDING),
    ]


def _int8_product_cases(sizes: tuple[int, int, int]) -> list[Case]:
    M, N, K = sizes
    half = torch.float16

    def codes(generator: Generator, *shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)

    def scaled(product: Tensor, row_stats: Tensor, col_stats: Tensor) -> Tensor:
        return product.double() * row_stats.double().view(-1, 1) * col_stats.double() / 127.0**2

    def product(A: Tensor, B: Tensor) -> Tensor:
        return A.double() @ B.double().t()

    def mixed_arguments(generator: Generator) -> tuple:
        A, columns = _random(generator, M, K, dtype=half), torch.tensor([3, K // 2])
        CA = codes(generator, M, K)
        CA[:, columns] = 0
        return A, CA, codes(generator, N, K), _scales(generator, M), _scales(generator, N), columns

    def mixed_error(args: tuple, results: Sequence[Any]) -> float:
        A, CA, CB, SCA, SCB, columns = args
        outliers = A[:, columns]
        exact = scaled(product(CA, CB), SCA, SCB)
        exact += outliers.double() @ (CB[:, columns].double() * SCB.double().view(-1, 1) / 127.0).t()
        return max(_norm_error(results[0], exact), _equal(results[1], outliers))

    def linear_arguments(threshold: float) -> Callable[[Generator], tuple]:
        def arguments(generator: Generator) -> tuple:
            A = _random(generator, M, K, dtype=half).clamp(-3.25, 3.25)
            A[:: M // 4, 5] = 8.0
            return (
                A,
                codes(generator, N, K),
                _scales(generator, N),
                _random(generator, N, dtype=half),
                threshold,
            )

        return arguments

    def linear_error(args: tuple, results: Sequence[Any]) -> float:
        A, (CB, SCB, bias), threshold = args[0].double(), args[1:4], args[4]
        aside = (A.abs() >= threshold).any(dim=0) if threshold else torch.zeros(K, dtype=torch.bool)
        kept = torch.where(aside, 0.0, A)
        scale = torch.where(A.abs() >= (threshold or float("inf")), 0.0, A).abs().amax(dim=1)
        CA = (kept * 127.0 / scale.unsqueeze(1)).round()
        outliers = torch.where(aside, A, 0.0) @ (CB.double() * SCB.double().view(-1, 1) / 127.0).t()
        exact = scaled(product(CA, CB), scale, SCB) + outliers + bias.double()
        right = results[1] is None if not threshold else torch.equal(results[1] != 0, aside)
        return _norm_error(results[0], exact) if right else float("inf")

    return [
        *(
            Case("int8_linear", label, linear_arguments(threshold), linear_error, _MATMUL[half])
            for label, threshold in (("fp16", 0.0), ("fp16 outliers", 3.5))
        ),
        Case(
            "int8_linear_matmul", f"{M}x{N}x{K}",
            lambda g: (codes(g, M, K), codes(g, N, K)), lambda a, r: _equal(r[0], product(a[0], a[1])), 0.0,
        ),
        Case(
            "int8_vectorwise_dequant", "int8",
            lambda g: (codes(g, N, K), _scales(g, N)),
            lambda a, r: _relative(r[0], a[0].double() * a[1].double().view(-1, 1) / 127.0), 3e-7,
        ),
        Case(
            "int8_mm_dequant", "fp16",
            lambda g: ((_random(g, M, N) * 1e4).int(), _scales(g, M), _scales(g, N), half, _random(g, N, dtype=half)),
            lambda a, r: _norm_error(r[0], scaled(a[0], a[1], a[2]) + a[4].double()), _MATMUL[half],
        ),
        Case(
            "int8_scaled_mm", "fp16",
            lambda g: (codes(g, M, K), codes(g, N, K), _scales(g, M), _scales(g, N), None, half),
            lambda a, r: _norm_error(r[0], scaled(product(a[0], a[1]), a[2], a[3])), _MATMUL[half],
        ),
        Case("int8_mixed_scaled_mm", "fp16 outliers", mixed_arguments, mixed_error, _MATMUL[half]),
    ]  # fmt: skip


def bytes_moved(values: Sequence[Any]) -> int:
    """Bytes of all tensors among ``values``."""
    return sum(prod(value.shape) * value.element_size() for value in values if isinstance(value, Tensor))
