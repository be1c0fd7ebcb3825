"""What an operator is: a schema, one function that checks and says what the results look like, and kernels.

That function runs first in every eager call, is the shape function under tracing, and guards the ``.out`` overload
(which takes one tensor for each result), so checks and shapes exist once. A backend supplies the filling alone.

torch drops trailing arguments that equal their defaults before it calls a Python kernel; ``Operator`` puts them back
from the check's signature, so a filling function never states a default.

Calling an ``Operator`` is calling ``torch.ops.bitsandbytes.<name>``, which costs about 7 us more than the kernel: torch
converts every argument twice. Where nothing could tell the difference the call therefore goes to the kernel itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import register_fake

from ._checks import ArgumentError

__all__ = ["OPERATORS", "PLAIN_TENSORS", "Operator", "Result", "all_plain", "operator", "plain_parameter"]

_LIBRARY = torch.library.Library("bitsandbytes", "FRAGMENT")
_DISPATCH_KEYS = {"default": "CompositeExplicitAutograd"}

OPERATORS: dict[str, Operator] = {}

# What a direct call may be given. Other subclasses of Tensor may want to see the operator themselves.
PLAIN_TENSORS: set[type] = {Tensor, torch.nn.Parameter}

# "<namespace>/<operator>/<key>" of the kernels that torch.library registered: a third party's, not ours.
_FOREIGN_KERNELS: set[str] | None = getattr(torch.library, "_impls", None)


def _observers() -> tuple[Callable[[], Any], ...]:
    """Questions that are all answered by something false when nobody watches operators; never, if torch lacks one."""
    questions = (
        (torch._C, "_len_torch_dispatch_stack"),  # tracing, fake tensors, counting
        (torch._C, "_len_torch_function_stack"),  # overridden functions, a default device
        (torch._C, "_is_tracing"),  # torch.jit.trace
        (getattr(torch._C, "_functorch", None), "peek_interpreter_stack"),  # vmap, grad
        (torch.autograd, "_profiler_enabled"),  # operators have names in a profile
    )
    if _FOREIGN_KERNELS is None or not all(hasattr(owner, name) for owner, name in questions):
        return tuple(lambda: True for _ in questions)
    return tuple(getattr(owner, name) for owner, name in questions)


# Found once, since a call of a small layer is mostly look-ups. A subclass pays two microseconds for each attribute
# unless its functions are disabled.
_modes, _functions, _tracing, _transforms, _profiling = _observers()
_is_compiling, _records_gradients = torch.compiler.is_compiling, torch.is_grad_enabled
_without_functions = torch._C.DisableTorchFunctionSubclass


def plain_parameter(cls: type) -> type:
    """Class decorator: this subclass of Tensor holds plain memory and overrides nothing that operators do."""
    PLAIN_TENSORS.add(cls)
    return cls


def _unobserved() -> bool:
    """Whether nobody would see that a call did not go through torch's dispatcher."""
    return not (_modes() or _functions() or _tracing() or _transforms() or _profiling())


def _plain(values: Sequence[Any], grad: bool) -> bool:
    """Whether tensors, or lists of them, are what a kernel reads as it is; with ``grad`` none may require it."""
    for value in values:
        if value is None:
            continue
        kind = type(value)
        if kind in PLAIN_TENSORS:
            if (
                grad and value.requires_grad
            ) or value.is_neg():  # the dispatcher negates what is lazily negative
                return False
        elif not (kind is list or kind is tuple) or not all_plain(value, grad):
            return False
    return True


def all_plain(values: Sequence[Any], grad: bool) -> bool:
    """Whether a kernel may read all these tensors as they are; with ``grad`` none may require it.

    An optimizer's lists are long, so what can be asked of all at once is.
    """
    if not PLAIN_TENSORS.issuperset(map(type, values)):
        return _plain(values, grad)
    return not (any(map(Tensor.is_neg, values)) or (grad and any(value.requires_grad for value in values)))


def _implement(name: str, kernel: Callable, key: str) -> None:
    """Register a kernel that a third party may replace by registering another, as newer torch allows by itself."""
    _LIBRARY.impl(name, kernel, key)
    getattr(torch.library, "_impls", set()).discard(f"bitsandbytes/{name}/{key}")


class Result(NamedTuple):
    """Shape and dtype of one result; its device is that of the operator's first tensor."""

    shape: Sequence[int]
    dtype: torch.dtype


