"""4-bit quantization: codes and values bit for bit, on every device, for every size, layout and bad argument."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, strategies as st

import oracles
from bitsandbytes import functional as F
from oracles import (
    BLOCKSIZES,
    FLOAT_DTYPES,
    QUANT_TYPES,
    STORAGE_DTYPES,
    as_bytes,
    assert_same_bytes,
    assert_same_codes,
    golden,
)
from shapes import LAYOUTS, TENSOR_SHAPES, block_edges, in_layout


def assert_matches_oracle(values: torch.Tensor, blocksize: int, quant_type: str) -> None:
    """Codes, statistics and the decoded values, bit for bit."""
    packed, state = F.quantize_4bit(values, blocksize=blocksize, quant_type=quant_type)

    expected, absmax = oracles.quantize_4bit(values, blocksize, quant_type)
    assert_same_codes(packed.cpu(), expected)
    assert_same_bytes(state.absmax, absmax)

    decoded = F.dequantize_4bit(packed, state)
    assert decoded.device == values.device
    assert_same_bytes(
        decoded, oracles.dequantize_4bit(expected, absmax, blocksize, quant_type, values.shape, values.dtype)
    )


# --- against the oracle ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_edges_of_blocks(device, quant_type, blocksize, dtype):
    for count in block_edges(blocksize):
        assert_matches_oracle(torch.randn(count, device=device, dtype=dtype), blocksize, quant_type)


@pytest.mark.parametrize("blocksize", [64, 256])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("shape", TENSOR_SHAPES, ids=str)
def test_blocks_run_over_the_flattened_tensor(device, shape, quant_type, blocksize):
    """Rows that end inside a block, of every rank, keep their place."""
    assert_matches_oracle(torch.randn(shape, device=device), blocksize, quant_type)


@given(
    count=st.integers(1, 1200),
    blocksize=st.sampled_from([32, 64, 128, 512]),
    quant_type=st.sampled_from(QUANT_TYPES),
    dtype=st.sampled_from(FLOAT_DTYPES),
    exponent=st.integers(-12, 12),
    seed=st.integers(0, 2**31),
)
def test_odd_sizes_and_magnitudes(device, count, blocksize, quant_type, dtype, exponent, seed):
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent

    assert_matches_oracle(values.to(dtype).to(device), blocksize, quant_type)


@given(
    values=st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=1, max_size=150),
    quant_type=st.sampled_from(QUANT_TYPES),
)
def test_values_chosen_to_be_awkward(device, values, quant_type):
    """Zeros of both signs, subnormals, equal values, the largest finite ones."""
    assert_matches_oracle(torch.tensor(values, dtype=torch.float16, device=device), 32, quant_type)


@pytest.mark.parametrize("n", [1, 65, 129])
def test_tail_block_uses_its_own_absmax(device, n):
    values = torch.full((n,), 2.0, device=device)
    values[-1] = 0.5

    _, state = F.quantize_4bit(values, blocksize=64, quant_type="nf4")

    assert state.absmax.tolist() == [2.0] * (n // 64) + [0.5]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_state_describes_the_tensor(device, quant_type, dtype, nested):
    values = torch.randn(3, 100, device=device, dtype=dtype)

    packed, state = F.quantize_4bit(values, quant_type=quant_type, compress_statistics=nested)

    assert packed.dtype == torch.uint8 and packed.shape == (150, 1) and packed.device.type == device
    assert state.shape == values.shape and isinstance(state.shape, torch.Size)
    assert (state.dtype, state.blocksize, state.quant_type) == (dtype, 64, quant_type)
    assert torch.equal(state.code.cpu(), golden("codebooks")[quant_type])
    assert state.code.device.type == state.absmax.device.type == device
    assert state.absmax.shape == (5,)
    assert state.nested is nested
    if nested:
        assert state.absmax.dtype == torch.uint8
        assert state.offset.dim() == 0 and state.offset.dtype == torch.float32
        assert state.state2.absmax.shape == (1,) and state.state2.blocksize == 256
        assert state.state2.dtype == torch.float32 and state.state2.code.shape == (256,)
    else:
        assert state.absmax.dtype == torch.float32 and state.offset is None


def test_default_format_is_fp4_in_blocks_of_64(device):
    values = torch.randn(100, device=device)

    packed, state = F.quantize_4bit(values)

    assert (state.quant_type, state.blocksize, state.nested) == ("fp4", 64, False)
    for other, other_state in (
        F.quantize_fp4(values),
        F.quantize_4bit(values, blocksize=64, quant_type="fp4"),
    ):
        assert torch.equal(packed, other) and other_state == state


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_named_functions_are_the_general_one(device, quant_type):
    values = torch.randn(33, 32, device=device)
    quantize, dequantize = getattr(F, f"quantize_{quant_type}"), getattr(F, f"dequantize_{quant_type}")
    arguments = {"blocksize": 128, "compress_statistics": True, "quant_storage": torch.bfloat16}

    packed, state = quantize(values, **arguments)
    expected, expected_state = F.quantize_4bit(values, quant_type=quant_type, **arguments)

    assert torch.equal(as_bytes(packed), as_bytes(expected))
    assert state == expected_state
    assert torch.equal(dequantize(packed, state), F.dequantize_4bit(packed, state))


def test_the_state_wins_over_other_arguments(device):
    packed, state = F.quantize_nf4(torch.randn(300, device=device))
    expected = F.dequantize_nf4(packed, state)

    assert torch.equal(F.dequantize_fp4(packed, state), expected)
    assert torch.equal(
        F.dequantize_4bit(packed, state, absmax=torch.zeros(1), blocksize=48, quant_type="none"), expected
    )


# --- orientation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGE_DTYPES, ids=str)
def test_a_packed_row_gives_the_transpose(device, storage):
    values = torch.randn(16, 64, device=device)
    packed, state = F.quantize_4bit(values, quant_type="nf4", quant_storage=storage)

    assert torch.equal(F.dequantize_4bit(packed.t(), state), F.dequantize_4bit(packed, state).t())


@pytest.mark.parametrize("storage", STORAGE_DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_single_packed_element_is_no_row(device, rank, storage):
    """One element is both a row and a column; results keep the state's shape."""
    shape = (1,) * (rank - 1) + (2 * storage.itemsize,)
    values = torch.randn(shape, device=device)

    packed, state = F.quantize_4bit(values, quant_type="nf4", quant_storage=storage)

    assert packed.shape == (1, 1)
    assert F.dequantize_4bit(packed, state).shape == shape


