"""Face: the matmuls, their autograd functions and the state of an int8 layer."""

from __future__ import annotations

from .._quant.layouts import get_inverse_transform_indices, get_tile_inds, undo_layout
from .fourbit import MatMul4Bit, matmul_4bit
from .int8 import GlobalOutlierPooler, MatMul8bitFp, MatMul8bitLt, MatmulLtState, logger, matmul
from .legacy import MatMul8bit, bmm_cublas, matmul_cublas, mm_cublas, supports_igemmlt

__all__ = [
    "GlobalOutlierPooler",
    "MatMul4Bit",
    "MatMul8bit",
    "MatMul8bitFp",
    "MatMul8bitLt",
    "MatmulLtState",
    "bmm_cublas",
    "get_inverse_transform_indices",
    "get_tile_inds",
    "logger",
    "matmul",
    "matmul_4bit",
    "matmul_cublas",
    "mm_cublas",
    "supports_igemmlt",
    "undo_layout",
]
