"""8-bit block-wise quantization with a 256-entry map, and expanding the nested statistics of any state."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from .._checks import ArgumentError, check_dtype, check_positive_blocksize
from .._formats.codebooks import create_dynamic_map, name2qmap
from .._formats.state import QuantState

__all__ = ["dequantize_blockwise", "expand_absmax", "quantize_blockwise"]


def _default_map(device: torch.device) -> Tensor:
    """The signed dynamic map on ``device``; the last device's is kept."""
    code = name2qmap.get("dynamic")
    if code is None or code.device != device:
        code = create_dynamic_map().to(device)
        if type(code) is Tensor:  # not a tracer's stand-in
            name2qmap["dynamic"] = code
    return code


def _check_target(out: Tensor, shape: Sequence[int], dtype: torch.dtype, name: str) -> None:
    if out.numel() != prod(shape) or out.dtype != dtype:
        raise ArgumentError(
            f"{name} must have {prod(shape)} elements of {dtype} (shape {tuple(shape)}), "
            f"got {out.numel()} of {out.dtype} (shape {tuple(out.shape)})"
        )


def _fill(out: Tensor | None, values: Tensor, name: str = "out") -> Tensor:
    """``values``, in the caller's tensor if there is one."""
    if out is None or out is values:
        return values
    _check_target(out, values.shape, values.dtype, name)
    return out.copy_(values.view(out.shape))


def _quantize_into(
    A: Tensor, code: Tensor, blocksize: int, out: Tensor | None, absmax: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes and statistics, in the caller's tensors where there are some; those must be plain memory beside ``A``."""
    check_positive_blocksize(blocksize)
    blocks = (-(A.numel() // -blocksize),)
    targets = []
    for given, shape, dtype, name in (
        (out, A.shape, torch.uint8, "out"),
        (absmax, blocks, torch.float32, "absmax"),
    ):
        if given is not None:
            _check_target(given, shape, dtype, name)
            if given.device != A.device or not given.is_contiguous():
                codes, statistics = torch.ops.bitsandbytes.quantize_blockwise(A, code, blocksize)
                return _fill(out, codes), _fill(absmax, statistics, "absmax")
        targets.append(A.new_empty(shape, dtype=dtype) if given is None else given)
    codes, statistics = targets
    torch.ops.bitsandbytes.quantize_blockwise.out(
        A, code, blocksize, codes.view(A.shape), statistics.view(blocks)
    )
    return codes, statistics


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[Tensor, QuantState]:
    """Quantize ``A`` to 8 bits in blocks that each keep their own absmax.

    ``code`` is an ascending float32 map of 256 values in [-1, 1], by default the signed dynamic map; each value takes
    the nearest entry. ``nested=True`` quantizes the statistics as well. ``absmax`` and ``out`` receive results.

    Returns the uint8 codes, shaped like ``A``, and the state :func:`dequantize_blockwise` needs.

    Raises:
        ValueError: ``A`` is no 16/32-bit float tensor, ``blocksize`` is not positive, or a tensor does not fit.
    """
    code = _default_map(A.device) if code is None else code.to(A.device)
    values, own_absmax = A.detach(), None if nested else absmax
    if out is None and own_absmax is None:
        codes, statistics = torch.ops.bitsandbytes.quantize_blockwise(values, code, blocksize)
    else:
        codes, statistics = _quantize_into(values, code, blocksize, out, own_absmax)

    if nested:
        offset = statistics.mean()
        inner, state2 = quantize_blockwise(statistics - offset, blocksize=blocksize)
        state = QuantState(
            absmax=_fill(absmax, inner, "absmax"),
            code=code.clone(),
            blocksize=blocksize,
            dtype=A.dtype,
            offset=offset,
            state2=state2,
        )
    else:
        state = QuantState(absmax=statistics, code=code.clone(), blocksize=blocksize, dtype=A.dtype)
    return codes, state


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    """Rebuild the tensor that :func:`quantize_blockwise` turned into the codes ``A``.

    With ``quant_state`` the arguments ``absmax``, ``code``, ``blocksize`` and ``nested`` are not looked at. Without,
    the result is float32.

    Raises:
        ValueError: neither ``quant_state`` nor ``absmax`` was given, ``A`` is not uint8, or a tensor does not fit.
    """
    if quant_state is None and absmax is None:
        raise ArgumentError("dequantize_blockwise requires either quant_state or absmax")
    check_dtype(A, torch.uint8, "A")
    if quant_state is None:
        assert absmax is not None
        code = _default_map(A.device) if code is None else code.to(A.device)
        quant_state = QuantState(absmax=absmax, code=code, blocksize=blocksize, dtype=torch.float32)
    check_positive_blocksize(quant_state.blocksize)

    arguments = (A, expand_absmax(quant_state), quant_state.code.to(A.device), quant_state.blocksize)
    if out is None:
        return torch.ops.bitsandbytes.dequantize_blockwise(*arguments, quant_state.dtype)
    torch.ops.bitsandbytes.dequantize_blockwise.out(*arguments, quant_state.dtype, out)
    return out


def expand_absmax(quant_state: QuantState) -> Tensor:
    """The state's statistics as float32, one per block, whether or not they are themselves quantized."""
    if not quant_state.nested:
        absmax = quant_state.absmax
        return absmax if absmax.dtype == torch.float32 else absmax.float()
    return dequantize_blockwise(quant_state.absmax, quant_state.state2).float() + quant_state.offset.float()