@pytest.mark.parametrize("n", [2, 16, 64, 128])
def test_vectors_stay_vectors(device, n):
    packed, state = F.quantize_4bit(torch.randn(n, device=device), quant_type="nf4")

    assert F.dequantize_4bit(packed, state).shape == (n,)


# --- special values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quant_type", "byte"), [("nf4", 0x77), ("fp4", 0x00)])
@pytest.mark.parametrize("n", [64, 40, 104])
def test_zeros(device, n, quant_type, byte):
    packed, state = F.quantize_4bit(torch.zeros(n, device=device), quant_type=quant_type)

    assert packed.unique().tolist() == [byte]
    tail = [torch.tensor(1e-38).item()] if n % 64 else []
    assert state.absmax.tolist() == [0.0] * (n // 64) + tail
    assert (F.dequantize_4bit(packed, state) == 0).all()


@pytest.mark.parametrize(("quant_type", "highest"), [("nf4", 15), ("fp4", 3)])
@pytest.mark.parametrize("count", [64, 40])
def test_nan_spoils_its_own_block_only(device, count, quant_type, highest):
    values = torch.randn(64 + count, device=device)
    values[64 + 3] = torch.nan

    packed, state = F.quantize_4bit(values, quant_type=quant_type)
    decoded = F.dequantize_4bit(packed, state)

    assert decoded[:64].isfinite().all()
    assert state.absmax[1].isnan()
    assert decoded[64:].isnan().all()
    assert (oracles.unpack(packed.cpu(), values.numel())[64:] == highest).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_infinity_does_not_leave_its_block(device, quant_type, sign):
    values = torch.randn(192, device=device)
    values[70] = sign * torch.inf

    packed, state = F.quantize_4bit(values, quant_type=quant_type)
    decoded = F.dequantize_4bit(packed, state)

    assert state.absmax[1].item() == torch.inf
    assert decoded[:64].isfinite().all() and decoded[128:].isfinite().all()
    assert not decoded[70].isfinite()
    assert_matches_oracle(values, 64, quant_type)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_denormals_and_largest_values(device, quant_type):
    tiny, huge = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    for scale in (tiny, tiny / 1024, huge / 8):
        assert_matches_oracle(((torch.rand(130) * 2 - 1) * scale).to(device), 64, quant_type)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(0,), (0, 64), (64, 0)], ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_empty(device, quant_type, shape, nested):
    packed, state = F.quantize_4bit(
        torch.empty(shape, device=device), quant_type=quant_type, compress_statistics=nested
    )

    assert packed.shape == (0, 1) and state.absmax.shape == (0,)
    assert F.dequantize_4bit(packed, state).shape == shape


