"""Look-ups in quantized tables by the native CPU kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..._native import DTYPE_ID, FORMAT_ID, lib, ptr, threads
from ..._ops import embedding_4bit, embedding_8bit
from .registration import native_kernel

__all__: list[str] = []


@contextmanager
def _index_errors() -> Iterator[None]:
    """Everything else has been checked, so what the kernel still refuses is an index."""
    try:
        yield
    except ValueError as error:
        raise IndexError(str(error)) from None


@native_kernel(embedding_4bit, "bnb_cpu_embedding_4bit")
def _(indices, A, absmax, blocksize, quant_type, num_embeddings, embedding_dim, dtype, out):
    indices, A, absmax = indices.long().contiguous(), A.contiguous(), absmax.contiguous()
    with _index_errors():
        lib.bnb_cpu_embedding_4bit(
            ptr(indices),
            ptr(A),
            ptr(absmax),
            FORMAT_ID[quant_type],
            ptr(out),
            DTYPE_ID[dtype],
            indices.numel(),
            num_embeddings,
            embedding_dim,
            blocksize,
            threads(),
        )


@native_kernel(embedding_8bit, "bnb_cpu_embedding_8bit")
def _(indices, A, absmax, dtype, out):
    indices, A, absmax = indices.long().contiguous(), A.contiguous(), absmax.contiguous()
    with _index_errors():
        lib.bnb_cpu_embedding_8bit(
            ptr(indices),
            ptr(A),
            ptr(absmax),
            ptr(out),
            DTYPE_ID[dtype],
            indices.numel(),
            *A.shape,
            threads(),
        )
