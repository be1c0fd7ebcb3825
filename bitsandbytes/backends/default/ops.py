"""The quantization operators in plain torch: right on any device, the reference for every faster kernel.

Everything is computed in float32 with one rounding at the end, in the order the formats define, so that native
kernels can be compared bit for bit. NaN makes its block's absmax NaN and takes the highest code: the block
decodes to NaN. An infinite absmax decodes to infinity or NaN.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..._formats.codebooks import encoding_table, get_4bit_type, midpoints
from ..._formats.packing import as_bytes, pack_nibbles
from ..._formats.table import NESTED_BLOCKSIZE
from ..._ops import (
    dequantize_4bit,
    dequantize_4bit_nested,
    dequantize_blockwise,
    gemm_4bit,
    gemm_4bit_transposed,
    gemv_4bit,
    int8_double_quant,
    int8_linear,
    int8_linear_matmul,
    int8_mixed_scaled_mm,
    int8_mm_dequant,
    int8_scaled_mm,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
    quantize_4bit,
    quantize_blockwise,
)

__all__ = ["expanded", "linear_into"]

_TINY = 1e-38  # keeps the reciprocal of an all-zero block's absmax finite
_EXACT_IN_FLOAT32 = 1024  # int8 products that float32 sums exactly: 1024 * 128 * 128 = 2**24
_INT8_SCALE = 1.0 / 127.0


def _rows(x: Tensor) -> Tensor:
    """All leading dimensions as one; a view of what is contiguous. Unlike -1, right for sizes of zero."""
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])


# --- block-wise formats ----------------------------------------------------------------------------------------


def _scale_by_block(values: Tensor, absmax: Tensor, blocksize: int) -> Tensor:
    """Flat float32 values over their blocks' absmax, in [-1, 1]; writes ``absmax``.

    A full block multiplies by the reciprocal, a short last block divides: published checkpoints were made so.
    """
    full = values.numel() // blocksize
    whole, tail = values[: full * blocksize].view(full, blocksize), values[full * blocksize :]
    scaled = torch.empty_like(values)
    if full:
        absmax[:full] = whole.abs().amax(dim=1)
        reciprocal = absmax[:full].clamp(min=_TINY).reciprocal().unsqueeze(1)
        torch.mul(whole, reciprocal, out=scaled[: full * blocksize].view(full, blocksize))
    if tail.numel():
        absmax[full] = tail.abs().max().clamp(min=_TINY)
        torch.div(tail, absmax[full], out=scaled[full * blocksize :])
    return scaled.clamp_(-1.0, 1.0)


def _rescale_by_block(values: Tensor, absmax: Tensor, blocksize: int, out: Tensor) -> None:
    """``out = values * absmax`` block by block: float32 product, one rounding to out's dtype."""
    full = values.numel() // blocksize
    whole, flat = full * blocksize, out.view(-1)
    if full:
        scale = absmax.reshape(-1)[:full].unsqueeze(1)
        torch.mul(values[:whole].view(full, blocksize), scale, out=flat[:whole].view(full, blocksize))
    if whole < values.numel():
        torch.mul(values[whole:], absmax.reshape(-1)[full], out=flat[whole:])


@quantize_4bit.kernel("default")
def _(A, blocksize, quant_type, quant_storage, packed, absmax):
    thresholds, codes = encoding_table(quant_type, A.device)
    scaled = _scale_by_block(A.reshape(-1).float(), absmax, blocksize)
    bucket = torch.bucketize(scaled, thresholds, out_int32=True)
    pad = {"nf4": 7, "fp4": 0}[quant_type]  # the code of zero
    as_bytes(packed).copy_(pack_nibbles(codes[bucket], pad))


