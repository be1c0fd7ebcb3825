"""The operators as torch sees them: schemas, shape functions, tracing, and the texts of their errors."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import bitsandbytes
from bitsandbytes._ops import OPERATORS
from samples import OPERATOR_NAMES, OUT_OVERLOADS, samples

SCHEMAS = {
    "quantize_4bit": "(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
    "dequantize_4bit": "(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype) -> Tensor",
    "dequantize_4bit.out": "(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype, "
    "Tensor! out) -> ()",
    "gemm_4bit": "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None, "
    "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor",
    "gemm_4bit_transposed": "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, "
    "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor",
    "gemm_4bit_grouped": "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, "
    "Tensor offsets, Tensor? bias=None, Tensor? absmax_8bit=None, Tensor? absmax_code=None, "
    "Tensor? absmax_offset=None) -> Tensor",
    "gemm_4bit_grouped_transposed": "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, "
    "str quant_type, Tensor offsets, Tensor? absmax_8bit=None, Tensor? absmax_code=None, "
    "Tensor? absmax_offset=None) -> Tensor",
    "gemv_4bit": "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize) -> Tensor",
    "gemv_4bit.out": "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize, Tensor! out) -> ()",
    "quantize_blockwise": "(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)",
    "dequantize_blockwise": "(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor",
    "dequantize_blockwise.out": "(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype, Tensor! out) "
    "-> ()",
    "int8_vectorwise_quant": "(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor?)",
    "int8_vectorwise_dequant": "(Tensor A, Tensor stats) -> Tensor",
    "int8_double_quant": "(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)",
    "int8_linear_matmul": "(Tensor A, Tensor B) -> Tensor",
    "int8_linear_matmul.out": "(Tensor A, Tensor B, Tensor! out) -> ()",
    "int8_mm_dequant": "(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None) "
    "-> Tensor",
    "int8_scaled_mm": "(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, "
    "ScalarType? dtype=None) -> Tensor",
    "int8_mixed_scaled_mm": "(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, "
    "Tensor? bias=None) -> (Tensor, Tensor?)",
    "optimizer_update_32bit": "(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, "
    "Tensor(a3!)? state2, Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, float beta1, float beta2, "
    "float beta3, float alpha, float eps, float weight_decay, int step, float lr, float gnorm_scale, "
    "bool skip_zeros=False) -> ()",
    "optimizer_update_8bit_blockwise": "(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, "
    "Tensor(a3!)? state2, float beta1, float beta2, float beta3, float alpha, float eps, int step, float lr, "
    "Tensor(a4!) qmap1, Tensor(a5!)? qmap2, Tensor(a6!) absmax1, Tensor(a7!)? absmax2, float weight_decay, "
    "float gnorm_scale, bool skip_zeros=False) -> ()",
}

# Results whose size depends on data need dynamo's permission to be traced.
DATA_DEPENDENT = ("int8_vectorwise_quant", "int8_double_quant", "int8_mixed_scaled_mm")


def overload(name: str):
    packet, _, variant = name.partition(".")
    return getattr(getattr(torch.ops.bitsandbytes, packet), variant or "default")


def every_case():
    """``(overload name, index)``: tensors are made when a test runs."""
    cases = []
    for name in OPERATOR_NAMES:
        for variant in ("", ".out") if name in OUT_OVERLOADS else ("",):
            cases += [(f"{name}{variant}", index) for index in range(len(samples(name)))]
    return cases


def sample(name: str, index: int, device: str = "cpu") -> tuple:
    packet = name.removesuffix(".out")
    arguments = samples(packet, device)[index]
    if name.endswith(".out"):
        results = overload(packet)(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        arguments = (*arguments, *map(torch.empty_like, results))
    return arguments


CASES = every_case()
CASE_IDS = [f"{name}-{index}" for name, index in CASES]
# One case per operator and overload for the checks that trace, which cost a second each: the one with most arguments.
LARGEST_CASES = {}
for _name, _index in CASES:
    if _name not in LARGEST_CASES or len(sample(_name, _index)) > len(sample(_name, LARGEST_CASES[_name])):
        LARGEST_CASES[_name] = _index
TRACED = [(name, index) for name, index in CASES if index in (0, LARGEST_CASES[name])]


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_is_the_published_one(name):
    expected = torch._C.parse_schema(f"bitsandbytes::{name}{SCHEMAS[name]}")

    assert str(overload(name)._schema) == str(expected)


def test_every_published_operator_is_declared_and_walked_by_the_tests():
    published = {name.partition(".")[0] for name in SCHEMAS}

    assert published <= set(OPERATORS)
    assert published <= set(OPERATOR_NAMES) <= set(OPERATORS)
    assert {name.removesuffix(".out") for name in SCHEMAS if name.endswith(".out")} <= set(OUT_OVERLOADS)


def test_backends_can_register_through_the_operator_module():
    assert bitsandbytes._ops.register_kernel is torch.library.register_kernel
    assert bitsandbytes._ops.register_fake is torch.library.register_fake


@pytest.mark.parametrize(("name", "index"), CASES, ids=CASE_IDS)
def test_schema_and_shape_function_tell_the_truth(device, name, index):
    arguments = sample(name, index, device)

    torch.library.opcheck(overload(name), arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("name", "index"), TRACED, ids=[f"{n}-{i}" for n, i in TRACED])
def test_opcheck(device, name, index):
    torch.library.opcheck(overload(name), sample(name, index, device))


@pytest.mark.parametrize(("name", "index"), TRACED, ids=[f"{n}-{i}" for n, i in TRACED])
def test_compiles_into_one_graph(device, name, index):
    arguments, expected = sample(name, index, device), sample(name, index, device)
    op = overload(name)
    captured = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
    with captured if name in DATA_DEPENDENT else contextlib.nullcontext():
        torch._dynamo.reset()
        result = torch.compile(lambda *args: op(*args), fullgraph=True, backend="aot_eager")(*arguments)
    plain = op(*expected)

    torch.testing.assert_close(result, plain, equal_nan=True)
    for mutated, wanted in zip(arguments, expected, strict=True):
        if isinstance(mutated, Tensor):
            torch.testing.assert_close(mutated, wanted, equal_nan=True)


def _flat(results) -> list:
    return list(results) if isinstance(results, tuple) else [results]


FIXED_SIZE = [(name, index) for name, index in CASES if name not in DATA_DEPENDENT]


@pytest.mark.parametrize(("name", "index"), FIXED_SIZE, ids=[f"{n}-{i}" for n, i in FIXED_SIZE])
def test_results_on_meta_have_the_real_shapes(name, index):
    arguments = sample(name, index)
    on_meta = tuple(x.to("meta") if isinstance(x, Tensor) else x for x in arguments)

    for real, meta in zip(_flat(overload(name)(*arguments)), _flat(overload(name)(*on_meta)), strict=True):
        if real is None:
            assert meta is None
        else:
            assert meta.device.type == "meta"
            assert (meta.shape, meta.dtype) == (real.shape, real.dtype)
            assert real.is_contiguous()


@pytest.mark.parametrize("name", DATA_DEPENDENT)
def test_sizes_that_depend_on_data_are_symbols_when_traced(name):
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    arguments = next(a for a in samples(name) if len(a) > 1)
    mode = FakeTensorMode(shape_env=ShapeEnv(allow_dynamic_output_shape_ops=True))
    with mode:
        fakes = tuple(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments)
        results = overload(name)(*fakes)
    real = overload(name)(*arguments)

    assert isinstance(results[-1].shape[-1], torch.SymInt)
    assert len(results) == len(real)
    for fake, actual in zip(results, real, strict=True):
        assert (fake.dtype, fake.dim()) == (actual.dtype, actual.dim())


def test_without_a_threshold_there_is_no_list_of_outliers_on_meta():
    assert overload("int8_vectorwise_quant")(torch.ones(2, 4, device="meta"))[2] is None


# --- errors ----------------------------------------------------------------------------------------------------


def u8(*shape):
    return torch.zeros(shape, dtype=torch.uint8)


def i8(*shape):
    return torch.zeros(shape, dtype=torch.int8)


def gemm(
    A=(2, 64),
    B=(1024, 1),
    shapeB=(32, 64),
    absmax=(32,),
    blocksize=64,
    quant_type="nf4",
    *more,
    dtype=torch.float32,
):
    B = B if isinstance(B, Tensor) else u8(*B)
    absmax = absmax if isinstance(absmax, Tensor) else torch.ones(absmax)
    return torch.zeros(A, dtype=dtype), B, list(shapeB), absmax, blocksize, quant_type, *more


CODE = torch.linspace(-1, 1, 256)


def grouped(A=(5, 64), B=(1024, 1), shapeB=(4, 8, 64), absmax=(32,), offsets=(4,), **changed):
    """The arguments of a stack of four experts; ``changed`` replaces what has no shape."""
    made = {
        "A": torch.zeros(A),
        "B": u8(*B),
        "shapeB": list(shapeB),
        "absmax": torch.ones(absmax),
        "blocksize": 64,
        "quant_type": "nf4",
        "offsets": offsets if isinstance(offsets, Tensor) else torch.zeros(offsets, dtype=torch.int32),
    }
    return tuple({**made, **changed}.values())


NESTED = (None, u8(32), CODE, torch.tensor(0.5))


def nested(**changed):
    names = ("bias", "absmax_8bit", "absmax_code", "absmax_offset")
    return gemm(
        (2, 64),
        (1024, 1),
        (32, 64),
        (1,),
        64,
        "nf4",
        *{**dict(zip(names, NESTED, strict=True)), **changed}.values(),
    )


def update_32bit(g, p, state1):
    return (
        "adam",
        g,
        p,
        state1,
        torch.zeros_like(state1),
        None,
        *(0.0, 0.0, 0.9, 0.99, 0.0, 0.0, 1e-8, 0.0, 1, 1e-3, 1.0),
    )


def update_8bit(g, p, state1, qmap1=CODE, absmax1=None):
    absmax1 = torch.zeros(1) if absmax1 is None else absmax1
    return (
        "momentum",
        g,
        p,
        state1,
        None,
        *(0.9, 0.99, 0.0, 0.0, 1e-8, 1, 1e-3),
        qmap1,
        None,
        absmax1,
        None,
        0.0,
        1.0,
    )


X = torch.zeros(64)
ERRORS = [
    ("quantize_4bit", (X, 48, "nf4", torch.uint8), "invalid blocksize 48"),
    ("quantize_4bit", (X, 64, "int4", torch.uint8), "quant_type must be 'nf4' or 'fp4', got 'int4'"),
    (
        "quantize_4bit",
        (X.double(), 64, "nf4", torch.uint8),
        "4bit quantization only supports 16/32-bit floats, but got torch.float64",
    ),
    ("dequantize_4bit", (u8(32, 1), torch.ones(1), 16, "nf4", [64], torch.float32), "invalid blocksize 16"),
    (
        "dequantize_4bit",
        (u8(32, 1), torch.ones(1), 64, "x", [64], torch.float32),
        "quant_type must be 'nf4' or 'fp4', got 'x'",
    ),
    (
        "dequantize_4bit",
        (u8(32, 1), u8(1), 64, "nf4", [64], torch.float32),
        "absmax must be float32, got torch.uint8",
    ),
    (
        "dequantize_4bit",
        (u8(32, 1), torch.ones(1), 64, "nf4", [64], torch.int8),
        "4bit dequantization only supports 16/32-bit floats",
    ),
    (
        "dequantize_4bit",
        (u8(31, 1), torch.ones(1), 64, "nf4", [64], torch.float32),
        "A must hold at least 32 bytes",
    ),
    (
        "dequantize_4bit",
        (u8(32, 1), torch.ones(0), 64, "nf4", [64], torch.float32),
        "absmax must have at least 1 value",
    ),
    (
        "dequantize_4bit.out",
        (u8(32, 1), torch.ones(1), 64, "nf4", [64], torch.float32, torch.zeros(8, 8)),
        "Expected out.shape ==",
    ),
    (
        "dequantize_4bit.out",
        (u8(32, 1), torch.ones(1), 64, "nf4", [64], torch.float32, X.half()),
        "Expected out.dtype ==",
    ),
    ("gemm_4bit", gemm(shapeB=(2048,)), "shapeB must be 2D"),
    ("gemm_4bit", gemm(A=(2, 32)), r"A inner dim \(32\) must match shapeB"),
    ("gemm_4bit", gemm(dtype=torch.float64), "A must be float16, bfloat16, or float32"),
    (
        "gemm_4bit",
        gemm(B=torch.zeros(1024, 1, dtype=torch.int64)),
        "B must be backed by storage of type uint8, bfloat16, float16, or float32",
    ),
    ("gemm_4bit", gemm(blocksize=65), "invalid blocksize 65"),
    ("gemm_4bit", gemm(quant_type="nf8"), "quant_type must be"),
    ("gemm_4bit", gemm(absmax=u8(32)), "absmax must be float32"),
    ("gemm_4bit", nested(absmax_8bit=u8(32, 1)), "absmax_8bit must be 1D"),
    ("gemm_4bit", nested(absmax_8bit=torch.zeros(32)), "absmax_8bit must be uint8"),
    ("gemm_4bit", nested(absmax_code=None), "absmax_code required when absmax_8bit is provided"),
    ("gemm_4bit", nested(absmax_code=CODE[:16]), "absmax_code must have 256 entries"),
    ("gemm_4bit", nested(absmax_code=CODE.half()), "absmax_code must be float32"),
    ("gemm_4bit", nested(absmax_offset=None), "absmax_offset required"),
    ("gemm_4bit", nested(absmax_offset=torch.zeros(3)), "absmax_offset must be 0-dim"),
    (
        "gemm_4bit",
        gemm((2, 64), (1024, 1), (32, 64), (32,), 64, "nf4", torch.zeros(2, 32)),
        "bias must be 1D",
    ),
    (
        "gemm_4bit",
        gemm((2, 64), (1024, 1), (32, 64), (32,), 64, "nf4", torch.zeros(31)),
        r"bias length \(.*\) must match N \(32\)",
    ),
    ("gemm_4bit", gemm((2, 64), (1024, 1), (32, 64), (32,), 64, "nf4", torch.zeros(32).half()), "bias dtype"),
    ("gemm_4bit_grouped", grouped(shapeB=(32, 64)), r"shapeB must be 3D \[E, N, K\], got \[32, 64\]"),
    ("gemm_4bit_grouped", grouped(A=(5, 32)), "A must be 2D with 64 columns"),
    ("gemm_4bit_grouped", grouped(A=(64,)), "A must be 2D with 64 columns"),
    ("gemm_4bit_grouped_transposed", grouped(A=(5, 64)), "A must be 2D with 8 columns"),
    ("gemm_4bit_grouped", grouped(shapeB=(4, 9, 64), B=(1023, 1)), "B must hold at least 1152 bytes"),
    ("gemm_4bit_grouped", grouped(blocksize=1024), r"N \* K = 8 \* 64 is no multiple of blocksize 1024"),
    ("gemm_4bit_grouped", grouped(blocksize=63), "invalid blocksize 63"),
    ("gemm_4bit_grouped", grouped(quant_type="nf8"), "quant_type must be"),
    ("gemm_4bit_grouped", grouped(absmax=(31,)), "absmax must have at least 32 values"),
    ("gemm_4bit_grouped", grouped(offsets=(3,)), "offsets must be 1D with one end for each of the 4 experts"),
    ("gemm_4bit_grouped", grouped(offsets=torch.zeros(4, dtype=torch.int64)), "offsets must be int32"),
    ("gemm_4bit_grouped", (*grouped(), torch.zeros(8)), r"bias must be \[E, N\] = \[4, 8\], got \[8\]"),
    ("gemm_4bit_grouped", (*grouped(), torch.zeros(4, 8).half()), "bias dtype"),
    ("gemm_4bit_grouped", (*grouped(), None, u8(32)), "absmax_code required when absmax_8bit is provided"),
    (
        "gemv_4bit",
        (X.double(), u8(1024, 1), [32, 64], torch.ones(32), CODE[:16], 64),
        "A must be float16, bfloat16, or float32",
    ),
    ("gemv_4bit", (X, u8(1024, 1), [32, 64], torch.ones(32), CODE[:16], 63), "invalid blocksize 63"),
    ("gemv_4bit", (X, i8(1024, 1), [32, 64], torch.ones(32), CODE[:16], 64), "B must be backed by storage"),
    ("gemv_4bit.out", (X, u8(1024, 1), [32, 64], torch.ones(32), CODE[:16], 64, X), "Expected out.shape"),
    (
        "gemv_4bit.out",
        (X, u8(1024, 1), [32, 64], torch.ones(32), CODE[:16], 64, X[:32].half()),
        "Expected out.dtype",
    ),
    ("quantize_blockwise", (X, CODE, 0), "blocksize must be positive, got 0"),
    ("quantize_blockwise", (X.int(), CODE, 64), "Blockwise quantization only supports 16/32-bit floats"),
    ("quantize_blockwise", (X, CODE.half(), 64), "code must be float32"),
    ("dequantize_blockwise", (u8(64), torch.ones(1), CODE, 0, torch.float32), "blocksize must be positive"),
    (
        "dequantize_blockwise",
        (i8(64), torch.ones(1), CODE, 64, torch.float32),
        "A must be uint8, got torch.int8",
    ),
    (
        "dequantize_blockwise",
        (u8(64), torch.ones(1), CODE, 64, torch.float64),
        "only supports 16/32-bit floats",
    ),
    (
        "dequantize_blockwise.out",
        (u8(64), torch.ones(1), CODE, 64, torch.float32, X[1:]),
        "Expected out.shape",
    ),
    (
        "dequantize_blockwise.out",
        (u8(64), torch.ones(1), CODE, 64, torch.float32, X.half()),
        "Expected out.dtype",
    ),
    ("int8_vectorwise_dequant", (X.view(8, 8), X[:8]), "A must be int8"),
    ("int8_vectorwise_quant", (i8(4, 4),), "A must be a floating point tensor"),
    ("int8_double_quant", (i8(4, 4),), "A must be a floating point tensor"),
    ("int8_linear", (i8(4, 4), i8(2, 4), torch.ones(2)), "A must be a floating point tensor"),
    ("int8_linear", (X.view(8, 8), X.view(8, 8), torch.ones(8)), "CB must be int8"),
    ("int8_linear", (X.view(8, 8), i8(2, 9), torch.ones(2)), r"CB must be \[N, 8\], as A's last dimension"),
    ("int8_linear", (X.view(8, 8), i8(2, 8), torch.ones(2).half()), "SCB must be float32"),
    ("int8_linear", (X.view(8, 8), i8(2, 8), torch.ones(3)), "SCB must have 2 values, one a row of CB"),
    ("int8_linear", (X.view(8, 8), i8(2, 8), torch.ones(2), X[:3]), "bias must have 2 values"),
    ("int8_linear", (X.view(8, 8), i8(2, 8), torch.ones(2), None, -1.0), "threshold must be non-negative"),
    ("int8_linear_matmul", (X.view(8, 8), i8(8, 8)), "A must be int8"),
    ("int8_linear_matmul", (i8(8, 8), X.view(8, 8)), "B must be int8"),
    ("int8_linear_matmul", (i8(8, 8), i8(8, 9)), "Inner dimensions do not match"),
    ("int8_linear_matmul.out", (i8(8, 8), i8(8, 8), X.view(8, 8)), "Expected out.dtype == int32"),
    ("int8_linear_matmul.out", (i8(8, 8), i8(8, 8), X.view(4, 16).int()), "Expected out.shape"),
    ("int8_mm_dequant", (X.view(8, 8), X[:8], X[:8]), "A must be int32"),
    ("int8_mm_dequant", (X.view(8, 8).int(), X[:8].half(), X[:8]), "row_stats must be float32"),
    ("int8_mm_dequant", (X.view(8, 8).int(), X[:8], X[:8].half()), "col_stats must be float32"),
    (
        "optimizer_update_32bit",
        update_32bit(X, X[1:].clone(), X.clone()),
        "g and p must have the same number of elements, got 64 and 63",
    ),
    (
        "optimizer_update_32bit",
        update_32bit(X.double(), X.double(), X.clone()),
        "g must be bfloat16, float16, or float32",
    ),
    (
        "optimizer_update_32bit",
        update_32bit(X, X.half(), X.clone()),
        "Expected all tensors to have the same dtype",
    ),
    ("optimizer_update_8bit_blockwise", update_8bit(X, X.clone(), X.clone()), "state1 must be uint8"),
    ("optimizer_update_8bit_blockwise", update_8bit(X, X.clone(), u8(64), CODE.half()), "qmap1.*float32"),
    (
        "optimizer_update_8bit_blockwise",
        update_8bit(X, X.clone(), u8(64), CODE, X[:1].half()),
        "absmax1.*float32",
    ),
]


@pytest.mark.parametrize("where", ["eager", "meta"])
@pytest.mark.parametrize(
    ("name", "arguments", "text"), ERRORS, ids=[f"{i}-{e[0]}" for i, e in enumerate(ERRORS)]
)
def test_bad_arguments_are_named_eagerly_and_when_traced(name, arguments, text, where):
    """One text everywhere; a ValueError by nature, and the RuntimeError torch's operators raise."""
    if where == "meta":
        arguments = tuple(x.to("meta") if isinstance(x, Tensor) else x for x in arguments)

    with pytest.raises(RuntimeError, match=text) as raised:
        overload(name)(*arguments)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize(("name", "arguments", "text"), [error for error in ERRORS if error[0] in OPERATORS])
