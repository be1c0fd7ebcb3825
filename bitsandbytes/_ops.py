"""The operators, one after another: schema, and the check that also says what the results look like.

Users and third parties reach them as ``torch.ops.bitsandbytes.<name>``; the schemas are a public contract. What a
declaration turns into is in ``_operator.py``; backends fill the results in. Those of LLM.int8() are in ``_ops_int8.py``, those of
experts in ``_ops_grouped.py``.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.library import register_fake, register_kernel

from ._checks import (
    ArgumentError,
    check_absmax,
    check_block_scales,
    check_blocksize,
    check_dtype,
    check_float,
    check_format,
    check_map,
    check_packed,
    check_positive_blocksize,
    check_same_device,
    check_storage,
    require,
)
from ._formats.rules import RULES
from ._formats.table import (
    NESTED_BLOCKSIZE,
    OPTIMIZER_4BIT_BLOCKSIZE,
    OPTIMIZER_BLOCKSIZE,
    STORAGE_DTYPES,
)
from ._operator import OPERATORS, Operator, Result, operator
from ._ops_grouped import gemm_4bit_grouped, gemm_4bit_grouped_transposed
from ._ops_int8 import (
    int8_double_quant,
    int8_linear,
    int8_linear_matmul,
    int8_mixed_scaled_mm,
    int8_mm_dequant,
    int8_scaled_mm,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
)

__all__ = [
    "OPERATORS",
    "Operator",
    "Result",
    "gemm_4bit_grouped",
    "gemm_4bit_grouped_transposed",
    "int8_double_quant",
    "int8_linear",
    "int8_linear_matmul",
    "int8_mixed_scaled_mm",
    "int8_mm_dequant",
    "int8_scaled_mm",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "operator",
    "register_fake",
    "register_kernel",
]


# --- 4-bit -----------------------------------------------------------------------------------------------------


@operator(
    "quantize_4bit(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)"
)
def quantize_4bit(A: Tensor, blocksize, quant_type, quant_storage):
    """``(packed [bytes / itemsize, 1], absmax [blocks])``: two codes a byte, the even element in the high nibble."""
    check_blocksize(blocksize)
    check_format(quant_type)
    check_float(A.dtype, "Blockwise 4bit quantization")
    check_storage(quant_storage, "quant_storage")
    numel = A.numel()
    packed_bytes = (numel + 1) // 2
    if packed_bytes % quant_storage.itemsize != 0:
        raise ArgumentError(
            f"A's {numel} values pack into {packed_bytes} bytes, which is no multiple of the "
            f"{quant_storage.itemsize} bytes of quant_storage {quant_storage}"
        )
    blocks = -(numel // -blocksize)
    return Result((packed_bytes // quant_storage.itemsize, 1), quant_storage), Result(
        (blocks,), torch.float32
    )


@operator(
    "dequantize_4bit(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype) -> Tensor",
    out=True,
)
def dequantize_4bit(A: Tensor, absmax: Tensor, blocksize, quant_type, shape, dtype):
    """Unpack 4-bit codes and scale each block by its absmax."""
    check_blocksize(blocksize)
    check_format(quant_type)
    check_float(dtype, "Blockwise 4bit dequantization")
    check_same_device(A, absmax=absmax)
    numel = prod(shape)
    check_absmax(absmax, numel, blocksize)
    check_packed(A, numel, "A")
    return Result(shape, dtype)


@operator(
    "dequantize_4bit_nested(Tensor A, Tensor absmax, Tensor absmax_8bit, Tensor absmax_code, Tensor absmax_offset, "
    "int blocksize, str quant_type, int[] shape, ScalarType dtype) -> Tensor",
    out=True,
)
def dequantize_4bit_nested(
    A: Tensor, absmax, absmax_8bit, absmax_code, absmax_offset, blocksize, quant_type, shape, dtype
):
    """:func:`dequantize_4bit` with block b scaled by ``absmax_code[absmax_8bit[b]] * absmax[b // 256] + absmax_offset``."""
    check_blocksize(blocksize)
    check_format(quant_type)
    check_float(dtype, "Blockwise 4bit dequantization")
    check_same_device(
        A, absmax=absmax, absmax_8bit=absmax_8bit, absmax_code=absmax_code, absmax_offset=absmax_offset
    )
    check_packed(A, prod(shape), "A")
    check_dtype(absmax_8bit, torch.uint8, "absmax_8bit")
    blocks = -(prod(shape) // -blocksize)
    require(absmax_8bit.numel() >= blocks, f"absmax_8bit must have {blocks} codes, got {absmax_8bit.numel()}")
    check_absmax(absmax, blocks, NESTED_BLOCKSIZE)
    check_map(absmax_code, "absmax_code")
    require(absmax_offset.numel() == 1, f"absmax_offset must be one number, got {absmax_offset.numel()}")
    return Result(shape, dtype)


@operator(
    "embedding_4bit(Tensor indices, Tensor A, Tensor absmax, int blocksize, str quant_type, int num_embeddings, "
    "int embedding_dim, ScalarType dtype) -> Tensor"
)
def embedding_4bit(
    indices: Tensor, A: Tensor, absmax: Tensor, blocksize, quant_type, num_embeddings, embedding_dim, dtype
):
    """Rows ``[..., embedding_dim]`` of the 4-bit table ``A`` for ``indices [...]``, int32 or int64.

    An index outside the table is an IndexError on the CPU; a GPU cannot say, and there the row is NaN.
    """
    _check_indices(indices)
    check_blocksize(blocksize)
    check_format(quant_type)
    check_float(dtype, "A 4-bit embedding")
    check_same_device(indices, "indices", A=A, absmax=absmax)
    check_absmax(absmax, num_embeddings * embedding_dim, blocksize)
    check_packed(A, num_embeddings * embedding_dim, "A")
    return Result((*indices.shape, embedding_dim), dtype)


@operator("embedding_8bit(Tensor indices, Tensor A, Tensor absmax, ScalarType dtype) -> Tensor")
def embedding_8bit(indices: Tensor, A: Tensor, absmax: Tensor, dtype):
    """Rows ``[..., columns]`` of the int8 table ``A [rows, columns]``, each scaled by its ``absmax [rows] / 127``."""
    _check_indices(indices)
    check_dtype(A, torch.int8, "A")
    check_dtype(absmax, torch.float32, "absmax")
    check_float(dtype, "An int8 embedding")
    check_same_device(indices, "indices", A=A, absmax=absmax)
    if A.dim() != 2 or absmax.shape != A.shape[:1]:
        raise ArgumentError(
            f"A must be [rows, columns] with absmax [rows], got {list(A.shape)} and {list(absmax.shape)}"
        )
    return Result((*indices.shape, A.shape[1]), dtype)


def _check_indices(indices: Tensor) -> None:
    if indices.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(f"indices must be int32 or int64, got {indices.dtype}")


def _check_matmul_4bit(A: Tensor, B: Tensor, shapeB, blocksize) -> Result:
    if len(shapeB) != 2:
        raise ArgumentError(f"shapeB must be 2D [N, K], got {list(shapeB)}")
    N, K = shapeB
    shape = list(A.shape)  # a torch.Size costs more to look into
    if not shape or shape[-1] != K:
        raise ArgumentError(
            f"A inner dim ({shape[-1] if shape else None}) must match shapeB ({list(shapeB)})"
        )
    check_float(A.dtype, "A must be float16, bfloat16, or float32: a 4-bit matmul")
    if B.dtype not in STORAGE_DTYPES:
        raise ArgumentError(
            f"B must be backed by storage of type uint8, bfloat16, float16, or float32, got {B.dtype}"
        )
    check_blocksize(blocksize)
    check_packed(B, N * K, "B")
    shape[-1] = N
    return Result(shape, A.dtype)


@operator(
    "gemm_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None, "
    "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor"
)
def gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB,
    absmax: Tensor,
    blocksize,
    quant_type,
    bias=None,
    absmax_8bit=None,
    absmax_code=None,
    absmax_offset=None,
):
    """``A @ W.T + bias`` with the 4-bit weight ``W`` of shape ``shapeB = [N, K]``.

    With ``absmax_8bit`` the block scales are themselves quantized: ``absmax_code[absmax_8bit[b]] * absmax[b // 256] +
    absmax_offset``.
    """
    result = _check_matmul_4bit(A, B, shapeB, blocksize)
    check_format(quant_type)
    check_same_device(
        A,
        B=B,
        absmax=absmax,
        bias=bias,
        absmax_8bit=absmax_8bit,
        absmax_code=absmax_code,
        absmax_offset=absmax_offset,
    )
    N, K = shapeB
    check_block_scales(N * K, blocksize, absmax, absmax_8bit, absmax_code, absmax_offset)
    if bias is not None:
        if bias.dim() != 1 or bias.shape[0] != N:
            raise ArgumentError(f"bias must be 1D and bias length ({tuple(bias.shape)}) must match N ({N})")
        if bias.dtype is not A.dtype:
            raise ArgumentError(f"bias dtype ({bias.dtype}) must match A's dtype ({A.dtype})")
    return result


@operator(
    "gemm_4bit_transposed(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, "
    "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor"
)
def gemm_4bit_transposed(
    A: Tensor,
    B: Tensor,
    shapeB,
    absmax: Tensor,
    blocksize,
    quant_type,
    absmax_8bit=None,
    absmax_code=None,
    absmax_offset=None,
):
    """``A @ W`` with the 4-bit weight ``W`` of shape ``shapeB = [N, K]``: the gradient of what went into ``W``."""
    _check_matmul_4bit(A, B, shapeB[::-1], blocksize)
    N, K = shapeB
    check_format(quant_type)
    check_same_device(
        A, B=B, absmax=absmax, absmax_8bit=absmax_8bit, absmax_code=absmax_code, absmax_offset=absmax_offset
    )
    check_block_scales(N * K, blocksize, absmax, absmax_8bit, absmax_code, absmax_offset)
    return Result((*A.shape[:-1], K), A.dtype)


@operator(
    "gemv_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize) -> Tensor",
    out=True,
)
def gemv_4bit(A: Tensor, B: Tensor, shapeB, absmax: Tensor, code: Tensor, blocksize):
    """``A @ W.T`` with a 4-bit weight and the 16-entry codebook it was made with; any number of rows."""
    result = _check_matmul_4bit(A, B, shapeB, blocksize)
    check_same_device(A, B=B, absmax=absmax, code=code)
    check_map(code, "code", entries=16)
    check_absmax(absmax, shapeB[0] * shapeB[1], blocksize)
    return result


# --- 8-bit block-wise ------------------------------------------------------------------------------------------


@operator(
    "quantize_blockwise(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)", out=("out", "absmax")
)
def quantize_blockwise(A: Tensor, code: Tensor, blocksize):
    """``(codes like A, absmax [blocks])``: the nearest entry of the ascending map ``code``; a tie takes the lower."""
    check_positive_blocksize(blocksize)
    check_float(A.dtype, "Blockwise quantization")
    check_same_device(A, code=code)
    check_map(code, "code")
    return Result(A.shape, torch.uint8), Result((-(A.numel() // -blocksize),), torch.float32)


@operator(
    "dequantize_blockwise(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor",
    out=True,
)
def dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize, dtype):
    """Look codes up in ``code`` and scale each block by its absmax."""
    check_positive_blocksize(blocksize)
    check_dtype(A, torch.uint8, "A")
    check_float(dtype, "Blockwise dequantization")
    check_same_device(A, absmax=absmax, code=code)
    check_map(code, "code")
    check_absmax(absmax, A.numel(), blocksize)
    return Result(A.shape, dtype)


# --- optimizers ------------------------------------------------------------------------------------------------


@operator(
    "optimizer_update_4bit_blockwise(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, "
    "Tensor(a3!)? state2, float beta1, float beta2, float beta3, float alpha, float eps, int step, float lr, "
    "Tensor qmap1, Tensor? qmap2, Tensor(a4!) absmax1, Tensor(a5!)? absmax2, float weight_decay, float gnorm_scale, "
    "int key) -> ()"
)
def optimizer_update_4bit_blockwise(
    optimizer_name,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2,
    beta1,
    beta2,
    beta3,
    alpha,
    eps,
    step,
    lr,
    qmap1: Tensor,
    qmap2,
    absmax1: Tensor,
    absmax2,
    weight_decay,
    gnorm_scale,
    key,
):
    """One step of the named rule with 4-bit block-wise state (blocks of 128), in place; ``key`` rounds state2."""
    check_same_device(
        g, "g", p=p, state1=state1, state2=state2, qmap1=qmap1, qmap2=qmap2, absmax1=absmax1, absmax2=absmax2
    )
    rule = RULES.get(optimizer_name)
    if rule is None or rule.averages != 1:
        raise ArgumentError(f"Unsupported optimizer name with 4-bit state: {optimizer_name!r}")
    check_float(p.dtype, "p must be bfloat16, float16, or float32: the update")
    if g.dtype != p.dtype or g.numel() != p.numel():
        raise ArgumentError(f"g must be like p ({p.numel()} of {p.dtype}), got {g.numel()} of {g.dtype}")
    require(state2 is not None or rule.states == 1, f"{optimizer_name} needs state2, got None")
    for index, (codes, qmap, absmax) in enumerate(((state1, qmap1, absmax1), (state2, qmap2, absmax2)), 1):
        if codes is None:
            continue
        require(qmap is not None and absmax is not None, f"qmap{index} and absmax{index} are required")
        check_dtype(codes, torch.uint8, f"state{index}")
        check_map(qmap, f"qmap{index}", entries=16)
        check_absmax(absmax, p.numel(), OPTIMIZER_4BIT_BLOCKSIZE)
        if codes.numel() != -(p.numel() // -2):
            raise ArgumentError(f"state{index} must have {-(p.numel() // -2)} bytes, got {codes.numel()}")


@operator("round_to_bfloat16(Tensor A, int key, int offset) -> Tensor", out=True)
def round_to_bfloat16(A: Tensor, key, offset):
    """bfloat16 like ``A`` (float32), rounded up or down at random so that the mean is right.

    The dice are a hash of ``key`` and ``offset`` plus the element's position: the same bits everywhere, every time.
    """
    check_dtype(A, torch.float32, "A")
    return Result(A.shape, torch.bfloat16)


def _check_update(optimizer_name: str, g: Tensor, p: Tensor, state1: Tensor, state2: Tensor | None) -> None:
    if optimizer_name not in RULES:
        raise ArgumentError(f"Unsupported optimizer name: {optimizer_name!r}; choose one of {sorted(RULES)}")
    if g.numel() != p.numel():
        raise ArgumentError(f"g and p must have the same number of elements, got {g.numel()} and {p.numel()}")
    check_float(g.dtype, f"g must be bfloat16, float16, or float32: {optimizer_name}")
    if g.dtype != p.dtype:
        raise ArgumentError(f"Expected all tensors to have the same dtype: g is {g.dtype}, p is {p.dtype}")
    numel = RULES[optimizer_name].averages * p.numel()
    if state1.numel() != numel:
        raise ArgumentError(f"state1 must have {numel} elements for p, got {state1.numel()}")
    require(
        state2 is not None or RULES[optimizer_name].states == 1, f"{optimizer_name} needs state2, got None"
    )
    if state2 is not None and state2.numel() != p.numel():
        raise ArgumentError(f"state2 must have as many elements as p ({p.numel()}), got {state2.numel()}")


@operator(
    "optimizer_update_32bit(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, "
    "Tensor(a3!)? state2, Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, float beta1, float beta2, "
    "float beta3, float alpha, float eps, float weight_decay, int step, float lr, float gnorm_scale, "
    "bool skip_zeros=False) -> ()"
)
def optimizer_update_32bit(
    optimizer_name,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2,
    unorm_vec,
    max_unorm,
    param_norm,
    beta1,
    beta2,
    beta3,
    alpha,
    eps,
    weight_decay,
    step,
    lr,
    gnorm_scale,
    skip_zeros=False,
):
    """One step of the named rule with float32 state, in place."""
    check_same_device(g, "g", p=p, state1=state1, state2=state2, unorm_vec=unorm_vec)
    _check_update(optimizer_name, g, p, state1, state2)
    check_dtype(state1, torch.float32, "state1")
    if state2 is not None:
        check_dtype(state2, torch.float32, "state2")


@operator(
    "optimizer_update_8bit_blockwise(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, "
    "Tensor(a3!)? state2, float beta1, float beta2, float beta3, float alpha, float eps, int step, float lr, "
    "Tensor(a4!) qmap1, Tensor(a5!)? qmap2, Tensor(a6!) absmax1, Tensor(a7!)? absmax2, float weight_decay, "
    "float gnorm_scale, bool skip_zeros=False) -> ()"
)
def optimizer_update_8bit_blockwise(
    optimizer_name,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2,
    beta1,
    beta2,
    beta3,
    alpha,
    eps,
    step,
    lr,
    qmap1: Tensor,
    qmap2,
    absmax1: Tensor,
    absmax2,
    weight_decay,
    gnorm_scale,
    skip_zeros=False,
):
    """One step of the named rule with 8-bit block-wise state (blocks of 256), in place."""
    check_same_device(
        g, "g", p=p, state1=state1, state2=state2, qmap1=qmap1, qmap2=qmap2, absmax1=absmax1, absmax2=absmax2
    )
    _check_update(optimizer_name, g, p, state1, state2)
    check_dtype(state1, torch.uint8, "state1")
    check_map(qmap1, "qmap1")
    check_dtype(absmax1, torch.float32, "absmax1")
    blocks = -(p.numel() // -OPTIMIZER_BLOCKSIZE)
    need = blocks * RULES[optimizer_name].averages
    if absmax1.numel() != need:
        raise ArgumentError(f"absmax1 must have {need} values, got {absmax1.numel()}")
    if state2 is not None:
        check_dtype(state2, torch.uint8, "state2")
        require(qmap2 is not None and absmax2 is not None, "qmap2 and absmax2 are required with state2")
        check_map(qmap2, "qmap2")
        check_dtype(absmax2, torch.float32, "absmax2")
        if absmax2.numel() != blocks:
            raise ArgumentError(f"absmax2 must have {blocks} values, got {absmax2.numel()}")


def _check_update_many(
    optimizer_name, g, p, table: Tensor, configs, scratch, qmap1, qmap2, counts, settings, lr, seeds, blocks
):
    """One step on many tensors of one kind, in place; ``table`` stands for their state: see ``StepTable``."""
    if optimizer_name not in RULES:
        raise ArgumentError(f"Unsupported optimizer name: {optimizer_name!r}; choose one of {sorted(RULES)}")
    if not len(g) == len(p) == table.shape[0] == sum(counts):
        raise ArgumentError(
            f"g, p, table and counts must be of as many tensors, got {len(g)}, {len(p)}, {table.shape[0]}, {sum(counts)}"
        )
    check_dtype(table, torch.int64, "table")
    if not len(counts) == len(lr) or len(settings) % max(len(counts), 1):
        raise ArgumentError(f"settings and lr must have a row for each of {len(counts)} counts")
    if len(seeds) not in (0, len(counts)):
        raise ArgumentError(f"seeds must be empty or one for each of {len(counts)} counts, got {len(seeds)}")


# Not one of OPERATORS, which are public: its table holds addresses, so only the library can call it.
optimizer_update_many = Operator(
    "optimizer_update_many(str optimizer_name, Tensor[] g, Tensor(a!)[] p, Tensor(b!) table, Tensor(c!) configs, "
    "Tensor(d!)? scratch, Tensor? qmap1, Tensor? qmap2, int[] counts, float[] settings, Tensor?[] lr, int[] seeds, "
    "int blocks) -> ()",
    _check_update_many,
    None,
    (),
)
