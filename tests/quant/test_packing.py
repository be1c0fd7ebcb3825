"""Bytes: which nibble is which, storage dtypes, dicts as bytes, and the private CPU tile layout of older releases."""

from __future__ import annotations

import json

import pytest
import torch

from bitsandbytes import functional as F
from oracles import QUANT_TYPES, STORAGE_DTYPES, as_bytes, assert_same_bytes, golden, table, unpack

# --- nibbles ---------------------------------------------------------------------------------------------------


def test_even_elements_are_high_nibbles(device):
    values = torch.tensor([-1.0, 1.0, 1.0, -1.0], device=device)

    packed, _ = F.quantize_4bit(values, quant_type="nf4")

    assert packed.tolist() == [[0x0F], [0xF0]]


@pytest.mark.parametrize(("quant_type", "last"), [("nf4", 0xF7), ("fp4", 0x30)])
def test_an_odd_count_is_padded_with_zero(device, quant_type, last):
    packed, _ = F.quantize_4bit(torch.ones(3, device=device), quant_type=quant_type)

    assert packed.shape == (2, 1)
    assert packed[-1].item() == last


def test_the_pad_nibble_is_ignored_when_decoding(device):
    packed, state = F.quantize_4bit(torch.randn(33, device=device), quant_type="nf4")
    expected = F.dequantize_4bit(packed, state)

    packed[-1] ^= 0x0F

    assert torch.equal(F.dequantize_4bit(packed, state), expected)


# --- storage dtypes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGE_DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_storage_dtype_reinterprets_the_same_bytes(device, quant_type, storage):
    values = torch.randn(24, 32, device=device)
    plain, _ = F.quantize_4bit(values, quant_type=quant_type)

    packed, state = F.quantize_4bit(values, quant_type=quant_type, quant_storage=storage)

    assert packed.dtype == storage
    assert packed.shape == (values.numel() // 2 // storage.itemsize, 1)
    assert torch.equal(as_bytes(packed), as_bytes(plain))
    assert torch.equal(F.dequantize_4bit(packed, state), F.dequantize_4bit(plain, state))


@pytest.mark.parametrize("name", ["bf16", "f16", "f32"])
def test_storage_dtypes_match_published_bytes(device, name):
    arrays = golden("quant4bit")
    expected = arrays[f"nf4.bs64.packed_as_{name}"]

    packed, _ = F.quantize_4bit(arrays["x_f32"].to(device), quant_type="nf4", quant_storage=expected.dtype)

    assert packed.dtype == expected.dtype and packed.shape == expected.shape
    assert torch.equal(as_bytes(packed), as_bytes(expected))


@pytest.mark.parametrize(
    ("storage", "count"), [(torch.float16, 2), (torch.bfloat16, 5), (torch.float32, 4)], ids=str
)
def test_bytes_that_do_not_fill_the_storage_dtype_are_refused(device, storage, count):
    """Never too small a result: one error that names the storage dtype."""
    with pytest.raises((ValueError, RuntimeError), match="quant_storage"):
        F.quantize_4bit(torch.randn(count, device=device), quant_type="nf4", quant_storage=storage)


@pytest.mark.parametrize("storage", [torch.int8, torch.int32, torch.float64, torch.bool], ids=str)
def test_other_storage_dtypes_are_refused(device, storage):
    with pytest.raises(ValueError, match="quant_storage"):
        F.quantize_4bit(torch.randn(64, device=device), quant_type="nf4", quant_storage=storage)


# --- dicts as bytes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"quant_type": "nf4", "blocksize": 64, "shape": [3, 4], "offset": 0.1, "none": None, "flag": True},
        {"umlaut": "ä ☃", "float": 0.08725889772176743},
    ],
    ids=["empty", "state", "unicode"],
)
def test_dict_round_trips_through_bytes(content):
    packed = F.pack_dict_to_tensor(content)

    assert packed.dtype == torch.uint8 and packed.dim() == 1 and packed.device.type == "cpu"
    assert bytes(packed.tolist()) == json.dumps(content).encode()
    assert F.unpack_tensor_to_dict(packed) == content


def test_tuples_come_back_as_lists():
    assert F.unpack_tensor_to_dict(F.pack_dict_to_tensor({"shape": (3, 4)})) == {"shape": [3, 4]}


def test_what_json_cannot_hold_is_a_type_error():
    with pytest.raises(TypeError):
        F.pack_dict_to_tensor({"tensor": torch.zeros(1)})


