"""Calling an ``Operator`` is calling the torch operator: the same results, and nobody who watches misses a call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bitsandbytes import nn
from bitsandbytes._ops import OPERATORS
from oracles import assert_same_bytes
from processes import run_python
from samples import OPERATOR_NAMES, samples

DEQUANT = torch.ops.bitsandbytes.int8_vectorwise_dequant


def _arguments() -> tuple[Tensor, Tensor]:
    return torch.randint(-127, 128, (3, 8), dtype=torch.int8), torch.rand(3)


def _call(*args: Tensor) -> Tensor:
    return OPERATORS["int8_vectorwise_dequant"](*args)


def _goes_direct(*args: object, name: str = "int8_vectorwise_dequant") -> bool:
    return OPERATORS[name]._direct_kernel(args) is not None


def _tensors(values: object) -> list[Tensor]:
    return [x for x in (values if isinstance(values, tuple) else (values,)) if isinstance(x, Tensor)]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_a_direct_call_gives_the_same_results(device, name, grad):
    direct = 0
    for arguments in samples(name, device):
        arguments = OPERATORS[name]._complete(arguments)
        theirs = tuple(x.clone() if isinstance(x, Tensor) else x for x in arguments)
        direct += _goes_direct(*arguments, name=name)

        with torch.set_grad_enabled(grad):
            mine = OPERATORS[name](*arguments)
        other = getattr(torch.ops.bitsandbytes, name)(*theirs)

        pairs = zip(_tensors(mine) + _tensors(arguments), _tensors(other) + _tensors(theirs), strict=True)
        for one, expected in pairs:
            assert one.stride() == expected.stride() or one.numel() == 0
            assert_same_bytes(one, expected)
    assert direct > 0


def _shortcut(name: str, device: str):
    """Whether the device's shortcut takes a call of these arguments."""
    operator = OPERATORS[name]
    take, name = operator._shortcuts.get(device == "cpu", (None, ""))
    if not name.endswith(f"/{device.upper()}"):
        pytest.skip("no native library for it is built")
    return lambda *arguments: take(*operator._complete(arguments)) is not None


def test_a_small_product_takes_the_shortcut_unless_a_tensor_is_special(device):
    takes_it = _shortcut("gemm_4bit", device)
    packed, bias = (
        torch.randint(256, (64, 1), dtype=torch.uint8, device=device),
        torch.randn(2, device=device),
    )
    A, rest = torch.randn(3, 64, device=device), ([2, 64], torch.rand(2, device=device), 64, "nf4")

    assert takes_it(A, packed, *rest, bias) and takes_it(A, nn.Params4bit(packed), *rest)
    assert not takes_it(A.expand(2000, 3, 64).contiguous(), packed, *rest)  # so many rows are decoded for
    assert not takes_it(A.new_empty(64, 3).t(), packed, *rest)
    assert not takes_it(torch._neg_view(A), packed, *rest)
    assert not takes_it(A, packed, *rest, bias.as_subclass(type("Watched", (Tensor,), {})))
    assert not takes_it(A, packed.to("meta"), *rest)
    assert not takes_it(A, packed, *rest, bias.to("meta"))


def test_a_small_int8_layer_takes_the_shortcut_unless_a_tensor_is_special(device):
    takes_it = _shortcut("int8_linear", device)
    A, CB, SCB, bias = torch.randn(1, 8), torch.ones(2, 8, dtype=torch.int8), torch.rand(2), torch.randn(2)
    A, CB, SCB, bias = (x.to(device) for x in (A, CB, SCB, bias))

    assert takes_it(A, CB, SCB) and takes_it(A, CB, SCB, bias.half(), 6.0)
    if device == "cpu":
        assert not takes_it(A.expand(5, 100, 8).contiguous(), CB, SCB)  # too many rows to be small
    assert not takes_it(A.new_empty(8, 2).t(), CB, SCB)
    assert not takes_it(A.double(), CB, SCB)
    assert not takes_it(torch._neg_view(A), CB, SCB)
    assert not takes_it(A, CB.to("meta"), SCB)
    assert not takes_it(A, CB, SCB, bias.as_subclass(type("Watched", (Tensor,), {})))


