"""Memory layouts of int8 matrices from before Hopper: how tensor cores of each generation wanted them.

Nothing computes in these layouts any more. Checkpoints saved in them exist, and programs convert them, so each layout
is a permutation known here once. All of them store tiles down a group of 32 columns, then the next group; matrices
are zero-padded to whole tiles:

======================  =============  ==================================================================
name                    tile           order inside a tile
======================  =============  ==================================================================
``row``, ``col``        none           plain row-major, plain column-major
``col32``               1 x 32         along the row
``col_turing``          8 x 32         even rows before odd; by 8 columns; halves of 4; row pairs; columns
``col_ampere``          32 x 32        whole rows, taken as 0 1 8 9 16 17 24 25, 2 3 10 11 ...
======================  =============  ==================================================================

NVIDIA documents them as CUBLASLT_ORDER_COL32, _COL4_4R2_8C and _COL32_2R_4R4.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from .deprecation import deprecated

__all__ = [
    "extract_outliers",
    "from_layout",
    "get_inverse_transform_indices",
    "get_special_format_str",
    "get_tile_inds",
    "get_transform_buffer",
    "get_transform_func",
    "nvidia_transform",
    "to_layout",
    "transform",
    "undo_layout",
]

_TILES = {"col32": (1, 32), "col_turing": (8, 32), "col_ampere": (32, 32)}
_ORDERS = ("row", "col", *_TILES)
_NO_REPLACEMENT = "Only row-major int8 matrices are computed with; no transformation is needed."

State = tuple[torch.Size, str]


def _check_order(order: str) -> None:
    if order not in _ORDERS:
        raise ValueError(f"unknown layout {order!r}: must be one of {list(_ORDERS)}")


def _positions(order: str, device: torch.device | str | None = None) -> Tensor:
    """``[tile rows, tile columns]``: where in its tile's memory each element lies."""
    rows, columns = _TILES[order]
    r = torch.arange(rows, device=device).unsqueeze(1)
    c = torch.arange(columns, device=device).unsqueeze(0)
    if order == "col32":
        return r * 32 + c
    if order == "col_turing":
        return (r % 2 * 4 + c // 8) * 32 + (c % 8 // 4 * 4 + r // 2) * 4 + c % 4
    return ((r % 8 // 2 * 4 + r // 8) * 2 + r % 2) * 32 + c


def _padded(shape: torch.Size | tuple[int, ...], order: str) -> tuple[int, int]:
    rows, columns = shape
    tile_rows, tile_columns = _TILES.get(order, (1, 1))
    return -(rows // -tile_rows) * tile_rows, -(columns // -tile_columns) * tile_columns


def to_layout(matrix: Tensor, order: str) -> Tensor:
    """A row-major 2-D matrix in the memory order of a layout, shaped like the padded matrix."""
    _check_order(order)
    if order == "row":
        return matrix.contiguous()
    if order == "col":
        return matrix.t().contiguous().view(matrix.shape)
    rows, columns = _padded(matrix.shape, order)
    tile_rows, tile_columns = _TILES[order]
    padded = matrix.new_zeros(rows, columns)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    tiles = padded.view(rows // tile_rows, tile_rows, columns // tile_columns, tile_columns).permute(
        2, 0, 1, 3
    )
    element_at = _positions(order, matrix.device).view(-1).argsort()
    return tiles.reshape(-1, element_at.numel())[:, element_at].view(rows, columns)


def from_layout(permuted: Tensor, order: str, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The inverse of :func:`to_layout`: a contiguous row-major matrix of ``shape``, padding dropped."""
    _check_order(order)
    rows, columns = shape
    if order == "row":
        return permuted.reshape(rows, columns).contiguous()
    if order == "col":
        return permuted.reshape(columns, rows).t().contiguous()
    padded = permuted.reshape(_padded((rows, columns), order))
    element_at = _positions(order, permuted.device).view(-1).argsort().view(_TILES[order])
    return undo_layout(padded, element_at)[:rows, :columns].contiguous()


def get_inverse_transform_indices(
    transform_tile: Callable[[Tensor], Tensor], tile_size: tuple[int, int]
) -> Tensor:
    """Find out how a layout permutes one tile, by passing numbered tiles through ``transform_tile``.

    Args:
        transform_tile: takes a row-major int8 tile and returns its int8 bytes in the layout's order.
        tile_size: rows and columns of a tile.

    Returns:
        int64 of shape ``tile_size``: at each position of the permuted tile, the row-major index of its element.
    """
    elements = torch.arange(tile_size[0] * tile_size[1])
    found = torch.zeros_like(elements)
    digit = 0
    while elements.numel() > 1 << (7 * digit):  # an int8 carries seven bits of the number at a time
        marks = (elements >> (7 * digit) & 0x7F).to(torch.int8).view(tile_size)
        found |= transform_tile(marks).reshape(-1).cpu().long() << (7 * digit)
        digit += 1
    if not torch.equal(found.sort().values, elements):
        raise ValueError(f"transform_tile is not a permutation of a tile of size {tuple(tile_size)}")
    return found.view(tile_size)


def undo_layout(permuted_tensor: Tensor, tile_indices: Tensor) -> Tensor:
    """Bring a matrix stored in permuted tiles back to row-major order.

    Args:
        permuted_tensor: ``[rows, columns]`` holding tiles down the rows of a column group, then the next group;
            whole tiles only.
        tile_indices: what :func:`get_inverse_transform_indices` or :func:`get_tile_inds` return.

    Returns:
        The contiguous row-major matrix, same shape and dtype.

    Raises:
        ValueError: the matrix does not consist of whole tiles.
    """
    (rows, columns), (tile_rows, tile_columns) = permuted_tensor.shape, tile_indices.shape
    if rows % tile_rows or columns % tile_columns:
        raise ValueError(
            f"a matrix of {rows} x {columns} does not divide into tiles of {tile_rows} x {tile_columns}"
        )
    position_of = tile_indices.to(permuted_tensor.device).reshape(-1).argsort()
    tiles = permuted_tensor.reshape(-1, tile_rows * tile_columns)[:, position_of]
    tiles = tiles.view(columns // tile_columns, rows // tile_rows, tile_rows, tile_columns)
    return tiles.permute(1, 2, 0, 3).reshape(rows, columns).contiguous()


def get_tile_inds(format: str, device: torch.device | str | None = None) -> Tensor:
    """The tile permutation of a named layout, as :func:`undo_layout` takes it."""
    if format not in _TILES:
        raise ValueError(f"layout {format!r} has no tiles: must be one of {list(_TILES)}")
    return _positions(format, device).view(-1).argsort().view(_TILES[format])


@deprecated(_NO_REPLACEMENT)
def get_special_format_str() -> str:
    """The layout int8 weights are computed in on this machine: always ``"row"``."""
    return "row"


@deprecated(_NO_REPLACEMENT)
def get_transform_func(
    dtype: torch.dtype, orderA: str, orderOut: str, transpose: bool = False
) -> Callable[[Tensor], Tensor]:
    """A function that brings a 2-D matrix from one layout to another.

    Raises:
        ValueError: no such layout, or a dtype that is not int8 or int32.
    """
    _check_order(orderA)
    _check_order(orderOut)
    if dtype not in (torch.int8, torch.int32):
        raise ValueError(f"layouts hold int8 or int32, got {dtype}")

    def convert(matrix: Tensor) -> Tensor:
        plain = from_layout(matrix, orderA, matrix.shape)
        return to_layout(plain.t() if transpose else plain, orderOut)

    return convert


def _target_shape(
    shape: torch.Size | tuple[int, ...], transpose: bool
) -> tuple[tuple[int, int], tuple[int, ...]]:
    """The matrix that is laid out and the logical shape the state remembers."""
    *leading, columns = shape
    rows = prod(leading)
    if not transpose:
        return (rows, columns), tuple(shape)
    return (columns, rows), (columns, *leading)


@deprecated(_NO_REPLACEMENT)
def get_transform_buffer(
    shape: torch.Size | tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str,
    to_order: str,
    from_order: str = "row",
    transpose: bool = False,
) -> tuple[Tensor, State]:
    """``(zeros, (shape, order))``: a buffer for a matrix of ``shape`` in a layout, padded to whole tiles."""
    _check_order(to_order)
    matrix, logical = _target_shape(shape, transpose)
    buffer_shape = logical if to_order in ("row", "col") else _padded(matrix, to_order)
    return torch.zeros(buffer_shape, dtype=dtype, device=device), (torch.Size(logical), to_order)


def _transform(
    A: Tensor,
    to_order: str,
    from_order: str = "row",
    out: Tensor | None = None,
    transpose: bool = False,
    state: State | None = None,
    ld: int | None = None,
) -> tuple[Tensor, State]:
    shape, from_order = (A.shape, from_order) if state is None else (state[0], state[1])
    matrix, _ = _target_shape(shape, False)
    plain = from_layout(A, from_order, matrix)
    _, logical = _target_shape(shape, transpose)
    result = to_layout(plain.t() if transpose else plain, to_order)
    if to_order in ("row", "col"):
        result = result.view(logical)
    if out is not None:
        result = out.copy_(result.view(out.shape))
    return result, (torch.Size(logical), to_order)


@deprecated(_NO_REPLACEMENT)
def transform(
    A: Tensor,
    to_order: str,
    from_order: str = "row",
    out: Tensor | None = None,
    transpose: bool = False,
    state: State | None = None,
    ld: int | None = None,
) -> tuple[Tensor, State]:
    """Bring a matrix into a layout.

    Args:
        A: 2-D or 3-D (leading dimensions count as rows).
        to_order: ``row``, ``col``, ``col32``, ``col_turing`` or ``col_ampere``.
        from_order: A's layout, unless ``state`` tells it together with A's logical shape.
        out: receives the result.
        transpose: transpose the matrix on the way.
        ld: ignored.

    Returns:
        ``(matrix padded to whole tiles, (logical shape, to_order))``.
    """
    return _transform(A, to_order, from_order, out, transpose, state, ld)


@deprecated(_NO_REPLACEMENT)
def nvidia_transform(
    A: Tensor,
    to_order: str,
    from_order: str = "row",
    out: Tensor | None = None,
    transpose: bool = False,
    state: State | None = None,
    ld: int | None = None,
) -> tuple[Tensor, State]:
    """The same as :func:`transform`."""
    return _transform(A, to_order, from_order, out, transpose, state, ld)


@deprecated("Index the row-major weight instead.")
def extract_outliers(A: Tensor, SA: State, idx: Tensor) -> Tensor:
    """Columns ``idx`` of an int8 matrix in the layout and of the logical shape that ``SA`` tells; row-major."""
    shape, order = SA
    matrix, _ = _target_shape(shape, False)
    return from_layout(A, order, matrix)[:, idx.long()].contiguous()
