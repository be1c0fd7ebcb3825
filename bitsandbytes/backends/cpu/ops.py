"""4-bit and block-wise CPU kernels, registered only where the loaded library has them.

The default backend serves the rest. Kernels read plain contiguous memory, so strided inputs are copied first. Codes
and dequantized values are the default backend's bit for bit; matrix products accumulate in float32 and round once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..._formats.packing import as_bytes
from ..._formats.table import FORMATS
from ..._native import ABI, DTYPE_ID, FORMAT_ID, has_native, lib, ptr, threads
from ..._ops import (
    dequantize_4bit,
    dequantize_blockwise,
    gemm_4bit,
    gemm_4bit_transposed,
    gemv_4bit,
    quantize_4bit,
    quantize_blockwise,
)
from ..._ops_shortcuts import fourbit_product
from ..default.ops import expanded, linear_into
from .memory import empty
from .plan import LEAST_DENSE_ROWS, dense_rows_here
from .registration import native_kernel as _native_kernel

__all__: list[str] = []

# The codebooks in code order, as the matrix product takes them.
_CODE = {
    name: torch.tensor(format.values, dtype=torch.float32, device="cpu") for name, format in FORMATS.items()
}
_CODE_ADDRESS = {name: code.data_ptr() for name, code in _CODE.items()}

# Decoded weights at a time: few enough to stay in the cache and to touch their memory once, and enough for torch's product
# to come within some percent of that of the whole weight.
_PANEL_VALUES = 1 << 20


@_native_kernel(quantize_4bit, "bnb_cpu_quantize_4bit")
def _(A, blocksize, quant_type, quant_storage, packed, absmax):
    A = A.contiguous()
    lib.bnb_cpu_quantize_4bit(
        ptr(A),
        DTYPE_ID[A.dtype],
        FORMAT_ID[quant_type],
        ptr(packed),
        ptr(absmax),
        A.numel(),
        blocksize,
        threads(),
    )


@_native_kernel(dequantize_4bit, "bnb_cpu_dequantize_4bit")
def _(A, absmax, blocksize, quant_type, shape, dtype, out):
    A, absmax = A.contiguous(), absmax.contiguous()
    lib.bnb_cpu_dequantize_4bit(
        ptr(A),
        ptr(absmax),
        FORMAT_ID[quant_type],
        ptr(out),
        DTYPE_ID[dtype],
        out.numel(),
        blocksize,
        threads(),
    )


@_native_kernel(quantize_blockwise, "bnb_cpu_quantize_blockwise")
def _(A, code, blocksize, codes, absmax):
    A, code = A.contiguous(), code.contiguous()
    lib.bnb_cpu_quantize_blockwise(
        ptr(code), ptr(A), DTYPE_ID[A.dtype], ptr(codes), ptr(absmax), A.numel(), blocksize, threads()
    )


@_native_kernel(dequantize_blockwise, "bnb_cpu_dequantize_blockwise")
def _(A, absmax, code, blocksize, dtype, out):
    A, absmax, code = A.contiguous(), absmax.contiguous(), code.contiguous()
    lib.bnb_cpu_dequantize_blockwise(
        ptr(code), ptr(A), ptr(absmax), ptr(out), DTYPE_ID[dtype], out.numel(), blocksize, threads()
    )


def _multiply(
    A: Tensor,
    B: Tensor,
    shapeB,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    bias,
    absmax_8bit,
    absmax_code,
    absmax_offset,
    out: Tensor,
) -> None:
    A, B, absmax = A.contiguous(), B.contiguous(), absmax.contiguous()
    bias = None if bias is None else bias.contiguous()
    absmax_8bit, absmax_code, absmax_offset = _contiguous((absmax_8bit, absmax_code, absmax_offset))
    N, K = shapeB
    lib.bnb_cpu_gemm_4bit(
        ptr(A),
        DTYPE_ID[A.dtype],
        ptr(B),
        ptr(absmax),
        ptr(absmax_8bit),
        ptr(absmax_code),
        ptr(absmax_offset),
        ptr(code),
        ptr(bias),
        ptr(out),
        A.shape[:-1].numel(),
        N,
        K,
        blocksize,
        threads(),
    )


def _contiguous(nested: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    absmax_8bit, code, offset = nested
    if absmax_8bit is None or code is None or offset is None:
        return None, None, None
    return absmax_8bit.contiguous(), code.contiguous(), offset.float()


def _panel_rows(N: int, K: int, blocksize: int) -> int:
    """How many weight rows to decode at a time: about a panel, starting on a block and on a byte."""
    step = max(blocksize, 2) // math.gcd(max(blocksize, 2), K)
    return max(1, min(N, max(1, _PANEL_VALUES // max(1, K * step)) * step))


def _decoded_panels(
    B: Tensor, shapeB, absmax: Tensor, blocksize: int, quant_type: str, dtype: torch.dtype, step: int
) -> Iterator[tuple[slice, Tensor]]:
    """``step`` rows of the weight after another, all in one buffer."""
    N, K = shapeB
    packed, absmax = as_bytes(B), absmax.reshape(-1)
    buffer = torch.empty((step, K), dtype=dtype)
    for start in range(0, N, step):
        stop = min(N, start + step)
        panel = buffer[: stop - start]
        torch.ops.bitsandbytes.dequantize_4bit.out(
            packed[start * K // 2 :],
            absmax[start * K // blocksize :],
            blocksize,
            quant_type,
            panel.shape,
            dtype,
            panel,
        )
        yield slice(start, stop), panel


def _decode_and_multiply(
    A: Tensor, B: Tensor, shapeB, absmax: Tensor, quant_type: str, blocksize: int, bias, out: Tensor
) -> None:
    """The product with the weight decoded panel by panel; never all of it at once."""
    N, K = shapeB
    count = A.shape[:-1].numel()
    rows, columns = A.reshape(count, K), out.view(count, N)
    step = _panel_rows(N, K, blocksize)
    for part, panel in _decoded_panels(B, shapeB, absmax, blocksize, quant_type, A.dtype, step):
        linear_into(rows, panel, None if bias is None else bias[part], columns[:, part])


def _decode_and_multiply_transposed(
    A: Tensor, B: Tensor, shapeB, absmax: Tensor, quant_type: str, blocksize: int, out: Tensor
) -> None:
    """The product with the transposed weight. Sums of 16 bits would be rounded after each panel, so they get one."""
    N, K = shapeB
    count = A.shape[:-1].numel()
    rows, sums = A.detach().reshape(count, N), out.view(count, K)
    step = _panel_rows(N, K, blocksize) if A.dtype is torch.float32 else max(1, N)
    sums.zero_()
    for part, panel in _decoded_panels(B, shapeB, absmax, blocksize, quant_type, A.dtype, step):
        torch.addmm(sums, rows[:, part], panel, out=sums)  # in place, which autocast leaves alone


@_native_kernel(gemm_4bit, "bnb_cpu_gemm_4bit")
def _(A, B, shapeB, absmax, blocksize, quant_type, bias, absmax_8bit, absmax_code, absmax_offset, out):
    K = shapeB[1]
    few = A.numel() < LEAST_DENSE_ROWS * K
    if not few and A.shape[:-1].numel() >= dense_rows_here(A.dtype, (K | blocksize) % 64 == 0):
        if absmax_8bit is not None:
            absmax = expanded(absmax, absmax_8bit, absmax_code, absmax_offset)
        _decode_and_multiply(A, B, shapeB, absmax, quant_type, blocksize, bias, out)
    else:
        code = _CODE[quant_type]
        _multiply(A, B, shapeB, absmax, code, blocksize, bias, absmax_8bit, absmax_code, absmax_offset, out)


def _multiply_small(
    A, B, shapeB, absmax, blocksize, quant_type, bias, absmax_8bit, absmax_code, absmax_offset
) -> Tensor | None:
    """``gemm_4bit`` of few rows, as :meth:`Operator.shortcut` wants it."""
    product = fourbit_product(
        "is_cpu", A, B, shapeB, absmax, blocksize, quant_type, bias, absmax_8bit, absmax_code, absmax_offset
    )
    if product is None:
        return None
    values, dtype, packed, absmax, codes, table, offset, bias, M, N, K, shape, strides = product
    if M >= LEAST_DENSE_ROWS:
        return None
    out = empty(shape, strides, A.dtype)
    _product(
        _arguments(
            values, dtype, packed, absmax, codes, table, offset, _CODE_ADDRESS[quant_type], bias, out.data_ptr(),
            M, N, K, blocksize, torch.get_num_threads(),
        )
    )  # fmt: skip
    return out


if ABI and has_native("bnb_cpu_gemm_4bit_with"):
    _arguments, _product = ABI.packer("bnb_gemm_4bit_arguments"), lib.bnb_cpu_gemm_4bit_with
    gemm_4bit.shortcut("cpu", _multiply_small)


@_native_kernel(gemv_4bit, "bnb_cpu_gemm_4bit")
def _(A, B, shapeB, absmax, code, blocksize, out):
    _multiply(A, B, shapeB, absmax, code.contiguous(), blocksize, None, None, None, None, out)


@_native_kernel(gemm_4bit_transposed, "bnb_cpu_gemm_4bit_transposed")
def _(A, B, shapeB, absmax, blocksize, quant_type, absmax_8bit, absmax_code, absmax_offset, out):
    rows, (N, K) = A.shape[:-1].numel(), shapeB
    if rows >= dense_rows_here(A.dtype, (K | blocksize) % 64 == 0):
        if absmax_8bit is not None:
            absmax = expanded(absmax, absmax_8bit, absmax_code, absmax_offset)
        _decode_and_multiply_transposed(A, B, shapeB, absmax, quant_type, blocksize, out)
        return
    A, B, absmax = A.contiguous(), B.contiguous(), absmax.contiguous()
    absmax_8bit, absmax_code, absmax_offset = _contiguous((absmax_8bit, absmax_code, absmax_offset))
    lib.bnb_cpu_gemm_4bit_transposed(
        ptr(A),
        DTYPE_ID[A.dtype],
        ptr(B),
        ptr(absmax),
        ptr(absmax_8bit),
        ptr(absmax_code),
        ptr(absmax_offset),
        ptr(_CODE[quant_type]),
        ptr(out),
        rows,
        N,
        K,
        blocksize,
        threads(),
    )
