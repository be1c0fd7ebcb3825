"""Finding the feature dimensions whose magnitudes stand out, and layers that treat them apart.

A few input features of large transformers carry magnitudes far beyond the rest (Dettmers et al., "LLM.int8()", 2022).
The tracer finds them from the spread of each weight's columns as a model runs for the first time; it owns nothing but
index tensors and hooks, keyed by the weight's storage.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["OutlierAwareLinear", "OutlierTracer", "find_outlier_dims", "logger", "outlier_hook"]

logger = logging.getLogger("bitsandbytes.utils")

_INPUT_ZSCORE = 3.0  # of the first layer's input, whose weight tells nothing yet
_INPUT_MAGNITUDE = 6.0


def find_outlier_dims(
    weight: Tensor, reduction_dim: int = 0, zscore: float = 4.0, topk: int | None = None, rdm: bool = False
) -> Tensor:
    """Indices (int64) of the dimensions of a matrix whose standard deviation stands out.

    Args:
        weight: 2-D.
        reduction_dim: the standard deviation is taken along this dimension.
        zscore: standard deviations more than this many of their own deviations above their mean stand out.
        topk: instead the so many largest.
        rdm: instead ``topk`` random indices below ``weight.shape[1]``, for ablations.
    """
    if rdm:
        return torch.randint(0, weight.shape[1], (topk or 0,), device=weight.device)
    deviation = _std(weight.float(), reduction_dim)
    if topk is not None:
        return deviation.topk(topk).indices
    return torch.where((deviation - deviation.mean()) / _std(deviation, 0) > zscore)[0]


def _std(values: Tensor, dim: int) -> Tensor:
    """The standard deviation; zero where there are too few values to have one."""
    if values.shape[dim] < 2:
        return torch.zeros_like(values.sum(dim=dim))
    return values.std(dim=dim)


def _find_in_input(features: Tensor) -> Tensor:
    flat = features.reshape(-1, features.shape[-1])
    spread = find_outlier_dims(flat, reduction_dim=1, zscore=_INPUT_ZSCORE)
    large = (flat.abs() > _INPUT_MAGNITUDE).any(dim=0).nonzero().view(-1)
    found = torch.cat([spread, large]).unique()
    return found[found < flat.shape[1]]  # the spread is one of rows


def outlier_hook(module: nn.Module, input: tuple[Any, ...]) -> None:
    """Forward-pre-hook of :class:`OutlierTracer`: records a linear layer's outlier dimensions at its first call.

    They come from its weight; for the very first layer from its input. When a layer is called a second time the model
    has been seen whole, and all hooks are removed.
    """
    assert isinstance(module, nn.Linear), f"outlier_hook is for torch.nn.Linear, got {type(module).__name__}"
    tracer = OutlierTracer.get_instance()
    key = tracer.get_hvalue(module.weight)
    if key in tracer.hvalue2outlier_idx:
        for hook in tracer.hooks:
            hook.remove()
        return
    found = find_outlier_dims(module.weight.detach())
    tracer.outliers.append(found)
    tracer.hvalues.append(key)
    if len(tracer.outliers) == 1:
        found = _find_in_input(input[0].detach())
    assert found.numel() == 0 or found.max() < module.weight.shape[1], (
        "outlier index beyond the input features"
    )
    tracer.hvalue2outlier_idx[key] = found


class OutlierTracer:
    """The one tracer of the process; get it with :meth:`get_instance`."""

    _instance: OutlierTracer | None = None

    def __init__(self) -> None:
        raise RuntimeError("Call get_instance() instead")

    @classmethod
    def get_instance(cls) -> OutlierTracer:
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
        return cls._instance

    def initialize(self, model: nn.Module) -> None:
        """Forget everything and watch the first run of every ``nn.Linear`` of ``model``."""
        for hook in getattr(self, "hooks", ()):
            hook.remove()
        self.last_w: Tensor | None = None
        self.current_outlier_dims: Tensor | None = None
        self.hvalues: list[int] = []
        self.outliers: list[Tensor] = []
        self.hvalue2outlier_idx: dict[int, Tensor] = {}
        self.initialized = True
        self.hooks = [
            m.register_forward_pre_hook(outlier_hook) for m in model.modules() if isinstance(m, nn.Linear)
        ]

    def is_initialized(self) -> bool:
        return getattr(self, "initialized", False)

    def get_hvalue(self, weight: Tensor) -> int:
        """What a weight is known by: the address of its storage."""
        return weight.detach().untyped_storage().data_ptr()

    def get_outliers(self, weight: Tensor) -> Tensor | None:
        """The outlier dimensions found for a weight; None for one that has not run, or without a model to trace."""
        if not self.is_initialized():
            logger.warning(
                "Outlier tracer is not initialized, so it knows no outliers. Call initialize(model) first"
            )
            return None
        return self.hvalue2outlier_idx.get(self.get_hvalue(weight))


class OutlierAwareLinear(nn.Linear):
    """Base of layers that quantize their weight knowing its outlier dimensions.

    A subclass implements :meth:`quantize_weight` and :meth:`forward_with_outliers`. The forward pass of this class
    looks the outlier dimensions up and quantizes the weight in place, once each, and returns None: what to compute is
    the subclass's matter.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.outlier_dim: Tensor | None = None
        self.is_quantized = False

    def forward_with_outliers(self, x: Tensor, outlier_idx: Tensor | None) -> Tensor:
        raise NotImplementedError(
            "Please override the `forward_with_outliers(self, x, outlier_idx)` function"
        )

    def quantize_weight(self, w: Tensor, outlier_idx: Tensor | None) -> Tensor:
        raise NotImplementedError("Please override the `quantize_weight(self, w, outlier_idx)` function")

    def forward(self, x: Tensor) -> None:  # type: ignore[override]
        if self.outlier_dim is None:
            tracer = OutlierTracer.get_instance()
            if not tracer.is_initialized():
                warnings.warn(
                    "Please use OutlierTracer.initialize(model) before using the OutlierAwareLinear layer",
                    stacklevel=2,
                )
            self.outlier_dim = tracer.get_outliers(self.weight)
        if not self.is_quantized:
            self.weight.data.copy_(self.quantize_weight(self.weight, self.outlier_dim))
            self.is_quantized = True

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, is_quantized={self.is_quantized}"


OutlierTracer.__module__ = "bitsandbytes.utils"
OutlierAwareLinear.__module__ = "bitsandbytes.nn.modules"  # the face that pickles record
