"""CUDA streams and graphs: operators run on the caller's stream, wait for nothing, and can be captured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitsandbytes._ops import OPERATORS
from samples import OPERATOR_NAMES, samples

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

# Results whose size depends on data have to be waited for.
DATA_DEPENDENT = ("int8_vectorwise_quant", "int8_double_quant", "int8_mixed_scaled_mm")
FIXED_SIZE = [name for name in OPERATOR_NAMES if name not in DATA_DEPENDENT]

_CYCLES = 100_000_000  # keeps a stream busy for some 50 ms


def call(name: str, arguments: tuple):
    """The operator's results, and the arguments it may have written to."""
    results = getattr(torch.ops.bitsandbytes, name)(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    return [x for x in (*results, *arguments) if isinstance(x, Tensor)]


def clones(arguments: tuple) -> tuple:
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in arguments)


def has_own_kernel(name: str) -> bool:
    return "cuda" in OPERATORS[name].kernels


@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_operators_run_on_the_current_stream(name):
    """Inputs that a busy stream has yet to write are read only after it wrote them."""
    arguments = samples(name, "cuda")[0]
    expected = call(name, clones(arguments))
    late = tuple(torch.zeros_like(x) if isinstance(x, Tensor) else x for x in arguments)
    torch.cuda.synchronize()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(_CYCLES)
        for empty, value in zip(late, arguments, strict=True):
            if isinstance(empty, Tensor):
                empty.copy_(value)
        actual = call(name, late)
    stream.synchronize()

    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.parametrize("name", FIXED_SIZE)
def test_own_kernels_do_not_wait_for_the_device(name):
    if not has_own_kernel(name):
        pytest.skip(f"needs a CUDA kernel of {name}")
    arguments = samples(name, "cuda")[0]
    call(name, clones(arguments))
    torch.cuda.synchronize()

    torch.cuda._sleep(_CYCLES)
    call(name, arguments)
    busy = not torch.cuda.current_stream().query()
    torch.cuda.synchronize()

    assert busy


@pytest.mark.parametrize("name", FIXED_SIZE)
def test_own_kernels_can_be_captured_into_a_graph(name):
    if not has_own_kernel(name):
        pytest.skip(f"needs a CUDA kernel of {name}")
    arguments = samples(name, "cuda")[0]
    expected = call(name, clones(arguments))
    held = clones(arguments)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(name, clones(arguments))
    torch.cuda.synchronize()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(name, held)
    for one, value in zip(held, arguments, strict=True):
        if isinstance(one, Tensor):
            one.copy_(value)
    graph.replay()
    torch.cuda.synchronize()

    for one, other in zip(captured, expected, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)
