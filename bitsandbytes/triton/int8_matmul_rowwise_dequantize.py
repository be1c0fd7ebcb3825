"""Int8 matmul of two operands with a scale for each row of the left and each column of the right."""

from __future__ import annotations

from torch import Tensor

from ._int8 import scaled_product

__all__ = ["int8_matmul_rowwise_dequantize"]


def int8_matmul_rowwise_dequantize(
    a: Tensor, b: Tensor, state_x: Tensor, state_w: Tensor, bias: Tensor | None
) -> Tensor:
    """``state_w[n] * state_x[m] * (a @ b) / 127**2 + bias``, float16 ``[M, N]``.

    Args:
        a: int8 ``[M, K]``.
        b: int8 ``[K, N]``, any strides.
        state_x: absmax ``[M]`` of a's rows.
        state_w: absmax ``[N]`` of b's columns.
        bias: ``[N]`` or None; added in float16.

    Raises:
        AssertionError: the inner dimensions differ.
    """
    return scaled_product(a, b, state_x, state_w, bias)
