"""8-bit block-wise quantization: nearest entry of any map, one absmax per block, nested statistics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import oracles
from bitsandbytes import functional as F
from oracles import FLOAT_DTYPES, assert_same_bytes, assert_same_codes, dynamic_map, golden
from shapes import LAYOUTS, TENSOR_SHAPES, block_edges, in_layout

ANY_BLOCKSIZE = [64, 128, 256, 512, 1024, 2048, 4096]


def assert_matches_oracle(values: torch.Tensor, blocksize: int, code: torch.Tensor | None = None) -> None:
    """Codes, statistics and the decoded values, bit for bit."""
    codes, state = F.quantize_blockwise(values, code=code, blocksize=blocksize)

    expected, absmax = oracles.quantize_blockwise(values, dynamic_map() if code is None else code, blocksize)
    assert_same_codes(codes.cpu(), expected)
    assert_same_bytes(state.absmax, absmax)

    decoded = F.dequantize_blockwise(codes, state)
    assert_same_bytes(
        decoded, oracles.dequantize_blockwise(expected, absmax, state.code, blocksize, values.dtype)
    )
    assert decoded.device == values.device


# --- published vectors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocksize", [64, 256, 1024, 4096])
@pytest.mark.parametrize("sign", ["signed", "unsigned"])
def test_published_codes(device, sign, blocksize):
    arrays = golden("quant8bit")
    values = arrays["x" if sign == "signed" else "x_pos"].to(device)
    code = F.create_dynamic_map(signed=sign == "signed")

    codes, state = F.quantize_blockwise(values, code=code, blocksize=blocksize)

    assert_same_codes(codes.cpu(), arrays[f"{sign}.bs{blocksize}.codes"])
    assert torch.equal(state.absmax.cpu(), arrays[f"{sign}.bs{blocksize}.absmax"])
    if blocksize in (64, 4096):
        assert_same_bytes(F.dequantize_blockwise(codes, state), arrays[f"{sign}.bs{blocksize}.dequant"])


def test_published_nested_codes(device):
    arrays = golden("quant8bit")

    codes, state = F.quantize_blockwise(arrays["x"].to(device), blocksize=64, nested=True)

    assert_same_codes(codes.cpu(), arrays["nested64.codes"])
    assert torch.allclose(state.offset.cpu(), arrays["nested64.offset"], rtol=1e-6, atol=0)
    assert state.offset.dim() == 0
    assert state.state2.blocksize == 64
    if torch.equal(state.offset.cpu(), arrays["nested64.offset"]):
        assert_same_codes(state.absmax.cpu(), arrays["nested64.absmax_u8"])
        assert_same_bytes(state.state2.absmax, arrays["nested64.nested_absmax"])
        assert_same_bytes(F.dequantize_blockwise(codes, state), arrays["nested64.dequant"])
    else:
        torch.testing.assert_close(F.dequantize_blockwise(codes, state).cpu(), arrays["nested64.dequant"])


def test_published_special_values(device):
    arrays = golden("quant8bit")

    codes, state = F.quantize_blockwise(arrays["special.x"].to(device), blocksize=4096)

    assert_same_codes(codes.cpu(), arrays["special.codes"])
    assert torch.equal(state.absmax.cpu(), arrays["special.absmax"])


# --- against the oracle ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", ANY_BLOCKSIZE)
def test_edges_of_blocks(device, blocksize, dtype):
    for count in block_edges(blocksize):
        assert_matches_oracle(torch.randn(count, device=device, dtype=dtype), blocksize)


@pytest.mark.parametrize("shape", TENSOR_SHAPES, ids=str)
def test_shapes(device, shape):
    assert_matches_oracle(torch.randn(shape, device=device), 256)


@given(
    count=st.integers(1, 1500),
    blocksize=st.sampled_from([64, 256, 512]),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_odd_sizes_and_magnitudes(device, count, blocksize, seed, data):
    exponent = data.draw(st.integers(-30, 30))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent

    assert_matches_oracle(values.to(dtype).to(device), blocksize)


@pytest.mark.parametrize("blocksize", [1, 3, 100, 8192])
def test_any_positive_blocksize_on_the_cpu(blocksize):
    assert_matches_oracle(torch.randn(250), blocksize)


@pytest.mark.parametrize(
    "make",
    [F.create_linear_map, lambda: F.create_fp8_map(True, 4, 3, 8), lambda: F.create_dynamic_map(False)],
)
def test_any_ascending_map(device, make):
    code = make().sort().values

    assert_matches_oracle(torch.randn(300, device=device), 64, code=code)


def test_map_moves_to_the_tensors_device(device):
    codes, state = F.quantize_blockwise(torch.randn(100, device=device), code=dynamic_map())

    assert codes.device.type == state.code.device.type == device


def test_state_holds_a_copy_of_the_map():
    code = F.create_dynamic_map()

    _, state = F.quantize_blockwise(torch.randn(10), code=code)
    code.zero_()

    assert state.code[255].item() == 1.0
    F.quantize_blockwise(torch.randn(10))[1].code.zero_()
    assert F.name2qmap["dynamic"][255].item() == 1.0


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_state_describes_the_tensor(device, dtype):
    values = torch.randn(3, 100, device=device, dtype=dtype)

    codes, state = F.quantize_blockwise(values, blocksize=64)

    assert codes.dtype == torch.uint8 and codes.shape == values.shape
    assert state.absmax.shape == (5,) and state.absmax.dtype == torch.float32
    assert (state.blocksize, state.dtype) == (64, dtype)
    assert state.shape is None and state.quant_type is None and not state.nested
    assert F.dequantize_blockwise(codes, state).dtype == dtype


# --- special values --------------------------------------------------------------------------------------------


def test_zero_is_exact(device):
    values = torch.tensor([1.0, 0.0, -0.0, -1.0], device=device)

    codes, state = F.quantize_blockwise(values)

    assert codes.tolist()[1:3] == [127, 127]
    assert F.dequantize_blockwise(codes, state)[1:3].tolist() == [0.0, 0.0]


def test_block_of_zeros_decodes_to_zeros(device):
    values = torch.cat([torch.zeros(64), torch.randn(64), torch.zeros(10)]).to(device)

    codes, state = F.quantize_blockwise(values, blocksize=64)

    assert codes[:64].unique().tolist() == [127]
    assert state.absmax[0].item() == 0.0
    decoded = F.dequantize_blockwise(codes, state)
    assert (decoded[:64] == 0).all() and (decoded[-10:] == 0).all()


@pytest.mark.parametrize("count", [64, 40])
def test_nan_spoils_its_own_block_only(device, count):
    values = torch.randn(64 + count, device=device)
    values[64 + 3] = torch.nan

    codes, state = F.quantize_blockwise(values, blocksize=64)
    decoded = F.dequantize_blockwise(codes, state)

    assert decoded[:64].isfinite().all()
    assert state.absmax[1].isnan()
    assert decoded[64:].isnan().all()
    assert (codes[64:] == 255).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_infinity_does_not_leave_its_block(device, sign):
    values = torch.randn(128, device=device)
    values[70] = sign * torch.inf

    codes, state = F.quantize_blockwise(values, blocksize=64)
    decoded = F.dequantize_blockwise(codes, state)

    assert state.absmax[1].item() == torch.inf
    assert decoded[:64].isfinite().all()
    assert not decoded[70].isfinite()


def test_denormals_and_largest_values(device):
    tiny, huge = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    for scale in (tiny, tiny / 1024, huge / 8):
        values = (torch.rand(130) * 2 - 1) * scale
        assert_matches_oracle(values.to(device), 64)


def test_ties_take_the_lower_entry(device):
    code = dynamic_map()
    middle = (code[:-1] + code[1:]) / 2
    values = torch.cat([torch.ones(1), middle])

    codes, _ = F.quantize_blockwise(values.to(device), blocksize=512)

    assert codes[1:].tolist() == list(range(255))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)], ids=str)
def test_empty(device, shape):
    codes, state = F.quantize_blockwise(torch.empty(shape, device=device))

    assert codes.shape == shape and state.absmax.shape == (0,)
    assert F.dequantize_blockwise(codes, state).shape == shape


# --- layouts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(7, 96), (3, 5, 7)], ids=str)
def test_layout_does_not_matter(device, shape, layout):
    values = torch.randn(shape, device=device)
    expected, _ = F.quantize_blockwise(values, blocksize=64)

    codes, state = F.quantize_blockwise(in_layout(layout, values), blocksize=64)

    assert torch.equal(codes, expected)
    assert torch.equal(
        F.dequantize_blockwise(in_layout(layout, codes), state), F.dequantize_blockwise(codes, state)
    )


def test_expanded_input(device):
    values = torch.randn(1, 96, device=device).expand(5, 96)

    assert_matches_oracle(values, 64)


def test_input_is_left_alone(device):
    values = torch.randn(200, device=device)
    before = values.clone()

    F.quantize_blockwise(values, blocksize=64, nested=True)

    assert torch.equal(values, before)


def test_quantizing_a_parameter_keeps_no_graph(device):
    parameter = torch.nn.Parameter(torch.randn(64, 64, device=device))

    codes, state = F.quantize_blockwise(parameter, blocksize=64, nested=True)

    assert not any(x.requires_grad for x in (codes, state.absmax, state.offset, state.state2.absmax))


# --- preallocated results --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["plain", "strided"])
def test_results_go_where_the_caller_wants_them(device, layout):
    values = torch.randn(6, 50, device=device)
    expected, state = F.quantize_blockwise(values, blocksize=64)
    wide = torch.full((6, 100), 99, dtype=torch.uint8, device=device)
    out = torch.full_like(expected, 99) if layout == "plain" else wide[:, ::2]
    absmax = torch.full((5,), torch.nan, device=device)

    codes, given = F.quantize_blockwise(values, absmax=absmax, out=out, blocksize=64)

    assert codes is out and given.absmax is absmax
    assert torch.equal(out, expected)
    assert torch.equal(absmax, state.absmax)
    if layout == "strided":
        assert (wide[:, 1::2] == 99).all()


@pytest.mark.parametrize("wanted", ["out", "absmax", "both"])
def test_codes_are_written_where_the_caller_wants_them_without_a_copy(device, wanted):
    """No tensor as large as the codes is made beside the caller's."""
    values = torch.randn(64, 100, device=device)
    expected, state = F.quantize_blockwise(values, blocksize=64)
    targets = {
        "out": torch.full((6400,), 99, dtype=torch.uint8, device=device),  # as many elements in another shape
        "absmax": torch.full((100,), torch.nan, device=device),
    }
    targets = targets if wanted == "both" else {wanted: targets[wanted]}
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Watch():
        codes, found = F.quantize_blockwise(values, blocksize=64, **targets)

    assert "copy_" not in made
    assert codes is targets.get("out", codes) and found.absmax is targets.get("absmax", found.absmax)
    assert torch.equal(codes.view(64, 100), expected) and torch.equal(found.absmax, state.absmax)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["plain", "strided", "transposed"])
