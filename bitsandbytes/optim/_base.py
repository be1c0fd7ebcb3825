"""The base of every optimizer here: stepping, state buffers, per-parameter settings.

A rule and how its state is stored are separate matters. The rule is a name that the two update operators know; the
state of one parameter is float32, or uint8 codes with one absmax for each 256 values of the flattened parameter. Which
of the two is decided once, when the state is made, and is read off the state ever after. Blocks follow the logical
order of a parameter whatever its memory format, so a checkpoint does not depend on that.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import ArgumentError
from .._formats.codebooks import create_dynamic_map
from .._formats.rules import RULES, Rule
from .._formats.table import FLOAT_DTYPES
from .._native.paged import GlobalPageManager, get_paged, prefetch_tensor
from .._overrides import GlobalOptimManager
from .._quant.optimizer import (
    optimizer_update_8bit_blockwise,
    optimizer_update_32bit,
    scale_to_percentile,
    update_limited,
)
from ._checkpoint import WRAPPER_KEY, CheckpointedOptimizer
from ._many import ManySteps
from ._rounding import new_seed, write_rounded
from ._rules import betas_of, check_hyperparameters, scheduled
from ._sharded import global_norm, global_numel, is_dtensor, is_sharded, local_grad, local_of
from ._variants import accepts_older_keywords, variant_init

__all__ = ["MockArgs", "Optimizer1State", "Optimizer2State", "Optimizer8bit"]

_PAGED_FROM = 100_000  # elements; smaller state is not worth a page table of its own
_CLIPPING_HISTORY = 100  # steps whose gradient norms percentile_clipping remembers

Group = dict[str, Any]


class MockArgs:
    """Settings as attributes: the form in which ``args`` carries what is no group setting."""

    def __init__(self, initial_data: dict[str, Any]) -> None:
        for key, value in initial_data.items():
            setattr(self, key, value)


class Optimizer8bit(CheckpointedOptimizer):
    """Base of all optimizers; steps over parameters and keeps their state. Subclasses make and update the state.

    Every constructor takes ``stochastic_rounding=True`` by keyword: bfloat16 parameters are then rounded up or down at
    random, right on average, so that steps below their last place count. The seed is part of the checkpoint. In several
    processes it is the first one's, hence all of them must make the optimizer.

    ``class X(Family, bits=8, paged=True, hides=(...), defaults={...}, requires={...})`` declares a variant: see
    :func:`bitsandbytes.optim._variants.variant_init`.
    """

    _FSDP_WRAPPED_QUANT_STATE_KEY = WRAPPER_KEY
    _rule_name = ""
    _percentile_clipping = 100
    _stochastic_rounding = False
    _state_bits = 8
    _needs_every_part = False  # steps on an empty part of a parameter too, because processes work together

    initialized: bool
    is_paged: bool
    args: Any
    optimizer_name: str
    name2qmap: dict[str, Tensor]

    def __init_subclass__(
        cls,
        rule: str | None = None,
        bits: int | None = None,
        paged: bool | None = None,
        hides: Sequence[str] = (),
        defaults: dict[str, Any] | None = None,
        requires: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init_subclass__(**kwargs)
        if rule is not None:
            cls._rule_name = rule
        storage = {"optim_bits": bits, "is_paged": paged}
        fixed = {name: value for name, value in storage.items() if value is not None}
        if fixed or hides or defaults or requires:
            init = variant_init(cls, fixed, hides, defaults or {}, requires or {})
            cls.__init__ = init  # type: ignore[method-assign]

    def __init__(
        self, params: Iterable[Any], defaults: dict[str, Any], optim_bits: int = 32, is_paged: bool = False
    ) -> None:
        check_hyperparameters(defaults)
        super().__init__(params, defaults)
        self.initialized = False
        self.name2qmap = {}
        self.is_paged = is_paged
        self._attach()
        self.non_castable_tensor_keys = {
            *("qmap1", "qmap2", "max1", "max2", "new_max1", "new_max2"),
            *("state1", "state2", "gnorm_vec", "absmax1", "absmax2", "unorm_vec"),
        }
        if optim_bits == self._state_bits:
            self.fill_qmap()

    def _attach(self) -> None:
        """What belongs to the process and is therefore no part of a pickle."""
        self.page_mng = GlobalPageManager.get_instance()
        self.mng = GlobalOptimManager.get_instance()
        self._many = ManySteps(self.__dict__.get("_many"))

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters; settings it does not have are the optimizer's defaults.

        Raises:
            ValueError: a setting is negative, infinite or NaN, or a beta lies outside [0, 1).
        """
        if isinstance(param_group, dict):
            check_hyperparameters({**self.defaults, **param_group})
            if self._stochastic_rounding and param_group.get("rounding_seed") is None:
                param_group["rounding_seed"] = new_seed()
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True

        rest = self._many.step(self)
        if rest is None:  # no launch for many: all of them, one by one
            groups = enumerate(self.param_groups)
            rest = [
                (gindex, pindex, p) for gindex, group in groups for pindex, p in enumerate(group["params"])
            ]
        for gindex, pindex, p in rest:
            if p.grad is None:
                continue
            group = self.param_groups[gindex]
            if not self.state.get(p):
                self.init_state(group, p, gindex, pindex)
            self.prefetch_state(p)
            self.update_step(group, p, gindex, pindex)
        if (
            self.is_paged and sys.platform == "win32"
        ):  # where the host may not touch pages that the device works on
            self._wait_for_pages()
        return loss

    def init_state(self, group: Group, p: Tensor, gindex: int, pindex: int) -> None:
        """Make the state of ``p``, at its first step."""
        raise NotImplementedError(f"{type(self).__name__} must define init_state")

    def update_step(self, group: Group, p: Tensor, gindex: int, pindex: int) -> None:
        """Take one step on ``p``, which has a gradient and state."""
        raise NotImplementedError(f"{type(self).__name__} must define update_step")

    def check_overrides(self) -> None:
        """Look up the parameters that modules registered settings for.

        Raises:
            AttributeError: a registered module has no attribute of the registered name.
            AssertionError: that attribute is None.
        """
        positions = {
            id(p): (gindex, pindex)
            for gindex, group in enumerate(self.param_groups)
            for pindex, p in enumerate(group["params"])
        }
        self.mng.resolve_modules(positions)

    def get_config(self, gindex: int, pindex: int, group: Group) -> dict[str, Any]:
        """The settings of one parameter: its group's, the optimizer's ``args``, then its own overrides."""
        config = {key: group[key] for key in ("betas", "eps", "weight_decay", "lr")}
        config["alpha"] = group.get("alpha", 0.0)
        config["t_alpha"] = group.get("t_alpha")
        config["t_beta3"] = group.get("t_beta3")
        for key in ("optim_bits", "min_8bit_size", "max_unorm", "skip_zeros"):
            config[key] = getattr(self.args, key)
        config["percentile_clipping"] = getattr(self.args, "percentile_clipping", 100)
        config["rounding_seed"] = group.get("rounding_seed")
        config.update(self.mng.config_of(group["params"][pindex], (gindex, pindex)) or {})
        return config

    def fill_qmap(self) -> None:
        """Make the maps that 8-bit state is encoded with: signed for state1, unsigned for state2."""
        self.name2qmap["dynamic"] = create_dynamic_map(signed=True)
        self.name2qmap["udynamic"] = create_dynamic_map(signed=False)

    def _map_on(self, name: str, device: torch.device) -> Tensor:
        """The named map on ``device``: one tensor for all parameters there."""
        if name not in self.name2qmap:
            self.fill_qmap()
        if self.name2qmap[name].device != device:
            self.name2qmap[name] = self.name2qmap[name].to(device)
        return self.name2qmap[name]

    def to_gpu(self) -> None:
        """Move state to its parameter's accelerator. Paged state, and that of parameters on the CPU, stays."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.device.type == "cpu":
                    continue
                state = self.state.get(p, {})
                for key, value in state.items():
                    if isinstance(value, Tensor) and not getattr(value, "is_paged", False):
                        state[key] = value.to(p.device)

    def get_state_buffer(self, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros shaped like ``p``; pageable memory if the optimizer is paged and ``p`` large enough."""
        return self._buffer(p, self._state_shape(p, dtype), dtype)

    def _buffer(self, p: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self.is_paged and p.device.type == "cpu":
            self._warn_not_paged("parameters on the CPU have nothing to page to")
        elif self.is_paged and p.numel() >= _PAGED_FROM:
            try:
                buffer = get_paged(*shape, dtype=dtype, device=p.device)
            except (RuntimeError, NotImplementedError) as error:
                self._warn_not_paged(str(error))
            else:
                buffer.zero_()
                self.page_mng.register(buffer)
                return buffer
        return torch.zeros(tuple(shape), dtype=dtype, device=p.device)

    def _warn_not_paged(self, reason: str) -> None:
        if not getattr(self, "_warned_not_paged", False):
            self._warned_not_paged = True
            warnings.warn(
                f"{type(self).__name__}: optimizer state is kept in ordinary memory instead of paged memory: {reason}",
                stacklevel=2,
            )

    def prefetch_state(self, p: Tensor) -> None:
        """Start moving paged state of ``p`` to its device, if the optimizer is paged."""
        if self.is_paged:
            for key in ("state1", "state2"):
                value = self.state[p].get(key)
                if getattr(value, "is_paged", False):
                    prefetch_tensor(value)

    def _settle(self) -> None:
        """Before state is read: the counts of steps that only the device knows, and pages it may still write to."""
        self._many.refresh_steps(self)
        if self.is_paged:
            self._wait_for_pages()

    def _wait_for_pages(self) -> None:
        devices = {p.device for group in self.param_groups for p in group["params"] if p.device.type != "cpu"}
        for device in devices:
            torch.accelerator.synchronize(device)


class _RuleOptimizer(Optimizer8bit):
    """State and update of an optimizer that is one of the rules the update operators know."""

    def _configure(
        self,
        optimizer_name: str,
        params: Iterable[Any],
        defaults: dict[str, Any],
        optim_bits: int,
        args: Any,
        settings: dict[str, Any],
        is_paged: bool,
    ) -> None:
        for key in ("min_8bit_size", "max_unorm"):
            if not settings[key] >= 0:
                raise ValueError(f"Invalid {key}: {settings[key]} (must be at least 0)")
        if args is None:
            args = MockArgs(
                {"optim_bits": optim_bits, "percentile_clipping": self._percentile_clipping, **settings}
            )
        Optimizer8bit.__init__(self, params, defaults, optim_bits, is_paged)
        self.args = args
        self.optimizer_name = optimizer_name

    @property
    def _rule(self) -> Rule:
        return RULES[self.optimizer_name]

    @torch.no_grad()
    def init_state(self, group: Group, p: Tensor, gindex: int, pindex: int) -> None:
        """Make the state of ``p``: 8-bit if asked for and ``p`` has at least ``min_8bit_size`` elements.

        Raises:
            NotImplementedError: ``optim_bits`` is neither 8 nor 32.
        """
        _check_parameter(p)
        config = self.get_config(gindex, pindex, group)
        if config["optim_bits"] not in (self._state_bits, 32):
            raise NotImplementedError(
                f"optim_bits must be {self._state_bits} or 32, got {config['optim_bits']}"
            )
        numel, coded = global_numel(p), config["optim_bits"] == self._state_bits
        if numel is None and coded:
            self._warn_size_unknown()
        is_8bit = coded and (numel is None or numel >= config["min_8bit_size"])
        parameter, p = p, local_of(p)
        dtype = torch.uint8 if is_8bit else torch.float32
        blocks = -(p.numel() // -self._blocksize)
        zeros = torch.zeros

        state: dict[str, Any] = {"step": 0, "state1": self._state1_buffer(p, dtype)}
        if is_8bit:
            shape = (blocks,) if self._rule.averages == 1 else (self._rule.averages, blocks)
            state["qmap1"] = self._map_on("dynamic", p.device)
            state["absmax1"] = zeros(shape, dtype=torch.float32, device=p.device)
        if self._rule.states == 2:
            state["state2"] = self.get_state_buffer(p, dtype=dtype)
            if is_8bit:
                state["qmap2"] = self._map_on("udynamic", p.device)
                state["absmax2"] = zeros((blocks,), dtype=torch.float32, device=p.device)
        if config["percentile_clipping"] < 100:
            state["gnorm_vec"] = zeros((_CLIPPING_HISTORY,), dtype=torch.float32, device=p.device)
        if config["max_unorm"] > 0.0:
            state["unorm_vec"] = zeros((1,), dtype=torch.float32, device=p.device)
        self.state[parameter].update(state)

    def _warn_size_unknown(self) -> None:
        if not getattr(self, "_warned_size_unknown", False):
            self._warned_size_unknown = True
            warnings.warn(
                f"{type(self).__name__}: FSDP1 hides how large parameters are, so all of them get 8-bit state whatever "
                "min_8bit_size says; call bitsandbytes.optim.record_sizes(model) before the first step",
                stacklevel=2,
            )

    def _state1_buffer(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        return self.get_state_buffer(p, dtype=dtype)

    @torch.no_grad()
    def update_step(self, group: Group, p: Tensor, gindex: int, pindex: int) -> None:
        """One step on ``p`` in place; its strides stay. Mixed dtypes and float64 are computed in float32.

        Raises:
            ValueError: ``p`` or its gradient has a dtype or layout there is no rule for (also a ``RuntimeError``).
        """
        _check_parameter(p)
        state, config = self.state[p], self.get_config(gindex, pindex, group)
        step = state["step"] + 1
        betas = config["betas"]
        alpha, beta3 = scheduled(betas, config["alpha"], config["t_alpha"], config["t_beta3"], step)
        seed = config["rounding_seed"] if p.dtype == torch.bfloat16 else None
        g, target = _operands(p, exact=seed is not None)
        owner, p = p, local_of(p)
        before = target.clone() if p.dtype == torch.float64 else None

        gnorm_scale = 1.0
        if config["percentile_clipping"] < 100 and "gnorm_vec" in state:
            gnorm_scale = float(
                scale_to_percentile(owner.grad, state["gnorm_vec"], step, config["percentile_clipping"])[2]  # type: ignore[arg-type]
            )
        scalars = {
            "beta1": betas[0],
            "beta2": betas[1],
            "beta3": beta3,
            "alpha": alpha,
            "eps": config["eps"],
            "weight_decay": config["weight_decay"],
            "step": step,
            "lr": float(config["lr"]),
            "gnorm_scale": gnorm_scale,
        }
        if config["max_unorm"] > 0.0 and is_sharded(owner):
            self._update_limited(owner, g, target, state, scalars, config)
        elif target.numel() or self._needs_every_part:
            self._update(g, target, state, scalars, config["max_unorm"], config["skip_zeros"])
        state["step"] = step
        if seed is not None:
            write_rounded(owner, p, target, seed, pindex, step)
        elif before is not None:
            p.add_((target - before).double())
        elif target.data_ptr() != p.data_ptr():
            p.copy_(target)

    def _update_limited(
        self, owner: Tensor, g: Tensor, p: Tensor, state: Group, scalars: Group, config: Group
    ) -> None:
        """The limit is one on the whole tensor's update, so all processes add up their parts, empty ones too."""
        if not is_dtensor(owner):
            raise NotImplementedError(
                f"{type(self).__name__} needs the norm of whole parameters, which FSDP1 does not give; use fully_shard"
            )
        state.setdefault("unorm_vec", torch.zeros(1, dtype=torch.float32, device=p.device))
        norm = functools.partial(global_norm, p=owner)
        update_limited(
            self.optimizer_name, g, p, state, config["max_unorm"], scalars, config["skip_zeros"], norm
        )

    def _update(
        self,
        g: Tensor,
        p: Tensor,
        state: dict[str, Any],
        scalars: dict[str, Any],
        max_unorm: float,
        skip_zeros: bool,
    ) -> None:
        """Run the update that fits the state, whatever the settings say now."""
        name, state2 = self.optimizer_name, state.get("state2")
        if max_unorm > 0.0 and "unorm_vec" not in state:  # asked for after the state was made
            state["unorm_vec"] = torch.zeros(1, dtype=torch.float32, device=p.device)
        if state["state1"].dtype == torch.float32:
            optimizer_update_32bit(
                name,
                g,
                p,
                state["state1"],
                state2=state2,
                unorm_vec=state.get("unorm_vec"),
                max_unorm=max_unorm,
                skip_zeros=skip_zeros,
                **scalars,
            )
            return
        if max_unorm > 0.0:
            update_limited(name, g, p, state, max_unorm, scalars, skip_zeros)
            return
        optimizer_update_8bit_blockwise(
            name,
            g,
            p,
            state["state1"],
            state2,
            qmap1=state["qmap1"],
            qmap2=state.get("qmap2"),
            absmax1=state["absmax1"],
            absmax2=state.get("absmax2"),
            skip_zeros=skip_zeros,
            **scalars,
        )


class Optimizer2State(_RuleOptimizer):
    """Base of the optimizers with two states: a signed average of gradients and an average of their squares."""

    @accepts_older_keywords
    def __init__(
        self,
        optimizer_name: str,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: Sequence[float] | str = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
        alpha: float = 0.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
    ) -> None:
        if isinstance(betas, str):
            betas = betas_of(betas)
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults.update(alpha=alpha, t_alpha=t_alpha, t_beta3=t_beta3)
        settings = {"min_8bit_size": min_8bit_size, "max_unorm": max_unorm, "skip_zeros": skip_zeros}
        self._configure(optimizer_name, params, defaults, optim_bits, args, settings, is_paged)


class Optimizer1State(_RuleOptimizer):
    """Base of the optimizers with one state."""

    @accepts_older_keywords
    def __init__(
        self,
        optimizer_name: str,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: Sequence[float] = (0.9, 0.0),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        settings = {"min_8bit_size": min_8bit_size, "max_unorm": max_unorm, "skip_zeros": skip_zeros}
        self._configure(optimizer_name, params, defaults, optim_bits, args, settings, is_paged)


def _check_parameter(p: Tensor) -> None:
    """Raise for parameters and gradients that no rule is defined for."""
    allowed = (*FLOAT_DTYPES, torch.float64)
    for name, tensor in (("parameter", p), ("gradient", p.grad)):
        if tensor is None:
            continue
        if tensor.layout != torch.strided:
            raise ArgumentError(
                f"the {name} must be dense, got layout {tensor.layout}; torch.optim.SparseAdam takes sparse gradients"
            )
        if tensor.dtype not in allowed:
            raise ArgumentError(
                f"the {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}"
            )


def _operands(p: Tensor, exact: bool = False) -> tuple[Tensor, Tensor]:
    """``(gradient, parameter)`` as the operators take them: one float dtype, contiguous.

    The parameter itself where that is possible, a copy otherwise; the caller writes a copy back. ``exact`` asks for
    float32, hence copies.
    """
    assert p.grad is not None
    p, grad = local_of(p.detach()), local_grad(p)
    native = p.dtype == grad.dtype and p.dtype in FLOAT_DTYPES and not exact
    dtype = p.dtype if native else torch.float32
    target = p.detach().to(dtype).contiguous()
    return grad.detach().to(dtype).contiguous(), target


for _public in (MockArgs, Optimizer8bit, Optimizer1State, Optimizer2State):
    _public.__module__ = "bitsandbytes.optim.optimizer"  # the import path users and pickles know
