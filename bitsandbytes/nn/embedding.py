"""Embeddings whose optimizer state stays in 32 bits: their gradients are too uneven for 8-bit state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._overrides import GlobalOptimManager

__all__ = ["Embedding", "StableEmbedding"]


class Embedding(nn.Embedding):
    """``nn.Embedding`` with Xavier initialisation and 32-bit optimizer state."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: Any = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device=device,
        )
        _ask_for_32bit_state(self)

    def reset_parameters(self) -> None:
        """Xavier-uniform rows; the padding row is zero."""
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()


class StableEmbedding(nn.Embedding):
    """``nn.Embedding`` with Xavier initialisation, layer normalisation and 32-bit optimizer state.

    The normalisation runs in the dtype of its own parameters, torch's default one unless the module was cast; the
    result has the weight's.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device=device,
            dtype=dtype,
        )
        self.norm = nn.LayerNorm(embedding_dim, device=device)
        _ask_for_32bit_state(self)

    def reset_parameters(self) -> None:
        """Xavier-uniform rows; the padding row is zero."""
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()

    def forward(self, input: Tensor) -> Tensor:
        """Indices ``[...]`` to normalised rows ``[..., embedding_dim]`` in the weight's dtype."""
        rows = super().forward(input).to(self.norm.weight.dtype)
        return self.norm(rows).to(self.weight.dtype)


def _ask_for_32bit_state(module: nn.Module) -> None:
    GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})


# Pickles record the public path.
for _public in (Embedding, StableEmbedding):
    _public.__module__ = "bitsandbytes.nn.modules"
