"""Params4bit and Int8Params: quantizing in place, moving, copying, and what integrations do to them."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch

import bitsandbytes as bnb
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from oracles import QUANT_TYPES, STORAGE_DTYPES, assert_same_bytes, golden

KEYS_4BIT = {
    "blocksize",
    "compress_statistics",
    "quant_type",
    "quant_state",
    "quant_storage",
    "bnb_quantized",
    "module",
}
KEYS_INT8 = {"CB", "SCB", "has_fp16_weights"}


def through_torch_save(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


DUPLICATES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda p: pickle.loads(pickle.dumps(p)),
    "torch.save": through_torch_save,
}


class TestParams4bit:
    def test_defaults(self):
        p = Params4bit()
        assert type(p) is Params4bit and isinstance(p, torch.nn.Parameter)
        assert (list(p.shape), p.dtype, p.requires_grad) == ([0], torch.float32, False)
        assert (p.blocksize, p.compress_statistics, p.quant_type, p.quant_storage) == (
            64,
            True,
            "fp4",
            torch.uint8,
        )
        assert (p.quant_state, p.module, p.bnb_quantized) == (None, None, False)
        assert set(p.__dict__) == KEYS_4BIT

    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize("storage", STORAGE_DTYPES)
    @pytest.mark.parametrize("quant_type", QUANT_TYPES)
    def test_first_move_quantizes_in_place(self, device, quant_type, storage, nested):
        values = torch.randn(48, 64)
        p = Params4bit(values, compress_statistics=nested, quant_type=quant_type, quant_storage=storage)

        returned = p.to(device)

        packed, state = quantize_4bit(
            values.to(device), compress_statistics=nested, quant_type=quant_type, quant_storage=storage
        )
        assert returned is p and p.bnb_quantized and p.device.type == device
        assert_same_bytes(p.data, packed)
        assert p.quant_state == state
        assert set(p.__dict__) == KEYS_4BIT

    def test_values_may_be_transposed(self, device):
        values = torch.randn(64, 48).t()
        p = Params4bit(values).to(device)
        assert list(p.quant_state.shape) == [48, 64]
        assert_same_bytes(p.data, quantize_4bit(values.contiguous().to(device))[0])

    @pytest.mark.parametrize("move", ["cpu", "to"])
    def test_moving_to_the_cpu_quantizes(self, move):
        p = Params4bit(torch.randn(8, 64))
        assert (p.cpu() if move == "cpu" else p.to("cpu")) is p
        assert p.bnb_quantized

    def test_second_move_does_not_quantize_again(self, device):
        p = Params4bit(torch.randn(8, 64)).to("cpu")
        before, state = p.data.clone(), p.quant_state
        q = p.to(device)
        assert q is not p and type(q) is Params4bit
        assert q.quant_state is state and state.absmax.device.type == device
        assert q.module is None
        assert_same_bytes(q.data, before)

    def test_device_wins_over_dtype(self, device):
        p = Params4bit(torch.randn(8, 64))
        p.to(device, torch.float16)
        assert p.quant_state.dtype == torch.float32

    def test_dtype_alone_casts_values_and_never_codes(self):
        p = Params4bit(torch.randn(8, 64), quant_type="nf4", quant_storage=torch.bfloat16)
        half = p.to(torch.float16)
        assert type(half) is Params4bit and half.dtype == torch.float16 and not half.bnb_quantized
        assert half.quant_type == "nf4"
        quantized = half.to("cpu")
        assert_same_bytes(quantized.to(torch.float32).data, quantized.data)
        assert_same_bytes(quantized.to("cpu", torch.float32).data, quantized.data)

    def test_meta_and_back_is_not_quantizing(self):
        p = Params4bit(torch.randn(8, 64)).to("meta")
        assert p.is_meta and not p.bnb_quantized and type(p) is Params4bit
        q = Params4bit(torch.randn(8, 64)).to("cpu").to("meta")
        assert q.is_meta and q.quant_state.absmax.is_meta

    def test_a_parameter_that_required_gradients_quantizes(self):
        p = Params4bit(torch.randn(8, 64), requires_grad=True).to("cpu")
        assert p.dtype == torch.uint8 and not p.requires_grad

    def test_layer_learns_the_state(self, device):
        layer = Linear4bit(64, 8)
        layer.weight = Params4bit(torch.randn(8, 64), module=layer).to(device)
        assert layer.quant_state is layer.weight.quant_state

    def test_rebuilding_from_the_dict_of_another(self, device):
        layer = Linear4bit(64, 8, quant_type="nf4")
        old = layer.weight
        old._is_hf_initialized = True
        new = Params4bit(torch.randn(8, 64), requires_grad=False, **old.__dict__).to(device)
        assert set(new.__dict__) == KEYS_4BIT
        assert new.module is layer and layer.quant_state is new.quant_state
        assert new.quant_state.quant_type == "nf4"

    def test_merging_an_adapter_requantizes_with_a_stale_state(self, device):
        layer = Linear4bit(64, 8).to(device)
        merged = torch.randn(8, 64)
        options = layer.weight.__dict__
        options["bnb_quantized"] = False
        options["requires_grad"] = False
        options.pop("data", None)
        stale = layer.weight.quant_state
        layer.weight = Params4bit(merged, **{k: v for k, v in options.items() if not k.startswith("_")}).to(
            device
        )
        assert layer.weight.quant_state is layer.quant_state is not stale
        assert_same_bytes(layer.weight.data, quantize_4bit(merged.to(device), compress_statistics=True)[0])

    def test_moving_a_layer_whose_parameter_dict_was_written_to(self):
        layer = Linear4bit(64, 8).to("cpu")
        layer.weight.__dict__["requires_grad"] = False
        assert type(layer.to("meta").weight) is Params4bit

    @pytest.mark.parametrize("quantized", [False, True])
    @pytest.mark.parametrize("how", DUPLICATES)
    def test_copies_keep_class_and_state(self, how, quantized):
        p = Params4bit(torch.randn(8, 64), quant_type="nf4", blocksize=32)
        if quantized:
            p = p.to("cpu")
        before = dict(p.__dict__)

        twin = DUPLICATES[how](p)

        assert type(twin) is Params4bit
        assert_same_bytes(twin.data, p.data)
        assert (twin.data_ptr() == p.data_ptr()) == (how == "copy")
        assert set(twin.__dict__) == set(before) and dict(p.__dict__) == before
        for name in KEYS_4BIT:
            assert getattr(twin, name) == getattr(p, name), name
        assert (twin.quant_state is p.quant_state) == (how == "copy" or not quantized)

    def test_state_for_pickling_holds_everything(self):
        p = Params4bit(torch.randn(8, 64)).to("cpu")
        state = p.__getstate__()
        assert set(state) == KEYS_4BIT | {"data", "requires_grad"}
        assert set(p.__dict__) == KEYS_4BIT
        q = Params4bit()
        q.__setstate__(state)
        assert_same_bytes(q.data, p.data)
        with pytest.raises(KeyError):
            q.__setstate__({"data": p.data, "requires_grad": False})

    def test_module_is_mapped_with_the_layer_that_is_copied(self):
        layer = Linear4bit(64, 8).to("cpu")
        twin = copy.deepcopy(layer)
        assert twin.weight.module is twin and twin.quant_state is twin.weight.quant_state
        assert twin.quant_state is not layer.quant_state and twin.quant_state == layer.quant_state
        assert copy.deepcopy(layer.weight).module is layer
        assert copy.copy(layer.weight).module is layer

    def test_plain_tensor_methods_return_plain_tensors(self):
        p = Params4bit(torch.randn(8, 64))
        for result in (
            p.half(),
            p.t(),
            p.view(-1),
            p.detach(),
            p.clone(),
            p.data,
            p.chunk(2)[0],
            p.split(4)[0],
        ):
            assert type(result) is torch.Tensor

    @pytest.mark.parametrize("cut", [lambda p: torch.chunk(p, 4), lambda p: torch.split(p, 64)])
    def test_function_forms_of_chunk_and_split_keep_class_and_state(self, cut):
        p = Params4bit(torch.randn(8, 64)).to("cpu")
        pieces = cut(p)
        assert isinstance(pieces, tuple) and len(pieces) == 4
        for piece in pieces:
            assert type(piece) is Params4bit and piece.quant_state is p.quant_state and piece.bnb_quantized
        assert_same_bytes(torch.cat(pieces), p.data)

    @pytest.mark.parametrize("nested", [False, True])
    def test_checkpoint_keys_resolve_by_attribute(self, nested):
        p = Params4bit(torch.randn(8, 64), compress_statistics=nested, quant_type="nf4")
        for name in ("absmax", "code", "quant_map", "offset", "state2", "nested_absmax", "nested_offset"):
            assert not hasattr(p, name)
            with pytest.raises(AttributeError, match=f"'Params4bit' object has no attribute '{name}'"):
                getattr(p, name)
        p = p.to("cpu")
        for key, value in p.quant_state.as_dict(packed=True).items():
            found = p
            for step in key.split("."):
                found = getattr(found, step)
            assert torch.equal(found, value), key
        assert hasattr(p, "nested_absmax") == hasattr(p, "nested_blocksize") == nested
        assert hasattr(p, "nested_quant_map") == hasattr(p, "nested_dtype") == nested
        assert p.code is p.quant_state.code
        if nested:
            assert p.state2 is p.quant_state.state2 and p.nested_offset is p.quant_state.offset

    @pytest.mark.parametrize("prefix", ["", "weight.", "model.layers.0.q.weight."])
    @pytest.mark.parametrize("name", ["nf4", "nf4_nested", "fp4", "nf4_nested_bf16storage"])
    def test_from_prequantized(self, device, name, prefix):
        entries = golden(f"linear4bit_{name}_state_dict")
        stats = {prefix + k.removeprefix("weight."): v for k, v in entries.items() if k.startswith("weight.")}
        layer = Linear4bit(128, 160)

        p = Params4bit.from_prequantized(entries["weight"], stats, device=device, module=layer)

        assert p.bnb_quantized and p.device.type == device and p.module is layer
        assert layer.quant_state is p.quant_state
        assert p.quant_storage == entries["weight"].dtype
        assert p.compress_statistics == ("nested" in name)
        assert p.quant_type == name.split("_")[0] and p.blocksize == 64
        assert_same_bytes(p.data, entries["weight"])
        for key, value in p.quant_state.as_dict(packed=True).items():
            assert_same_bytes(value, entries[f"weight.{key}"])

    def test_from_prequantized_names_what_is_wrong(self):
        entries = golden("linear4bit_nf4_state_dict")
        stats = {k: v for k, v in entries.items() if k.startswith("weight.")}
        blob = "weight.quant_state.bitsandbytes__nf4"
        with pytest.raises(ValueError, match="Expected packed or unpacked quant_state items"):
            Params4bit.from_prequantized(entries["weight"], {"absmax": stats["weight.absmax"]}, device="cpu")
        with pytest.raises(ValueError, match="exactly one"):
            Params4bit.from_prequantized(
                entries["weight"], {**stats, "quant_state.bitsandbytes__fp4": stats[blob]}, device="cpu"
            )
        with pytest.raises(AssertionError):
            Params4bit.from_prequantized(entries["weight"], {**stats, "bias": entries["bias"]}, device="cpu")
        with pytest.raises(ValueError, match="damaged"):
            Params4bit.from_prequantized(entries["weight"], {**stats, blob: stats[blob][:-3]}, device="cpu")


class TestInt8Params:
    def test_defaults(self):
        p = Int8Params()
        assert type(p) is Int8Params and isinstance(p, torch.nn.Parameter)
        assert p.requires_grad and not p.has_fp16_weights
        assert set(p.__dict__) == KEYS_INT8

    def test_leaving_the_cpu_quantizes_in_place(self, device):
        vectors = golden("int8")
        p = Int8Params(vectors["W"].float(), requires_grad=False)
        assert p.to(device) is p
        assert p.dtype == torch.int8 and p.CB.data_ptr() == p.data_ptr()
        assert torch.equal(p.CB.cpu(), vectors["CB"])
        assert torch.equal(p.SCB.cpu(), vectors["SCB"])
        assert set(p.__dict__) == KEYS_INT8

    def test_a_parameter_that_required_gradients_quantizes(self):
        p = Int8Params(torch.randn(4, 8)).to("cpu")
        assert p.dtype == torch.int8 and not p.requires_grad

    def test_float_weights_stay_float(self, device):
        p = Int8Params(torch.randn(4, 8), has_fp16_weights=True)
        moved = p.to(device)
        assert moved.dtype == torch.float32 and moved.CB is None and moved.has_fp16_weights

    def test_codes_move_with_their_statistics_and_are_never_cast(self, device):
        p = Int8Params(torch.randn(4, 8), requires_grad=False).to("cpu")
        for moved in (p.to(device), p.to(device, torch.float16), p.to(torch.float16), p.to(device).cpu()):
            assert type(moved) is Int8Params and moved is not p
            assert moved.dtype == torch.int8 and moved.CB.data_ptr() == moved.data_ptr()
            assert moved.SCB.device == moved.device
            assert torch.equal(moved.cpu(), p.data) and torch.equal(moved.SCB.cpu(), p.SCB)

    def test_dtype_alone_leaves_it_unquantized(self):
        p = Int8Params(torch.randn(4, 8)).to(torch.float16)
        assert type(p) is Int8Params and p.dtype == torch.float16 and p.CB is None
        assert Int8Params(torch.randn(4, 8)).to("meta").is_meta

    def test_rebuilding_from_the_dict_of_another(self, device):
        source = Int8Params(torch.randn(4, 8), requires_grad=False).to("cpu")
        options = torch.nn.Parameter.__new__(Int8Params, torch.empty(4, 8, device="meta")).__dict__
        options.update(CB=None, has_fp16_weights=False, _is_hf_initialized=True)
        options["SCB"] = source.SCB
        p = Int8Params(source.data, requires_grad=False, **options).to(device)
        assert torch.equal(p.CB.cpu(), source.data) and torch.equal(p.SCB.cpu(), source.SCB)
        assert set(p.__dict__) == KEYS_INT8

    def test_taking_an_entry_out_of_the_dict_is_harmless(self):
        p = Int8Params(torch.randn(4, 8), requires_grad=False)
        p.__dict__.pop("SCB")
        assert p.SCB is None
        assert p.to("cpu").SCB.shape == (4,)

    @pytest.mark.parametrize("quantized", [False, True])
    @pytest.mark.parametrize("how", DUPLICATES)
    def test_copies_keep_class_and_state(self, how, quantized):
        p = Int8Params(torch.randn(4, 8), requires_grad=False)
        if quantized:
            p = p.to("cpu")
        twin = DUPLICATES[how](p)
        assert type(twin) is Int8Params and set(twin.__dict__) == KEYS_INT8
        assert torch.equal(twin.data, p.data)
        assert (twin.data_ptr() == p.data_ptr()) == (how == "copy")
        assert twin.has_fp16_weights is False
        if quantized:
            assert twin.CB.data_ptr() == twin.data_ptr(), "one copy of the codes, not two"
            assert torch.equal(twin.SCB, p.SCB)
        else:
            assert twin.CB is None and twin.SCB is None


BUILDERS = {
    "Linear4bit": lambda: (Linear4bit(64, 64).to("cpu"), torch.randn(2, 64, requires_grad=True)),
    "Linear8bitLt": lambda: (
        Linear8bitLt(64, 64, has_fp16_weights=False).to("cpu"),
        torch.randn(2, 64, requires_grad=True),
    ),
    "float Linear8bitLt": lambda: (Linear8bitLt(64, 64), torch.randn(2, 64, requires_grad=True)),
    "EmbeddingNF4": lambda: (bnb.nn.EmbeddingNF4(8, 64).to("cpu"), torch.tensor([1, 2])),
    "Embedding8bit": lambda: (bnb.nn.Embedding8bit(8, 64).to("cpu"), torch.tensor([1, 2])),
    "StableEmbedding": lambda: (bnb.nn.StableEmbedding(8, 64), torch.tensor([1, 2])),
}


class TestMemory:
    """Without the garbage collector: references alone must free everything."""

    @pytest.fixture(autouse=True)
    def _no_collector(self):
        gc.collect()
        gc.disable()
        yield
        gc.enable()

    @pytest.mark.parametrize("name", BUILDERS)
    def test_layers_leave_no_cycle(self, name):
        layer, x = BUILDERS[name]()
        y = layer(x)
        if y.requires_grad:
            y.sum().backward()
        state = layer.state_dict()
        layer.load_state_dict(state)
        watched = [weakref.ref(layer), weakref.ref(layer.weight), weakref.ref(y)]
        del layer, y, state
        assert [w() for w in watched] == [None] * len(watched)

    def test_copies_leave_no_cycle(self):
        layer = pickle.loads(pickle.dumps(copy.deepcopy(Linear4bit(64, 64).to("cpu"))))
        watched = [weakref.ref(layer), weakref.ref(layer.weight)]
        del layer
        assert [w() for w in watched] == [None, None]

    def test_a_weight_outlives_its_layer(self):
        layer = Linear4bit(64, 8)
        weight = layer.weight
        del layer
        assert weight.module is None
        assert dequantize_4bit(weight.to("cpu"), weight.quant_state).shape == (8, 64)
        assert set(weight.__dict__) == KEYS_4BIT
        assert copy.deepcopy(weight).module is None
        assert isinstance(weight.quant_state, QuantState)
