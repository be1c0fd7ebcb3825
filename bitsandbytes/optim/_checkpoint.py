"""The checkpoint form of optimizer state.

``state_dict()`` is torch's, except that each parameter's tensors lie in one nested dict under
``__bnb_optimizer_quant_state__``: sharded checkpointing gathers every tensor it sees at the top level as if it were
shaped like the parameter, which codes, maps and absmax are not. Checkpoints without the wrapper load too. Loading
never aliases what it is given, keeps dtypes, and puts state back into paged memory where the optimizer is paged.
Sharded parameters have a form of their own, see ``_sharded.py``; each form loads for either kind of parameter.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .._checks import ArgumentError
from .._formats.rules import RULES
from .._formats.table import OPTIMIZER_BLOCKSIZE
from ._sharded import BITS_KEY, encoded, is_sharded, local_of, sharded_form

__all__ = ["WRAPPER_KEY", "CheckpointedOptimizer"]

WRAPPER_KEY = "__bnb_optimizer_quant_state__"

_PICKLED = (
    "_stochastic_rounding",
    "args",
    "initialized",
    "is_paged",
    "name2qmap",
    "non_castable_tensor_keys",
    "optimizer_name",
)


class CheckpointedOptimizer(torch.optim.Optimizer):
    """``state_dict``, ``load_state_dict``, pickling and copying of an optimizer with the state described above."""

    non_castable_tensor_keys: set[str]
    is_paged: bool
    optimizer_name: str
    _blocksize = OPTIMIZER_BLOCKSIZE
    _map_entries = 256

    def _state_shape(self, p: Tensor, dtype: torch.dtype) -> tuple[int, ...]:
        """The shape of one average of ``p`` in float32, or of its codes in uint8."""
        return tuple(p.shape)

    def _attach(self) -> None:
        raise NotImplementedError

    def _settle(self) -> None:
        raise NotImplementedError

    def _buffer(self, p: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        raise NotImplementedError

    def _map_on(self, name: str, device: torch.device) -> Tensor:
        raise NotImplementedError

    # --- saving ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state, with each parameter's tensors wrapped. Tensors are aliases of the optimizer's own.

        8-bit state of sharded parameters is decoded to float32 tensors that are sharded likewise.
        """
        self._settle()
        saved = super().state_dict()
        parameters = [p for group in self.param_groups for p in group["params"]]
        keys = [key for group in saved["param_groups"] for key in group["params"]]
        sharded = {key: p for key, p in zip(keys, parameters, strict=True) if is_sharded(p)}
        saved["state"] = {key: self._shown(sharded.get(key), value) for key, value in saved["state"].items()}
        return saved

    def _shown(self, sharded: Tensor | None, state: Any) -> Any:
        rule = RULES.get(getattr(self, "optimizer_name", ""))
        if sharded is None or rule is None or "state1" not in state:
            return self._wrapped(state)
        return sharded_form(sharded, state, rule)

    def _wrapped(self, state: Any) -> Any:
        if not isinstance(state, dict):
            return state
        hidden = {key: value for key, value in state.items() if key in self.non_castable_tensor_keys}
        shown = {key: value for key, value in state.items() if key not in hidden}
        return {**shown, WRAPPER_KEY: hidden} if hidden else shown

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        own = {key: self.__dict__[key] for key in _PICKLED if key in self.__dict__}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._attach()
        if "is_paged" in state:  # a pickle or a copy: its tensors look paged but are ordinary memory
            for parameter, own in self.state.items():
                for key in ("state1", "state2"):
                    if getattr(own.get(key), "is_paged", False):
                        own[key] = self._rehoused(parameter, own[key])

    def _rehoused(self, parameter: Tensor, value: Tensor) -> Tensor:
        """A copy of ``value`` in the kind of memory this optimizer keeps the state of ``parameter`` in."""
        buffer = self._buffer(parameter, value.shape, value.dtype)
        return buffer.copy_(value)

    # --- loading ---------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Replace state and hyper-parameters by saved ones.

        Args:
            state_dict: from :meth:`state_dict`, wrapped or not. It is not changed, nor shared.
            move_to_device: put the state on the parameters' devices; otherwise it stays where it was loaded.

        Raises:
            ValueError: the groups or the shapes of the state do not fit this optimizer's parameters. The optimizer is
                left as it was.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, dict(state_dict))
            state_dict = state_dict if replaced is None else replaced
        groups, saved_groups = self.param_groups, state_dict["param_groups"]
        if len(groups) != len(saved_groups):
            raise ValueError(
                f"loaded state dict has {len(saved_groups)} parameter groups, the optimizer has {len(groups)}"
            )
        for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
            if len(group["params"]) != len(saved["params"]):
                raise ValueError(
                    f"loaded state dict has {len(saved['params'])} parameters in group {index}, "
                    f"the optimizer has {len(group['params'])}"
                )

        keys = chain.from_iterable(saved["params"] for saved in saved_groups)
        parameters = dict(zip(keys, chain.from_iterable(group["params"] for group in groups), strict=True))
        state: defaultdict[Any, Any] = defaultdict(dict)
        for key, value in state_dict["state"].items():
            if key in parameters:
                state[parameters[key]] = self._load_state_of(key, parameters[key], value, move_to_device)
            else:
                state[key] = copy.deepcopy(value)
        loaded_groups = [
            {**group, **{k: copy.deepcopy(v) for k, v in saved.items() if k != "params"}}
            for group, saved in zip(groups, saved_groups, strict=True)
        ]
        self.__setstate__({"state": state, "param_groups": loaded_groups})
        for done in self._optimizer_load_state_dict_post_hooks.values():
            done(self)

    def _load_state_of(self, key: Hashable, parameter: Tensor, saved: Any, move_to_device: bool) -> Any:
        if not isinstance(saved, dict):
            return copy.deepcopy(saved)
        flat = {name: value for name, value in saved.items() if name != WRAPPER_KEY}
        flat.update(saved.get(WRAPPER_KEY, {}))
        if "state1" in flat and (BITS_KEY in flat or is_sharded(parameter)):
            return self._load_sharded(key, parameter, flat)
        self._check_shapes(key, parameter, flat)
        state: dict[str, Any] = {}
        for name, value in flat.items():
            if name in self.non_castable_tensor_keys:
                state[name] = self._adopted(name, value, parameter, move_to_device)
            elif name == "step" and isinstance(value, Tensor):  # some checkpointing only knows tensors
                state[name] = int(value)
            else:
                state[name] = _cast(value, parameter)
        return state

    def _load_sharded(self, key: Hashable, parameter: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
        part = local_of(parameter.detach())
        names = {"qmap1": "dynamic", "qmap2": "udynamic"}
        maps = {key: self._map_on(name, part.device) for key, name in names.items()}
        state = encoded(parameter, saved, RULES[self.optimizer_name], maps)
        self._check_shapes(key, part, state)
        state["step"] = int(state.get("step", 0))
        for name in ("state1", "state2") if self.is_paged else ():
            if name in state:
                state[name] = self._rehoused(part, state[name])
        return state

    def _adopted(self, name: str, value: Tensor, parameter: Tensor, move_to_device: bool) -> Tensor:
        """A copy of a saved tensor, dtype kept, in the memory this optimizer would have made it in."""
        if not value.is_contiguous():
            # Such state was written in the order of memory for a parameter that the step had made contiguous.
            value = _in_memory_order(value)
        if name in ("state1", "state2") and self.is_paged and move_to_device:
            return self._rehoused(parameter, value)
        return value.detach().to(parameter.device if move_to_device else value.device, copy=True)

    def _check_shapes(self, key: Hashable, parameter: Tensor, state: dict[str, Any]) -> None:
        """Every tensor must have the shape that this optimizer's rule gives it for ``parameter``."""
        rule = RULES.get(getattr(self, "optimizer_name", ""))
        if rule is None or "state1" not in state:
            return
        stack = () if rule.averages == 1 else (rule.averages,)
        blocks = -(parameter.numel() // -self._blocksize)
        shape = self._state_shape(parameter, getattr(state["state1"], "dtype", torch.float32))
        expected = {
            "state1": (*stack, *shape),
            "state2": shape,
            "absmax1": (*stack, blocks),
            "absmax2": (blocks,),
            "qmap1": (self._map_entries,),
            "qmap2": (self._map_entries,),
        }
        needed = ["state1", "state2"][: rule.states]
        if getattr(state["state1"], "dtype", None) == torch.uint8:
            needed += [
                name for index in range(1, rule.states + 1) for name in (f"absmax{index}", f"qmap{index}")
            ]
        for name in needed:
            if not isinstance(state.get(name), Tensor):
                kind = type(state.get(name)).__name__
                raise ArgumentError(f"state of parameter {key}: {name} must be a tensor, got {kind}")
        for name, shape in expected.items():
            if name in state and tuple(state[name].shape) != shape:
                raise ArgumentError(
                    f"state of parameter {key}: {name} must have shape {shape} for a parameter of shape "
                    f"{tuple(parameter.shape)} in blocks of {self._blocksize}, got {tuple(state[name].shape)}"
                )
        dtype = state["state1"].dtype
        for name in needed[: rule.states]:
            if state[name].dtype != dtype or dtype not in (torch.float32, torch.uint8):
                raise ArgumentError(
                    f"state of parameter {key}: state1 and state2 must both be float32 or both uint8, "
                    f"got {state[name].dtype} for {name}"
                )


def _in_memory_order(value: Tensor) -> Tensor:
    """The elements of a dense tensor as they lie in memory, in value's shape; a plain copy of any other tensor."""
    order = sorted(range(value.dim()), key=lambda axis: value.stride(axis), reverse=True)
    permuted = value.permute(order)
    return permuted.reshape(value.shape) if permuted.is_contiguous() else value.contiguous()


def _cast(value: Any, parameter: Tensor) -> Any:
    """Unknown entries follow torch's policy: floats take the parameter's dtype and device, all else is kept."""
    if isinstance(value, Tensor):
        floats = value.is_floating_point() and parameter.is_floating_point()
        dtype = parameter.dtype if floats else value.dtype
        return value.detach().to(device=parameter.device, dtype=dtype, copy=True)
    if isinstance(value, dict):
        return {key: _cast(item, parameter) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(item, parameter) for item in value)
    return copy.deepcopy(value)
