"""Int8 matmul of a row-wise quantized left operand and a right one that has a single scale."""

from __future__ import annotations

from torch import Tensor

from ._int8 import scaled_product

__all__ = ["int8_matmul_mixed_dequantize"]


def int8_matmul_mixed_dequantize(
    a: Tensor, b: Tensor, state_x: Tensor, state_w: Tensor, bias: Tensor | None
) -> Tensor:
    """``state_w[0] * state_x[m] * (a @ b) / 127**2 + bias``, float16 ``[M, N]``.

    Args:
        a: int8 ``[M, K]``.
        b: int8 ``[K, N]``, any strides.
        state_x: absmax ``[M]`` of a's rows.
        state_w: absmax ``[1]`` of b.
        bias: ``[N]`` or None; added in float16.

    Raises:
        AssertionError: the inner dimensions differ.
    """
    return scaled_product(a, b, state_x, state_w.reshape(-1)[:1], bias)
