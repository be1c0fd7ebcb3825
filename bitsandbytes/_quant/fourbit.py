"""4-bit quantization: NF4 and FP4 weights, with plain or nested statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import ArgumentError, check_blocksize, check_float, check_format
from .._formats.codebooks import get_4bit_type
from .._formats.state import QuantState
from .._formats.table import DEFAULT_BLOCKSIZE, NESTED_BLOCKSIZE
from .blockwise import _fill, expand_absmax, quantize_blockwise

__all__ = [
    "dequantize_4bit",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemv_4bit",
    "quantize_4bit",
    "quantize_fp4",
    "quantize_nf4",
]


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """Quantize ``A`` to 4 bits in blocks that each keep their own absmax (Dettmers et al., "QLoRA", 2023).

    Blocks run over the flattened tensor, 64 values each unless ``blocksize`` says otherwise (32 to 4096, a power of
    two). ``compress_statistics=True`` quantizes the statistics to 8 bits as well. The bytes are returned as
    ``quant_storage``, so that sharding tools see a float tensor. ``absmax`` and ``out`` receive results.

    Returns the packed tensor ``[bytes / itemsize, 1]`` and the state :func:`dequantize_4bit` needs.

    Raises:
        ValueError: ``A`` is no float16, bfloat16 or float32 tensor, or the block size, the type or a tensor given
            does not fit.
    """
    if blocksize is None:
        blocksize = DEFAULT_BLOCKSIZE
    packed, statistics = torch.ops.bitsandbytes.quantize_4bit(
        A.detach(), blocksize, quant_type, quant_storage
    )
    offset = state2 = None
    if compress_statistics and statistics.numel():
        offset = statistics.mean()
        statistics, state2 = quantize_blockwise(statistics - offset, blocksize=NESTED_BLOCKSIZE)

    state = QuantState(
        absmax=_fill(absmax, statistics, "absmax"),
        shape=A.shape,
        code=get_4bit_type(quant_type, A.device),
        blocksize=blocksize,
        quant_type=quant_type,
        dtype=A.dtype,
        offset=offset,
        state2=state2,
    )
    return _fill(out, packed), state


def quantize_fp4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """:func:`quantize_4bit` with ``quant_type="fp4"``."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def quantize_nf4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """:func:`quantize_4bit` with ``quant_type="nf4"``."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """Rebuild the tensor that :func:`quantize_4bit` packed into ``A``.

    Pass the ``quant_state`` it returned; then ``absmax``, ``blocksize`` and ``quant_type`` are not looked at.
    ``absmax`` and ``out`` together serve callers that keep their own statistics: shape and dtype come from ``out``.
    Nested statistics are expanded first. Packed bytes laid out as ``[1, n]``, the transpose of what
    :func:`quantize_4bit` returns, give the transpose of a two-dimensional result.

    Raises:
        ValueError: neither ``quant_state`` nor both of ``absmax`` and ``out`` were given, or ``A`` or the statistics
            hold too little for the shape.
    """
    if quant_state is None:
        if absmax is None or out is None:
            raise ArgumentError("dequantize_4bit requires both absmax and out when there is no quant_state")
        quant_state = QuantState(
            absmax=absmax,
            shape=out.shape,
            blocksize=DEFAULT_BLOCKSIZE if blocksize is None else blocksize,
            quant_type=quant_type,
            dtype=out.dtype,
        )
    check_blocksize(quant_state.blocksize)
    check_format(quant_state.quant_type)
    check_float(quant_state.dtype, "Blockwise 4bit dequantization")

    state2 = quant_state.state2
    if quant_state.nested and state2.blocksize == NESTED_BLOCKSIZE and state2.dtype == torch.float32:
        decode = torch.ops.bitsandbytes.dequantize_4bit_nested
        statistics: tuple[Tensor, ...] = (state2.absmax, quant_state.absmax, state2.code, quant_state.offset)
    else:
        decode = torch.ops.bitsandbytes.dequantize_4bit
        statistics = (expand_absmax(quant_state),)
    arguments = (
        A,
        *statistics,
        quant_state.blocksize,
        quant_state.quant_type,
        quant_state.shape,
        quant_state.dtype,
    )
    if out is None:
        out = decode(*arguments)
    else:
        decode.out(*arguments, out)

    transposed = A.dim() == 2 and A.shape[0] == 1 and A.shape[1] > 1
    return out.t() if transposed and out.dim() == 2 else out


def dequantize_fp4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """:func:`dequantize_4bit` with ``quant_type="fp4"``, which a given ``quant_state`` overrides."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def dequantize_nf4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """:func:`dequantize_4bit` with ``quant_type="nf4"``, which a given ``quant_state`` overrides."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:
    """``A @ W.T`` for activations ``A [..., K]`` and the packed 4-bit weight ``B`` of ``state.shape = [N, K]``.

    Returns ``[..., N]`` in A's dtype, without gradients. The ``transposed_*`` arguments have no effect.

    Raises:
        ValueError: ``state`` is None, or a tensor does not fit it.
    """
    if state is None:
        raise ArgumentError("state cannot be None: gemv_4bit needs the state that quantize_4bit returned")
    arguments = (A, B, state.shape, expand_absmax(state), state.code, state.blocksize)
    if out is None:
        return torch.ops.bitsandbytes.gemv_4bit(*arguments)
    torch.ops.bitsandbytes.gemv_4bit.out(*arguments, out)
    return out
