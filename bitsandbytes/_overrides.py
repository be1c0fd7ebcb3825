"""Per-parameter optimizer settings: written by layers and by users, read by every optimizer.

``nn.Embedding`` asks for 32-bit state when it is built, long before an optimizer exists, so the requests live in one
process-wide registry. It never keeps a parameter or a module alive, and an entry counts only for the object it was
made for: an id that Python gives to a new tensor, or a position in another optimizer, inherits nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["GlobalOptimManager"]

Config = dict[str, Any]


class GlobalOptimManager:
    """The registry of per-parameter settings; get it with :meth:`get_instance`.

    ``pid2config`` maps the id of a parameter to its settings, ``index2config`` a position (group, index).
    Settings may be any of ``lr, betas, eps, weight_decay, alpha, t_alpha, t_beta3, optim_bits, min_8bit_size,
    max_unorm, skip_zeros`` and win over the parameter group's values at every step.
    """

    _instance: GlobalOptimManager | None = None

    pid2config: dict[int, Config]
    index2config: dict[tuple[int, int], Config]
    optimizer: Any
    uses_config_override: bool

    def __init__(self) -> None:
        raise RuntimeError("Call get_instance() instead")

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        """The one instance of this process."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        """Forget every setting."""
        self.pid2config = {}
        self.index2config = {}
        self.optimizer = None
        self.uses_config_override = False
        self._parameters: dict[int, weakref.ref[Tensor]] = {}
        self._positions: dict[tuple[int, int], weakref.ref[Tensor]] = {}
        self._requests: list[tuple[weakref.ref[torch.nn.Module], str, Config]] = []

    @property
    def module_weight_config_triple(self) -> list[tuple[torch.nn.Module, str, Config]]:
        """``(module, parameter name, settings)`` of each registered module that is still alive."""
        alive = ((reference(), name, config) for reference, name, config in self._requests)
        return [(module, name, config) for module, name, config in alive if module is not None]

    def register_parameters(self, params: Iterable[Any]) -> None:
        """Record the current settings of these parameters, or parameter groups, under their positions.

        Raises:
            IndexError: ``params`` is empty.
        """
        groups = list(params)
        if not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        for group_index, group in enumerate(groups):
            for index, parameter in enumerate(group["params"]):
                config = self.config_of(parameter)
                if config is not None:
                    self._assign(parameter, (group_index, index), config)

    def override_config(
        self,
        parameters: Tensor | list[Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: Config | None = None,
    ) -> None:
        """Set ``key`` to ``value``, or all of ``key_value_dict``, for one parameter or a list of them.

        A dict is kept, not copied, and shared by the parameters it was given for. Works before and after the
        optimizer is made, up to its first step for settings that shape the state (``optim_bits``, ``min_8bit_size``).
        """
        self.uses_config_override = True
        if isinstance(parameters, Tensor):
            parameters = [parameters]
        if key is not None and value is not None:
            assert key_value_dict is None, "give either key and value or key_value_dict, not both"
            key_value_dict = {key: value}
        if key_value_dict is None:
            return
        for parameter in parameters:
            config = self.config_of(parameter)
            if config is None:
                self._assign(parameter, None, key_value_dict)
            else:
                config.update(key_value_dict)

    def register_module_override(self, module: torch.nn.Module, param_name: str, config: Config) -> None:
        """Apply ``config`` to the parameter ``module.<param_name>`` that an optimizer finds at its first step."""
        self._requests = [request for request in self._requests if request[0]() is not None]
        self._requests.append((weakref.ref(module), param_name, config))

    def config_of(self, parameter: Tensor, position: tuple[int, int] | None = None) -> Config | None:
        """The settings of ``parameter``, those of its position first; None when there are none."""
        config: Config = {}
        if position is not None and self._belongs(self._positions.get(position), parameter):
            config = self.index2config.get(position, config)
        if self._belongs(self._parameters.get(id(parameter)), parameter):
            own = self.pid2config.get(id(parameter))
            if own is not None:
                return {**config, **own} if config and config is not own else own
        return config or None

    def resolve_modules(self, positions: dict[int, tuple[int, int]]) -> None:
        """Turn module requests into settings of those parameters, given by id, that an optimizer has.

        What was set for a parameter itself wins over what its module asked for.

        Raises:
            AttributeError: a module has no such attribute.
            AssertionError: the attribute is None.
        """
        requested: dict[int, tuple[Tensor, Config]] = {}
        for module, name, config in self.module_weight_config_triple:
            parameter = getattr(module, name)
            assert parameter is not None, (
                f"{type(module).__name__}.{name} is None and cannot have optimizer settings"
            )
            if id(parameter) in positions:
                requested.setdefault(id(parameter), (parameter, {}))[1].update(config)
        for key, (parameter, config) in requested.items():
            self._assign(parameter, positions[key], {**config, **(self.config_of(parameter) or {})})

    @staticmethod
    def _belongs(owner: weakref.ref[Tensor] | None, parameter: Tensor) -> bool:
        """Whether an entry was made for ``parameter``. Entries written straight into the dicts have no owner."""
        return owner is None or owner() is parameter

    def _assign(self, parameter: Tensor, position: tuple[int, int] | None, config: Config) -> None:
        key = id(parameter)
        owner = self._parameters.get(key)
        if owner is None or owner() is not parameter:
            self._parameters[key] = weakref.ref(parameter, lambda dead: self._forget(key, dead))
        self.pid2config[key] = config
        if position is not None:
            self._positions[position] = weakref.ref(parameter)
            self.index2config[position] = config

    def _forget(self, key: int, dead: weakref.ref[Tensor]) -> None:
        """Drop the entry of a parameter that died, unless a new one already took its id."""
        if self._parameters.get(key) is dead:
            del self._parameters[key]
            self.pid2config.pop(key, None)
