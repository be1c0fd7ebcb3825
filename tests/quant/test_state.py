"""QuantState: attributes, the list older releases used, and the form it takes in checkpoints."""

from __future__ import annotations

import copy
import io
import json
import pickle
from functools import reduce

import pytest
import torch

from bitsandbytes import functional as F
from bitsandbytes.functional import QuantState
from oracles import assert_same_bytes, golden

KINDS = ["nf4", "fp4", "nf4_nested", "fp4_nested"]


def make_state(kind: str = "nf4", device: str = "cpu", shape=(40, 33), dtype=torch.float32) -> QuantState:
    quant_type, _, nested = kind.partition("_")
    values = torch.randn(shape, device=device, dtype=dtype)
    _, state = F.quantize_4bit(values, quant_type=quant_type, compress_statistics=bool(nested))
    return state


def make_8bit_state(nested: bool = False, device: str = "cpu") -> QuantState:
    return F.quantize_blockwise(torch.randn(700, device=device), blocksize=64, nested=nested)[1]


# --- attributes ------------------------------------------------------------------------------------------------


def test_constructor_takes_its_arguments_in_the_published_order():
    absmax, code, offset = torch.ones(2), torch.zeros(16), torch.tensor(1.0)
    inner = QuantState(torch.ones(1))

    state = QuantState(absmax, torch.Size([2, 2]), code, 64, "nf4", torch.float16, offset, inner)

    assert state.absmax is absmax and state.code is code and state.offset is offset and state.state2 is inner
    assert (state.shape, state.blocksize, state.quant_type, state.dtype) == ((2, 2), 64, "nf4", torch.float16)
    assert state.nested is True
    assert inner.nested is False
    assert all(getattr(inner, name) is None for name in ("shape", "code", "blocksize", "quant_type", "dtype"))


def test_class_attributes_list_what_checkpoints_may_hold():
    assert tuple(QuantState.valid_quant_types) == ("fp4", "nf4")
    assert QuantState.valid_qs_type_keys == ["bitsandbytes__fp4", "bitsandbytes__nf4"]
    assert QuantState.valid_qs_keys == [
        "absmax",
        "quant_map",
        "nested_absmax",
        "nested_quant_map",
        "quant_state",
        "quant_type",
        "blocksize",
        "dtype",
        "shape",
        "nested_blocksize",
        "nested_dtype",
        "nested_offset",
    ]


def test_state_is_a_plain_mutable_object():
    state = make_state("nf4_nested")

    state.packing_format_for_cpu = False
    state.absmax, state.nested, state.offset, state.state2 = torch.ones(3), False, None, None

    assert state[0].shape == (3,)
    assert state[4] is None
    assert "nested_absmax" not in state.as_dict()


def test_readers_look_at_nested_afresh():
    """Sharding code un-nests states by hand; dequantizing must follow."""
    packed, state = F.quantize_4bit(torch.randn(40, 33), quant_type="nf4", compress_statistics=True)
    before = F.dequantize_4bit(packed, state)

    state.absmax = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    state.nested, state.offset, state.state2 = False, None, None

    assert torch.equal(F.dequantize_4bit(packed, state), before)


@pytest.mark.parametrize("kind", KINDS)
def test_list_view(kind):
    state = make_state(kind)

    absmax, shape, dtype, blocksize, second, quant_type = state[:]

    assert absmax is state.absmax
    assert (shape, dtype, blocksize, quant_type) == (
        state.shape,
        state.dtype,
        state.blocksize,
        state.quant_type,
    )
    if state.nested:
        assert second[0] is state.offset and second[1] is state.state2
    else:
        assert second is None
    assert state[-1] == state.quant_type
    assert state[-6] is state.absmax
    assert len(state[1:3]) == 2
    with pytest.raises(IndexError):
        state[6]


def test_unpacking_into_names_works_as_with_a_list():
    absmax, _shape, _dtype, blocksize, _second, quant_type = make_state("fp4")

    assert absmax.dtype == torch.float32
    assert (blocksize, quant_type) == (64, "fp4")


@pytest.mark.parametrize("name", ["bitsandbytes__fp4", "nothing", "_private", "__deepcopy__"])
def test_missing_attribute_is_an_attribute_error_that_names_it(name):
    state = make_state("nf4")

    assert not hasattr(state, name)
    with pytest.raises(AttributeError, match=rf"(?s)QuantState.*{name}"):
        getattr(state, name)


def test_to_moves_in_place_and_returns_nothing(device):
    for kind in KINDS:
        state = make_state(kind)
        assert state.to(device) is None
        tensors = [state.absmax, state.code]
        if state.nested:
            tensors += [state.offset, state.state2.absmax, state.state2.code]
        assert {t.device.type for t in tensors} == {device}