def test_decoding_into_the_callers_tensor(device, layout, dtype):
    values = torch.randn(6, 50, device=device, dtype=dtype)
    codes, state = F.quantize_blockwise(values, blocksize=64)
    expected = F.dequantize_blockwise(codes, state)
    poisoned = torch.full_like(values, torch.nan)
    out = poisoned if layout == "plain" else in_layout(layout, poisoned)

    result = F.dequantize_blockwise(codes, state, out=out)

    assert result is out
    assert torch.equal(out, expected)


def test_decoding_without_a_state(device):
    codes, state = F.quantize_blockwise(torch.randn(300, device=device, dtype=torch.float16), blocksize=64)

    decoded = F.dequantize_blockwise(codes, absmax=state.absmax, code=state.code, blocksize=64)

    assert decoded.dtype == torch.float32
    assert torch.equal(decoded.half(), F.dequantize_blockwise(codes, state))
    assert torch.equal(decoded, F.dequantize_blockwise(codes, absmax=state.absmax, blocksize=64))


def test_the_state_wins_over_other_arguments(device):
    codes, state = F.quantize_blockwise(torch.randn(300, device=device), blocksize=64)

    decoded = F.dequantize_blockwise(
        codes, state, absmax=torch.zeros(1, device=device), code=torch.zeros(256), blocksize=4096, nested=True
    )

    assert torch.equal(decoded, F.dequantize_blockwise(codes, state))