class Operator:
    """One operator: its schema, its check, and the kernels that backends registered.

    ``check`` takes the schema's arguments and returns a :class:`Result`, a tuple of them, or None for an operator
    that works in place. A kernel takes the same arguments followed by one contiguous tensor for each result, and
    fills those. Where sizes depend on data, ``fake`` replaces the shape function and kernels return their results.
    """

    def __init__(self, schema: str, check: Callable, fake: Callable | None, out: Sequence[str]) -> None:
        self.schema = schema
        self.name = schema[: schema.index("(")]
        self.check = check
        self.kernels: dict[str, Callable] = {}
        self._direct: dict[str, tuple[Callable | None, frozenset[str]]] = {}
        # Of the CPU, and of the other device that has one: the function, and the name that a third party takes.
        self._shortcuts: dict[object, tuple[Callable, str]] = {}
        self._returns = fake is not None
        parameters = list(inspect.signature(check).parameters.values())
        self._arity = len(parameters)
        self._defaults = tuple(p.default for p in parameters)
        self._position_of_tensor = next(i for i, p in enumerate(parameters) if p.annotation == "Tensor")
        arguments = schema[schema.index("(") + 1 : schema.rindex(") ->")]
        self._tensor_positions = [
            i for i, text in enumerate(arguments.split(", ")) if text.startswith("Tensor")
        ]
        several = len(self._tensor_positions) > 1  # of one position itemgetter makes no tuple
        self._tensors: Callable[[tuple], Sequence[Any]] = (
            itemgetter(*self._tensor_positions) if several else lambda args: [args[self._position_of_tensor]]
        )
        self._outs = tuple(out)

        _LIBRARY.define(schema)
        register_fake(f"bitsandbytes::{self.name}", fake or self._fake, lib=_LIBRARY)
        if out:
            targets = ", ".join(f"Tensor! {name}" for name in out)
            _LIBRARY.define(f"{self.name}.out({arguments}, {targets}) -> ()")
            register_fake(f"bitsandbytes::{self.name}.out", self._fake_out, lib=_LIBRARY)
        self._packet = getattr(torch.ops.bitsandbytes, self.name)

    def __call__(self, *args: Any) -> Any:
        """``torch.ops.bitsandbytes.<name>(*args)``, past torch's dispatcher where that makes no difference."""
        if _is_compiling():
            return self._packet(*args)
        with _without_functions():
            if (
                self._shortcuts
                and len(args) == self._arity
                and (found := self._shortcuts.get(getattr(args[self._position_of_tensor], "is_cpu", None)))
                and not _records_gradients()
                # As _unobserved, less a frame.
                and not (_modes() or _functions() or _tracing() or _transforms() or _profiling())
                and found[1] not in _FOREIGN_KERNELS  # type: ignore[operator]
                and (result := found[0](*args)) is not None
            ):
                return result
            direct = self._direct_kernel(args)
            if direct is not None:
                return direct(*args)
        return self._packet(*args)

    def call_knowing(self, plain: Collection[int], *args: Any) -> Any:
        """As a call; of the lists at the positions ``plain`` it is known that :func:`all_plain` holds without grad."""
        if _is_compiling() or _records_gradients():
            return self(*args)
        with _without_functions():
            direct = self._direct_kernel(args, [i for i in self._tensor_positions if i not in plain])
            if direct is not None:
                return direct(*args)
        return self._packet(*args)

    def _direct_kernel(self, args: tuple, unknown: Sequence[int] | None = None) -> Callable | None:
        """The kernel that the dispatcher would find; None where it has to be asked, of tensors at ``unknown`` or all."""
        if not _unobserved():
            return None
        if len(args) < self._arity:
            args = self._complete(args)
        tensors = self._tensors(args) if unknown is None else [args[i] for i in unknown]
        if not _plain(tensors, _records_gradients()):
            return None
        first = args[self._position_of_tensor]
        device = "cpu" if first.is_cpu else first.device.type  # an attribute is quicker than a device object
        if device not in self._direct:
            self._direct[device] = self._find_kernel(device)
        kernel, names = self._direct[device]
        return kernel if names.isdisjoint(_FOREIGN_KERNELS) else None  # type: ignore[arg-type]

    def _find_kernel(self, device: str) -> tuple[Callable | None, frozenset[str]]:
        """Our kernel for a device type, and the names under which a third party would have replaced it."""
        own = self.kernels.get(device)
        fill = self.kernels.get("default") if own is None else own
        keys = (device.upper(), _DISPATCH_KEYS["default"]) if own is None else (device.upper(),)
        names = frozenset(f"bitsandbytes/{self.name}/{key}" for key in keys)
        if fill is None or device == "meta":
            return None, names
        return self._eager(fill, self._allocate_beside), names

    def shortcut(self, device: str, take: Callable) -> None:
        """Register what does a whole call on a device type, of all arguments: check, allocate and fill, in few frames.

        It returns None unless tensors are on the device, of ``PLAIN_TENSORS``, none is lazily negative, and ``check``
        would pass; then the call goes the long way, which knows what to raise. Asked only where no gradient is recorded.
        One device type besides the CPU may have one.
        """
        self._shortcuts[device == "cpu"] = take, f"bitsandbytes/{self.name}/{device.upper()}"

    def kernel(self, device: str) -> Callable[[Callable], Callable]:
        """Register the filling for a device type; ``"default"`` serves every device that has none of its own."""

        def register(fill: Callable) -> Callable:
            self.kernels[device] = fill
            self._direct.clear()
            if self._shortcuts.get(device == "cpu", ("", ""))[1].endswith(f"/{device.upper()}"):
                del self._shortcuts[device == "cpu"]  # which was that of another kernel
            key = _DISPATCH_KEYS.get(device, device.upper())
            _implement(self.name, self._eager(fill), key)
            if self._outs:
                _implement(f"{self.name}.out", self._eager_out(fill), key)
            return fill

        return register

    def run_with(self, device: str, *args: Any) -> Any:
        """Run the kernel registered for ``device``, wherever the tensors are. For tests and measurements."""
        return self._eager(self.kernels[device])(*args)

    def _complete(self, args: tuple) -> tuple:
        return args + self._defaults[len(args) :]

    def _allocate(self, args: tuple, results: Any) -> Any:
        if results is None:
            return None
        device = args[self._position_of_tensor].device
        if isinstance(results, Result):
            return torch.empty(results.shape, dtype=results.dtype, device=device)
        return tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in results)

    def _allocate_beside(self, args: tuple, results: Any) -> Any:
        """As :meth:`_allocate` for a plain first tensor; ``new_empty`` of a subclass might be of that subclass."""
        first = args[self._position_of_tensor]
        if isinstance(results, Result):
            shape, dtype = results
            if not shape:
                return first.new_empty(shape, dtype=dtype)
            # Sizes one by one and no dtype are parsed sooner.
            return first.new_empty(*shape) if dtype is first.dtype else first.new_empty(*shape, dtype=dtype)
        if results is None:
            return None
        return tuple(first.new_empty(shape, dtype=dtype) for shape, dtype in results)

    def _fake(self, *args: Any) -> Any:
        args = self._complete(args)
        return self._allocate(args, self.check(*args))

    def _given_outs(self, args: tuple) -> tuple[tuple, tuple[Tensor, ...]]:
        """The inputs of an ``.out`` call, and its targets after their check."""
        inputs, targets = self._complete(args[: -len(self._outs)]), args[-len(self._outs) :]
        results = self.check(*inputs)
        results = (results,) if isinstance(results, Result) else results
        for name, target, result in zip(self._outs, targets, results, strict=True):
            self._check_out(name, target, result, inputs)
        return inputs, targets

    def _fake_out(self, *args: Any) -> None:
        self._given_outs(args)

    def _eager(self, fill: Callable, allocate: Callable | None = None) -> Callable:
        check, complete, arity = self.check, self._complete, self._arity
        allocate = allocate or self._allocate

        if self._returns:

            def run(*args):
                if len(args) < arity:
                    args = complete(args)
                check(*args)
                return fill(*args)

        else:

            def run(*args):
                if len(args) < arity:
                    args = complete(args)
                results = allocate(args, check(*args))
                if results is None:
                    fill(*args)
                elif isinstance(results, tuple):
                    fill(*args, *results)
                else:
                    fill(*args, results)
                return results

        return run

    def _eager_out(self, fill: Callable) -> Callable:
        def run(*args):
            inputs, targets = self._given_outs(args)
            filled = [
                target
                if target.is_contiguous() and not any(_shares_memory(target, x) for x in inputs)
                else torch.empty_like(target, memory_format=torch.contiguous_format)
                for target in targets
            ]
            fill(*inputs, *filled)
            for target, values in zip(targets, filled, strict=True):
                if values is not target:
                    target.copy_(values)

        return run

    def _check_out(self, name: str, out: Tensor, result: Result, inputs: tuple) -> None:
        device = inputs[self._position_of_tensor].device
        if tuple(out.shape) != tuple(result.shape):
            raise ArgumentError(f"Expected {name}.shape == {tuple(result.shape)}, got {tuple(out.shape)}")
        if out.device != device:
            raise ArgumentError(f"Expected {name}.device == {device}, got {out.device}")
        if out.dtype != result.dtype:
            raise ArgumentError(
                f"Expected {name}.dtype == {str(result.dtype).removeprefix('torch.')}, got {out.dtype}"
            )


def _shares_memory(out: Tensor, value: Any) -> bool:
    return (
        isinstance(value, Tensor) and value.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
    )


def operator(
    schema: str, *, out: bool | Sequence[str] = (), fake: Callable | None = None
) -> Callable[[Callable], Operator]:
    """Declare an operator; the decorated function is its check.

    ``out`` defines the ``.out`` overload too, with one argument for each result: their names, or True for "out" alone.
    """
    outs = ("out",) if out is True else out or ()

    def declare(check: Callable) -> Operator:
        declared = Operator(schema, check, fake, outs)
        OPERATORS[declared.name] = declared
        return declared

    return declare
