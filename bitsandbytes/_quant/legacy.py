"""Deprecated integer matmuls, in-place elementwise helpers, and small leftovers programs still import.

The matmuls are sums of exact int8 products from the ``int8_linear_matmul`` operator, so they run on any device and
accept any strides. The elementwise helpers are torch's own; a paged tensor is host memory that the accelerator may be
using, hence they wait for it first.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod as _product_of
from typing import Any

import torch
from torch import Tensor

from .._native.tensors import _get_tensor_stream
from .deprecation import deprecated

__all__ = [
    "_mul",
    "arange",
    "batched_igemm",
    "check_matmul",
    "elementwise_func",
    "fill",
    "get_tensor_stream",
    "igemm",
    "pipeline_test",
    "post_call",
    "pre_call",
    "prod",
]


# --- integer matmuls -------------------------------------------------------------------------------------------


def _mismatch(A: Tensor, B: Tensor, out: Tensor | None) -> ValueError:
    into = "" if out is None else f" into {tuple(out.shape)}"
    return ValueError(
        f"Tensor dimensions incorrect for matrix multiplication: {tuple(A.shape)} x {tuple(B.shape)}{into}. Expected "
        "[M, K] x [K, N], [b, s, i] x [i, o], [b, s, i] x [b, i, o], or bsi,bso->io with out [i, o]"
    )


def _contracts(A: Tensor, B: Tensor, out: Tensor | None) -> bool:
    """Whether this is the product over batch and sequence, ``bsi,bso->io``; the shape of ``out`` tells."""
    return (
        out is not None
        and A.dim() == B.dim() == 3
        and A.shape[:2] == B.shape[:2]
        and tuple(out.shape) == (A.shape[2], B.shape[2])
    )


def _oriented(A: Tensor, B: Tensor, transposed_A: bool, transposed_B: bool) -> tuple[Tensor, Tensor]:
    return A.transpose(-1, -2) if transposed_A else A, B.transpose(-1, -2) if transposed_B else B


def _output_size(
    A: Tensor,
    B: Tensor,
    out: Tensor | None,
    transposed_A: bool,
    transposed_B: bool,
    expected_type: torch.dtype,
) -> torch.Size:
    if A.dtype != expected_type or B.dtype != expected_type:
        raise TypeError(f"Expected {expected_type} for both operands, got {A.dtype} and {B.dtype}")
    if _contracts(A, B, out):
        assert out is not None
        return out.shape
    if (A.dim(), B.dim()) not in ((2, 2), (3, 2), (3, 3)):
        raise _mismatch(A, B, out)
    left, right = _oriented(A, B, transposed_A, transposed_B)
    batches_differ = right.dim() == 3 and left.shape[0] != right.shape[0]
    if batches_differ or left.shape[-1] != right.shape[-2]:
        raise _mismatch(A, B, out)
    size = torch.Size((*left.shape[:-1], right.shape[-1]))
    if out is not None and out.shape != size:
        raise _mismatch(A, B, out)
    return size


def integer_matmul(
    A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False
) -> Tensor:
    """What :func:`igemm` computes."""
    contracts = _contracts(A, B, out)
    size = _output_size(A, B, out, transposed_A, transposed_B, torch.int8)
    multiply = torch.ops.bitsandbytes.int8_linear_matmul
    if contracts:
        left, right = A.reshape(-1, A.shape[2]), B.reshape(-1, B.shape[2])
        result = multiply(left.t().contiguous(), right.t().contiguous())
    else:
        left, right = _oriented(A, B, transposed_A, transposed_B)
        if right.dim() == 2:
            result = multiply(left.contiguous(), right.t().contiguous())
        elif left.shape[0] == 0:
            result = torch.zeros(size, dtype=torch.int32, device=A.device)
        else:
            result = torch.stack(
                [multiply(a.contiguous(), b.t().contiguous()) for a, b in zip(left, right, strict=True)]
            )
    return result if out is None else out.copy_(result)


_INT8_MATMUL = "Use int8_linear_matmul instead."


@deprecated("")
def check_matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None,
    transposed_A: bool,
    transposed_B: bool,
    expected_type: torch.dtype = torch.int8,
) -> torch.Size:
    """Size of the product of two matrices, a batch and a matrix, or two batches.

    With ``out`` of shape ``[i, o]``, batches ``[b, s, i]`` and ``[b, s, o]`` contract to it.

    Raises:
        TypeError: an operand is not of ``expected_type``.
        ValueError: the shapes do not fit.
    """
    return _output_size(A, B, out, transposed_A, transposed_B, expected_type)


@deprecated(_INT8_MATMUL)
def igemm(
    A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False
) -> Tensor:
    """Exact int8 product, int32: ``[M, K] @ [K, N]``, ``[b, s, i] @ [i, o]`` or ``[b, s, i] @ [b, i, o]``.

    With ``out`` of shape ``[i, o]``, ``[b, s, i]`` and ``[b, s, o]`` are summed over batch and sequence.

    Raises:
        TypeError: an operand is not int8.
        ValueError: the shapes fit none of these.
    """
    return integer_matmul(A, B, out, transposed_A, transposed_B)


@deprecated(_INT8_MATMUL)
def batched_igemm(
    A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False
) -> Tensor:
    """Exact int8 products of a batch, int32: ``[b, s, i] @ [b, i, o]``.

    Raises:
        TypeError: an operand is not int8.
        ValueError: an operand is not 3-dimensional, or the shapes do not fit.
    """
    if A.dim() != 3 or B.dim() != 3:
        raise ValueError(f"Expected 3-dimensional tensors for bmm, got {tuple(A.shape)} and {tuple(B.shape)}")
    return integer_matmul(A, B, out, transposed_A, transposed_B)


# --- elementwise, in place -------------------------------------------------------------------------------------


def _fill(A: Tensor, B: Tensor | None, value: float) -> None:
    A.fill_(value)


def _arange(A: Tensor, B: Tensor | None, value: float) -> None:
    A.copy_(torch.arange(A.numel(), device=A.device).view(A.shape))


def _multiply(A: Tensor, B: Tensor | None, value: float) -> None:
    assert B is not None
    A.mul_(B)


_ELEMENTWISE = {
    ("fill", torch.float32): _fill,
    ("fill", torch.uint8): _fill,
    ("arange", torch.float32): _arange,
    ("_mul", torch.float32): _multiply,
}


def _wait_for_pages(*tensors: Tensor | None) -> None:
    for device in {getattr(t, "page_deviceid", None) for t in tensors if getattr(t, "is_paged", False)}:
        torch.cuda.synchronize(device)


def elementwise_func(
    func_name: str, A: Tensor, B: Tensor | None, value: float, prefetch: bool = True
) -> None:
    """Apply ``fill`` (``A = value``), ``arange`` (``A = 0, 1, …``) or ``_mul`` (``A *= B``) in place.

    Args:
        A: float32; for ``fill`` also uint8. May be paged.
        B: second operand of ``_mul``.
        prefetch: accepted for callers of older versions; pages move as they are touched.

    Raises:
        NotImplementedError: no such function for A's dtype.
    """
    function = _ELEMENTWISE.get((func_name, A.dtype))
    if function is None:
        raise NotImplementedError(f"Function not implemented: {func_name} for {A.dtype}")
    _wait_for_pages(A, B)
    function(A, B, value)


def fill(A: Tensor, value: float, device: torch.device | None = None, prefetch: bool = True) -> None:
    """``A[:] = value`` for float32 or uint8, paged or not."""
    elementwise_func("fill", A, None, value, prefetch)


def _mul(A: Tensor, B: Tensor, device: torch.device | None = None) -> None:
    """``A *= B`` for float32, paged or not."""
    elementwise_func("_mul", A, B, 0)


@deprecated("Use torch.arange instead.")
def arange(A: Tensor, device: torch.device | None = None) -> None:
    """``A = 0, 1, 2, …`` in place, float32, paged or not."""
    elementwise_func("arange", A, None, 0)


# --- leftovers -------------------------------------------------------------------------------------------------


def prod(iterable: Iterable[int]) -> int:
    """The product of the numbers."""
    return _product_of(iterable)


@deprecated("Use torch.cuda.device instead.")
def pre_call(device: torch.device) -> int | None:
    """Make ``device`` the current CUDA device; returns the one before, for :func:`post_call`. No-op elsewhere."""
    if torch.device(device).type != "cuda":
        return None
    previous = torch.cuda.current_device()
    torch.cuda.set_device(device)
    return previous


@deprecated("Use torch.cuda.device instead.")
def post_call(prev_device: int | None) -> None:
    """Make the device that :func:`pre_call` returned current again."""
    if prev_device is not None:
        torch.cuda.set_device(prev_device)


@deprecated("Use torch.Tensor.clone instead.")
def pipeline_test(A: Tensor, batch_size: int) -> Tensor:
    """A copy of ``A``; once exercised pipelined copies on the device."""
    return A.clone()


@deprecated("Use torch.cuda.current_stream instead.")
def get_tensor_stream(tensor: Tensor) -> Any:
    """Raw current stream of the tensor's device, as ``ctypes.c_void_p``."""
    return _get_tensor_stream(tensor)
