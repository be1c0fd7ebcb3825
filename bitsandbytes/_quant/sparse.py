"""Sparse float16 matrices as three tensors, and their products with dense ones.

They carried the outliers of the first int8 matmuls. Products are summed in float32 in plain torch, so they run on any
device; the work is cut into slices because each stored entry expands to a row of the dense operand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .deprecation import deprecated

__all__ = [
    "COOSparseTensor",
    "CSCSparseTensor",
    "CSRSparseTensor",
    "Cusparse_Context",
    "coo2csc",
    "coo2csr",
    "coo_zeros",
    "spmm_coo",
    "spmm_coo_very_sparse",
]

_SLICE_ELEMENTS = 1 << 22  # of the expanded dense operand that exist at a time
_VERY_SPARSE_ROW = 32  # stored entries a row may have to count as very sparse


class Cusparse_Context:
    """Kept for programs that ask for it; products need no library handle, so ``context`` is None."""

    _instance: Cusparse_Context | None = None
    context: None

    def __init__(self) -> None:
        raise RuntimeError("Call get_instance() instead")

    def initialize(self) -> None:
        self.context = None

    @classmethod
    def get_instance(cls) -> Cusparse_Context:
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance


def _check_entries(nnz: int, values: Tensor, **indices: tuple[Tensor, int]) -> None:
    assert values.dtype == torch.float16, f"values must be float16, got {values.dtype}"
    assert values.numel() == nnz, f"values must have {nnz} elements, got {values.numel()}"
    for name, (index, length) in indices.items():
        assert index.dtype == torch.int32, f"{name} must be int32, got {index.dtype}"
        assert index.numel() == length, f"{name} must have {length} elements, got {index.numel()}"


class COOSparseTensor:
    """A ``[rows, cols]`` float16 matrix of ``nnz`` entries, each with its row and column (int32)."""

    def __init__(
        self, rows: int, cols: int, nnz: int, rowidx: Tensor, colidx: Tensor, values: Tensor
    ) -> None:
        _check_entries(nnz, values, rowidx=(rowidx, nnz), colidx=(colidx, nnz))
        self.rows, self.cols, self.nnz = rows, cols, nnz
        self.rowidx, self.colidx, self.values = rowidx, colidx, values


class CSRSparseTensor:
    """A ``[rows, cols]`` float16 matrix stored by row: ``rowptr [rows + 1]`` and a column per entry (int32)."""

    def __init__(
        self, rows: int, cols: int, nnz: int, rowptr: Tensor, colidx: Tensor, values: Tensor
    ) -> None:
        _check_entries(nnz, values, rowptr=(rowptr, rows + 1), colidx=(colidx, nnz))
        self.rows, self.cols, self.nnz = rows, cols, nnz
        self.rowptr, self.colidx, self.values = rowptr, colidx, values


class CSCSparseTensor:
    """A ``[rows, cols]`` float16 matrix stored by column: ``colptr [cols + 1]`` and a row per entry (int32)."""

    def __init__(
        self, rows: int, cols: int, nnz: int, colptr: Tensor, rowidx: Tensor, values: Tensor
    ) -> None:
        _check_entries(nnz, values, colptr=(colptr, cols + 1), rowidx=(rowidx, nnz))
        self.rows, self.cols, self.nnz = rows, cols, nnz
        self.colptr, self.rowidx, self.values = colptr, rowidx, values


_TORCH_SPARSE = "Use torch's sparse tensors instead."


@deprecated(_TORCH_SPARSE)
def coo_zeros(
    rows: int, cols: int, nnz: int, device: torch.device | str, dtype: torch.dtype = torch.half
) -> COOSparseTensor:
    """A COO matrix of ``nnz`` entries, all of them zero at row 0, column 0."""
    rowidx = torch.zeros(nnz, dtype=torch.int32, device=device)
    values = torch.zeros(nnz, dtype=dtype, device=device)
    return COOSparseTensor(rows, cols, nnz, rowidx, rowidx.clone(), values)


def _pointers(indices: Tensor, size: int) -> Tensor:
    counts = torch.zeros(size + 1, dtype=torch.int32, device=indices.device)
    counts.index_add_(0, indices.long() + 1, torch.ones_like(indices))
    return counts.cumsum(0, dtype=torch.int32)


@deprecated(_TORCH_SPARSE)
def coo2csr(cooA: COOSparseTensor) -> CSRSparseTensor:
    """The same matrix by row; the entries of ``cooA`` must be sorted by row."""
    rowptr = _pointers(cooA.rowidx, cooA.rows)
    return CSRSparseTensor(cooA.rows, cooA.cols, cooA.nnz, rowptr, cooA.colidx, cooA.values)


@deprecated(_TORCH_SPARSE)
def coo2csc(cooA: COOSparseTensor) -> CSCSparseTensor:
    """The same matrix by column; entries of one column keep their order."""
    colidx, order = cooA.colidx.sort(stable=True)
    colptr = _pointers(colidx, cooA.cols)
    return CSCSparseTensor(cooA.rows, cooA.cols, cooA.nnz, colptr, cooA.rowidx[order], cooA.values[order])


def _product(cooA: COOSparseTensor, B: Tensor, column_scales: Tensor | None = None) -> Tensor:
    """``A @ B`` in float32, ``B``'s columns scaled by ``column_scales`` if given."""
    if B.dim() != 2 or B.shape[0] != cooA.cols:
        raise ValueError(
            f"B must have shape [{cooA.cols}, columns] to match the sparse matrix, got {tuple(B.shape)}"
        )
    total = torch.zeros(cooA.rows, B.shape[1], dtype=torch.float32, device=B.device)
    step = max(1, _SLICE_ELEMENTS // max(1, B.shape[1]))
    for start in range(0, cooA.nnz, step):
        part = slice(start, start + step)
        rows, columns = cooA.rowidx[part].long(), cooA.colidx[part].long()
        total.index_add_(0, rows, B[columns].float() * cooA.values[part].float().unsqueeze(1))
    return total if column_scales is None else total * column_scales.float().reshape(1, -1)


@deprecated(_TORCH_SPARSE)
def spmm_coo(cooA: COOSparseTensor | Tensor, B: Tensor, out: Tensor | None = None) -> Tensor:
    """Sparse ``[rows, cols]`` times dense float16 ``[cols, n]``: float16 ``[rows, n]``, summed in float32.

    Args:
        cooA: a :class:`COOSparseTensor` or a torch sparse COO tensor.
        B: may be a transposed view.
        out: receives the result.
    """
    if isinstance(cooA, Tensor):
        cooA = cooA.coalesce()
        rowidx, colidx = cooA.indices().int()
        values = cooA.values().half()
        cooA = COOSparseTensor(cooA.shape[0], cooA.shape[1], values.numel(), rowidx, colidx, values)
    product = _product(cooA, B).half()
    return product if out is None else out.copy_(product)


@deprecated(_TORCH_SPARSE)
def spmm_coo_very_sparse(
    cooA: COOSparseTensor, B: Tensor, dequant_stats: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Add ``A @ B`` to ``out`` (float16 zeros if None) for a matrix with at most 32 entries in any row.

    Args:
        B: float16 ``[cols, n]``, or int8 with ``dequant_stats``.
        dequant_stats: absmax ``[n]`` of the columns of an int8 ``B``, which then stands for ``B * stats / 127``.

    Raises:
        AssertionError: a row of the sparse matrix has more than 32 entries.
    """
    if cooA.nnz:
        fullest = int(torch.bincount(cooA.rowidx.long(), minlength=1).max())
        assert fullest <= _VERY_SPARSE_ROW, (
            f"a row may have at most {_VERY_SPARSE_ROW} entries, got {fullest}"
        )
    if out is None:
        out = torch.zeros(cooA.rows, B.shape[1], dtype=torch.float16, device=B.device)
    scales = None if dequant_stats is None else dequant_stats.float() / 127.0
    return out.copy_(out.float() + _product(cooA, B, scales))