# --- nested statistics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocksize", [64, 256])
def test_nested_statistics_use_the_same_blocksize(device, blocksize):
    values = torch.randn(blocksize * 70 + 5, device=device)

    codes, state = F.quantize_blockwise(values, blocksize=blocksize, nested=True)

    plain, plain_state = F.quantize_blockwise(values, blocksize=blocksize)
    assert torch.equal(codes, plain)
    assert state.nested and state.absmax.dtype == torch.uint8
    torch.testing.assert_close(state.offset, plain_state.absmax.mean(), rtol=1e-6, atol=0)
    expected, absmax2 = oracles.quantize_blockwise(
        plain_state.absmax - state.offset, dynamic_map(), blocksize
    )
    assert_same_codes(state.absmax.cpu(), expected)
    assert_same_bytes(state.state2.absmax, absmax2)
    restored = oracles.expand_nested(expected, absmax2, dynamic_map(), state.offset, blocksize)
    assert_same_bytes(
        F.dequantize_blockwise(codes, state),
        oracles.dequantize_blockwise(codes, restored, dynamic_map(), blocksize, torch.float32),
    )


# --- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocksize", [0, -1, -64])
def test_blocksize_must_be_positive(device, blocksize):
    with pytest.raises(ValueError, match="blocksize must be positive"):
        F.quantize_blockwise(torch.ones(4, device=device), blocksize=blocksize)
    codes, state = F.quantize_blockwise(torch.ones(4, device=device))
    state.blocksize = blocksize
    with pytest.raises(ValueError, match="blocksize must be positive"):
        F.dequantize_blockwise(codes, state)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int32, torch.uint8, torch.bool, torch.complex64], ids=str
)
def test_input_dtype_is_named(device, dtype):
    if dtype == torch.float64 and device == "mps":
        pytest.skip("mps has no float64")
    with pytest.raises(ValueError, match=rf"only supports 16/32-bit floats.*{dtype}"):
        F.quantize_blockwise(torch.ones(4, device=device).to(dtype))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.int64], ids=str)
