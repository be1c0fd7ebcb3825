"""The C names of earlier releases: which there are, how they may be called, and that they compute the same."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch

from bitsandbytes import _native, functional as F
from bitsandbytes._native.legacy import legacy_types

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMATS = ("fp4", "nf4")

CPU_SYMBOLS = [
    *(f"cquantize_blockwise_cpu_{t}" for t in FLOATS),
    *(f"cdequantize_blockwise_cpu_{t}" for t in FLOATS),
    *(f"cdequantize_blockwise_cpu_{f}_{t}" for f, t in itertools.product(FORMATS, FLOATS)),
    *(f"gemv_4bit_inference_cpu_{f}_bf16" for f in FORMATS),
    "has_avx512f_cpu",
    "has_avx512bf16_cpu",
]
CUDA_SYMBOLS = [
    *(f"cdequantize_blockwise_{t}{f}" for t, f in itertools.product(FLOATS, ("", "_fp4", "_nf4"))),
    "get_context",
    "cget_managed_ptr",
    "cprefetch",
]
# Names whose kernels this library does not have (yet): probing for them gives a callable that raises.
OTHER_SYMBOLS = [
    *(f"cquantize_blockwise_{t}{f}" for t, f in itertools.product(FLOATS, ("", "_fp4", "_nf4"))),
    *(f"cgemm_4bit_inference_naive_{t}" for t in FLOATS),
    *(f"cgemm_4bit_{t}" for t in FLOATS),
    *(f"c{o}32bit_grad_{t}" for o in ("adam", "lion", "ademamix") for t in FLOATS),
    *(f"c{o}32bit_grad_{b}" for o in ("momentum", "rmsprop", "adagrad") for b in (32, 16)),
    *(
        f"c{o}_8bit_blockwise_grad_{t}"
        for o in ("adam", "momentum", "rmsprop", "adagrad", "lion", "ademamix")
        for t in FLOATS
    ),
    "cigemm",
    "cbatched_igemm",
    "cigemmlt_32",
    "cigemmlt_8",
    "cigemmlt_8_rowscale",
    "cdequant_mm_int32_fp16",
    "cint8_vector_quant",
    "cfill_fp32",
    "cfill_uint8",
    "carange_fp32",
    "c_mul_fp32",
    "cquantize",
    "cdequantize",
]

needs_library = pytest.mark.skipif(_native.ABI is None, reason="no native library is built")
needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and _native.has_native("get_context")),
    reason="needs a CUDA device and library",
)


@pytest.mark.parametrize("name", [*CPU_SYMBOLS, *CUDA_SYMBOLS, *OTHER_SYMBOLS])
def test_probing_never_raises_and_tells_the_truth(name):
    function = getattr(F.lib, name)
    assert legacy_types(name) is not None
    assert hasattr(function, "restype") == _native.has_native(name)
    if _native.has_native(name):
        assert function.argtypes is not None
    else:
        with pytest.raises(RuntimeError, match=name):
            function()


@needs_library
@pytest.mark.parametrize("name", CPU_SYMBOLS)
def test_every_cpu_symbol_is_there(name):
    assert _native.has_native(name)


@needs_library
@pytest.mark.parametrize("name", CUDA_SYMBOLS)
def test_cuda_symbols_come_with_the_cuda_library(name):
    assert _native.has_native(name) == F.lib.bnb_has_cuda()


@needs_library
@pytest.mark.parametrize("style", ["plain integers", "ctypes objects"])
@pytest.mark.parametrize("name", FLOATS)
def test_8bit_on_the_cpu(name, style):
    dtype = FLOATS[name]
    values, code = torch.randn(1000).to(dtype), F.create_dynamic_map()
    expected, state = F.quantize_blockwise(values, blocksize=256)
    codes, absmax, out = torch.empty(1000, dtype=torch.uint8), torch.empty(4), torch.empty(1000, dtype=dtype)
    as_pointer = ctypes.c_void_p if style == "ctypes objects" else int
    as_size = ctypes.c_longlong if style == "ctypes objects" else int

    def pointers(*tensors):
        return [as_pointer(tensor.data_ptr()) for tensor in tensors]

    quantize = getattr(F.lib, f"cquantize_blockwise_cpu_{name}")
    assert quantize(*pointers(code, values, absmax, codes), as_size(256), as_size(1000)) is None
    assert torch.equal(codes, expected) and torch.equal(absmax, state.absmax)

    dequantize = getattr(F.lib, f"cdequantize_blockwise_cpu_{name}")
    dequantize(*pointers(code, codes, absmax, out), as_size(256), as_size(1000))
    assert torch.equal(out, F.dequantize_blockwise(codes, state))


@needs_library
@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("quant_type", FORMATS)
def test_4bit_on_the_cpu(quant_type, name):
    values = torch.randn(7, 96).to(FLOATS[name])
    packed, state = F.quantize_4bit(values, quant_type=quant_type)
    out = torch.empty_like(values)

    dequantize = getattr(F.lib, f"cdequantize_blockwise_cpu_{quant_type}_{name}")
    dequantize(F.get_ptr(packed), F.get_ptr(state.absmax), F.get_ptr(out), 64, 7, 96)

    assert torch.equal(out, F.dequantize_4bit(packed, state))


@needs_library
@pytest.mark.parametrize("quant_type", FORMATS)
def test_product_with_a_weight_in_tiles(quant_type):
    N, K, rows = 64, 256, 3
    weight = torch.randn(N, K, dtype=torch.bfloat16)
    packed, state = F.quantize_4bit(weight, quant_type=quant_type)
    state.absmax = state.absmax.bfloat16().float()  # the tiles keep bfloat16 statistics
    decoded = F.dequantize_4bit(packed, state).float()
    tiles, state = F._convert_weight_packed_for_cpu(packed, state)
    x = torch.randn(rows, K + 8, dtype=torch.bfloat16)[:, :K]
    out = torch.zeros(rows, N + 4, dtype=torch.bfloat16)

    getattr(F.lib, f"gemv_4bit_inference_cpu_{quant_type}_bf16")(
        rows, N, K, F.get_ptr(x), F.get_ptr(tiles), F.get_ptr(state.absmax), F.get_ptr(out), 64, K + 8, N + 4
    )

    expected = x.float() @ decoded.T
    assert (out[:, :N].float() - expected).norm() / expected.norm() < 0.01
    assert not out[:, N:].any()


@needs_library
def test_a_failure_is_raised_although_nothing_is_returned():
    with pytest.raises(ValueError, match="blocksize"):
        F.lib.cdequantize_blockwise_cpu_fp32(None, None, None, None, 0, 0)


@needs_gpu
@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("quant_type", FORMATS)
def test_4bit_on_the_gpu(quant_type, name):
    values = torch.randn(1001, device="cuda").to(FLOATS[name])
    packed, state = F.quantize_4bit(values, quant_type=quant_type)
    out = torch.empty_like(values)

    getattr(F.lib, f"cdequantize_blockwise_{name}_{quant_type}")(
        None, packed.data_ptr(), state.absmax.data_ptr(), out.data_ptr(), 64, 1001, F._get_tensor_stream(out)
    )

    assert torch.equal(out, F.dequantize_4bit(packed, state))


@needs_gpu
@pytest.mark.parametrize("name", FLOATS)
def test_8bit_on_the_gpu(name):
    values = torch.randn(1001, device="cuda").to(FLOATS[name])
    codes, state = F.quantize_blockwise(values, blocksize=256)
    out = torch.empty_like(values)

    getattr(F.lib, f"cdequantize_blockwise_{name}")(
        F.get_ptr(state.code),
        F.get_ptr(codes),
        F.get_ptr(state.absmax),
        F.get_ptr(out),
        ctypes.c_int(256),
        ctypes.c_int(1001),
        F._get_tensor_stream(out),
    )

    assert torch.equal(out, F.dequantize_blockwise(codes, state))