def test_to_meta_moves_everything():
    state = make_state("nf4_nested")

    state.to("meta")

    assert {t.device.type for t in (state.absmax, state.code, state.offset, state.state2.absmax)} == {"meta"}


# --- equality --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_state_equals_its_copy(kind):
    state = make_state(kind)

    assert state == copy.deepcopy(state)
    assert (state != copy.deepcopy(state)) is False


@pytest.mark.parametrize(
    "change",
    [
        lambda s: setattr(s, "absmax", s.absmax + 1),
        lambda s: setattr(s, "shape", torch.Size([33, 40])),
        lambda s: setattr(s, "code", s.code * 2),
        lambda s: setattr(s, "dtype", torch.float16),
        lambda s: setattr(s, "blocksize", 128),
        lambda s: setattr(s, "quant_type", "fp4"),
        lambda s: setattr(s, "offset", s.offset + 1),
        lambda s: setattr(s, "offset", None),
        lambda s: setattr(s.state2, "absmax", s.state2.absmax + 1),
        lambda s: setattr(s, "state2", None),
    ],
    ids=[
        "absmax",
        "shape",
        "code",
        "dtype",
        "blocksize",
        "quant_type",
        "offset",
        "no offset",
        "state2",
        "no state2",
    ],
)
def test_state_differs_from_one_with_another_field(change):
    state = make_state("nf4_nested")
    other = copy.deepcopy(state)

    change(other)

    assert state != other


def test_state_differs_from_other_types_and_other_sizes():
    assert make_state("nf4") != "nf4"
    assert make_state("nf4", shape=(64,)) != make_state("nf4", shape=(128,))
    assert (make_state("nf4") == None) is False  # noqa: E711


def test_states_have_no_hash():
    with pytest.raises(TypeError, match="unhashable"):
        hash(make_state())


def test_tiny_differences_of_statistics_do_not_matter():
    state = make_state()
    other = copy.deepcopy(state)
    other.absmax = other.absmax + 5e-7

    assert state == other


