"""4-bit codes and values against vectors that other machines published, bit for bit."""

from __future__ import annotations

import pickle

import pytest
import torch

import oracles
from bitsandbytes import functional as F
from oracles import (
    QUANT_TYPES,
    assert_same_bytes,
    assert_same_codes,
    golden,
)

# --- published vectors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_published_codes(device, quant_type, blocksize):
    arrays = golden("quant4bit")
    key = f"{quant_type}.bs{blocksize}"

    packed, state = F.quantize_4bit(arrays["x_f32"].to(device), blocksize=blocksize, quant_type=quant_type)

    assert_same_codes(packed.cpu(), arrays[f"{key}.packed"])
    assert torch.equal(state.absmax.cpu(), arrays[f"{key}.absmax"])
    if f"{key}.dequant" in arrays:
        assert_same_bytes(F.dequantize_4bit(packed, state), arrays[f"{key}.dequant"])


@pytest.mark.parametrize("name", ["f16", "bf16"])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_published_codes_of_16_bit_inputs(device, quant_type, name):
    arrays = golden("quant4bit")
    key = f"{quant_type}.{name}.bs64"

    packed, state = F.quantize_4bit(arrays[f"x_{name}"].to(device), quant_type=quant_type)

    assert_same_codes(packed.cpu(), arrays[f"{key}.packed"])
    assert torch.equal(state.absmax.cpu(), arrays[f"{key}.absmax"])
    assert_same_bytes(F.dequantize_4bit(packed, state), arrays[f"{key}.dequant"])