def _decode_4bit(packed: Tensor, code: Tensor, numel: int) -> Tensor:
    """Codebook values of the first ``numel`` packed codes: one look-up a byte, which yields both of its values."""
    byte = torch.arange(256, dtype=torch.int32, device=packed.device)
    pairs = torch.stack((code[byte >> 4], code[byte & 0xF]), dim=1)
    held = as_bytes(packed)[: (numel + 1) // 2]
    return torch.nn.functional.embedding(held.int(), pairs).view(-1)[:numel]


@dequantize_4bit.kernel("default")
def _(A, absmax, blocksize, quant_type, shape, dtype, out):
    code = get_4bit_type(quant_type, A.device)
    _rescale_by_block(_decode_4bit(A, code, out.numel()), absmax, blocksize, out)


def expanded(absmax: Tensor, absmax_8bit: Tensor, absmax_code: Tensor, absmax_offset: Tensor) -> Tensor:
    """The float32 scales that nested statistics stand for."""
    scales = torch.ops.bitsandbytes.dequantize_blockwise(
        absmax_8bit, absmax, absmax_code, NESTED_BLOCKSIZE, torch.float32
    )
    return scales + absmax_offset.float()


@dequantize_4bit_nested.kernel("default")
def _(A, absmax, absmax_8bit, absmax_code, absmax_offset, blocksize, quant_type, shape, dtype, out):
    scales = expanded(absmax, absmax_8bit, absmax_code, absmax_offset)
    torch.ops.bitsandbytes.dequantize_4bit.out(A, scales, blocksize, quant_type, shape, dtype, out)


@quantize_blockwise.kernel("default")
def _(A, code, blocksize, codes, absmax):
    scaled = _scale_by_block(A.reshape(-1).float(), absmax, blocksize)
    codes.view(-1).copy_(torch.bucketize(scaled, midpoints(code.reshape(-1)), out_int32=True))


@dequantize_blockwise.kernel("default")
def _(A, absmax, code, blocksize, dtype, out):
    _rescale_by_block(code.reshape(-1)[A.reshape(-1).int()], absmax, blocksize, out)


# --- 4-bit matmul ----------------------------------------------------------------------------------------------


def linear_into(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """``out = rows @ weight.T + bias``, all two-dimensional. Into a given tensor, because autocast leaves that alone."""
    rows = rows.detach()  # an operator may meet tensors that require grad, and torch refuses `out` for those
    if bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias.detach(), rows, weight.t(), out=out)


@gemm_4bit.kernel("default")
def _(
    A,
    B,
    shapeB,
    absmax,
    blocksize,
    quant_type,
    bias,
    absmax_8bit,
    absmax_code,
    absmax_offset,
    out,
):
    if absmax_8bit is not None:
        absmax = expanded(absmax, absmax_8bit, absmax_code, absmax_offset)
    weight = torch.ops.bitsandbytes.dequantize_4bit(B, absmax, blocksize, quant_type, shapeB, A.dtype)
    linear_into(_rows(A), weight, bias, _rows(out))


@gemm_4bit_transposed.kernel("default")
def _(A, B, shapeB, absmax, blocksize, quant_type, absmax_8bit, absmax_code, absmax_offset, out):
    if absmax_8bit is not None:
        absmax = expanded(absmax, absmax_8bit, absmax_code, absmax_offset)
    weight = torch.ops.bitsandbytes.dequantize_4bit(B, absmax, blocksize, quant_type, shapeB, A.dtype)
    linear_into(_rows(A), weight.t(), None, _rows(out))


@gemv_4bit.kernel("default")
def _(A, B, shapeB, absmax, code, blocksize, out):
    weight = torch.empty(shapeB, dtype=A.dtype, device=A.device)
    _rescale_by_block(_decode_4bit(B, code.reshape(-1), weight.numel()), absmax, blocksize, weight)
    linear_into(_rows(A), weight, None, _rows(out))


# --- LLM.int8() ------------------------------------------------------------------------------------------------


def _outliers(A: Tensor, threshold: float) -> tuple[Tensor | None, Tensor | None]:
    """Which elements of the rows of A are outliers, and the ascending columns that hold any."""
    if threshold <= 0.0:
        return None, None
    mask = A.abs() >= threshold
    return mask, mask.any(dim=0).nonzero().view(-1)


def _absmax(magnitudes: Tensor, dim: int) -> Tensor:
    if magnitudes.shape[dim] == 0:
        return magnitudes.new_zeros(magnitudes.shape[1 - dim])
    return magnitudes.amax(dim=dim)


def _to_int8(values: Tensor, absmax: Tensor) -> Tensor:
    """``round(values * 127 / absmax)``, ties to even. An all-zero row gives zeros; so does what is not finite."""
    scale = torch.where(absmax > 0, 127.0 / absmax, 0.0)
    rounded = (values * scale).round_().clamp_(-127.0, 127.0).nan_to_num_(0.0)
    return rounded.to(torch.int8, memory_format=torch.contiguous_format)


@int8_vectorwise_quant.kernel("default")
def _(A, threshold):
    rows = _rows(A)
    mask, columns = _outliers(rows, threshold)
    values = rows.float()
    magnitudes = values.abs()
    if mask is not None:
        magnitudes = magnitudes.masked_fill_(mask, 0.0)
    row_stats = _absmax(magnitudes, 1)
    quantized = _to_int8(values, row_stats.unsqueeze(1))
    if columns is not None:
        quantized[:, columns] = 0
    return quantized.view(A.shape), row_stats, columns


@int8_double_quant.kernel("default")
def _(A, threshold):
    by_row, row_stats, columns = int8_vectorwise_quant(A, threshold)
    rows = _rows(A)
    mask, _ = _outliers(rows, threshold)
    values = rows.float()
    if mask is not None:
        values = values.masked_fill(mask, 0.0)
    col_stats = _absmax(values.abs(), 0)
    by_column = _to_int8(values, col_stats).view(A.shape)
    if columns is None:
        columns = torch.empty(0, dtype=torch.int64, device=A.device)
    return by_row, by_column, row_stats, col_stats, columns


@int8_vectorwise_dequant.kernel("default")
def _(A, stats, out):
    rows = _rows(out)
    torch.mul(A.reshape(rows.shape), stats.reshape(-1, 1), out=rows)
    rows.mul_(_INT8_SCALE)


@int8_linear_matmul.kernel("default")
def _(A, B, out):
    # Not every device multiplies integers. Slices of K whose sums float32 holds exactly are added as integers.
    # Into a given tensor, because autocast leaves that alone and would round the plain product.
    rows, columns = _rows(A), _rows(out)
    columns.zero_()
    product = torch.empty(columns.shape, dtype=torch.float32, device=A.device)
    for start in range(0, A.shape[-1], _EXACT_IN_FLOAT32):
        part = slice(start, start + _EXACT_IN_FLOAT32)
        torch.mm(rows[:, part].float(), B[:, part].float().t(), out=product)
        columns += product.to(torch.int32)


def _dequantize_product(
    product: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    values = _rows(product).float()
    values *= row_stats.reshape(-1, 1) * (_INT8_SCALE * _INT8_SCALE)
    values *= col_stats.reshape(1, -1)
    if bias is not None:
        values += bias.reshape(1, -1)
    out.view(values.shape).copy_(values)


@int8_mm_dequant.kernel("default")
def _(A, row_stats, col_stats, dtype, bias, out):
    _dequantize_product(A, row_stats, col_stats, bias, out)


@int8_scaled_mm.kernel("default")
def _(A, B, row_stats, col_stats, bias, dtype, out):
    product = int8_linear_matmul(A, B)
    _dequantize_product(product, row_stats, col_stats, bias, out)


@int8_mixed_scaled_mm.kernel("default")
def _(A, CA, CB, SCA, SCB, outlier_cols, bias):
    result = int8_scaled_mm(CA, CB, SCA, SCB, bias, A.dtype)
    if outlier_cols is None or outlier_cols.numel() == 0:
        return result, A.new_empty((*A.shape[:-1], 0))
    outliers = A[..., outlier_cols].contiguous()
    weight = (CB[:, outlier_cols] * (SCB.reshape(-1, 1) * _INT8_SCALE)).to(A.dtype)
    _rows(result).addmm_(_rows(outliers), weight.t())
    return result, outliers


@int8_linear.kernel("default")
def _(A, CB, SCB, bias, threshold):
    quantized, row_stats, columns = int8_vectorwise_quant(A, threshold)
    if columns is None:
        return int8_scaled_mm(quantized, CB, row_stats, SCB, bias, A.dtype), None
    product, _ = int8_mixed_scaled_mm(A, quantized, CB, row_stats, SCB, columns, bias)
    flags = torch.zeros(A.shape[-1], dtype=torch.uint8, device=A.device).index_fill_(0, columns, 1)
    return product, flags
