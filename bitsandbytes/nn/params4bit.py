"""Params4bit: a parameter that quantizes itself to 4 bits when it first meets a real device.

Integrations rebuild parameters as ``type(p)(data, **p.__dict__)``, so the instance dict holds constructor keywords and
nothing else. The layer that owns the parameter is referenced weakly: a strong reference would make a cycle, and a
model's memory would wait for the garbage collector.
"""

from __future__ import annotations

import copy
import copyreg
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._formats.packing import convert_weight_packed_for_cpu_inverse
from .._formats.state import QuantState
from .._formats.table import DEFAULT_BLOCKSIZE
from .._operator import plain_parameter
from .._quant.fourbit import quantize_4bit
from ._notices import notify

__all__ = ["Params4bit", "fix_4bit_weight_quant_state_from_module", "quant_state_of"]


class _LayerRef(weakref.ref):
    """A weak reference that answers attribute look-ups as the layer would; what ``p.__dict__["module"]`` holds."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self(), name)

    def __copy__(self) -> _LayerRef:
        return self

    def __deepcopy__(self, memo: dict) -> _LayerRef | None:
        layer = self()
        return _reference(memo.get(id(layer), layer))

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _reference, (self(),)


def _reference(layer: nn.Module | _LayerRef | None) -> _LayerRef | None:
    return layer if layer is None or isinstance(layer, _LayerRef) else _LayerRef(layer)


def _of_state(name: str, *path: str) -> property:
    """A read-only property that follows ``path`` from the quantization state.

    A property and not ``__getattr__``, which torch.compile does not trace through a parameter.
    """

    def follow(self: Params4bit) -> Any:
        value = self.quant_state
        for step in path:
            if value is None:
                break
            value = getattr(value, step)
        if value is None and (self.quant_state is None or path[0] == "state2"):
            raise AttributeError(f"'Params4bit' object has no attribute {name!r}")
        return value

    follow.__doc__ = f"``quant_state.{'.'.join(path)}``, for tools that resolve checkpoint keys by attribute."
    return property(follow)


@plain_parameter
class Params4bit(nn.Parameter):
    """A weight that becomes 4-bit codes plus a :class:`QuantState` on its first ``.to(device)``.

    That first move works in place and returns the parameter itself; later ones return a new parameter and move the
    shared state. ``module`` is the layer that is told about the state. Unknown keywords are ignored: integrations pass
    on what they found in another parameter's ``__dict__``.
    """

    quant_state: QuantState | None
    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_storage: torch.dtype
    bnb_quantized: bool

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: nn.Module | None = None,
        bnb_quantized: bool = False,
        **kwargs: Any,
    ) -> Params4bit:
        self = torch.Tensor._make_subclass(cls, torch.empty(0) if data is None else data, requires_grad)
        self.blocksize = DEFAULT_BLOCKSIZE if blocksize is None else blocksize
        self.compress_statistics = compress_statistics
        self.quant_type = quant_type
        self.quant_state = quant_state
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        self.module = module
        return self

    # --- the layer, and what checkpoint tools look up ---

    @property
    def module(self) -> nn.Module | None:
        """The layer that owns this parameter, while it is alive."""
        reference = self.__dict__.get("module")
        return None if reference is None else reference()

    @module.setter
    def module(self, layer: nn.Module | None) -> None:
        self.__dict__["module"] = _reference(layer)

    absmax = _of_state("absmax", "absmax")
    code = _of_state("code", "code")
    quant_map = _of_state("quant_map", "code")
    offset = _of_state("offset", "offset")
    state2 = _of_state("state2", "state2")
    nested_absmax = _of_state("nested_absmax", "state2", "absmax")
    nested_blocksize = _of_state("nested_blocksize", "state2", "blocksize")
    nested_quant_map = _of_state("nested_quant_map", "state2", "code")
    nested_dtype = _of_state("nested_dtype", "state2", "dtype")
    nested_offset = _of_state("nested_offset", "offset")

    # --- quantizing and moving ---

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: Mapping[str, Any],
        requires_grad: bool = False,
        device: torch.device | str = "cuda",
        module: nn.Module | None = None,
        **kwargs: Any,
    ) -> Params4bit:
        """Build the parameter from checkpoint entries: packed ``data`` and its statistics, keys with any prefix.

        Raises:
            ValueError: the statistics name no format or several, or their text is damaged.
            AssertionError: an entry that no quantization state has.
            KeyError: an entry is missing.
        """
        state = QuantState.from_dict(quantized_stats, device)
        self = cls(
            data.to(device),
            requires_grad=requires_grad,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=data.dtype,
            module=module,
            bnb_quantized=True,
        )
        if module is not None:
            module.quant_state = state
        return self

    def _quantize(self, device: torch.device | str, non_blocking: bool = False) -> Params4bit:
        """Quantize in place on ``device``, and tell the layer."""
        values = self.data.contiguous().to(device, non_blocking=non_blocking)
        packed, state = quantize_4bit(
            values,
            blocksize=self.blocksize,
            compress_statistics=self.compress_statistics,
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        if not packed.is_floating_point():
            self.requires_grad = False
        self.data = packed
        self.quant_state = state
        self.bnb_quantized = True
        if self.module is not None:
            self.module.quant_state = state
        return self

    def _like(self, data: Tensor, **changes: Any) -> Params4bit:
        """A parameter of this class around ``data``, with this one's attributes but for ``changes``."""
        new = torch.Tensor._make_subclass(type(self), data, self.requires_grad)
        new.__dict__.update(self.__dict__)
        new.__dict__.update(changes)
        return new

    def to(self, *args: Any, **kwargs: Any) -> Params4bit:  # type: ignore[override]
        """As ``Tensor.to``; a real device quantizes. The bytes of a quantized parameter are never cast to a dtype."""
        duplicate = kwargs.pop("copy", False)
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if not self.bnb_quantized:
            if device is not None and device.type != "meta":
                return self._quantize(device, non_blocking)
            return self._like(
                self.data.to(device=device, dtype=dtype, non_blocking=non_blocking, copy=duplicate)
            )

        data, state = self.data, self.quant_state
        if device is not None and state is not None:
            if device.type != "cpu" and getattr(state, "packing_format_for_cpu", False):
                data, _ = convert_weight_packed_for_cpu_inverse(data, state)
            state.to(device)
        return self._like(data.to(device=device, non_blocking=non_blocking, copy=duplicate), module=None)

    def cpu(self) -> Params4bit:  # type: ignore[override]
        return self.to(device="cpu")

    def cuda(self, device: Any = None, non_blocking: bool = False) -> Params4bit:  # type: ignore[override]
        return self.to(device=_device_of_type("cuda", device), non_blocking=non_blocking)

    def xpu(self, device: Any = None, non_blocking: bool = False) -> Params4bit:  # type: ignore[override]
        return self.to(device=_device_of_type("xpu", device), non_blocking=non_blocking)

    # --- copies ---

    def __copy__(self) -> Params4bit:
        return self._like(self.data)

    def __deepcopy__(self, memo: dict) -> Params4bit:
        if id(self) in memo:
            return memo[id(self)]
        new = memo[id(self)] = self._like(copy.deepcopy(self.data, memo))
        for name, value in self.__dict__.items():
            new.__dict__[name] = copy.deepcopy(value, memo)
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "module": self.module,
            "data": self.data,
            "requires_grad": self.requires_grad,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        attributes = dict(state)
        data, requires_grad = attributes.pop("data"), attributes.pop("requires_grad")
        self.requires_grad = False
        self.data = data
        self.requires_grad = requires_grad
        for name in _ATTRIBUTES:
            setattr(self, name, attributes.pop(name))
        self.__dict__.update(attributes)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The attributes travel as state, after the object: the layer among them refers back to it.
        state = self.__getstate__()
        return copyreg.__newobj__, (type(self), state["data"], self.requires_grad), state  # type: ignore[attr-defined]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """``torch.chunk`` and ``torch.split`` keep class and attributes: sharding cuts parameters with them."""
        kwargs = {} if kwargs is None else kwargs
        if func not in (torch.chunk, torch.split):
            return super().__torch_function__(func, types, args, kwargs)
        source = args[0] if args else kwargs.get("input", kwargs.get("tensor"))
        pieces = super().__torch_function__(func, types, args, kwargs)
        if not isinstance(source, Params4bit):
            return pieces
        return (
            tuple(source._like(p.detach()) for p in pieces)
            if isinstance(pieces, tuple)
            else source._like(pieces)
        )


