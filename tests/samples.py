"""Arguments for every operator: plain cases, tails, odd sizes, strided tensors, optional arguments given and left out.

The checks of schemas, of tracing and of backends against each other all walk these, so an operator is listed once.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import oracles

__all__ = ["OPERATOR_NAMES", "OUT_OVERLOADS", "samples"]

OUT_OVERLOADS = (
    "dequantize_4bit",
    "gemv_4bit",
    "quantize_blockwise",
    "dequantize_blockwise",
    "int8_linear_matmul",
    "dequantize_4bit_nested",
    "round_to_bfloat16",
)


def _weight(
    N: int, K: int, blocksize: int, quant_type: str, storage: torch.dtype = torch.uint8
) -> tuple[Tensor, Tensor]:
    packed, absmax = oracles.quantize_4bit(torch.randn(N, K) / K**0.5, blocksize, quant_type)
    return packed.view(-1).view(storage).view(-1, 1), absmax


def _strided(values: Tensor) -> Tensor:
    """The same values with gaps between them."""
    return torch.stack([values, torch.zeros_like(values)], dim=-1)[..., 0]


def _quantize_4bit():
    for dtype in oracles.FLOAT_DTYPES:
        yield torch.randn(7, 33, dtype=dtype), 64, "nf4", torch.uint8
        yield torch.randn(130, dtype=dtype), 32, "fp4", torch.uint8
    yield torch.randn(40, 6).t(), 128, "nf4", torch.uint8
    yield torch.randn(1), 4096, "fp4", torch.uint8
    yield torch.empty(0, 4), 64, "nf4", torch.uint8
    for storage in oracles.STORAGE_DTYPES[1:]:
        yield torch.zeros(64, 2), 64, "nf4", storage  # zeros: no byte pattern that is a NaN


def _dequantize_4bit():
    for index, dtype in enumerate(oracles.FLOAT_DTYPES):
        for quant_type in oracles.QUANT_TYPES:
            for shape, blocksize in (((7, 33), 64), ((6, 64), 128), ((3, 5, 7), 32), ((1,), 64)):
                numel = torch.Size(shape).numel()
                packed, absmax = _weight(1, numel, blocksize, quant_type)
                yield packed, absmax, blocksize, quant_type, list(shape), dtype
        packed, absmax = _weight(8, 16, 64, "nf4", oracles.STORAGE_DTYPES[index + 1])
        yield packed, absmax, 64, "nf4", [8, 16], dtype
    packed, absmax = _weight(8, 16, 64, "fp4")
    yield packed.t(), absmax, 64, "fp4", [8, 16], torch.float32
    yield packed[:0], absmax[:0], 64, "fp4", [0, 16], torch.float16
    yield _strided(packed), _strided(absmax), 64, "fp4", [8, 16], torch.float32


def _dequantize_4bit_nested():
    for shape, blocksize, quant_type in (((600, 64), 64, "nf4"), ((7, 33), 32, "fp4"), ((0,), 64, "nf4")):
        packed, absmax = oracles.quantize_4bit(torch.randn(shape), blocksize, quant_type)
        offset = absmax.mean() if absmax.numel() else torch.tensor(0.0)
        codes, absmax2 = oracles.quantize_blockwise(absmax - offset, oracles.dynamic_map(), 256)
        nested = (absmax2, codes, oracles.dynamic_map().clone(), offset)
        for dtype in oracles.FLOAT_DTYPES:
            yield packed, *nested, blocksize, quant_type, list(shape), dtype
    yield _strided(packed), *nested, blocksize, quant_type, list(shape), torch.float32


def _embedding_4bit():
    for rows, columns, blocksize, quant_type in (
        (50, 128, 64, "nf4"),
        (7, 33, 32, "fp4"),
        (9, 80, 4096, "nf4"),
    ):
        for dtype in oracles.FLOAT_DTYPES:
            table = (
                *_weight(rows, columns, blocksize, quant_type),
                blocksize,
                quant_type,
                rows,
                columns,
                dtype,
            )
            for shape in ((), (5,), (2, 3), (0,)):
                yield torch.randint(rows, shape), *table
            yield torch.randint(rows, (6, 4), dtype=torch.int32).t(), *table
    packed, absmax = _weight(16, 64, 64, "fp4", torch.bfloat16)
    yield torch.tensor([15, 0, 15]), packed.t(), _strided(absmax), 64, "fp4", 16, 64, torch.float32


def _embedding_8bit():
    for rows, columns in ((50, 24), (7, 33), (3, 1)):
        table = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
        for dtype in oracles.FLOAT_DTYPES:
            for shape in ((), (5,), (2, 3), (0,)):
                yield torch.randint(rows, shape), table, torch.rand(rows), dtype
    yield (
        torch.tensor([[1, 3]], dtype=torch.int32),
        _strided(table.repeat(2, 1)),
        torch.rand(6),
        torch.float16,
    )


def _gemm_4bit():
    for dtype in oracles.FLOAT_DTYPES:
        for quant_type in oracles.QUANT_TYPES:
            for lead, N, K, blocksize in (
                ((1,), 32, 64, 64),
                ((5,), 33, 100, 32),
                ((2, 3), 16, 128, 64),
                ((), 8, 64, 32),
            ):
                packed, absmax = _weight(N, K, blocksize, quant_type)
                A = torch.randn(*lead, K).to(dtype)
                yield A, packed, [N, K], absmax, blocksize, quant_type
                yield A, packed, [N, K], absmax, blocksize, quant_type, torch.randn(N).to(dtype)
    packed, absmax = _weight(600, 64, 64, "nf4")
    offset = absmax.mean()
    codes, absmax2 = oracles.quantize_blockwise(absmax - offset, oracles.dynamic_map(), 256)
    A = torch.randn(64, 3).t()
    yield (
        A,
        packed,
        [600, 64],
        absmax2,
        64,
        "nf4",
        torch.randn(600),
        codes,
        oracles.dynamic_map().clone(),
        offset,
    )
    yield (
        A.bfloat16(),
        packed,
        [600, 64],
        absmax2,
        64,
        "nf4",
        None,
        codes,
        oracles.dynamic_map().clone(),
        offset,
    )
    packed, absmax = _weight(32, 64, 64, "fp4", torch.float16)
    yield torch.randn(70, 64), packed.t(), [32, 64], absmax, 64, "fp4"
    yield torch.randn(0, 64), packed, [32, 64], absmax, 64, "fp4"
    yield (
        torch.randn(2, 64),
        _strided(packed),
        [32, 64],
        _strided(absmax),
        64,
        "fp4",
        _strided(torch.randn(32)),
    )


def _gemm_4bit_transposed():
    """The same weights, with activations of as many columns as those have rows, and no bias."""
    for A, packed, shape, absmax, blocksize, quant_type, *rest in _gemm_4bit():
        if not rest or rest[0] is None:
            rows = torch.randn(*A.shape[:-1], shape[0]).to(A.dtype)
            yield rows, packed, shape, absmax, blocksize, quant_type, *rest[1:]


def _gemm_4bit_grouped():
    """Experts without rows first, last and between; all rows with one; rows of nobody; no rows at all."""
    for index, dtype in enumerate(oracles.FLOAT_DTYPES):
        for ends, N, K, blocksize in (
            ([0, 2, 2, 5, 5], 24, 32, 32),
            ([4, 4, 4], 33, 64, 64),
            ([0, 0, 1], 5, 96, 32),
            ([2, 6], 7, 128, 128),
        ):
            E, quant_type = len(ends), oracles.QUANT_TYPES[index % 2]
            packed, absmax = _weight(E * N, K, blocksize, quant_type)
            A, offsets = torch.randn(ends[-1] + index, K).to(dtype), torch.tensor(ends, dtype=torch.int32)
            yield A, packed, [E, N, K], absmax, blocksize, quant_type, offsets
            yield A, packed, [E, N, K], absmax, blocksize, quant_type, offsets, torch.randn(E, N).to(dtype)
    offsets = torch.tensor([3, 3, 40, 41], dtype=torch.int32)
    for N, K in ((128, 64), (150, 64)):  # experts that begin with a block of 256 statistics, and that do not
        packed, absmax = _weight(4 * N, K, 32, "nf4")
        offset, code = absmax.mean(), oracles.dynamic_map().clone()
        codes, absmax2 = oracles.quantize_blockwise(absmax - offset, code, 256)
        for dtype, bias in ((torch.float32, torch.randn(4, N)), (torch.bfloat16, None)):
            A = torch.randn(K, 43).t().to(dtype)
            yield A, packed, [4, N, K], absmax2, 32, "nf4", offsets, bias, codes, code, offset
    packed, absmax = _weight(4 * 8, 64, 64, "fp4", torch.bfloat16)
    yield torch.randn(0, 64), packed, [4, 8, 64], absmax, 64, "fp4", offsets * 0
    yield (
        torch.randn(41, 64),
        packed.t(),
        [4, 8, 64],
        _strided(absmax),
        64,
        "fp4",
        _strided(offsets),
        _strided(torch.randn(4, 8)),
    )


def _gemm_4bit_grouped_transposed():
    """The same experts, with activations of as many columns as those have rows, and no bias."""
    for A, packed, shape, absmax, blocksize, quant_type, offsets, *rest in _gemm_4bit_grouped():
        if not rest or rest[0] is None:
            rows = torch.randn(A.shape[0], shape[1]).to(A.dtype)
            yield rows, packed, shape, absmax, blocksize, quant_type, offsets, *rest[1:]


def _gemv_4bit():
    for dtype in oracles.FLOAT_DTYPES:
        for quant_type in oracles.QUANT_TYPES:
            for lead, N, K, blocksize in (((1,), 32, 64, 64), ((1, 1), 17, 100, 32), ((2, 3), 16, 128, 64)):
                packed, absmax = _weight(N, K, blocksize, quant_type)
                A = torch.randn(*lead, K).to(dtype)
                yield A, packed, [N, K], absmax, oracles.table(quant_type).float(), blocksize


def _maps():
    return oracles.dynamic_map(True).clone(), oracles.dynamic_map(False).clone()


def _quantize_blockwise():
    signed, unsigned = _maps()
    for dtype in oracles.FLOAT_DTYPES:
        yield torch.randn(7, 33, dtype=dtype), signed, 64
        yield torch.rand(700, dtype=dtype), unsigned, 256
    yield torch.randn(40, 6).t(), signed, 4096
    yield torch.zeros(100), signed, 64
    yield torch.randn(100), _strided(signed), 64
    yield torch.empty(0, 4), signed, 64


def _dequantize_blockwise():
    signed, unsigned = _maps()
    for dtype in oracles.FLOAT_DTYPES:
        yield torch.randint(0, 256, (7, 33), dtype=torch.uint8), torch.rand(4), signed, 64, dtype
        yield torch.randint(0, 256, (700,), dtype=torch.uint8), torch.rand(3), unsigned, 256, dtype
    yield torch.randint(0, 256, (40, 6), dtype=torch.uint8).t(), torch.rand(1), signed, 4096, torch.float32
    yield (
        torch.randint(0, 256, (100,), dtype=torch.uint8),
        _strided(torch.rand(2)),
        _strided(signed),
        64,
        torch.float16,
    )
    yield torch.empty(0, dtype=torch.uint8), torch.empty(0), signed, 64, torch.float16


def _activations(dtype: torch.dtype) -> Tensor:
    A = torch.randn(9, 40).clamp(-4, 4)
    A[1, 3], A[8, 3], A[0, 39], A[2] = 7.5, -6.0, 12.0, 0.0
    return A.to(dtype)


def _int8_quant():
    for dtype in oracles.FLOAT_DTYPES:
        yield (_activations(dtype),)
        yield _activations(dtype), 6.0
    yield _activations(torch.float16).t(), 3.0
    yield torch.randn(4, 8).half(), 100.0


def _int8(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def _int8_vectorwise_dequant():
    yield _int8(9, 40), torch.rand(9)
    yield _int8(40, 3).t(), torch.rand(3)


def _int8_linear_matmul():
    yield _int8(9, 40), _int8(24, 40)
    yield _int8(2, 3, 37), _int8(5, 37)
    yield _int8(40, 9).t(), _int8(40, 24).t()
    yield _int8(1, 1030), _int8(3, 1030)
    yield torch.full((8, 200), -128, dtype=torch.int8), torch.full((70, 200), -128, dtype=torch.int8)


def _int8_mm_dequant():
    acc = torch.randint(-(2**20), 2**20, (9, 24), dtype=torch.int32)
    yield acc, torch.rand(9), torch.rand(24)
    for dtype in oracles.FLOAT_DTYPES:
        yield acc, torch.rand(9), torch.rand(24), dtype, torch.randn(24, dtype=dtype)
    yield acc.view(3, 3, 24), torch.rand(9), torch.rand(24), torch.float32
    yield (
        acc.t().contiguous().t(),
        _strided(torch.rand(9)),
        _strided(torch.rand(24)),
        None,
        _strided(torch.rand(24)),
    )


def _int8_scaled_mm():
    yield _int8(9, 40), _int8(24, 40), torch.rand(9), torch.rand(24)
    for dtype in oracles.FLOAT_DTYPES:
        yield _int8(9, 37), _int8(24, 37), torch.rand(9), torch.rand(24), torch.randn(24, dtype=dtype), dtype
    yield _int8(2, 3, 40), _int8(24, 40), torch.rand(6), torch.rand(24), None, torch.bfloat16


def _int8_mixed_scaled_mm():
    for dtype in oracles.FLOAT_DTYPES:
        A = _activations(dtype)
        CA, SCA, columns = oracles.int8_rows(A, 6.0)
        CB, SCB, _ = oracles.int8_rows(torch.randn(24, 40))
        yield A, CA, CB, SCA, SCB, columns, torch.randn(24).to(dtype)
        yield A, CA, CB, SCA, SCB, columns
    yield A, CA, CB, SCA, SCB
    yield A, CA, CB, SCA, SCB, columns[:0]


def _int8_linear():
    for dtype in oracles.FLOAT_DTYPES:
        CB, SCB, _ = oracles.int8_rows(torch.randn(24, 40))
        yield _activations(dtype), CB, SCB, torch.randn(24).to(dtype), 6.0
        yield _activations(dtype), CB, SCB, None, 6.0
        yield _activations(dtype), CB, SCB, torch.randn(24)
        for rows, N, K in ((1, 1, 1), (7, 67, 130), (13, 130, 67)):  # beside the tile, the task and the step
            CB, SCB, _ = oracles.int8_rows(torch.randn(N, K))
            yield torch.randn(rows, K).to(dtype), CB, SCB, None, 2.0
            yield torch.randn(rows, K).to(dtype), CB, SCB
    CB, SCB, _ = oracles.int8_rows(torch.randn(5, 37))
    yield torch.randn(37, 9).t(), CB, SCB, torch.randn(5)
    yield torch.randn(2, 3, 37), CB, SCB, None, 100.0
    yield torch.randn(37), CB, SCB
    yield torch.randn(0, 37), CB, SCB, None, 6.0


_RULES_32BIT = ("momentum", "lars", "rmsprop", "adagrad", "adam", "lamb", "lion", "ademamix")
_RULES_8BIT = ("momentum", "rmsprop", "adagrad", "adam", "lion", "ademamix")
_TWO_STATES = ("adam", "lamb", "ademamix")


def _optimizer_update_32bit():
    for index, name in enumerate(_RULES_32BIT):
        dtype = oracles.FLOAT_DTYPES[index % 3]
        shape = (3, 100)
        unorm = torch.zeros(1) if name in ("lars", "lamb") else None
        state1 = torch.randn(2, *shape) * 0.1 if name == "ademamix" else torch.rand(shape) * 0.1
        state2 = torch.rand(shape) * 0.1 if name in _TWO_STATES else None
        scalars = (1.0 if unorm is not None else 0.0, 2.0, 0.9, 0.99, 0.999, 0.5, 1e-8, 0.01, 2, 1e-3, 1.0)
        yield (
            name,
            torch.randn(shape).to(dtype),
            torch.randn(shape).to(dtype),
            state1,
            state2,
            unorm,
            *scalars,
        )


def _optimizer_update_8bit_blockwise():
    signed, unsigned = _maps()
    for index, name in enumerate(_RULES_8BIT):
        dtype = oracles.FLOAT_DTYPES[index % 3]
        count = 700
        rows = (2, count) if name == "ademamix" else (count,)
        state1 = torch.randint(128, 250, rows, dtype=torch.uint8)
        absmax1 = torch.rand(2, 3) if name == "ademamix" else torch.rand(3)
        two = name in _TWO_STATES
        state2 = torch.randint(64, 250, (count,), dtype=torch.uint8) if two else None
        yield (
            name,
            torch.randn(count).to(dtype),
            torch.randn(count).to(dtype),
            state1,
            state2,
            *(0.9, 0.99, 0.999, 0.5, 1e-8, 2, 1e-3),
            signed.clone(),
            unsigned.clone() if two else None,
            absmax1,
            torch.rand(3) if two else None,
            *(0.01, 1.0),
        )


def _round_to_bfloat16():
    yield torch.randn(7, 33), 12345, 0
    yield torch.randn(40, 6).t(), -7, 2**33
    yield torch.tensor([0.0, -0.0, 1.0, torch.inf, 1e-40, 3.3e38]), 1, 5


_MAKERS = {
    "quantize_4bit": _quantize_4bit,
    "dequantize_4bit": _dequantize_4bit,
    "dequantize_4bit_nested": _dequantize_4bit_nested,
    "embedding_4bit": _embedding_4bit,
    "embedding_8bit": _embedding_8bit,
    "gemm_4bit": _gemm_4bit,
    "gemm_4bit_transposed": _gemm_4bit_transposed,
    "gemm_4bit_grouped": _gemm_4bit_grouped,
    "gemm_4bit_grouped_transposed": _gemm_4bit_grouped_transposed,
    "gemv_4bit": _gemv_4bit,
    "quantize_blockwise": _quantize_blockwise,
    "dequantize_blockwise": _dequantize_blockwise,
    "int8_vectorwise_quant": _int8_quant,
    "int8_vectorwise_dequant": _int8_vectorwise_dequant,
    "int8_double_quant": _int8_quant,
    "int8_linear_matmul": _int8_linear_matmul,
    "int8_mm_dequant": _int8_mm_dequant,
    "int8_scaled_mm": _int8_scaled_mm,
    "int8_mixed_scaled_mm": _int8_mixed_scaled_mm,
    "int8_linear": _int8_linear,
    "round_to_bfloat16": _round_to_bfloat16,
    "optimizer_update_32bit": _optimizer_update_32bit,
    "optimizer_update_8bit_blockwise": _optimizer_update_8bit_blockwise,
}
OPERATOR_NAMES = tuple(_MAKERS)


@functools.cache
def _made(name: str) -> list[tuple]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return list(_MAKERS[name]())


def samples(name: str, device: str = "cpu") -> list[tuple]:
    """Argument tuples for the operator, on ``device``: fresh tensors, but the same values in every process."""
    return [
        tuple(x.clone().to(device) if isinstance(x, Tensor) else x for x in arguments)
        for arguments in _made(name)
    ]
