"""Memory layouts of int8 matrices: each undoes itself, holds documented places, and can be multiplied in."""

from __future__ import annotations

import pytest
import torch

import bitsandbytes.functional as F
from bitsandbytes._quant.layouts import from_layout, to_layout
from bitsandbytes.autograd._functions import get_inverse_transform_indices, get_tile_inds, undo_layout

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")


def random_int8(*shape: int, device: str) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8).to(device)


def exact_product(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return torch.matmul(A.cpu().long(), B.cpu().long())


TILES = {"col32": (1, 32), "col_turing": (8, 32), "col_ampere": (32, 32)}


@pytest.mark.parametrize("order", ["row", "col", *TILES])
@pytest.mark.parametrize("shape", [(1, 1), (33, 70), (64, 64), (8, 32), (2, 5, 33)])
def test_a_layout_undoes_itself(device, order, shape):
    matrix = random_int8(*shape, device=device)

    permuted, state = F.transform(matrix, order)
    restored, back = F.transform(permuted, "row", state=state)

    assert state == (matrix.shape, order) and back == (matrix.shape, "row")
    assert torch.equal(restored, matrix)
    buffer, _ = F.get_transform_buffer(matrix.shape, torch.int8, device, order)
    assert buffer.shape == permuted.shape


@pytest.mark.parametrize("order", ["row", "col32", "col_turing"])
def test_transform_transposes_on_the_way(device, order):
    matrix = random_int8(10, 40, device=device)
    permuted, state = F.transform(matrix, order, transpose=True)
    assert state == ((40, 10), order)
    assert torch.equal(from_layout(permuted, order, (40, 10)), matrix.t())


def test_documented_corners_of_the_layouts():
    """Elements whose place NVIDIA's description of the layouts names."""
    matrix = torch.arange(64 * 64, dtype=torch.int32).view(64, 64)
    col32 = to_layout(matrix, "col32").view(-1)
    assert col32[:64].tolist() == matrix[:2, :32].reshape(-1).tolist()
    assert col32[64 * 32] == matrix[0, 32]
    turing = to_layout(matrix, "col_turing").view(-1)
    assert turing[:8].tolist() == [*matrix[0, :4].tolist(), *matrix[2, :4].tolist()]
    assert turing[16:20].tolist() == matrix[0, 4:8].tolist()
    assert turing[32:36].tolist() == matrix[0, 8:12].tolist()
    assert turing[128:132].tolist() == matrix[1, :4].tolist()
    assert turing[256] == matrix[8, 0] and turing[8 * 256] == matrix[0, 32]
    ampere = to_layout(matrix, "col_ampere").view(-1)
    assert [int(ampere[32 * i]) // 64 for i in range(10)] == [0, 1, 8, 9, 16, 17, 24, 25, 2, 3]
    assert ampere[1024] == matrix[32, 0] and ampere[2048] == matrix[0, 32]


@pytest.mark.parametrize("order", TILES)
def test_undo_layout_reads_older_checkpoints(device, order):
    indices = get_inverse_transform_indices(lambda tile: F.transform(tile.to(device), order)[0], TILES[order])
    assert torch.equal(indices, get_tile_inds(order, "cpu"))

    weight = random_int8(96, 128, device=device)
    restored = undo_layout(F.transform(weight, order)[0], indices)

    assert restored.is_contiguous() and torch.equal(restored, weight)


def test_undo_layout_wants_whole_tiles():
    with pytest.raises(ValueError, match="does not divide into tiles"):
        undo_layout(torch.zeros(7, 32, dtype=torch.int8), get_tile_inds("col_turing"))
    with pytest.raises(ValueError, match="not a permutation"):
        get_inverse_transform_indices(torch.zeros_like, (8, 32))
    with pytest.raises(ValueError, match="unknown layout"):
        F.transform(torch.zeros(2, 2, dtype=torch.int8), "diagonal")


@pytest.mark.parametrize(
    ("order_a", "order_b"), [("row", "row"), ("col32", "col_turing"), ("col32", "col_ampere")]
)
def test_igemmlt_multiplies_in_any_layout(device, order_a, order_b):
    A, B = random_int8(2, 9, 40, device=device), random_int8(17, 40, device=device)
    (tiled_A, SA), (tiled_B, SB) = F.transform(A, order_a), F.transform(B, order_b)

    product, state = F.igemmlt(tiled_A, tiled_B, SA, SB)
    row_stats, col_stats = torch.rand(18, device=device), torch.rand(17, device=device)
    result = F.mm_dequant(product, state, row_stats, col_stats)

    exact = exact_product(A.view(18, 40), B.t())
    assert state == ((2, 9, 17), order_a)
    assert torch.equal(from_layout(product, order_a, (18, 17)).cpu().long(), exact)
    scaled = exact.double() * row_stats.cpu().double()[:, None] * col_stats.cpu().double() / 127**2
    assert result.shape == (2, 9, 17) and result.dtype == torch.float16
    torch.testing.assert_close(result.view(18, 17).cpu().double(), scaled, atol=1e-3, rtol=1e-3)


def test_extract_outliers_takes_columns(device):
    weight = random_int8(40, 70, device=device)
    columns = torch.tensor([3, 69, 0], dtype=torch.int32, device=device)
    tiled, state = F.transform(weight, "col_turing")
    assert torch.equal(F.extract_outliers(tiled, state, columns), weight[:, columns.long()])


def test_transform_functions_convert(device):
    matrix = random_int8(32, 64, device=device)
    convert = F.get_transform_func(torch.int8, "row", "col32")
    assert torch.equal(convert(matrix), F.transform(matrix, "col32")[0])
    assert F.get_special_format_str() == "row"
    with pytest.raises(ValueError, match="int8 or int32"):
        F.get_transform_func(torch.float32, "row", "col32")