_ATTRIBUTES = (
    "blocksize",
    "compress_statistics",
    "quant_type",
    "quant_state",
    "quant_storage",
    "bnb_quantized",
    "module",
)


def _device_of_type(kind: str, device: Any) -> torch.device:
    if device is None:
        return torch.device(kind)
    return torch.device(kind, device) if isinstance(device, int) else torch.device(device)


def quant_state_of(module: nn.Module) -> QuantState | None:
    """The state of a layer's weight, given back to it first if a tool replaced the parameter.

    An exporter runs the layer with stand-ins for its parameters; those are left as they are.
    """
    state = getattr(module.weight, "quant_state", None)
    if state is not None:
        return state
    if torch.compiler.is_compiling():
        return module.quant_state
    fix_4bit_weight_quant_state_from_module(module)
    return module.weight.quant_state


def fix_4bit_weight_quant_state_from_module(module: nn.Module) -> None:
    """Give a layer's weight its quantization state back from the layer, after a tool replaced the parameter.

    Raises:
        AssertionError: the weight is not packed: the layer was never quantized.
    """
    weight = module.weight
    if getattr(weight, "quant_state", None) is not None:
        return
    if getattr(module, "quant_state", None) is None:
        notify(
            f"{type(module).__name__}: quantization state not initialized. "
            "Move the layer to a device, for example with .to('cpu') or .to('cuda'), before the first forward."
        )
    assert weight.shape[1] == 1, (
        f"{type(module).__name__}.weight must be packed, of shape [n, 1], got {list(weight.shape)}: "
        "quantize the layer first by moving it to a device"
    )
    if not isinstance(weight, Params4bit):
        module.weight = weight = Params4bit(
            weight.data, quant_storage=module.quant_storage, bnb_quantized=True
        )
    weight.quant_state = module.quant_state


# Pickles record the public path.
Params4bit.__module__ = "bitsandbytes.nn.modules"
fix_4bit_weight_quant_state_from_module.__module__ = "bitsandbytes.nn.modules"
