"""Look-ups in quantized tables by the native CUDA kernels: one launch, and no temporaries."""

from __future__ import annotations

from ..._native import DTYPE_ID, FORMAT_ID, device_of, has_native, lib, ptr, stream_of
from ..._ops import embedding_4bit, embedding_8bit

__all__: list[str] = []


def _embedding_4bit(
    indices, A, absmax, blocksize, quant_type, num_embeddings, embedding_dim, dtype, out
):  # fmt: skip
    indices, A, absmax = indices.long().contiguous(), A.contiguous(), absmax.contiguous()
    with device_of(out):
        lib.bnb_cuda_embedding_4bit(
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
            stream_of(out),
        )


def _embedding_8bit(indices, A, absmax, dtype, out):
    indices, A, absmax = indices.long().contiguous(), A.contiguous(), absmax.contiguous()
    with device_of(out):
        lib.bnb_cuda_embedding_8bit(
            ptr(indices),
            ptr(A),
            ptr(absmax),
            ptr(out),
            DTYPE_ID[dtype],
            indices.numel(),
            *A.shape,
            stream_of(out),
        )


if has_native("bnb_cuda_embedding_4bit"):
    embedding_4bit.kernel("cuda")(_embedding_4bit)
if has_native("bnb_cuda_embedding_8bit"):
    embedding_8bit.kernel("cuda")(_embedding_8bit)