# --- layouts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(7, 96), (3, 5, 7), (64,)], ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_layout_does_not_matter(device, quant_type, shape, layout):
    values = torch.randn(shape, device=device)
    expected, expected_state = F.quantize_4bit(values, quant_type=quant_type)

    packed, state = F.quantize_4bit(in_layout(layout, values), quant_type=quant_type)

    assert torch.equal(packed, expected) and state == expected_state
    assert torch.equal(F.dequantize_4bit(packed, state), F.dequantize_4bit(expected, expected_state))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_expanded_input(device, quant_type):
    assert_matches_oracle(torch.randn(1, 96, device=device).expand(5, 96), 64, quant_type)
    assert_matches_oracle(torch.randn((), device=device).expand(70), 64, quant_type)


@pytest.mark.parametrize("layout", ["strided", "offset", "row_gaps"])
def test_layout_of_the_packed_bytes_does_not_matter(device, layout):
    packed, state = F.quantize_4bit(torch.randn(33, 40, device=device), quant_type="nf4")

    assert torch.equal(F.dequantize_4bit(in_layout(layout, packed), state), F.dequantize_4bit(packed, state))
    assert torch.equal(F.dequantize_4bit(packed.view(-1), state), F.dequantize_4bit(packed, state))


def test_a_byte_aligned_slice_of_a_larger_buffer_decodes(device):
    packed, state = F.quantize_4bit(torch.randn(33, 40, device=device), quant_type="nf4")
    buffer = torch.cat([packed.new_full((5, 1), 0xAB), packed, packed.new_full((9, 1), 0xCD)])

    assert torch.equal(
        F.dequantize_4bit(buffer[5 : 5 + packed.shape[0]], state), F.dequantize_4bit(packed, state)
    )


def test_input_is_left_alone(device):
    values = torch.randn(200, device=device)
    before = values.clone()

    F.quantize_4bit(values, compress_statistics=True)

    assert torch.equal(values, before)


def test_quantizing_a_parameter_keeps_no_graph(device):
    """A state with a graph would keep the parameter alive and could not be copied."""
    parameter = torch.nn.Parameter(torch.randn(64, 64, device=device))

    packed, state = F.quantize_4bit(parameter, quant_type="nf4", compress_statistics=True)

    tensors = (packed, state.absmax, state.offset, state.state2.absmax, F.dequantize_4bit(packed, state))
    assert not any(x.requires_grad for x in tensors)
    assert copy.deepcopy(state) == state


# --- preallocated results --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["plain", "strided"])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_results_go_where_the_caller_wants_them(device, quant_type, layout):
    values = torch.randn(6, 50, device=device)
    expected, expected_state = F.quantize_4bit(values, quant_type=quant_type)
    wide = torch.full((150, 2), 0xEE, dtype=torch.uint8, device=device)
    out = torch.full_like(expected, 0xEE) if layout == "plain" else wide[:, :1]
    absmax = torch.full((5,), torch.nan, device=device)

    packed, state = F.quantize_4bit(values, absmax=absmax, out=out, quant_type=quant_type)

    assert packed is out and state.absmax is absmax
    assert torch.equal(out, expected) and state == expected_state
    if layout == "strided":
        assert (wide[:, 1] == 0xEE).all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["plain", "strided", "transposed", "row_gaps"])
