"""Quantization with one scale for a whole tensor, and the statistics older codebooks were built from.

The block-wise functions replaced all of this; it stays because programs and the FP8 emulation of
``bitsandbytes.research`` use it. Everything is plain torch, hence right on any device. The undecorated functions are
for use inside the package, the deprecated ones are what users imported.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._formats.codebooks import create_dynamic_map, midpoints
from .deprecation import deprecated

__all__ = [
    "create_quantile_map",
    "dequantize",
    "dequantize_no_absmax",
    "encode_nearest",
    "estimate_quantiles",
    "histogram_scatter_add_2d",
    "quantize",
    "quantize_no_absmax",
    "quantize_tensorwise",
]

_QUANTILE_CHUNK = 4096  # values whose order statistics are taken together


def encode_nearest(values: Tensor, code: Tensor) -> Tensor:
    """Index (uint8, like ``values``) of the entry of the ascending map nearest to each value; a tie takes the lower."""
    thresholds = midpoints(code.to(device=values.device, dtype=torch.float32).reshape(-1))
    return torch.bucketize(values.float().contiguous(), thresholds, out_int32=True).to(torch.uint8)


def decode(indices: Tensor, code: Tensor) -> Tensor:
    """The map's entry (float32, like ``indices``) at each index."""
    return code.to(device=indices.device, dtype=torch.float32).reshape(-1)[indices.int()]


def quantize_tensorwise(values: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """``(indices uint8, absmax float32 0-dim)``; a tensor of zeros, or an empty one, has absmax 0."""
    exact = values.float()
    absmax = exact.abs().max() if exact.numel() else exact.new_zeros(())
    scale = torch.where(absmax == 0, torch.ones_like(absmax), absmax)
    return encode_nearest(exact / scale, code), absmax


def _store(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None else out.copy_(result)


_BLOCKWISE = "Use quantize_blockwise and dequantize_blockwise instead."


@deprecated(_BLOCKWISE)
def quantize(
    A: Tensor, code: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Quantize to the nearest entries of a map with one absmax for the whole tensor.

    Args:
        A: any shape, any float dtype.
        code: ascending float32 map of 256 entries; the signed dynamic map when None.
        out: uint8, receives the indices.

    Returns:
        ``(indices, (absmax, code))`` with a 0-dim float32 absmax.
    """
    code = create_dynamic_map().to(A.device) if code is None else code.to(A.device)
    indices, absmax = quantize_tensorwise(A, code)
    return _store(indices, out), (absmax, code)


@deprecated(_BLOCKWISE)
def dequantize(
    A: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Rebuild what :func:`quantize` encoded: ``code[A] * absmax``, float32.

    Raises:
        AssertionError: neither ``state`` nor ``absmax`` was given.
    """
    assert state is not None or absmax is not None, "dequantize needs either state or absmax"
    if state is None:
        state = (absmax, create_dynamic_map() if code is None else code)  # type: ignore[assignment]
    absmax, code = state  # type: ignore[misc]
    return _store(decode(A, code) * torch.as_tensor(absmax, device=A.device, dtype=torch.float32), out)


@deprecated(_BLOCKWISE)
def quantize_no_absmax(A: Tensor, code: Tensor, out: Tensor | None = None) -> Tensor:
    """Indices (uint8) of the entries of ``code`` nearest to ``A``, whose values lie in [-1, 1]."""
    return _store(encode_nearest(A, code), out)


@deprecated(_BLOCKWISE)
def dequantize_no_absmax(A: Tensor, code: Tensor, out: Tensor | None = None) -> Tensor:
    """``code[A]``, float32."""
    return _store(decode(A, code), out)


def _quantiles(A: Tensor, offset: float, num_quantiles: int) -> Tensor:
    if A.numel() < 256:
        raise NotImplementedError(f"quantile estimation needs at least 256 values, got {A.numel()}")
    if num_quantiles > 256:
        raise NotImplementedError(f"at most 256 quantiles can be estimated, got {num_quantiles}")
    if not A.is_floating_point():
        raise NotImplementedError(f"quantile estimation needs a float tensor, got {A.dtype}")
    if num_quantiles < 256 and offset == 1 / 512:
        offset = 1 / (2 * num_quantiles)
    chunk = min(A.numel(), _QUANTILE_CHUNK)
    chunks = A.numel() // chunk
    ordered = A.reshape(-1)[: chunks * chunk].float().view(chunks, chunk).sort(dim=1).values
    position = torch.linspace(offset, 1 - offset, 256, dtype=torch.float64) * (chunk - 1)
    result = ordered[:, position.round().long().to(A.device)].mean(dim=0)
    if num_quantiles < 256:
        result = result[torch.linspace(0, 255, num_quantiles).long().to(A.device)]
    return result


@deprecated("Use torch.quantile instead.")
def estimate_quantiles(
    A: Tensor, out: Tensor | None = None, offset: float = 1 / 512, num_quantiles: int = 256
) -> Tensor:
    """Estimate evenly spaced quantiles between ``offset`` and ``1 - offset``.

    Order statistics are taken in chunks of 4096 values and averaged; values after the last whole chunk do not count.
    With fewer than 256 quantiles the default offset becomes ``1 / (2 * num_quantiles)``.

    Returns:
        float32 ``[num_quantiles]``, ascending.

    Raises:
        NotImplementedError: fewer than 256 values, more than 256 quantiles, or a dtype that is not a float.
    """
    return _store(_quantiles(A, offset, num_quantiles), out)


@deprecated("Use create_dynamic_map or create_normal_map instead.")
def create_quantile_map(A: Tensor, total_bits: int = 8) -> Tensor:
    """A map (float32 ``[256]``, ascending) of the quantiles of ``A`` and zero, scaled to a largest magnitude of one."""
    quantiles = _quantiles(A, 1 / 512, 2**total_bits - 1)
    table = torch.nn.functional.pad(quantiles, (0, 256 - quantiles.numel())).sort().values
    return table / table.abs().max()


@deprecated("Use torch.Tensor.index_put_ with accumulate=True instead.")
def histogram_scatter_add_2d(histogram: Tensor, index1: Tensor, index2: Tensor, source: Tensor) -> None:
    """Add ``source`` to the square ``histogram`` at ``[index1, index2]``, in place; repeated indices accumulate.

    Raises:
        ValueError: ``histogram`` is not two-dimensional and contiguous.
    """
    if histogram.dim() != 2 or not histogram.is_contiguous():
        raise ValueError(f"histogram must be 2D and contiguous, got shape {tuple(histogram.shape)}")
    cells = index1.reshape(-1).long() * histogram.shape[0] + index2.reshape(-1).long()
    histogram.view(-1).index_add_(0, cells, source.reshape(-1).to(histogram.dtype))
