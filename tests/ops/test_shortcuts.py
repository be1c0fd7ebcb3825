"""What shortcuts remember of calls: whatever makes a call special is noticed after any number that were not."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bitsandbytes import _alike, _ops_shortcuts, nn
from bitsandbytes._native import DTYPE_ID
from bitsandbytes._ops import OPERATORS
from bitsandbytes._ops_shortcuts import fourbit_product, int8_product
from bitsandbytes.backends.cpu import memory
from oracles import assert_same_bytes

pytestmark = pytest.mark.skipif(not DTYPE_ID, reason="needs the native library")
needs_guards = pytest.mark.skipif(_alike._GUARDS is None, reason="this torch has no guards for tensors")

N, K = 4, 128


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(_ops_shortcuts, "_KNOWN", {})


class Watched(Tensor):
    pass


def fourbit_arguments(device: str, nested: bool, bias: bool) -> dict:
    arguments = {
        "A": torch.randn(3, K),
        "B": torch.randint(256, (N * K // 2, 1), dtype=torch.uint8),
        "shapeB": [N, K],
        "absmax": torch.rand(2 if nested else N * K // 64),
        "blocksize": 64,
        "quant_type": "nf4",
        "bias": torch.randn(N) if bias else None,
        "absmax_8bit": torch.randint(256, (N * K // 64,), dtype=torch.uint8) if nested else None,
        "absmax_code": torch.randn(256) if nested else None,
        "absmax_offset": torch.rand(()) if nested else None,
    }
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}


def int8_arguments(device: str, bias: bool) -> dict:
    return {
        "A": torch.randn(3, K, device=device),
        "CB": torch.ones(N, K, dtype=torch.int8, device=device),
        "SCB": torch.rand(N, device=device),
        "bias": torch.randn(N, device=device) if bias else None,
        "threshold": 6.0,
    }


def taken_fourbit(device: str, arguments: dict):
    return fourbit_product(f"is_{device}", *arguments.values())


def taken_int8(device: str, arguments: dict):
    return int8_product(f"is_{device}", *arguments.values())


OF_THE_SAME_SIZE = {torch.uint8: torch.int8, torch.int8: torch.uint8, torch.float32: torch.int32}

SPECIAL = {
    "its dtype": lambda x: x.to(torch.float64),
    "its dtype, of the same size": lambda x: x.view(OF_THE_SAME_SIZE[x.dtype]),
    "its shape": lambda x: x.repeat(*[1] * (x.dim() - 1), 2) if x.dim() else x.repeat(3),
    "its strides": lambda x: torch.stack([x, x], -1)[..., 0],
    "a lazy negation": torch._neg_view,
    "its class": lambda x: x.as_subclass(Watched),
    "its device": lambda x: x.to("meta"),
}

TENSORS = ["A", "B", "absmax", "bias", "absmax_8bit", "absmax_code", "absmax_offset"]
HARMLESS = {  # more than is needed may be there, and one value has any strides
    ("B", "its shape"),
    ("absmax", "its shape"),
    ("absmax_8bit", "its shape"),
    ("absmax_offset", "its strides"),
}


@pytest.mark.parametrize("change", SPECIAL)
@pytest.mark.parametrize("name", TENSORS)
def test_a_special_tensor_is_noticed_after_plain_ones(device, name, change):
    if (name, change) in HARMLESS:
        pytest.skip("is not special")
    arguments = fourbit_arguments(device, nested=True, bias=True)
    assert taken_fourbit(device, arguments) and taken_fourbit(device, arguments)

    arguments[name] = SPECIAL[change](arguments[name])

    assert taken_fourbit(device, arguments) is None


@pytest.mark.parametrize("change", SPECIAL)
@pytest.mark.parametrize("name", ["A", "CB", "SCB", "bias"])
def test_a_special_tensor_of_an_int8_layer_is_noticed_after_plain_ones(device, name, change):
    arguments = int8_arguments(device, bias=True)
    assert taken_int8(device, arguments) and taken_int8(device, arguments)

    arguments[name] = SPECIAL[change](arguments[name])

    assert taken_int8(device, arguments) is None


ELSE = {
    "fewer codes": {"B": torch.zeros(N * K // 2 - 1, 1, dtype=torch.uint8)},
    "fewer scales": {"absmax": torch.zeros(0)},
    "no code": {"absmax_code": None},
    "no offset": {"absmax_offset": None},
    "no nested codes beside their map": {"absmax_8bit": None},
    "a larger weight": {"shapeB": [2 * N, K]},
    "an unknown block size": {"blocksize": 48},
    "a block size in a list": {"blocksize": [64]},
    "an unknown format": {"quant_type": "int3"},
    "three sizes": {"shapeB": [N, K, 1]},
    "no rows": {"A": torch.zeros(0, K)},
    "no dimensions": {"A": torch.zeros(())},
}


@pytest.mark.parametrize("change", ELSE)
def test_whatever_else_is_wrong_is_noticed_too(device, change):
    arguments = fourbit_arguments(device, nested=True, bias=True)
    assert taken_fourbit(device, arguments)

    changed = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in ELSE[change].items()}

    assert taken_fourbit(device, arguments | changed) is None


def test_a_threshold_is_asked_about_in_every_call(device):
    arguments = int8_arguments(device, bias=False)
    assert taken_int8(device, arguments)

    for threshold in (-1.0, float("nan")):
        assert taken_int8(device, arguments | {"threshold": threshold}) is None


@needs_guards
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_a_call_like_an_earlier_one_is_asked_nothing_and_has_addresses_of_its_own(
    device, nested, bias, monkeypatch
):
    taken_fourbit(device, fourbit_arguments(device, nested, bias))
    monkeypatch.setattr(_ops_shortcuts, "_fourbit_kind", None)
    arguments = fourbit_arguments(device, nested, bias)

    product = taken_fourbit(device, arguments)

    order = ("A", "B", "absmax", "absmax_8bit", "absmax_code", "absmax_offset", "bias")
    addresses = [0 if arguments[name] is None else arguments[name].data_ptr() for name in order]
    assert [product[0], *product[2:8]] == addresses
    assert product[8:] == (3, N, K, (3, N), (N, 1))


@needs_guards
@pytest.mark.parametrize("bias", [True, False])
def test_an_int8_layer_like_an_earlier_one_is_asked_nothing(device, bias, monkeypatch):
    first = taken_int8(device, int8_arguments(device, bias))
    monkeypatch.setattr(_ops_shortcuts, "_int8_product", None)

    assert taken_int8(device, int8_arguments(device, bias)) == first


def test_dtypes_of_the_same_shapes_take_turns(device):
    plain, halved = (fourbit_arguments(device, nested=False, bias=True) for _ in range(2))
    halved.update(A=halved["A"].half(), bias=halved["bias"].half())

    for _ in range(2):
        assert taken_fourbit(device, plain)[1] == DTYPE_ID[torch.float32]
        assert taken_fourbit(device, halved)[1] == DTYPE_ID[torch.float16]


def test_no_tensor_is_kept_alive(device):
    arguments = fourbit_arguments(device, nested=True, bias=True)
    assert taken_fourbit(device, arguments)
    references = [weakref.ref(x) for x in arguments.values() if isinstance(x, Tensor)]
    del arguments

    assert not any(reference() is not None for reference in references)


def test_ever_new_shapes_take_no_ever_more_memory(device, monkeypatch):
    monkeypatch.setattr(_ops_shortcuts, "_MOST_KNOWN", 4)
    arguments = fourbit_arguments(device, nested=False, bias=False)

    for rows in range(1, 12):
        assert taken_fourbit(device, arguments | {"A": torch.randn(rows, K, device=device)})

    assert len(_ops_shortcuts._KNOWN) <= 4


def test_without_guards_every_question_is_asked(device, monkeypatch):
    monkeypatch.setattr(_alike, "_GUARDS", None)
    arguments = fourbit_arguments(device, nested=True, bias=True)

    assert taken_fourbit(device, arguments) == taken_fourbit(device, arguments)
    assert taken_fourbit(device, arguments | {"absmax": torch.zeros(0, device=device)}) is None
    assert not _ops_shortcuts._KNOWN


def test_fake_tensors_outside_their_mode_go_the_long_way():
    with FakeTensorMode() as mode:
        pass
    fake = {
        name: mode.from_tensor(x) if isinstance(x, Tensor) else x
        for name, x in fourbit_arguments("cpu", nested=True, bias=True).items()
    }

    assert taken_fourbit("cpu", fake) is None
    assert OPERATORS["gemm_4bit"](*fake.values()).shape == (3, N)


@pytest.mark.parametrize("nested", [True, False])
def test_data_put_under_a_weight_or_its_statistics_counts_from_the_next_call(device, nested):
    layer, other = (
        nn.Linear4bit(K, N, compute_dtype=torch.float32, compress_statistics=nested).to(device)
        for _ in range(2)
    )
    x = torch.randn(1, K, device=device)
    with torch.no_grad():
        layer(x)
        layer.weight.data = other.weight.data.clone()
        state, theirs = layer.weight.quant_state, other.weight.quant_state
        state.absmax.data = theirs.absmax.clone()
        if nested:
            state.state2.absmax.data, state.offset.data = theirs.state2.absmax.clone(), theirs.offset.clone()
        layer.bias.data = other.bias.clone()

        assert_same_bytes(layer(x), other(x))

        layer.weight.data = layer.weight.data[: N * K // 4]
        with pytest.raises(ValueError, match="B must hold at least 256 bytes"):
            layer(x)


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 4), (1, 1, 7), (2, 1, 3, 4)])
def test_memory_for_results_is_that_of_torch(shape):
    strides = torch.empty(shape).stride()
    for inference in (True, False):
        with torch.inference_mode(inference):
            for made in (
                memory.empty(shape, strides, torch.bfloat16),
                memory._of_torch(shape, strides, torch.bfloat16),
            ):
                assert (made.shape, made.stride(), made.dtype) == (shape, strides, torch.bfloat16)
                assert made.device.type == "cpu" and type(made) is Tensor
                assert made.is_inference() is inference and not made.requires_grad


@pytest.mark.parametrize("columns", [1, 7])
def test_a_result_lies_as_torch_would_lay_it(columns):
    for rows in ((), (1,), (3,), (2, 1, 5)):
        A = torch.empty(*rows, 2)

        assert _ops_shortcuts._result(A, columns) == (
            (*rows, columns),
            torch.empty(*rows, columns).stride(),
        )