def test_codes_must_be_uint8(device, dtype):
    _, state = F.quantize_blockwise(torch.ones(4, device=device))

    with pytest.raises(ValueError, match="A must be uint8"):
        F.dequantize_blockwise(torch.zeros(4, dtype=dtype, device=device), state)


def test_decoding_needs_statistics(device):
    with pytest.raises(ValueError, match="requires either quant_state or absmax"):
        F.dequantize_blockwise(torch.zeros(4, dtype=torch.uint8, device=device))


@pytest.mark.parametrize("entries", [0, 16, 255, 257])
def test_map_needs_256_entries(device, entries):
    with pytest.raises(ValueError, match="code must have 256 entries"):
        F.quantize_blockwise(torch.ones(4, device=device), code=torch.linspace(-1, 1, entries))


def test_map_must_be_float32(device):
    with pytest.raises(ValueError, match="code must be float32"):
        F.quantize_blockwise(torch.ones(4, device=device), code=dynamic_map().half())


def test_too_few_statistics_are_named(device):
    codes, state = F.quantize_blockwise(torch.ones(200, device=device), blocksize=64)

    with pytest.raises(ValueError, match="absmax must have at least 4 values"):
        F.dequantize_blockwise(codes, absmax=state.absmax[:3], blocksize=64)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (lambda n, d: torch.empty(n - 1, dtype=torch.uint8, device=d), "out"),
        (lambda n, d: torch.empty(n, dtype=torch.int8, device=d), "out"),
    ],
    ids=["size", "dtype"],
)
def test_out_that_does_not_fit_is_named(device, out, message):
    with pytest.raises(ValueError, match=message):
        F.quantize_blockwise(torch.ones(100, device=device), out=out(100, device))


def test_out_that_does_not_fit_the_decoded_values_is_named(device):
    codes, state = F.quantize_blockwise(torch.ones(100, device=device))

    with pytest.raises(ValueError, match=r"Expected out.shape"):
        F.dequantize_blockwise(codes, state, out=torch.empty(99, device=device))
    with pytest.raises(ValueError, match=r"Expected out.dtype"):
        F.dequantize_blockwise(codes, state, out=torch.empty(100, device=device, dtype=torch.float16))


def test_tensors_on_two_devices_are_refused(accelerators):
    if not accelerators:
        pytest.skip("needs a device beside the CPU")
    codes, state = F.quantize_blockwise(torch.ones(100))
    with pytest.raises(ValueError, match=r"absmax must be on the same device"):
        F.dequantize_blockwise(codes.to(accelerators[0]), state)


# --- accuracy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", ANY_BLOCKSIZE)
def test_mean_error_of_normal_values(device, blocksize, nested, dtype):
    values = torch.randn(1024, 1024, device=device).to(dtype)

    codes, state = F.quantize_blockwise(values, blocksize=blocksize, nested=nested)
    error = (F.dequantize_blockwise(codes, state).float() - values.float()).abs()

    assert error.mean() < 0.011
    assert (error / (values.float().abs() + 1e-8)).mean() < 0.018


@pytest.mark.parametrize(("signed", "absolute", "relative"), [(True, 0.0036, 0.015), (False, 0.0023, 0.012)])
@pytest.mark.parametrize("blocksize", [64, 4096])
def test_mean_error_of_uniform_values(device, blocksize, signed, absolute, relative):
    values = torch.rand(1024, 1024, device=device)

    codes, state = F.quantize_blockwise(values, code=F.create_dynamic_map(signed=signed), blocksize=blocksize)
    error = (F.dequantize_blockwise(codes, state) - values).abs()

    assert error.mean() < absolute
    assert (error / (values + 1e-8)).mean() < relative


@pytest.mark.parametrize("blocksize", [64, 4096])
def test_no_value_is_off_by_more_than_half_a_gap(device, blocksize):
    values = torch.randn(10_000, device=device)

    codes, state = F.quantize_blockwise(values, blocksize=blocksize)

    bound = oracles.quantization_bound(state.absmax, blocksize, values.numel(), state.code, values.dtype)
    assert ((F.dequantize_blockwise(codes, state) - values).abs().cpu() <= bound).all()