@pytest.mark.parametrize("shape", [(6, 50), (33,), (300, 40)], ids=str)
def test_decoding_into_the_callers_tensor(device, shape, layout, dtype):
    values = torch.randn(shape, device=device, dtype=dtype)
    packed, state = F.quantize_4bit(values, quant_type="nf4")
    expected = F.dequantize_4bit(packed, state)
    poisoned = torch.full_like(values, torch.nan)
    out = poisoned if layout == "plain" else in_layout(layout, poisoned)

    result = F.dequantize_4bit(packed, state, out=out)

    assert result is out
    assert torch.equal(out, expected)


def test_decoding_writes_nothing_beside_out(device):
    packed, state = F.quantize_4bit(torch.randn(6, 50, device=device), quant_type="nf4")
    wide = torch.full((6, 101), 7.0, device=device)

    F.dequantize_4bit(packed, state, out=wide[:, 1::2])

    assert (wide[:, ::2] == 7.0).all()


@pytest.mark.parametrize("blocksize", [None, 128])
def test_decoding_without_a_state(device, blocksize):
    values = torch.randn(3, 100, device=device, dtype=torch.bfloat16)
    packed, state = F.quantize_4bit(values, blocksize=blocksize, quant_type="nf4")
    out = torch.empty_like(values)

    result = F.dequantize_4bit(packed, absmax=state.absmax, out=out, blocksize=blocksize, quant_type="nf4")

    assert result is out
    assert torch.equal(out, F.dequantize_4bit(packed, state))


# --- nested statistics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("blocks", [1, 255, 256, 257, 600])
def test_nested_statistics_follow_their_description(device, blocks, quant_type):
    values = torch.randn(blocks * 64 - 3, device=device)

    packed, state = F.quantize_4bit(values, quant_type=quant_type, compress_statistics=True)

    plain, plain_state = F.quantize_4bit(values, quant_type=quant_type)
    assert torch.equal(packed, plain)
    torch.testing.assert_close(state.offset, plain_state.absmax.mean(), rtol=1e-6, atol=0)
    expected, absmax2 = oracles.quantize_blockwise(
        plain_state.absmax - state.offset, oracles.dynamic_map(), 256
    )
    assert_same_codes(state.absmax.cpu(), expected)
    assert_same_bytes(state.state2.absmax, absmax2)
    assert_same_bytes(
        F.dequantize_4bit(packed, state),
        oracles.dequantize_4bit(
            packed,
            oracles.expand_nested(expected, absmax2, oracles.dynamic_map(), state.offset),
            64,
            quant_type,
            values.shape,
            values.dtype,
        ),
    )


# --- compiled --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_functions_compile_into_one_graph(device, nested):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def there_and_back(values):
        packed, state = F.quantize_4bit(values, quant_type="nf4", compress_statistics=nested)
        return packed, F.dequantize_4bit(packed, state)

    for rows in (3, 65, 130):
        values = torch.randn(rows, 7, device=device)
        expected, state = F.quantize_4bit(values, quant_type="nf4", compress_statistics=nested)
        packed, decoded = there_and_back(values)
        assert torch.equal(packed, expected)
        torch.testing.assert_close(decoded, F.dequantize_4bit(expected, state))


# --- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocksize", [0, 1, 16, 48, 63, 8192, -64])
def test_blocksize_is_one_of_the_list(device, blocksize):
    with pytest.raises(ValueError, match=rf"invalid blocksize {blocksize}"):
        F.quantize_4bit(torch.ones(64, device=device), blocksize=blocksize)
    packed, state = F.quantize_4bit(torch.ones(64, device=device))
    state.blocksize = blocksize
    with pytest.raises(ValueError, match=rf"invalid blocksize {blocksize}"):
        F.dequantize_4bit(packed, state)


