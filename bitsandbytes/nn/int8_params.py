"""Int8Params: a parameter that quantizes itself row by row to int8 when it first leaves for a device.

As with Params4bit, the instance dict holds constructor keywords and nothing else, because integrations rebuild
parameters from it.
"""

from __future__ import annotations

import copy
import copyreg
from typing import Any

import torch
from torch import Tensor, nn

from .._operator import plain_parameter
from .._quant.int8 import int8_vectorwise_quant
from .params4bit import _device_of_type

__all__ = ["Int8Params"]


@plain_parameter
class Int8Params(nn.Parameter):
    """A weight ``[N, K]`` that becomes int8 on its first ``.to(device)`` from the CPU, unless ``has_fp16_weights``.

    Then ``data`` and ``CB`` are the same int8 tensor and ``SCB`` is the float32 absmax of its rows. That move works in
    place and returns the parameter itself. Unknown keywords are ignored: integrations pass on what they found in
    another parameter's ``__dict__``.
    """

    # Defaults, because integrations take entries out of the instance dict.
    has_fp16_weights: bool = False
    CB: Tensor | None = None
    SCB: Tensor | None = None

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = True,
        has_fp16_weights: bool = False,
        CB: Tensor | None = None,
        SCB: Tensor | None = None,
        **kwargs: Any,
    ) -> Int8Params:
        self = torch.Tensor._make_subclass(cls, torch.empty(0) if data is None else data, requires_grad)
        self.CB = CB
        self.SCB = SCB
        self.has_fp16_weights = has_fp16_weights
        return self

    def _quantize(self, device: torch.device, non_blocking: bool = False) -> Int8Params:
        """Quantize in place on ``device``. Rows are scaled by the absmax of their float16 values."""
        values = self.data.contiguous().to(device=device, dtype=torch.float16, non_blocking=non_blocking)
        codes, absmax, _ = int8_vectorwise_quant(values)
        self.requires_grad = False
        self.data = codes
        self.CB, self.SCB = codes, absmax
        return self

    def _like(self, data: Tensor, **changes: Any) -> Int8Params:
        """A parameter of this class around ``data``, with this one's attributes but for ``changes``."""
        new = torch.Tensor._make_subclass(type(self), data, self.requires_grad)
        new.__dict__.update(self.__dict__)
        new.__dict__.update(changes)
        return new

    def to(self, *args: Any, **kwargs: Any) -> Int8Params:  # type: ignore[override]
        """As ``Tensor.to``; leaving the CPU quantizes. int8 codes are never cast to another dtype."""
        duplicate = kwargs.pop("copy", False)
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if self.dtype != torch.int8:
            if device is not None and device.type != "meta" and self.device.type == "cpu":
                if not self.has_fp16_weights:
                    return self._quantize(device, non_blocking)
                dtype = None  # published: a float weight keeps its dtype on the way to a device
            return self._like(
                self.data.to(device=device, dtype=dtype, non_blocking=non_blocking, copy=duplicate)
            )

        codes = self.data.to(device=device, non_blocking=non_blocking, copy=duplicate)
        absmax = self.SCB
        if absmax is not None and device is not None and not (absmax.is_meta and device.type != "meta"):
            absmax = absmax.to(device=device, non_blocking=non_blocking, copy=duplicate)
        return self._like(codes, CB=codes, SCB=absmax)

    def cpu(self) -> Int8Params:  # type: ignore[override]
        return self.to(device="cpu")

    def cuda(self, device: Any = None, non_blocking: bool = False) -> Int8Params:  # type: ignore[override]
        return self.to(device=_device_of_type("cuda", device), non_blocking=non_blocking)

    def xpu(self, device: Any = None, non_blocking: bool = False) -> Int8Params:  # type: ignore[override]
        return self.to(device=_device_of_type("xpu", device), non_blocking=non_blocking)

    def _attributes(self, data: Tensor) -> dict[str, Any]:
        """The instance dict; CB is ``data`` itself where they share memory, so that copies and pickles share it too."""
        attributes = dict(self.__dict__)
        CB = self.CB
        if (
            CB is not None
            and CB.dtype == data.dtype
            and CB.data_ptr() == data.data_ptr()
            and CB.shape == data.shape
        ):
            attributes["CB"] = data
        return attributes

    def __copy__(self) -> Int8Params:
        return self._like(self.data)

    def __deepcopy__(self, memo: dict) -> Int8Params:
        if id(self) in memo:
            return memo[id(self)]
        source = self.data
        new = memo[id(self)] = self._like(copy.deepcopy(source, memo))
        new.__dict__.update(copy.deepcopy(self._attributes(source), memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        data = self.data
        return {**self._attributes(data), "data": data, "requires_grad": self.requires_grad}

    def __setstate__(self, state: dict[str, Any]) -> None:
        attributes = dict(state)
        data, requires_grad = attributes.pop("data"), attributes.pop("requires_grad")
        self.requires_grad = False
        self.data = data
        self.requires_grad = requires_grad
        self.__dict__.update(attributes)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # By constructor arguments, which every release understands; a state only for what others added.
        state = self.__getstate__()
        data, CB = state["data"], state.get("CB")
        arguments = (type(self), data, self.requires_grad, self.has_fp16_weights, CB, self.SCB)
        added = set(self.__dict__) - {"has_fp16_weights", "CB", "SCB"}
        return copyreg.__newobj__, arguments, state if added else None  # type: ignore[attr-defined]


# Pickles record the public path.
Int8Params.__module__ = "bitsandbytes.nn.modules"