def test_dict_is_read_from_any_device(device):
    packed = F.pack_dict_to_tensor({"a": 1}).to(device)

    assert F.unpack_tensor_to_dict(packed) == {"a": 1}


def test_packing_works_under_a_meta_default_device():
    with torch.device("meta"):
        assert F.unpack_tensor_to_dict(F.pack_dict_to_tensor({"a": 1})) == {"a": 1}


def test_utils_and_functional_share_the_helpers():
    from bitsandbytes import utils

    assert utils.pack_dict_to_tensor is F.pack_dict_to_tensor
    assert utils.unpack_tensor_to_dict is F.unpack_tensor_to_dict


# --- the CPU tile layout ---------------------------------------------------------------------------------------


def _tile_oracle(codes: torch.Tensor, rows: int, columns: int, block: int = 32) -> list[int]:
    """For 32 rows and a pair of columns: 64 codes in the order 2·row + column, bytes join code i and 32 + i."""
    grid = codes.view(rows, columns).tolist()
    packed = []
    for start in range(0, rows, block):
        for pair in range(columns // 2):
            codes64 = [grid[start + r][2 * pair + c] for r in range(block) for c in (0, 1)]
            packed += [codes64[i] | codes64[block + i] << 4 for i in range(block)]
    return packed


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_tile_layout_matches_its_description_and_is_undone_without_loss(quant_type, nested, storage):
    N, K, blocksize = 64, 128, 64
    weight = torch.randn(N, K, dtype=torch.float16)
    packed, state = F.quantize_4bit(
        weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested, quant_storage=storage
    )
    before = {key: value.clone() for key, value in state.as_dict(packed=True).items()}
    plain_absmax = (
        F.dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
    )
    bytes_before = packed.clone()

    tiles, tiled_state = F._convert_weight_packed_for_cpu(packed, state)

    assert tiles.dtype == torch.uint8 and tiles.shape == (N, K // 2)
    assert tiles.reshape(-1).tolist() == _tile_oracle(unpack(packed, N * K), N, K)
    assert tiled_state.packing_format_for_cpu
    assert tiled_state.dtype == torch.bfloat16 and not tiled_state.nested
    assert torch.equal(tiled_state.absmax, plain_absmax.view(N, K // blocksize).t().to(torch.bfloat16))
    assert (tiled_state.original_dtype, tiled_state.original_nested) == (torch.float16, nested)

    restored, state_again = F._convert_weight_packed_for_cpu_inverse(tiles, tiled_state)

    assert not getattr(state_again, "packing_format_for_cpu", False)
    assert torch.equal(as_bytes(restored), as_bytes(bytes_before))
    assert restored.dtype == storage
    after = state_again.as_dict(packed=True)
    assert list(after) == list(before)
    for key, value in before.items():
        assert_same_bytes(after[key], value)


@pytest.mark.parametrize("shape", [(33, 64), (32, 65)], ids=str)
def test_tile_layout_needs_32_rows_and_column_pairs(shape):
    packed, state = F.quantize_4bit(torch.randn(shape), quant_type="nf4", blocksize=32)

    with pytest.raises(AssertionError):
        F._convert_weight_packed_for_cpu(packed, state)


# --- decoding without the library ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nf4", "nf4_nested", "fp4", "nf4_nested_bf16storage"])
def test_checkpoints_decode_by_their_description_alone(name):
    """The published recipe, in plain Python, against what the library decodes."""
    saved = golden(f"linear4bit_{name}_state_dict")
    quant_type = name.split("_")[0]
    meta = json.loads(bytes(saved[f"weight.quant_state.bitsandbytes__{quant_type}"].tolist()))
    held = as_bytes(saved["weight"]).tolist()
    codes = [nibble for byte in held for nibble in (byte >> 4, byte & 15)]
    absmax = saved["weight.absmax"]
    if "nested_blocksize" in meta:
        second = saved["weight.nested_absmax"].repeat_interleave(meta["nested_blocksize"])[: absmax.numel()]
        absmax = saved["weight.nested_quant_map"][absmax.long()] * second + torch.tensor(
            meta["nested_offset"]
        )
    scale = absmax.repeat_interleave(meta["blocksize"])
    by_hand = (table(quant_type).float()[torch.tensor(codes)] * scale).to(getattr(torch, meta["dtype"]))

    stats = {key: value for key, value in saved.items() if key.startswith("weight.")}
    state = F.QuantState.from_dict(stats, "cpu")

    assert torch.equal(F.dequantize_4bit(saved["weight"], state), by_hand.view(meta["shape"]))
