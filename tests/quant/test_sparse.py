"""Sparse float16 matrices: products against dense float64 ones, conversions, checks of their parts."""

from __future__ import annotations

import pytest
import torch

import bitsandbytes.functional as F

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")


def random_int8(*shape: int, device: str) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8).to(device)


def random_coo(rows: int, cols: int, density: float, device: str) -> tuple[F.COOSparseTensor, torch.Tensor]:
    dense = torch.randn(rows, cols).half() * (torch.rand(rows, cols) < density)
    rowidx, colidx = dense.nonzero(as_tuple=True)
    values = dense[rowidx, colidx]
    coo = F.COOSparseTensor(
        rows, cols, values.numel(), rowidx.int().to(device), colidx.int().to(device), values.to(device)
    )
    return coo, dense.double()


@pytest.mark.parametrize("shape", [(1, 1, 1), (40, 60, 17), (5, 8, 0)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_spmm_coo_is_the_dense_product(device, shape, transposed, density):
    rows, cols, n = shape
    coo, dense = random_coo(rows, cols, density, device)
    B = (torch.randn(n, cols).t() if transposed else torch.randn(cols, n)).half().to(device)

    result = F.spmm_coo(coo, B)

    assert result.dtype == torch.float16 and result.shape == (rows, n)
    torch.testing.assert_close(result.cpu().double(), dense @ B.cpu().double(), atol=2e-3, rtol=2e-3)


def test_spmm_coo_takes_torch_sparse_tensors_and_out(device):
    coo, dense = random_coo(10, 12, 0.3, device)
    B, out = torch.randn(12, 4).half().to(device), torch.empty(10, 4, dtype=torch.float16, device=device)
    expected = F.spmm_coo(coo, B)
    assert F.spmm_coo(dense.half().to(device).to_sparse(), B, out=out) is out
    assert torch.equal(out, expected)


def test_very_sparse_product_adds_to_out(device):
    coo, dense = random_coo(30, 50, 0.05, device)
    B = torch.randn(50, 20).half().to(device)
    out = torch.ones(30, 20, dtype=torch.float16, device=device)

    assert F.spmm_coo_very_sparse(coo, B, out=out) is out

    torch.testing.assert_close(out.cpu().double(), 1 + dense @ B.cpu().double(), atol=4e-3, rtol=2e-3)
    torch.testing.assert_close(F.spmm_coo_very_sparse(coo, B) + 1, out, atol=4e-3, rtol=2e-3)


def test_very_sparse_product_scales_int8(device):
    coo, dense = random_coo(30, 50, 0.05, device)
    B, stats = random_int8(50, 20, device=device), torch.rand(20, device=device)
    result = F.spmm_coo_very_sparse(coo, B, dequant_stats=stats)
    expected = dense @ (B.cpu().double() * stats.cpu().double() / 127)
    torch.testing.assert_close(result.cpu().double(), expected, atol=4e-3, rtol=2e-3)


def test_very_sparse_product_refuses_full_rows():
    coo, _ = random_coo(1, 40, 1.1, "cpu")
    assert coo.nnz > 32
    with pytest.raises(AssertionError, match="at most 32"):
        F.spmm_coo_very_sparse(coo, torch.zeros(40, 2).half())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_coo_converts_to_pointers(device):
    coo, dense = random_coo(7, 9, 0.4, device)
    csr, csc = F.coo2csr(coo), F.coo2csc(coo)
    reference = dense.to_sparse_csr()
    assert csr.rowptr.tolist() == reference.crow_indices().tolist()
    assert csr.colidx.tolist() == reference.col_indices().tolist()
    reference = dense.to_sparse_csc()
    assert csc.colptr.tolist() == reference.ccol_indices().tolist()
    assert csc.rowidx.tolist() == reference.row_indices().tolist()
    assert csc.values.tolist() == reference.values().tolist()


def test_sparse_matrices_check_their_parts():
    index, values = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.float16)
    with pytest.raises(AssertionError, match="float16"):
        F.COOSparseTensor(2, 2, 2, index, index, values.float())
    with pytest.raises(AssertionError, match="int32"):
        F.COOSparseTensor(2, 2, 2, index.long(), index, values)
    with pytest.raises(AssertionError, match="rowptr must have 3"):
        F.CSRSparseTensor(2, 2, 2, index, index, values)
    empty = F.coo_zeros(3, 4, 5, "cpu")
    assert (empty.rows, empty.cols, empty.nnz) == (3, 4, 5)


def test_cusparse_context_is_a_singleton():
    assert F.Cusparse_Context.get_instance() is F.Cusparse_Context.get_instance()
    with pytest.raises(RuntimeError, match="get_instance"):
        F.Cusparse_Context()