def test_bad_arguments_are_named_past_the_dispatcher(name, arguments, text):
    """Whatever a call of the ``Operator`` leaves out where no gradient is recorded, it is not a check."""
    operator = OPERATORS[name]
    with torch.no_grad(), pytest.raises(ValueError, match=text):
        operator(*operator._complete(arguments))


def _tensors(arguments: tuple) -> int:
    return sum(isinstance(x, Tensor) for x in arguments)


SEVERAL_TENSORS = {name: max(samples(name), key=_tensors) for name in OPERATOR_NAMES}
SEVERAL_TENSORS = {name: row for name, row in SEVERAL_TENSORS.items() if _tensors(row) > 1}


@pytest.mark.parametrize("name", SEVERAL_TENSORS)
def test_tensors_on_another_device_are_refused(name, device):
    """Every tensor in turn is somewhere else: no kernel may follow its pointer."""
    elsewhere = "meta" if device == "cpu" else "cpu"
    arguments = tuple(x.to(device) if isinstance(x, Tensor) else x for x in SEVERAL_TENSORS[name])
    for position, value in enumerate(arguments):
        if isinstance(value, Tensor):
            mixed = (*arguments[:position], value.to(elsewhere), *arguments[position + 1 :])
            with pytest.raises(ValueError, match="on the same device"):
                overload(name)(*mixed)
            with torch.no_grad(), pytest.raises(ValueError, match="on the same device"):
                OPERATORS[name](*OPERATORS[name]._complete(mixed))
