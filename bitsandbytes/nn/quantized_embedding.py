"""Embedding tables kept in 8 or 4 bits. A look-up decodes the rows it needs, not the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import ArgumentError
from .._formats.state import QuantState
from .._formats.table import FLOAT_DTYPES
from .._ops import embedding_4bit, embedding_8bit
from .._quant.blockwise import expand_absmax
from ._checkpoint import load_4bit, load_int8, maybe_rearrange_weight, save_int8_statistics, save_state
from ._layers import check_format_and_storage, move_with_statistics
from ._notices import notify
from .int8_params import Int8Params
from .params4bit import Params4bit, quant_state_of

__all__ = ["Embedding4bit", "Embedding8bit", "EmbeddingFP4", "EmbeddingNF4"]


class Embedding8bit(nn.Embedding):
    """``nn.Embedding`` with int8 rows, quantized when the module first moves to a device (the CPU counts).

    ``dtype`` is that of the rows it returns. ``state_dict`` holds ``weight``, ``SCB`` and ``weight_format``.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.weight = Int8Params(self.weight.data, has_fp16_weights=False, requires_grad=False)
        self._register_load_state_dict_pre_hook(maybe_rearrange_weight)

    def forward(self, input: Tensor) -> Tensor:
        """Indices ``[...]`` to rows ``[..., embedding_dim]``.

        Raises:
            RuntimeError: the table was never quantized.
        """
        weight = self.weight
        absmax = getattr(weight, "SCB", None)
        if absmax is None or weight.dtype != torch.int8:
            raise RuntimeError(
                "Embedding layer is not quantized. Move it to a device first, for example .to('cpu')."
            )
        table, size = (self.num_embeddings, self.embedding_dim), tuple(weight.shape)
        assert size == table, f"weight must have shape {list(table)}, got {list(size)}"
        assert absmax.shape == (self.num_embeddings,), (
            f"SCB must have shape [{self.num_embeddings}], got {list(absmax.shape)}"
        )
        dtype = self.dtype if self.dtype in FLOAT_DTYPES else torch.float32
        return embedding_8bit(input, weight, absmax, dtype).to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Embedding8bit:
        move_with_statistics(self, super()._apply, fn, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        absmax = getattr(self.weight, "SCB", None)
        if absmax is not None and self.weight.dtype == torch.int8:
            save_int8_statistics(destination, prefix, absmax, keep_vars)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        load_int8(self, super()._load_from_state_dict, *arguments)

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, format=int8, blocksize=row, "
            f"weight_dtype={self.weight.dtype}, dtype={self.dtype}"
        )


class Embedding4bit(nn.Embedding):
    """``nn.Embedding`` with a 4-bit table, quantized when the module first moves to a device (the CPU counts).

    ``dtype`` is that of the rows it returns. A row need not begin with a block. ``state_dict`` holds the packed table
    and its statistics.

    Raises:
        ValueError: an unknown ``quant_type`` or ``quant_storage``.
    """

    _only_quant_type: str | None = None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        check_format_and_storage(quant_type, quant_storage)
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            compress_statistics=None,  # type: ignore[arg-type]  # published: never nested
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.quant_state: QuantState | None = None
        self.quant_storage = quant_storage
        if embedding_dim % self.weight.blocksize != 0:
            notify(
                f"Embedding size {embedding_dim} is not divisible by block size {self.weight.blocksize}. "
                "This will lead to slow inference."
            )

    def forward(self, input: Tensor) -> Tensor:
        """Indices ``[...]`` to rows ``[..., embedding_dim]``.

        Raises:
            AssertionError: the table was never quantized.
        """
        state = quant_state_of(self)
        weight: Tensor = self.weight
        if state is None:
            raise ArgumentError(
                "Embedding layer is not quantized. Move it to a device first, for example .to('cpu')."
            )
        dtype = self.dtype if self.dtype in FLOAT_DTYPES else state.dtype
        table = (state.blocksize, state.quant_type, self.num_embeddings, self.embedding_dim)
        return embedding_4bit(input, weight, expand_absmax(state), *table, dtype).to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Embedding4bit:
        move_with_statistics(self, super()._apply, fn, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = getattr(self.weight, "quant_state", None)
        if state is not None:
            save_state(destination, f"{prefix}weight", state, keep_vars)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        shape = (self.num_embeddings, self.embedding_dim)
        load_4bit(self, super()._load_from_state_dict, shape, self._only_quant_type, *arguments)

    def extra_repr(self) -> str:
        weight = self.weight
        state = getattr(weight, "quant_state", None)
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, quant_type={getattr(weight, 'quant_type', None)}, "
            f"blocksize={getattr(weight, 'blocksize', None)}, nested={state is not None and state.nested}, "
            f"dtype={self.dtype}, quant_storage={self.quant_storage}, quantized={state is not None}"
        )


class EmbeddingFP4(Embedding4bit):
    """:class:`Embedding4bit` in FP4."""

    _only_quant_type = "fp4"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)


class EmbeddingNF4(Embedding4bit):
    """:class:`Embedding4bit` in NF4."""

    _only_quant_type = "nf4"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)


# Pickles record the public path.
for _public in (Embedding8bit, Embedding4bit, EmbeddingFP4, EmbeddingNF4):
    _public.__module__ = "bitsandbytes.nn.modules"
