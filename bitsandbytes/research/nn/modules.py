"""Linear layers that train in emulated FP8. Parameters and checkpoints are those of ``torch.nn.Linear``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..._formats.codebooks import create_fp8_map
from ..autograd._functions import get_block_sizes, matmul_fp8_global, matmul_fp8_mixed

__all__ = ["LinearFP8Global", "LinearFP8Mixed"]


class _LinearFP8(nn.Linear):
    """The maps are made at the first forward and follow the input's device; they are not part of the state dict."""

    matmul: Callable[..., Tensor]

    def __init__(self, input_features: int, output_features: int, bias: bool = True) -> None:
        super().__init__(input_features, output_features, bias)
        self.bsz, self.bsz2 = get_block_sizes(self.weight, self.weight.t())
        self.fw_code: Tensor | None = None
        self.bw_code: Tensor | None = None

    def _codes(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.fw_code is None or self.bw_code is None:
            self.fw_code, self.bw_code = create_fp8_map(True, 4, 3, 8), create_fp8_map(True, 5, 2, 8)
        if self.fw_code.device != device or self.bw_code.device != device:
            self.fw_code, self.bw_code = self.fw_code.to(device), self.bw_code.to(device)
        return self.fw_code, self.bw_code

    def forward(self, x: Tensor) -> Tensor:
        fw_code, bw_code = self._codes(x.device)
        out = self.matmul(x, self.weight.t(), fw_code=fw_code, bw_code=bw_code, bsz=self.bsz, bsz2=self.bsz2)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format=fp8 e4m3/e5m2 (emulated), bsz={self.bsz}, bsz2={self.bsz2}"


class LinearFP8Mixed(_LinearFP8):
    """FP8 with block-wise scales for activations and gradients; the weight gradient is not quantized."""

    matmul = staticmethod(matmul_fp8_mixed)


class LinearFP8Global(_LinearFP8):
    """FP8 with one scale for each tensor."""

    matmul = staticmethod(matmul_fp8_global)