def test_a_direct_call_checks_its_arguments():
    codes, stats = _arguments()

    with pytest.raises(ValueError, match="stats must have one value for each of A's 3 rows"):
        _call(codes, stats[:2])


def test_a_call_that_lacks_an_argument_gets_the_error_of_torch():
    codes, _ = _arguments()

    with pytest.raises(RuntimeError, match="missing value for argument 'stats'"):
        _call(codes)


def test_a_dispatch_mode_sees_the_operator():
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[object] = []
    with Recorder():
        _call(*_arguments())

    assert DEQUANT.default in seen


def test_a_function_mode_sees_the_operator():
    class Recorder(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[object] = []
    with Recorder():
        _call(*_arguments())

    assert any(func in (DEQUANT, DEQUANT.default) for func in seen)


def test_a_subclass_sees_the_operator():
    class Recorder(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    seen: list[object] = []
    codes, stats = _arguments()
    _call(codes.as_subclass(Recorder), stats)

    assert any(func in (DEQUANT, DEQUANT.default) for func in seen)


def test_a_profile_shows_the_operator():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _call(*_arguments())

    assert "bitsandbytes::int8_vectorwise_dequant" in [event.key for event in profile.key_averages()]


def test_a_trace_records_the_operator():
    codes, stats = _arguments()
    traced = torch.jit.trace(_call, (codes, stats))

    assert "bitsandbytes::int8_vectorwise_dequant" in str(traced.graph)
    assert torch.equal(traced(codes.flip(0), stats), _call(codes.flip(0), stats))


def test_a_compiled_graph_contains_the_operator():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    codes, stats = _arguments()
    compiled = torch.compile(_call, fullgraph=True, backend=backend)

    assert torch.equal(compiled(codes, stats), _call(codes, stats))
    assert any("int8_vectorwise_dequant" in str(node.target) for node in graphs[0].graph.nodes)


def test_vmap_and_gradients_are_left_to_torch():
    codes, stats = _arguments()
    went_direct = []

    torch.func.vmap(lambda x: went_direct.append(_goes_direct(x, stats)) or x)(codes)
    went_direct.append(_goes_direct(codes, stats.requires_grad_()))
    with torch.no_grad():
        assert _goes_direct(codes, stats)

    assert went_direct == [False, False]


def test_a_lazily_negated_tensor_is_negated():
    codes, stats = _arguments()
    negated = torch._neg_view(stats)

    assert torch.equal(_call(codes, negated), _call(codes, -stats))


def test_parameters_of_quantized_layers_are_plain():
    four, eight = nn.Params4bit(torch.randn(8, 64)).to("cpu"), nn.Int8Params(torch.randn(8, 64)).to("cpu")

    assert _goes_direct(four, torch.rand(8), 64, "fp4", [8, 64], torch.float32, name="dequantize_4bit")
    assert _goes_direct(eight, eight.SCB)


def test_a_kernel_that_a_third_party_registered_is_used():
    done = run_python(
        """
        import torch, bitsandbytes
        from bitsandbytes._ops import OPERATORS

        arguments = torch.ones(2, 4, dtype=torch.int8), torch.ones(2)
        ours = OPERATORS["int8_vectorwise_dequant"](*arguments)

        @torch.library.register_kernel("bitsandbytes::int8_vectorwise_dequant", "cpu")
        def theirs(A, stats):
            return torch.full(A.shape, 42.0)

        print(OPERATORS["int8_vectorwise_dequant"](*arguments).unique().tolist(), ours.unique().numel())
        """
    )

    assert done.stdout.split() == ["[42.0]", "1"]