@pytest.mark.parametrize("blocksize", [32, 64])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("shape", ["1", "13", "7x33", "3x5x7", "5x24", "2x50", "9x65"])
def test_published_codes_of_odd_shapes(device, shape, quant_type, blocksize):
    arrays = golden("quant4bit_odd_edge")
    key = f"{shape}.{quant_type}.bs{blocksize}"

    packed, state = F.quantize_4bit(
        arrays[f"{shape}.x"].to(device), blocksize=blocksize, quant_type=quant_type
    )

    assert_same_codes(packed.cpu(), arrays[f"{key}.packed"])
    assert torch.equal(state.absmax.cpu(), arrays[f"{key}.absmax"])
    assert_same_bytes(F.dequantize_4bit(packed, state), arrays[f"{key}.dequant"])


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_published_codes_around_a_block_of_zeros(device, quant_type):
    arrays = golden("quant4bit_odd_edge")

    packed, state = F.quantize_4bit(arrays["zeroblock.x"].to(device), quant_type=quant_type)

    assert_same_codes(packed.cpu(), arrays[f"zeroblock.{quant_type}.packed"])
    assert torch.equal(state.absmax.cpu(), arrays[f"zeroblock.{quant_type}.absmax"])
    assert_same_bytes(F.dequantize_4bit(packed, state), arrays[f"zeroblock.{quant_type}.dequant"])


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_published_nested_statistics(device, quant_type):
    arrays = golden("quant4bit_nested")

    packed, state = F.quantize_4bit(arrays["w"].to(device), quant_type=quant_type, compress_statistics=True)

    assert_same_codes(packed.cpu(), arrays[f"{quant_type}.packed"])
    torch.testing.assert_close(state.offset.cpu(), arrays[f"{quant_type}.offset"], rtol=1e-6, atol=0)
    assert_same_bytes(state.state2.code, arrays["nested_code"])
    if torch.equal(state.offset.cpu(), arrays[f"{quant_type}.offset"]):
        assert_same_codes(state.absmax.cpu(), arrays[f"{quant_type}.absmax_u8"])
        assert_same_bytes(state.state2.absmax, arrays[f"{quant_type}.nested_absmax"])
        assert_same_bytes(F.dequantize_4bit(packed, state)[:8], arrays[f"{quant_type}.dequant_rows0_8"])
    restored = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    torch.testing.assert_close(restored.cpu(), arrays[f"{quant_type}.absmax_restored"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_published_nested_state_decodes_exactly(device, quant_type):
    """Decoding does not depend on how this machine sums the mean."""
    arrays = golden("quant4bit_nested")
    second = F.QuantState(
        absmax=arrays[f"{quant_type}.nested_absmax"],
        code=arrays["nested_code"],
        blocksize=256,
        dtype=torch.float32,
    )
    state = F.QuantState(
        absmax=arrays[f"{quant_type}.absmax_u8"],
        shape=torch.Size([160, 128]),
        code=golden("codebooks")[quant_type],
        blocksize=64,
        quant_type=quant_type,
        dtype=torch.float16,
        offset=arrays[f"{quant_type}.offset"],
        state2=second,
    )
    state = pickle.loads(pickle.dumps(state))  # moving must not touch the shared arrays
    state.to(device)

    decoded = F.dequantize_4bit(arrays[f"{quant_type}.packed"].to(device), state)

    assert_same_bytes(decoded[:8], arrays[f"{quant_type}.dequant_rows0_8"])
    assert_same_bytes(
        decoded,
        oracles.dequantize_4bit(
            arrays[f"{quant_type}.packed"],
            arrays[f"{quant_type}.absmax_restored"],
            64,
            quant_type,
            (160, 128),
            torch.float16,
        ),
    )


# --- published vectors of a GPU --------------------------------------------------------------------------------

GPU_LENGTHS = [1, 63, 64, 65, 4096, 5000]


@pytest.fixture(params=[f"n{n}_{d}" for n in GPU_LENGTHS for d in ("float32", "float16", "bfloat16")])
def gpu_case(request):
    """``(key, input)`` of one vector a GPU quantized."""
    values = golden("cuda/quant_cuda")[f"{request.param}/in"]
    return request.param, values


@pytest.mark.parametrize("blocksize", [64, 128, 512])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_gpu_vectors_decode_bit_exactly(device, gpu_case, quant_type, blocksize):
    key, values = gpu_case
    arrays = golden("cuda/quant_cuda")
    q, absmax, expected = (
        arrays[f"{key}/{quant_type}_{blocksize}_{part}"] for part in ("q", "absmax", "deq")
    )

    decoded = F.dequantize_4bit(
        q.to(device),
        absmax=absmax.to(device),
        out=torch.empty_like(values, device=device),
        blocksize=blocksize,
        quant_type=quant_type,
    )

    assert_same_bytes(decoded, expected)


def _near_threshold(values: torch.Tensor, blocksize: int, quant_type: str, ulps: int) -> torch.Tensor:
    """Which values scale to within ``ulps`` of a decision threshold, or to next to zero for fp4."""
    scaled, _ = oracles.scale_by_block(values, blocksize)
    bounds = golden("codebooks")["nf4_bounds" if quant_type == "nf4" else "fp4_bounds_signed"].double()
    bounds = bounds[bounds != 0]
    room = ulps * torch.finfo(torch.float32).eps * bounds.abs()
    near = ((scaled.unsqueeze(1) - bounds).abs() <= room).any(1)
    if quant_type == "fp4":
        near |= scaled.abs() <= golden("codebooks")["fp4"][1].item() / 2 * (1 + 1e-5)
    return near


@pytest.mark.parametrize("blocksize", [64, 128, 512])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_gpu_vectors_encode_alike_away_from_thresholds(device, gpu_case, quant_type, blocksize):
    key, values = gpu_case
    arrays = golden("cuda/quant_cuda")

    packed, state = F.quantize_4bit(values.to(device), blocksize=blocksize, quant_type=quant_type)

    expected = oracles.unpack(arrays[f"{key}/{quant_type}_{blocksize}_q"], values.numel())
    differ = oracles.unpack(packed.cpu(), values.numel()) != expected
    allowed = _near_threshold(values, blocksize, quant_type, ulps=16 if quant_type == "fp4" else 2)
    assert not (differ & ~allowed).any()
    assert torch.equal(state.absmax.cpu(), arrays[f"{key}/{quant_type}_{blocksize}_absmax"])


def test_gpu_nested_vectors_decode_bit_exactly(device, gpu_case):
    key, values = gpu_case
    arrays = {
        name: golden("cuda/quant_cuda")[f"{key}/nested_{name}"]
        for name in ("q", "absmax", "absmax2", "offset")
    }
    state = F.QuantState(
        absmax=arrays["absmax"].to(device),
        shape=values.shape,
        code=F.get_4bit_type("nf4", device),
        blocksize=64,
        quant_type="nf4",
        dtype=values.dtype,
        offset=arrays["offset"].reshape(()).to(device),
        state2=F.QuantState(
            absmax=arrays["absmax2"].to(device),
            code=F.create_dynamic_map().to(device),
            blocksize=256,
            dtype=torch.float32,
        ),
    )

    decoded = F.dequantize_4bit(arrays["q"].to(device), state)

    assert_same_bytes(decoded, golden("cuda/quant_cuda")[f"{key}/nested_deq"])


@pytest.mark.parametrize("blocksize", [64, 256, 4096])
def test_gpu_8bit_vectors_decode_bit_exactly_and_encode_alike(device, gpu_case, blocksize):
    key, values = gpu_case
    arrays = golden("cuda/quant_cuda")
    q, absmax, expected = (arrays[f"{key}/dyn_{blocksize}_{part}"] for part in ("q", "absmax", "deq"))

    decoded = F.dequantize_blockwise(q.to(device), absmax=absmax.to(device), blocksize=blocksize)
    codes, state = F.quantize_blockwise(values.to(device), blocksize=blocksize)

    assert_same_bytes(decoded.to(values.dtype), expected)
    assert torch.equal(state.absmax.cpu(), absmax)
    step = (codes.cpu().int() - q.int()).abs()
    assert step.max() <= 1
    code, scaled = oracles.dynamic_map().double(), oracles.scale_by_block(values, blocksize)[0]
    middle = (code[:-1] + code[1:]) / 2
    room = 2 * torch.finfo(torch.float32).eps
    near = ((scaled.unsqueeze(1) - middle).abs() <= room * middle.abs().clamp(min=1e-12)).any(1)
    assert not ((step > 0).reshape(-1) & ~near).any()