# --- copies and pickles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_keep_everything(kind):
    state = make_state(kind)
    state.note = "kept"
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)

    for other in (
        copy.copy(state),
        copy.deepcopy(state),
        pickle.loads(pickle.dumps(state)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(other) is QuantState
        assert other == state
        assert other.note == "kept"


def test_pickle_records_the_public_module():
    assert QuantState.__module__ == "bitsandbytes.functional"
    assert b"bitsandbytes.functional" in pickle.dumps(make_state())


def test_half_built_state_does_not_recurse():
    empty = QuantState.__new__(QuantState)

    with pytest.raises(AttributeError):
        _ = empty.absmax
    with pytest.raises(AttributeError):
        _ = empty.bitsandbytes__nf4


# --- dict form -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_unpacked_dict_has_the_published_keys_in_order(kind, dtype):
    state = make_state(kind, dtype=dtype)

    entries = state.as_dict()

    keys = ["quant_type", "absmax", "blocksize", "quant_map", "dtype", "shape"]
    if state.nested:
        keys += ["nested_absmax", "nested_blocksize", "nested_quant_map", "nested_dtype", "nested_offset"]
    assert list(entries) == keys
    assert entries["quant_type"] == state.quant_type
    assert entries["dtype"] == str(dtype).removeprefix("torch.")
    assert entries["shape"] == (40, 33) and type(entries["shape"]) is tuple
    assert entries["quant_map"].shape == (16,)
    if state.nested:
        assert entries["absmax"].dtype == torch.uint8
        assert entries["nested_blocksize"] == 256
        assert entries["nested_dtype"] == "float32"
        assert type(entries["nested_offset"]) is float
        assert entries["nested_offset"] == state.offset.item()
        assert entries["nested_quant_map"].data_ptr() != state.state2.code.data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_packed_dict_holds_tensors_only_with_the_rest_as_json(kind):
    state = make_state(kind)

    entries = state.as_dict(packed=True)

    blob = f"quant_state.bitsandbytes__{state.quant_type}"
    keys = ["absmax", "quant_map"] + (["nested_absmax", "nested_quant_map"] if state.nested else []) + [blob]
    assert list(entries) == keys
    assert all(isinstance(value, torch.Tensor) for value in entries.values())
    inner = ["quant_type", "blocksize", "dtype", "shape"]
    inner += ["nested_blocksize", "nested_dtype", "nested_offset"] if state.nested else []
    text = bytes(entries[blob].tolist()).decode("ascii")
    assert list(json.loads(text)) == inner
    assert text == json.dumps(json.loads(text))  # the default separators


def test_packed_json_is_byte_for_byte_the_published_text():
    _, state = F.quantize_4bit(torch.randn(64, 64), quant_type="nf4")

    blob = state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"]

    expected = b'{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 64]}'
    assert blob.dtype == torch.uint8 and blob.shape == (77,)
    assert bytes(blob.tolist()) == expected


@pytest.mark.parametrize("nested", [False, True])
def test_8bit_states_have_no_packed_form(nested):
    state = make_8bit_state(nested)

    entries = state.as_dict(packed=True)

    assert entries["quant_type"] is None and entries["shape"] is None
    assert list(entries) == list(state.as_dict())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("prefix", ["", "weight.", "model.layers.0.self_attn.q_proj.weight."])
@pytest.mark.parametrize("kind", KINDS)
def test_dict_round_trip_is_exact(device, kind, prefix, packed):
    state = make_state(kind)
    entries = {prefix + key: value for key, value in state.as_dict(packed=packed).items()}

    for target in (device, torch.device(device)):
        if prefix and not packed:
            entries_here = dict(entries)
            entries_here["quant_type"] = entries_here.pop(prefix + "quant_type")
        else:
            entries_here = entries
        again = QuantState.from_dict(entries_here, target)

        assert again.absmax.device.type == device
        again.to("cpu")
        assert again == state
        assert again.shape == state.shape and isinstance(again.shape, torch.Size)
        assert_same_bytes(again.absmax, state.absmax)
        if state.nested:
            assert again.offset.dtype == torch.float32 and again.offset.dim() == 0
            assert again.offset.item() == state.offset.item()
            assert_same_bytes(again.state2.absmax, state.state2.absmax)
            assert again.state2.shape is None and again.state2.quant_type is None
            assert again.state2.blocksize == 256 and again.state2.dtype == torch.float32


@pytest.mark.parametrize("nested", [False, True])
def test_8bit_state_round_trips(nested):
    state = make_8bit_state(nested)

    again = QuantState.from_dict(state.as_dict(), "cpu")

    assert again == state
    assert again.shape is None and again.quant_type is None


def test_reading_leaves_the_callers_dict_alone():
    entries = make_state("nf4_nested").as_dict(packed=True)
    keys = list(entries)

    QuantState.from_dict(entries, "cpu")

    assert list(entries) == keys


def test_tensors_keep_their_dtype_when_read():
    entries = make_state("nf4").as_dict(packed=True)
    entries["absmax"] = entries["absmax"].half()

    assert QuantState.from_dict(entries, "cpu").absmax.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_offset_keeps_its_digits_under_another_default_dtype(default_dtype, dtype):
    """Models are often loaded under a 16-bit default dtype."""
    state = make_state("nf4_nested")
    entries = state.as_dict(packed=True)

    default_dtype(dtype)
    again = QuantState.from_dict(entries, "cpu")

    assert again.offset.dtype == torch.float32
    assert again.offset.item() == state.offset.item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_offset_of_another_dtype_is_accepted(dtype):
    packed, state = F.quantize_4bit(torch.randn(40, 33), quant_type="nf4", compress_statistics=True)
    rounded = copy.deepcopy(state)
    rounded.offset = state.offset.to(dtype)
    state.offset = rounded.offset.float()

    assert torch.equal(F.dequantize_4bit(packed, rounded), F.dequantize_4bit(packed, state))


def test_json_of_any_spacing_and_order_is_read():
    entries = make_state("nf4_nested").as_dict(packed=True)
    blob = "quant_state.bitsandbytes__nf4"
    loose = json.loads(bytes(entries[blob].tolist()))
    text = json.dumps(dict(reversed(loose.items())), indent=3)
    other = {**entries, blob: torch.tensor(list(text.encode()), dtype=torch.uint8)}

    assert QuantState.from_dict(other, "cpu") == QuantState.from_dict(entries, "cpu")


# --- damaged checkpoints ---------------------------------------------------------------------------------------


def _entries(kind: str = "nf4_nested") -> dict:
    return make_state(kind).as_dict(packed=True)


BLOB = "quant_state.bitsandbytes__nf4"


def test_no_blob_is_named():
    entries = _entries()
    del entries[BLOB]

    with pytest.raises(ValueError, match="Expected packed or unpacked quant_state items, found neither"):
        QuantState.from_dict(entries, "cpu")


def test_two_blobs_are_listed():
    entries = _entries()
    entries["quant_state.bitsandbytes__fp4"] = entries[BLOB]

    with pytest.raises(
        ValueError, match=r"(?s)There should be exactly one `quant_state` item.*bitsandbytes__fp4"
    ):
        QuantState.from_dict(entries, "cpu")


def test_blob_of_an_unknown_format_is_listed():
    entries = _entries()
    entries["quant_state.bitsandbytes__nf5"] = entries.pop(BLOB)

    with pytest.raises(ValueError, match=r"(?s)There should be exactly one `quant_state` item.*nf5"):
        QuantState.from_dict(entries, "cpu")


@pytest.mark.parametrize("key", ["bias", "weight", "scales"])
def test_unknown_key_is_refused(key):
    with pytest.raises(AssertionError, match=key):
        QuantState.from_dict({**_entries(), key: torch.zeros(1)}, "cpu")


@pytest.mark.parametrize("key", ["absmax", "quant_map", "nested_quant_map"])
def test_missing_key_is_named(key):
    entries = _entries()
    del entries[key]

    with pytest.raises(KeyError, match=key):
        QuantState.from_dict(entries, "cpu")


@pytest.mark.parametrize(
    "key", ["blocksize", "dtype", "shape", "nested_offset", "nested_dtype", "nested_blocksize"]
)
def test_missing_json_entry_is_named(key):
    entries = _entries()
    inner = json.loads(bytes(entries[BLOB].tolist()))
    del inner[key]
    entries[BLOB] = F.pack_dict_to_tensor(inner)

    with pytest.raises(KeyError, match=key):
        QuantState.from_dict(entries, "cpu")


@pytest.mark.parametrize(
    "damage",
    [
        lambda blob: blob[: blob.numel() // 2],
        lambda blob: blob[:0],
        lambda blob: torch.full_like(blob, 255),
        lambda blob: torch.cat([blob, blob]),
        lambda blob: torch.tensor(list(b"[1, 2]"), dtype=torch.uint8),
        lambda blob: torch.tensor(list(b"null"), dtype=torch.uint8),
    ],
    ids=["cut in half", "empty", "not text", "twice", "a list", "null"],
)
def test_damaged_blob_is_one_clear_error(damage):
    entries = _entries()
    entries[BLOB] = damage(entries[BLOB])

    with pytest.raises(ValueError, match="quant_state"):
        QuantState.from_dict(entries, "cpu")


@pytest.mark.parametrize("name", ["float33", "nn", "__name__"])
def test_dtype_that_is_none_is_refused(name):
    entries = _entries()
    inner = json.loads(bytes(entries[BLOB].tolist()))
    entries[BLOB] = F.pack_dict_to_tensor({**inner, "dtype": name})

    with pytest.raises(ValueError, match=name):
        QuantState.from_dict(entries, "cpu")


@pytest.mark.parametrize("changed", [{"blocksize": 48}, {"quant_type": "nf3"}, {"dtype": "int8"}], ids=str)
def test_damaged_values_fail_when_dequantizing(changed):
    entries = _entries()
    inner = json.loads(bytes(entries[BLOB].tolist()))
    entries[BLOB] = F.pack_dict_to_tensor({**inner, **changed})
    packed, _ = F.quantize_4bit(torch.randn(40, 33), quant_type="nf4")

    with pytest.raises(ValueError, match=r"blocksize|quant_type|only supports 16/32-bit floats"):
        F.dequantize_4bit(packed, QuantState.from_dict(entries, "cpu"))


def test_statistics_that_are_too_few_fail_when_dequantizing():
    packed, state = F.quantize_4bit(torch.randn(40, 33), quant_type="nf4")
    state.absmax = state.absmax[:-1]

    with pytest.raises(ValueError, match="absmax"):
        F.dequantize_4bit(packed, state)


@pytest.mark.parametrize("field", ["absmax", "state2"])
def test_nested_statistics_that_are_too_few_fail_when_dequantizing(field):
    packed, state = F.quantize_4bit(torch.randn(64, 512), quant_type="nf4", compress_statistics=True)
    holder = state if field == "absmax" else state.state2
    holder.absmax = holder.absmax[:-1]

    with pytest.raises(ValueError, match="absmax"):
        F.dequantize_4bit(packed, state)


def test_cut_packed_weight_fails_when_dequantizing():
    packed, state = F.quantize_4bit(torch.randn(40, 33), quant_type="nf4")

    with pytest.raises(ValueError, match="A must hold at least 660 bytes"):
        F.dequantize_4bit(packed[:-1], state)


# --- names that sharding tools resolve -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_blob_resolves_as_an_attribute(kind):
    state = make_state(kind)

    for key, value in state.as_dict(packed=True).items():
        if key.startswith("quant_state."):
            found = reduce(getattr, key.removeprefix("quant_state.").split("."), state)
            assert torch.equal(found, value)


def test_8bit_states_have_no_blob_attribute():
    with pytest.raises(AttributeError):
        _ = make_8bit_state().bitsandbytes__nf4


# --- bytes of published checkpoints ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nf4", "nf4_nested", "fp4", "nf4_nested_bf16storage"])
def test_published_checkpoint_is_written_again_byte_for_byte(name):
    saved = golden(f"linear4bit_{name}_state_dict")
    stats = {key: value for key, value in saved.items() if key not in ("weight", "bias")}

    state = QuantState.from_dict(stats, "cpu")
    again = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}

    assert set(again) == set(stats)
    for key, value in stats.items():
        assert_same_bytes(again[key], value)
    assert (state.shape, state.dtype) == ((160, 128), torch.float16)
