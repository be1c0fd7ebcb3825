"""The experts of a mixture-of-experts layer, as one stack of weights kept in 4 bits.

A token goes to a few of many experts, so few rows meet each weight and reading the weights is what costs. Tokens are
sorted by expert on the device, all experts multiply in one grouped product, and results go back to their tokens; the
host never learns who went where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .._checks import ArgumentError, check_blocksize
from .._formats.state import QuantState
from .._formats.table import FLOAT_DTYPES
from ..autograd.grouped import grouped_matmul_4bit, rows_of_choices, sort_by_expert
from ._checkpoint import load_4bit, save_state, take_entries
from ._layers import check_format_and_storage, move_with_statistics
from .parametrize import Bnb4bitParametrization, replace_parameter_4bit_prequantized
from .params4bit import Params4bit, quant_state_of

__all__ = ["Experts4bit"]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Experts4bit(nn.Module):
    """``num_experts`` linear maps with one 4-bit weight ``[num_experts, out_features, in_features]``.

    The weight is quantized when the module first moves to a device (the CPU counts), or by :meth:`quantize`.

    Args:
        compute_dtype: dtype of the multiplication; None takes that of each input. Inputs are cast to it, and outputs
            back to the input's.
        compress_statistics: quantize the block statistics as well (0.4 bits a weight less).
        quant_type: "nf4" or "fp4".
        blocksize: values that share one absmax; must divide ``in_features * out_features``.

    ``state_dict`` holds the packed weight and its statistics under the keys of a ``Linear4bit``'s, and loads into
    quantized and unquantized modules alike. ``device="meta"`` builds one without memory, to load a checkpoint into.

    Raises:
        ValueError: an argument is not among what is allowed.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = False,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "nf4",
        blocksize: int = 64,
        device: Any = None,
    ) -> None:
        super().__init__()
        check_format_and_storage(quant_type, torch.uint8)
        check_blocksize(blocksize)
        if compute_dtype is not None and compute_dtype not in FLOAT_DTYPES:
            raise ArgumentError(
                f"compute_dtype must be None or one of {list(FLOAT_DTYPES)}, got {compute_dtype!r}"
            )
        if in_features * out_features % blocksize != 0:
            raise ArgumentError(
                f"in_features * out_features must be a multiple of blocksize {blocksize}, got {in_features} * "
                f"{out_features}"
            )
        self.num_experts = num_experts
        self.in_features = in_features
        self.out_features = out_features
        self.compute_dtype = compute_dtype
        self.quant_state: QuantState | None = None
        self.quant_storage = torch.uint8
        self.weight = Params4bit(
            torch.empty(num_experts, out_features, in_features, device=device),
            requires_grad=False,
            blocksize=blocksize,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            module=self,
        )
        self.bias = nn.Parameter(torch.empty(num_experts, out_features, device=device)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform values as ``nn.Linear`` draws them; a weight that is quantized stays as it is."""
        bound = self.in_features**-0.5 if self.in_features else 0.0
        for parameter in (self.weight if self.quant_state is None else None, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter.data, -bound, bound)

    # --- from and to other forms ---

    @classmethod
    def from_dense(
        cls, weight: Tensor, bias: Tensor | None = None, device: Any = None, **options: Any
    ) -> Experts4bit:
        """Quantize ``weight [E, N, K]`` on ``device``, by default its own; ``bias [E, N]`` is copied.

        ``options`` are the constructor's.

        Raises:
            ValueError: a tensor is of the wrong shape, or an option is not among what is allowed.
        """
        layer = cls._without_memory(weight.shape, "weight", bias, **options)
        device = weight.device if device is None else device
        given = layer.weight
        layer.weight = Params4bit(weight.detach(), **given.__dict__)
        layer.weight.to(device)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(device, copy=True))
        return layer

    @classmethod
    def from_parametrized(
        cls,
        module: nn.Module,
        name: str,
        bias: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> Experts4bit:
        """Take over the parameter ``module.<name>``, ``[E, N, K]``, that ``replace_parameter_4bit`` quantized.

        Nothing is quantized again, and the memory of codes and statistics is shared. ``bias [E, N]`` becomes the
        module's.

        Raises:
            ValueError: the parameter is not quantized, or has another shape.
        """
        held = module.parametrizations[name] if is_parametrized(module, name) else ()
        state = next((p.quant_state for p in held if isinstance(p, Bnb4bitParametrization)), None)
        if state is None:
            raise ArgumentError(
                f"name must be a parameter that replace_parameter_4bit quantized, got {name!r}"
            )
        return cls._from_entries(held.original.data, state.as_dict(packed=True), bias, compute_dtype)

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Any],
        key: str,
        compute_dtype: torch.dtype | None = None,
    ) -> Experts4bit:
        """Build the module that a checkpoint holds under ``key``: an ``Experts4bit``, or a parametrized parameter.

        Of the first also the bias. The checkpoint's tensors are used as they are, wherever they are.

        Raises:
            ValueError: there is no quantized ``[E, N, K]`` under that key.
        """
        weight_key = f"{key}.weight" if f"{key}.weight" in state_dict else key
        if weight_key not in state_dict:
            raise ArgumentError(f"key must be that of experts in state_dict, which has no {key!r}")
        entries = take_entries(dict(state_dict), weight_key)
        bias = None if weight_key == key else state_dict.get(f"{key}.bias")
        return cls._from_entries(state_dict[weight_key], entries, bias, compute_dtype)

    def to_parametrized(self, module: nn.Module, name: str) -> None:
        """Make the weight the parameter ``module.<name>``, as ``replace_parameter_4bit`` would have left it.

        Nothing is quantized again, and the memory of codes and statistics is shared. A parameter or buffer of that name
        is replaced; the bias is left to the caller.

        Raises:
            ValueError: the weight is not quantized yet, or ``module.<name>`` is parametrized already.
        """
        state = self._state()
        if is_parametrized(module, name):
            raise ArgumentError(f"name must not be a parametrized parameter, got {name!r}: remove that first")
        if hasattr(module, name):
            delattr(module, name)
        module.register_parameter(name, nn.Parameter(self.weight.data, requires_grad=False))
        entries = state.as_dict(packed=True)
        replace_parameter_4bit_prequantized(module, name, entries, self.weight.device)

    @classmethod
    def _without_memory(cls, shape: Any, what: str, bias: Tensor | None, **options: Any) -> Experts4bit:
        if shape is None or len(shape) != 3:
            came = None if shape is None else list(shape)
            raise ArgumentError(f"{what} must be 3D [experts, out_features, in_features], got shape {came}")
        E, N, K = shape
        if bias is not None and tuple(bias.shape) != (E, N):
            raise ArgumentError(f"bias must be [{E}, {N}], one row an expert, got {list(bias.shape)}")
        return cls(E, K, N, bias is not None, device="meta", **options)

    @classmethod
    def _from_entries(
        cls,
        packed: Tensor,
        entries: Mapping[str, Any],
        bias: Tensor | None,
        compute_dtype: torch.dtype | None,
    ) -> Experts4bit:
        state = QuantState.from_dict(entries, packed.device)
        layer = cls._without_memory(
            state.shape,
            "the quantized tensor",
            bias,
            compute_dtype=compute_dtype,
            quant_type=state.quant_type,
            blocksize=state.blocksize,
        )
        own = {"weight": packed, **{f"weight.{name}": value for name, value in entries.items()}}
        layer.load_state_dict(own if bias is None else {**own, "bias": bias.detach()}, assign=True)
        return layer

    # --- multiplying ---

    def quantize(self, device: Any = None) -> Experts4bit:
        """Quantize the weight on ``device``, by default where it lies, and move the module there."""
        return self.to(self.weight.device if device is None else device)

    def route(self, experts: Tensor) -> tuple[Tensor, Tensor]:
        """``(order, offsets)``: how choices ``experts`` of any shape are sorted, for :meth:`forward_sorted`.

        ``order`` lists the positions of the flattened choices by expert, and ``offsets [E]`` (int32) where each
        expert's end. Layers that see the same choices need this once. It does not wait for the device.
        """
        if experts.dtype not in _INTEGERS:
            raise ArgumentError(f"experts must be a tensor of integers, got {experts.dtype}")
        # A GPU cannot say without waiting; there, and in a compiled graph, such rows are zero.
        if experts.device.type == "cpu" and experts.numel() and not torch.compiler.is_compiling():
            low, high = (int(value) for value in experts.aminmax())
            if low < 0 or high >= self.num_experts:
                raise IndexError(
                    f"experts must be in 0..{self.num_experts - 1}, got {low if low < 0 else high}"
                )
        return sort_by_expert(experts, self.num_experts)

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """Multiply each token by the experts it chose; gradients reach x and the bias.

        ``x [T, in_features]`` with ``experts [T, top_k]`` gives ``[T, top_k, out_features]``, and with ``experts [T]``
        ``[T, out_features]``; ``x [T, top_k, in_features]`` has an input of its own for each choice. The result has
        x's dtype. An index of no expert is an IndexError on the CPU; a GPU cannot say, and there the row is zero.

        Raises:
            ValueError: the weight is not quantized yet, or a tensor does not fit.
        """
        self._check_input(x, experts)
        dtype, top_k = x.dtype, experts.shape[1] if experts.dim() == 2 else 1
        order, offsets = self.route(experts)
        x = self._cast(x)
        rows = (
            rows_of_choices(x, order, top_k) if x.dim() == 2 else rows_of_choices(x.flatten(0, 1), order, 1)
        )
        results = self._multiply(rows, offsets).to(dtype)
        back = torch.empty_like(results).index_copy_(0, order, results)
        return back.view(*experts.shape, self.out_features)

    def forward_sorted(self, x: Tensor, offsets: Tensor) -> Tensor:
        """``x [R, in_features]``, rows sorted by expert, to ``[R, out_features]`` in x's dtype.

        ``offsets [E]`` (int32) says where each expert's rows end, as for torch's grouped matmul; rows past the last are
        zero. For callers that sort for themselves, or once for several layers with :meth:`route`.
        """
        if not x.is_floating_point() or x.dim() != 2 or x.shape[1] != self.in_features:
            raise ArgumentError(
                f"x must be floating-point [rows, {self.in_features}], got {x.dtype} {list(x.shape)}"
            )
        return self._multiply(self._cast(x), offsets).to(x.dtype)

    def _check_input(self, x: Tensor, experts: Tensor) -> None:
        if not x.is_floating_point():
            raise ArgumentError(f"x must be a floating-point tensor, got {x.dtype}")
        if experts.dim() not in (1, 2):
            raise ArgumentError(f"experts must be [T] or [T, top_k], got shape {list(experts.shape)}")
        if experts.device != x.device:
            raise ArgumentError(f"experts must be on x's device ({x.device}), got {experts.device}")
        shapes = [(experts.shape[0], self.in_features)]
        if experts.dim() == 2:
            shapes.append((*experts.shape, self.in_features))
        if tuple(x.shape) not in shapes:
            allowed = " or ".join(str(list(shape)) for shape in shapes)
            raise ArgumentError(
                f"x must be {allowed} for experts {list(experts.shape)}, got shape {list(x.shape)}"
            )

    def _state(self) -> QuantState:
        state = getattr(self.weight, "quant_state", None)
        if state is None and self.quant_state is not None:
            state = quant_state_of(self)  # a tool replaced the parameter
        if state is None:
            raise ArgumentError(
                "Experts4bit is not quantized: move it to a device first, for example .to('cpu') or .to('cuda')"
            )
        return state

    def _cast(self, x: Tensor) -> Tensor:
        return x if self.compute_dtype is None else x.to(self.compute_dtype)

    def _multiply(self, rows: Tensor, offsets: Tensor) -> Tensor:
        state, bias = self._state(), self.bias
        if bias is not None and bias.dtype != rows.dtype:
            bias = bias.to(rows.dtype)
        return grouped_matmul_4bit(rows, self.weight, state, offsets, bias)

    # --- moving and saving ---

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts4bit:
        move_with_statistics(self, super()._apply, fn, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = getattr(self.weight, "quant_state", None)
        if state is not None:
            save_state(destination, f"{prefix}weight", state, keep_vars)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        shape = (self.num_experts, self.out_features, self.in_features)
        load_4bit(self, super()._load_from_state_dict, shape, None, *arguments)

    def extra_repr(self) -> str:
        weight = self.weight
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, quant_type={getattr(weight, 'quant_type', None)}, "
            f"blocksize={getattr(weight, 'blocksize', None)}, "
            f"nested={bool(getattr(weight, 'compress_statistics', False))}, compute_dtype={self.compute_dtype}, "
            f"quantized={getattr(weight, 'quant_state', None) is not None}"
        )


# Pickles record the public path.
Experts4bit.__module__ = "bitsandbytes.nn.modules"