@pytest.mark.parametrize("quant_type", ["int4", "af4", "NF4", "", "nf5"])
def test_quant_type_is_nf4_or_fp4(device, quant_type):
    with pytest.raises(ValueError, match=rf"quant_type must be 'nf4' or 'fp4', got '{quant_type}'"):
        F.quantize_4bit(torch.ones(64, device=device), quant_type=quant_type)
    packed, state = F.quantize_4bit(torch.ones(64, device=device))
    state.quant_type = quant_type
    with pytest.raises(ValueError, match=r"quant_type must be 'nf4' or 'fp4'"):
        F.dequantize_4bit(packed, state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.uint8, torch.int8, torch.bool], ids=str)
def test_input_dtype_is_named(device, dtype):
    if dtype == torch.float64 and device == "mps":
        pytest.skip("mps has no float64")
    with pytest.raises(ValueError, match=rf"only supports 16/32-bit floats.*{dtype}"):
        F.quantize_4bit(torch.ones(64, device=device).to(dtype))
    packed, state = F.quantize_4bit(torch.ones(64, device=device))
    state.dtype = dtype
    with pytest.raises(ValueError, match=rf"only supports 16/32-bit floats.*{dtype}"):
        F.dequantize_4bit(packed, state)


@pytest.mark.parametrize(
    "given_arguments", [{}, {"absmax": torch.ones(1)}, {"out": torch.ones(64)}], ids=["none", "absmax", "out"]
)
def test_decoding_needs_a_state_or_both_tensors(given_arguments):
    packed, _ = F.quantize_4bit(torch.ones(64))

    with pytest.raises(ValueError, match="requires both absmax and out"):
        F.dequantize_4bit(packed, **given_arguments)


def test_packed_bytes_that_are_too_few_are_counted(device):
    packed, state = F.quantize_4bit(torch.randn(7, 33, device=device), quant_type="nf4")

    with pytest.raises(ValueError, match="A must hold at least 116 bytes"):
        F.dequantize_4bit(packed[:-1], state)
    with pytest.raises(ValueError, match="B must hold at least 116 bytes"):
        F.gemv_4bit(torch.randn(1, 33, device=device), packed[:-1], state=state)


def test_statistics_that_are_too_few_are_counted(device):
    packed, state = F.quantize_4bit(torch.randn(7, 33, device=device), quant_type="nf4")
    state.absmax = state.absmax[:-1]

    with pytest.raises(ValueError, match="absmax must have at least 4 values"):
        F.dequantize_4bit(packed, state)
    with pytest.raises(ValueError, match="absmax must have at least 4 values"):
        F.gemv_4bit(torch.randn(1, 33, device=device), packed, state=state)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (lambda d: torch.empty(6, 49, device=d), "Expected out.shape"),
        (lambda d: torch.empty(50, 6, device=d), "Expected out.shape"),
        (lambda d: torch.empty(6, 50, device=d, dtype=torch.float16), "Expected out.dtype"),
        (lambda d: torch.empty(6, 50, device="meta"), "Expected out.device"),
    ],
    ids=["size", "order", "dtype", "device"],
)
def test_out_that_does_not_fit_the_decoded_values_is_named(device, out, message):
    packed, state = F.quantize_4bit(torch.randn(6, 50, device=device))

    with pytest.raises(ValueError, match=message):
        F.dequantize_4bit(packed, state, out=out(device))


def test_out_that_does_not_fit_the_codes_is_named(device):
    values = torch.randn(6, 50, device=device)

    with pytest.raises(ValueError, match="out must have 150 elements"):
        F.quantize_4bit(values, out=torch.empty(149, 1, dtype=torch.uint8, device=device))
    with pytest.raises(ValueError, match="out must have 150 elements"):
        F.quantize_4bit(values, out=torch.empty(150, 1, dtype=torch.int8, device=device))
    with pytest.raises(ValueError, match="absmax must have 5 elements"):
        F.quantize_4bit(values, absmax=torch.empty(4, device=device))


