"""What the formats and functions mean, computed another way, and the error each format is allowed.

Everything here works in float64 and rounds to float32 where the formats say so. A product or a quotient of two
float32 numbers, rounded to float64 and then to float32, is the correctly rounded float32 result, so these models are
exact. Tables come from the golden files. Nothing is imported from the library: an oracle that shared its code would
agree with its mistakes.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
STORAGE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("nf4", "fp4")

# Smallest magnitude a block is divided by; a short last block that holds less stores this as its absmax.
TINY = torch.tensor(1e-38, dtype=torch.float32).double().item()

_PAD_CODE = {"nf4": 7, "fp4": 0}  # the code of zero fills the last nibble of an odd number of values


@functools.cache
def golden(name: str) -> dict[str, Tensor]:
    """The arrays of ``tests/golden/<name>.safetensors``. Shared: do not write to them."""
    from safetensors.torch import load_file

    return load_file(GOLDEN / f"{name}.safetensors")


def table(quant_type: str) -> Tensor:
    """The 16 values of a 4-bit format in the order of its codes, float64."""
    return golden("codebooks")[quant_type].double()


def dynamic_map(signed: bool = True) -> Tensor:
    return golden("codebooks")["dynamic_signed" if signed else "dynamic_unsigned"]


# --- block-wise formats ----------------------------------------------------------------------------------------


def scale_by_block(values: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """``(scaled float64, absmax float32)`` of flattened values: a full block multiplies, a short last one divides."""
    flat = values.detach().cpu().reshape(-1).float().double()
    scaled, statistics = [], []
    for block in flat.split(blocksize) if flat.numel() else ():
        absmax = math.nan if block.isnan().any() else block.abs().max().item()
        floor = absmax if math.isnan(absmax) else max(absmax, TINY)
        if block.numel() == blocksize:
            reciprocal = torch.tensor(1.0 / floor, dtype=torch.float64).float().double()
            part = (block * reciprocal).float().double()
        else:
            part = (block / floor).float().double()
            absmax = floor
        scaled.append(part.clamp(-1.0, 1.0))
        statistics.append(absmax)
    joined = torch.cat(scaled) if scaled else flat
    return joined, torch.tensor(statistics, dtype=torch.float32)


def _count_below(scaled: Tensor, thresholds: Tensor) -> Tensor:
    """How many thresholds each value exceeds; all of them for NaN."""
    exceeds = scaled.unsqueeze(1) > thresholds.double().unsqueeze(0)
    return torch.where(scaled.isnan(), thresholds.numel(), exceeds.sum(1))


def encode_4bit(scaled: Tensor, quant_type: str) -> Tensor:
    """Codes (uint8, one per value) of scaled values."""
    books = golden("codebooks")
    if quant_type == "nf4":
        return _count_below(scaled, books["nf4_bounds"]).to(torch.uint8)
    return books["fp4_bucket_to_code"][_count_below(scaled, books["fp4_bounds_signed"])]


def pack(codes: Tensor, quant_type: str) -> Tensor:
    """Two codes a byte, the even element high; uint8 ``[(n + 1) // 2, 1]``."""
    codes = codes.tolist()
    if len(codes) % 2:
        codes.append(_PAD_CODE[quant_type])
    packed = [16 * high + low for high, low in zip(codes[::2], codes[1::2], strict=True)]
    return torch.tensor(packed, dtype=torch.uint8).view(-1, 1)


def unpack(packed: Tensor, count: int) -> Tensor:
    """The first ``count`` codes of packed bytes in any storage dtype."""
    held = as_bytes(packed)
    return torch.stack([held // 16, held % 16], dim=1).reshape(-1)[:count]


def quantize_4bit(values: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    """``(packed uint8 [(n + 1) // 2, 1], absmax float32)``."""
    scaled, absmax = scale_by_block(values, blocksize)
    return pack(encode_4bit(scaled, quant_type), quant_type), absmax


def _rescale(values: Tensor, absmax: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    scale = absmax.detach().cpu().double().repeat_interleave(blocksize)[: values.numel()]
    return (values * scale).float().to(dtype)


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """Table value times absmax in float32, one rounding; blocks run over the flattened tensor."""
    codes = unpack(packed.cpu(), math.prod(shape))
    return _rescale(table(quant_type)[codes.long()], absmax, blocksize, dtype).reshape(shape)


def quantize_blockwise(values: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """``(codes uint8 like values, absmax float32)``: the nearest entry, a tie takes the lower."""
    code = code.cpu().double()
    thresholds = ((code[:-1] + code[1:]) / 2).float()
    scaled, absmax = scale_by_block(values, blocksize)
    return _count_below(scaled, thresholds).to(torch.uint8).reshape(values.shape), absmax


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
) -> Tensor:
    values = code.cpu().double()[codes.cpu().reshape(-1).long()]
    return _rescale(values, absmax, blocksize, dtype).reshape(codes.shape)


def expand_nested(
    codes: Tensor, absmax: Tensor, code: Tensor, offset: Tensor, blocksize: int = 256
) -> Tensor:
    """First-level statistics from quantized ones: ``code[u8] * absmax2 + offset``, each step rounded to float32."""
    products = dequantize_blockwise(codes, absmax, code, blocksize, torch.float32)
    return (products.double() + offset.detach().cpu().float().double()).float()


def matmul_4bit(A: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``A @ weight.T + bias`` in float64, for the weight as it was decoded."""
    product = A.detach().cpu().double() @ weight.detach().cpu().double().t()
    return product if bias is None else product + bias.detach().cpu().double()


def product_error(result: Tensor, A: Tensor, weight: Tensor, bias: Tensor | None = None) -> float:
    """Norm of a product's error over what it is measured against: the exact product.

    A few values may cancel; then it is the product of magnitudes, to which rounding errors are proportional.
    """
    exact = matmul_4bit(A, weight, bias)
    against = (
        exact
        if exact.numel() >= 256
        else matmul_4bit(A.abs(), weight.abs(), None if bias is None else bias.abs())
    )
    assert result.shape == exact.shape, f"shape {tuple(result.shape)}, expected {tuple(exact.shape)}"
    return (result.detach().cpu().double() - exact).norm().item() / max(against.norm().item(), 1e-300)


# --- LLM.int8() ------------------------------------------------------------------------------------------------


def int8_rows(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """``(q int8 like A, absmax float32 [rows], outlier columns int64)`` of ``A [..., K]``."""
    values = A.detach().cpu().reshape(-1, A.shape[-1])
    outlier = values.abs() >= threshold if threshold > 0 else torch.zeros_like(values, dtype=torch.bool)
    exact = values.double()
    absmax = (
        exact.masked_fill(outlier, 0.0).abs().amax(1) if values.numel() else exact.new_zeros(values.shape[0])
    )
    columns = torch.tensor([k for k in range(values.shape[1]) if outlier[:, k].any()], dtype=torch.int64)
    q = _round_127(exact, absmax.unsqueeze(1))
    q[:, columns] = 0
    return q.to(torch.int8).reshape(A.shape), absmax.float(), columns


def int8_columns(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor]:
    """``(q int8 like A, absmax float32 [columns])`` with outlier elements, not columns, set to zero."""
    values = A.detach().cpu().reshape(-1, A.shape[-1])
    exact = values.double()
    if threshold > 0:
        exact = exact.masked_fill(values.abs() >= threshold, 0.0)
    absmax = exact.abs().amax(0)
    return _round_127(exact, absmax.unsqueeze(0)).to(torch.int8).reshape(A.shape), absmax.float()


def _round_127(values: Tensor, absmax: Tensor) -> Tensor:
    # 127 times the reciprocal, two roundings: the published vectors are made so (they differ from a division by one
    # code of golden/int8's CB).
    scale = torch.where(absmax > 0, (1.0 / absmax).float().double() * 127.0, 0.0).float().double()
    return (values * scale).float().round().clamp(-127, 127)  # torch rounds half to even


def int8_matmul(A: Tensor, B: Tensor) -> Tensor:
    """``A @ B.T`` in int64."""
    return A.cpu().long() @ B.cpu().long().t()


def int8_mm_dequant(acc: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None = None) -> Tensor:
    """``acc * row * col / 127**2 + bias`` in float64."""
    rows = acc.cpu().double().reshape(-1, acc.shape[-1])
    values = rows * row_stats.cpu().double().reshape(-1, 1) * col_stats.cpu().double().reshape(1, -1) / 127**2
    if bias is not None:
        values = values + bias.cpu().double()
    return values.reshape(acc.shape)


# --- bounds and comparisons ------------------------------------------------------------------------------------


def worst_step(code: Tensor) -> float:
    """Largest distance from a value in [-1, 1] to the nearest entry of a table: half the widest gap, or an end."""
    entries = code.detach().cpu().double().reshape(-1).sort().values
    lowest = -1.0 if entries[0] < 0 else 0.0
    ends = max(1.0 - entries[-1].item(), abs(lowest - entries[0].item()))
    return max(entries.diff().max().item() / 2, ends)


def quantization_bound(
    absmax: Tensor, blocksize: int, count: int, code: Tensor, dtype: torch.dtype
) -> Tensor:
    """How far each of ``count`` values may be from its decoded self: half the widest gap of the table times absmax.

    A value on a threshold may end up on either side by the rounding of the scaling, and the result rounds once.
    """
    scale = absmax.detach().cpu().double().repeat_interleave(blocksize)[:count]
    slack = 2 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    return scale * (worst_step(code) + slack)


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, for comparisons that NaN must not disturb."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def assert_same_bytes(actual: Tensor, expected: Tensor) -> None:
    """Same dtype, shape and bytes, up to the sign of zero."""
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    same = (as_bytes(actual) == as_bytes(expected)).view(-1, actual.element_size()).all(1)
    if actual.is_floating_point():
        same |= (actual.reshape(-1) == 0) & (expected.reshape(-1) == 0)
        same |= actual.reshape(-1).isnan() & expected.reshape(-1).isnan()
    if not same.all():
        first = int((~same).nonzero()[0])
        raise AssertionError(
            f"{int((~same).sum())} of {same.numel()} elements differ; first at {first}: "
            f"{actual.reshape(-1)[first].item()!r}, expected {expected.reshape(-1)[first].item()!r}"
        )


def assert_same_codes(actual: Tensor, expected: Tensor, *, count: int | None = None) -> None:
    """Packed tensors of the same shape, dtype and codes; ``count`` leaves out what pads the last byte."""
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    held, wanted = as_bytes(actual), as_bytes(expected)
    if count is not None:
        held, wanted = unpack(actual.cpu(), count), unpack(expected.cpu(), count)
    if not torch.equal(held, wanted):
        wrong = (held != wanted).nonzero().reshape(-1)
        first = int(wrong[0])
        raise AssertionError(
            f"{wrong.numel()} of {held.numel()} codes differ; first at {first}: {int(held[first])}, "
            f"expected {int(wanted[first])}"
        )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected, in float64."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    norm = expected.norm().item()
    return (actual - expected).norm().item() / norm if norm else actual.norm().item()
