"""QuantState: what is needed beside the codes to rebuild a tensor, and its form in checkpoints.

The checkpoint form is a flat dict of tensors; everything that is not a tensor travels as JSON text in a uint8 tensor
named after the format. Keys, their order and the JSON text are a published format: files written here load in every
release that reads it, and the other way round.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .table import FORMATS

__all__ = ["QuantState", "pack_dict_to_tensor", "unpack_tensor_to_dict"]

_BLOB_PREFIX = "bitsandbytes__"


def pack_dict_to_tensor(source_dict: dict[str, Any]) -> Tensor:
    """A JSON-serialisable dict as the UTF-8 bytes of its JSON text, one per element of a CPU uint8 tensor.

    Raises:
        TypeError: a value has no JSON form.
    """
    return torch.tensor(list(json.dumps(source_dict).encode("utf-8")), dtype=torch.uint8, device="cpu")


def unpack_tensor_to_dict(tensor_data: Tensor) -> dict[str, Any]:
    """The dict that :func:`pack_dict_to_tensor` packed; any valid JSON object is read.

    Raises:
        ValueError: the bytes are not the UTF-8 text of a JSON object.
    """
    try:
        unpacked = json.loads(bytes(tensor_data.cpu().reshape(-1).tolist()).decode("utf-8"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"quant_state blob is damaged: not the bytes of a JSON object ({error})") from error
    if not isinstance(unpacked, dict):
        raise ValueError(
            f"quant_state blob is damaged: expected a JSON object, got {type(unpacked).__name__}"
        )
    return unpacked


class QuantState:
    """Statistics, codebook, shape and dtype of one quantized tensor.

    ``absmax`` is float32 with one value a block, or uint8 when nested: then ``state2`` and ``offset`` rebuild it.
    4-bit states carry ``quant_type`` and ``shape``; 8-bit block-wise ones have None there. A plain mutable object:
    programs assign attributes, also new ones, and every reader looks at ``nested`` afresh.
    """

    valid_quant_types = tuple(sorted(FORMATS))
    valid_qs_type_keys = [f"{_BLOB_PREFIX}{name}" for name in sorted(FORMATS)]
    valid_qs_keys = [
        "absmax",
        "quant_map",
        "nested_absmax",
        "nested_quant_map",
        "quant_state",
        "quant_type",
        "blocksize",
        "dtype",
        "shape",
        "nested_blocksize",
        "nested_dtype",
        "nested_offset",
    ]

    __hash__ = None  # type: ignore[assignment]

    packing_format_for_cpu = False  # programs may hand over states in the CPU layout of earlier releases

    def __init__(
        self,
        absmax: Tensor,
        shape: torch.Size | None = None,
        code: Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
        state2: QuantState | None = None,
    ) -> None:
        self.absmax = absmax
        # Which of these are None depends on the kind of state, which each reader knows and a type does not.
        self.shape: Any = shape
        self.code: Any = code
        self.dtype: Any = dtype
        self.blocksize: Any = blocksize
        self.quant_type: Any = quant_type
        self.offset: Any = offset
        self.state2: Any = state2
        self.nested = state2 is not None

    def __getattr__(self, name: str) -> Any:
        # Sharded checkpointing resolves "weight.quant_state.bitsandbytes__nf4" attribute by attribute.
        if name.startswith(_BLOB_PREFIX) and self.__dict__.get("quant_type") is not None:
            packed = self.as_dict(packed=True)
            if f"quant_state.{name}" in packed:
                return packed[f"quant_state.{name}"]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getitem__(self, index: Any) -> Any:
        """The list older releases used for a state: absmax, shape, dtype, blocksize, [offset, state2], quant_type."""
        second = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, second, self.quant_type][index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return False
        return (
            _close(self.absmax, other.absmax)
            and self.shape == other.shape
            and _close(self.code, other.code)
            and self.dtype == other.dtype
            and self.blocksize == other.blocksize
            and self.quant_type == other.quant_type
            and _same_offset(self.offset, other.offset)
            and self.state2 == other.state2
        )

    def __repr__(self) -> str:
        shape = None if self.shape is None else list(self.shape)
        return (
            f"{type(self).__name__}(quant_type={self.quant_type!r}, shape={shape}, dtype={self.dtype}, "
            f"blocksize={self.blocksize}, nested={self.nested})"
        )

    @classmethod
    def from_dict(cls, qs_dict: Mapping[str, Any], device: torch.device | str) -> QuantState:
        """Build a state from checkpoint entries, packed or unpacked; keys may carry any dotted prefix.

        ``qs_dict`` is left as it is. Tensors move to ``device`` and keep their dtype.

        Raises:
            ValueError: no or several ``quant_state`` blobs, or one that is damaged.
            AssertionError: a key that no state has.
            KeyError: an entry that every state needs is missing.
        """
        entries = dict(qs_dict)
        blobs = [key for key, value in entries.items() if "quant_state" in key and isinstance(value, Tensor)]
        if "quant_type" not in entries:
            if not blobs:
                raise ValueError(
                    f"Expected packed or unpacked quant_state items, found neither; keys: {sorted(entries)}"
                )
            if len(blobs) != 1 or blobs[0].split(".")[-1] not in cls.valid_qs_type_keys:
                raise ValueError(
                    "There should be exactly one `quant_state` item with ending from "
                    f"{cls.valid_qs_type_keys}, found {blobs}"
                )
        if len(blobs) == 1:
            entries.update(unpack_tensor_to_dict(entries.pop(blobs[0])))

        entries = {key.split(".")[-1]: value for key, value in entries.items()}
        unknown = set(entries) - set(cls.valid_qs_keys)
        assert not unknown, f"unexpected quant_state keys {sorted(unknown)}; allowed: {cls.valid_qs_keys}"

        offset = state2 = None
        if "nested_absmax" in entries:
            # Always float32: under a bfloat16 default dtype the offset would lose the digits it was saved with.
            offset = torch.tensor(float(entries["nested_offset"]), dtype=torch.float32, device=device)
            state2 = cls(
                absmax=entries["nested_absmax"].to(device),
                blocksize=entries["nested_blocksize"],
                code=entries["nested_quant_map"].to(device),
                dtype=_dtype_named(entries["nested_dtype"]),
            )
        return cls(
            quant_type=entries["quant_type"],
            absmax=entries["absmax"].to(device),
            blocksize=entries["blocksize"],
            code=entries["quant_map"].to(device),
            dtype=_dtype_named(entries["dtype"]),
            shape=torch.Size(entries["shape"]) if entries["shape"] is not None else None,
            offset=offset,
            state2=state2,
        )

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The state as checkpoint entries. ``packed=True`` gives tensors only (what safetensors can hold)."""
        entries: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.nested:
            assert self.state2 is not None and self.offset is not None
            entries |= {
                "nested_absmax": self.state2.absmax,
                "nested_blocksize": self.state2.blocksize,
                # A copy: layers share the map, and safetensors drops tensors that share memory.
                "nested_quant_map": self.state2.code.clone(),
                "nested_dtype": str(self.state2.dtype).removeprefix("torch."),
                # On the meta device there is no value; keys and sizes are still asked for.
                "nested_offset": float("nan") if self.offset.is_meta else self.offset.item(),
            }
        if not packed or self.quant_type is None:
            return entries

        tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
        others = {key: value for key, value in entries.items() if not isinstance(value, Tensor)}
        return tensors | {f"quant_state.{_BLOB_PREFIX}{self.quant_type}": pack_dict_to_tensor(others)}

    def to(self, device: torch.device | str) -> None:
        """Move the state's tensors to ``device``, in place."""
        self.absmax = self.absmax.to(device)
        if self.code is not None:
            self.code = self.code.to(device)
        if self.nested:
            assert self.state2 is not None and self.offset is not None
            self.offset = self.offset.to(device)
            self.state2.absmax = self.state2.absmax.to(device)
            self.state2.code = self.state2.code.to(device)


# Pickles record the public path.
QuantState.__module__ = "bitsandbytes.functional"


def _dtype_named(name: str) -> torch.dtype:
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"quant_state names no torch dtype: {name!r}")
    return dtype


def _close(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return first.shape == second.shape and torch.allclose(first.float(), second.float(), atol=1e-6)


def _same_offset(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return bool(first == second)