def test_tensors_on_two_devices_are_refused(accelerators):
    if not accelerators:
        pytest.skip("needs a device beside the CPU")
    packed, state = F.quantize_4bit(torch.randn(32, 64))
    with pytest.raises(ValueError, match="absmax must be on the same device"):
        F.dequantize_4bit(packed.to(accelerators[0]), state)
    with pytest.raises(ValueError, match="B must be on the same device"):
        F.gemv_4bit(torch.ones(1, 64, device=accelerators[0]), packed, state=state)


# --- accuracy --------------------------------------------------------------------------------------------------

# Mean and spread of the mean absolute and the mean relative error of normal values, by block size.
ACCEPTANCE = {
    "fp4": {
        32: ((0.088925, 0.000091), (0.242443, 0.000330)),
        64: ((0.096543, 0.000111), (0.260125, 0.000379)),
        128: ((0.102969, 0.000134), (0.275817, 0.000433)),
        256: ((0.108684, 0.000182), (0.289831, 0.000497)),
        512: ((0.114115, 0.000234), (0.302881, 0.000583)),
        1024: ((0.119333, 0.000320), (0.315000, 0.000757)),
        2048: ((0.124556, 0.000455), (0.326607, 0.000955)),
        4096: ((0.129536, 0.000612), (0.337169, 0.001239)),
    },
    "nf4": {
        32: ((0.067746, 0.000069), (0.189726, 0.000304)),
        64: ((0.072798, 0.000074), (0.203339, 0.000340)),
        128: ((0.076831, 0.000091), (0.215237, 0.000391)),
        256: ((0.080337, 0.000102), (0.226105, 0.000398)),
        512: ((0.083547, 0.000143), (0.236079, 0.000544)),
        1024: ((0.086610, 0.000187), (0.245370, 0.000600)),
        2048: ((0.089592, 0.000251), (0.254163, 0.000747)),
        4096: ((0.092547, 0.000360), (0.262473, 0.000999)),
    },
}


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_mean_error_of_normal_values(device, quant_type, blocksize, dtype):
    values = torch.randn(1024, 1024, device=device).to(dtype)

    packed, state = F.quantize_4bit(values, blocksize=blocksize, quant_type=quant_type)
    error = (F.dequantize_4bit(packed, state).float() - values.float()).abs()

    (absolute, absolute_spread), (relative, relative_spread) = ACCEPTANCE[quant_type][blocksize]
    assert error.mean().item() < absolute + 7 * absolute_spread
    assert (error / (values.float().abs() + 1e-8)).mean().item() < relative + 7 * relative_spread


@pytest.mark.parametrize("blocksize", [32, 64, 128])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_mean_error_with_nested_statistics(device, quant_type, blocksize):
    values = torch.randn(1024, 1024, device=device)

    packed, state = F.quantize_4bit(
        values, blocksize=blocksize, quant_type=quant_type, compress_statistics=True
    )
    error = (F.dequantize_4bit(packed, state) - values).abs()

    assert error.mean().item() < 0.11
    assert (error / (values.abs() + 1e-8)).mean().item() < 0.28


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_no_value_is_off_by_more_than_half_a_gap(device, quant_type, dtype):
    values = torch.randn(10_000, device=device, dtype=dtype)

    packed, state = F.quantize_4bit(values, quant_type=quant_type)

    bound = oracles.quantization_bound(state.absmax, 64, values.numel(), state.code, dtype)
    assert ((F.dequantize_4bit(packed, state).double() - values.double()).abs().cpu() <= bound).all()


@pytest.mark.large_memory
@pytest.mark.slow
def test_the_largest_odd_tensor(device):
    """2**31 - 1 elements: indices of bytes and blocks must not wrap."""
    n = 2**31 - 1
    values = torch.zeros(n, dtype=torch.float16, device=device)
    values[-3:] = torch.tensor([1.0, -1.0, 0.5])

    packed, state = F.quantize_4bit(values, blocksize=4096, quant_type="nf4")
    del values

    assert packed.shape == (2**30, 1)
    assert F.dequantize_4bit(packed, state)[-3:].tolist() == [1.0, -1.0, pytest.approx(0.5, abs=0.16)]
