"""State dicts: every module, onto every kind of target, bit for bit; and clear errors for what does not fit."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from torch import nn

from bitsandbytes.functional import dequantize_4bit, pack_dict_to_tensor, unpack_tensor_to_dict
from bitsandbytes.nn import (
    Embedding,
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    Int8Params,
    Linear4bit,
    Linear8bitLt,
    LinearFP4,
    LinearNF4,
    Params4bit,
    StableEmbedding,
)
from oracles import assert_same_bytes, golden

pytestmark = pytest.mark.filterwarnings("ignore:Embedding size:UserWarning")

BLOB = "weight.quant_state.bitsandbytes__nf4"
ASSIGN = pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])

MODULES = {
    "Linear4bit": lambda: Linear4bit(96, 48),
    "Linear4bit odd": lambda: Linear4bit(33, 7, bias=False, quant_type="nf4"),
    "Linear4bit bf16 storage": lambda: Linear4bit(96, 48, quant_type="nf4", quant_storage=torch.bfloat16),
    "Linear4bit half": lambda: Linear4bit(96, 48, compress_statistics=False).half(),
    "LinearFP4": lambda: LinearFP4(96, 48, compute_dtype=torch.bfloat16),
    "LinearNF4": lambda: LinearNF4(96, 48, compress_statistics=False),
    "Linear8bitLt": lambda: Linear8bitLt(96, 48, has_fp16_weights=False),
    "Linear8bitLt outliers": lambda: Linear8bitLt(96, 48, has_fp16_weights=False, threshold=1.0, bias=False),
    "Linear8bitLt float": lambda: Linear8bitLt(96, 48),
    "Embedding8bit": lambda: Embedding8bit(20, 48),
    "Embedding4bit": lambda: Embedding4bit(20, 64, quant_storage=torch.float32),
    "EmbeddingFP4": lambda: EmbeddingFP4(20, 48),
    "EmbeddingNF4": lambda: EmbeddingNF4(20, 64, dtype=torch.bfloat16),
    "Embedding": lambda: Embedding(20, 48),
    "StableEmbedding": lambda: StableEmbedding(20, 48),
}
PLAIN = ("Embedding", "StableEmbedding", "Linear8bitLt float")


def input_of(name, module, device="cpu"):
    if "Embedding" in name:
        return torch.randint(20, (5,), device=device)
    dtype = torch.float16 if module.bias is not None and module.bias.dtype == torch.float16 else torch.float32
    return torch.randn(5, module.in_features, device=device, dtype=dtype)


def same_state(actual, expected):
    assert list(actual) == list(expected)
    for key in expected:
        assert_same_bytes(actual[key], expected[key])


def replaced(state, **entries):
    """A copy of a state dict with some entries replaced, or removed where they are None."""
    state = {**state, **{k.replace("__", "."): v for k, v in entries.items()}}
    return {k: v for k, v in state.items() if v is not None}


@pytest.mark.filterwarnings("ignore:.*slow inference.*:UserWarning")
@ASSIGN
@pytest.mark.parametrize("target", ["fresh", "quantized", "used", "meta", "meta after use"])
@pytest.mark.parametrize("name", MODULES)
def test_round_trip(device, name, target, assign):
    source = MODULES[name]().to(device).eval()
    x = input_of(name, source, device)
    saved = copy.deepcopy(source.state_dict())
    expected = source(x)

    module = MODULES[name]().eval()
    if "used" in target or "use" in target:
        module.to(device)(x)
    elif target == "quantized" or (target == "fresh" and name in PLAIN):
        module.to(device)
    if "meta" in target:
        if name in PLAIN and not assign:
            pytest.skip("torch itself copies nothing into float parameters on meta")
        module.to("meta")
    elif target == "fresh" and device != "cpu":
        saved = {key: value.cpu() for key, value in saved.items()}

    result = module.load_state_dict(saved, strict=True, assign=assign)

    assert not result.missing_keys and not result.unexpected_keys
    same_state(module.state_dict(), saved)
    assert type(module.weight) is type(source.weight)
    if target == "fresh" and device != "cpu":
        module.to(device)
    assert torch.equal(module(x), expected)
    same_state(module.state_dict(), saved)


@ASSIGN
@pytest.mark.parametrize("name", MODULES)
def test_checkpoint_is_left_alone_and_shared_only_on_request(name, assign):
    source = MODULES[name]().to("cpu")
    saved = source.state_dict()
    before = copy.deepcopy(saved)
    module = nn.ModuleDict({"inner": MODULES[name]()})
    prefixed = {f"inner.{key}": value for key, value in saved.items()}

    module.load_state_dict(prefixed, assign=assign)

    assert list(prefixed) == [f"inner.{key}" for key in saved]
    same_state(saved, before)
    assert (module.inner.weight.data_ptr() == saved["weight"].data_ptr()) == assign
    if not assign:
        module.inner.weight.data.zero_()
        state = getattr(module.inner.weight, "quant_state", None)
        if state is not None:
            state.absmax.zero_()
        if isinstance(module.inner.weight, Int8Params) and module.inner.weight.SCB is not None:
            module.inner.weight.SCB.zero_()
        same_state(saved, before)


@pytest.mark.parametrize("name", MODULES)
def test_through_a_safetensors_file(tmp_path, name):
    safetensors = pytest.importorskip("safetensors.torch")
    source = MODULES[name]().to("cpu")
    safetensors.save_file(source.state_dict(), tmp_path / "model.safetensors")
    module = MODULES[name]()
    module.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"), assign=True)
    same_state(module.state_dict(), source.state_dict())


def test_a_model_of_many_layers(device):
    def build():
        return nn.Sequential(
            nn.ModuleDict({"embed": EmbeddingNF4(20, 64), "norm": nn.LayerNorm(64)}),
            LinearNF4(64, 64),
            nn.Sequential(Linear8bitLt(64, 64, has_fp16_weights=False), LinearFP4(64, 8, bias=False)),
        )

    source = build().to(device)
    module = build()
    module.load_state_dict(source.state_dict(), strict=True)
    same_state(
        {k: v.cpu() for k, v in module.state_dict().items()},
        {k: v.cpu() for k, v in source.state_dict().items()},
    )
    x = torch.randn(3, 64, device=device)
    assert torch.equal(module[1:].to(device).eval()(x), source[1:].eval()(x))


class TestPublishedFourBitFiles:
    NAMES = ("nf4", "nf4_nested", "fp4", "nf4_nested_bf16storage")

    @pytest.mark.parametrize("name", NAMES)
    def test_load_and_save_again(self, device, name):
        saved = golden(f"linear4bit_{name}_state_dict")
        layer = Linear4bit(128, 160).to(device)
        layer.load_state_dict(saved)
        own = layer.state_dict()
        assert own.keys() == saved.keys()
        for key in saved:
            assert_same_bytes(own[key], saved[key])
        assert layer.weight.module is layer and layer.quant_state is layer.weight.quant_state
        assert (layer.weight.quant_type, layer.weight.blocksize) == (name.split("_")[0], 64)
        assert layer.quant_storage == layer.weight.quant_storage == saved["weight"].dtype
        assert layer.weight.compress_statistics == ("nested" in name)

    @pytest.mark.parametrize("name", NAMES)
    def test_agree_with_from_prequantized(self, name):
        saved = golden(f"linear4bit_{name}_state_dict")
        layer = Linear4bit(128, 160)
        layer.load_state_dict(saved)
        stats = {k: v for k, v in saved.items() if k.startswith("weight.")}
        p = Params4bit.from_prequantized(saved["weight"], stats, device="cpu")
        assert p.quant_state == layer.quant_state
        assert torch.equal(
            dequantize_4bit(p.data, p.quant_state), dequantize_4bit(layer.weight, layer.quant_state)
        )

    @pytest.mark.parametrize("name", NAMES)
    def test_unpacked_entries_load_as_well(self, name):
        saved = golden(f"linear4bit_{name}_state_dict")
        blob = next(k for k in saved if ".bitsandbytes__" in k)
        unpacked = {f"weight.{k}": v for k, v in unpack_tensor_to_dict(saved[blob]).items()}
        layer = Linear4bit(128, 160)
        layer.load_state_dict({**{k: v for k, v in saved.items() if k != blob}, **unpacked})
        same_state({k: layer.state_dict()[k] for k in sorted(saved)}, {k: saved[k] for k in sorted(saved)})

    def test_any_valid_json_is_read(self):
        saved = golden("linear4bit_nf4_nested_state_dict")
        facts = unpack_tensor_to_dict(saved[BLOB])
        text = json.dumps(dict(reversed(facts.items())), indent=3)
        layer = Linear4bit(128, 160)
        layer.load_state_dict({**saved, BLOB: torch.tensor(list(text.encode()), dtype=torch.uint8)})
        assert_same_bytes(layer.state_dict()[BLOB], saved[BLOB])

    def test_offset_keeps_its_digits_under_another_default_dtype(self, default_dtype):
        saved = golden("linear4bit_nf4_nested_state_dict")
        layer = Linear4bit(128, 160, compute_dtype=torch.float32)
        default_dtype(torch.bfloat16)
        layer.load_state_dict(saved)
        assert layer.quant_state.offset.dtype == torch.float32
        assert_same_bytes(layer.state_dict()[BLOB], saved[BLOB])

    def test_statistics_that_a_loader_cast_are_taken_back(self):
        saved = dict(golden("linear4bit_nf4_state_dict"))
        saved["weight.absmax"] = saved["weight.absmax"].half()
        layer = Linear4bit(128, 160)
        layer.load_state_dict(saved)
        assert layer.quant_state.absmax.dtype == torch.float32


class TestFourBitTargets:
    @ASSIGN
    @pytest.mark.parametrize(
        "options",
        [{"quant_type": "fp4"}, {"compress_statistics": False}, {"quant_storage": torch.bfloat16}],
        ids=lambda o: next(iter(o)),
    )
    @pytest.mark.parametrize("quantized", [False, True])
    def test_take_the_format_of_the_checkpoint(self, options, quantized, assign):
        source = Linear4bit(96, 48, quant_type="nf4").to("cpu")
        module = Linear4bit(96, 48, **options)
        if quantized:
            module.to("cpu")
        module.load_state_dict(source.state_dict(), assign=assign)
        same_state(module.state_dict(), source.state_dict())
        x = torch.randn(2, 96)
        assert torch.equal(module(x), source(x))
        assert type(module.weight) is Params4bit and module.weight.module is module

    @pytest.mark.parametrize("blocksize", [32, 256])
    def test_block_sizes(self, blocksize):
        source = LinearNF4(96, 48)
        source.weight.blocksize = blocksize
        source.to("cpu")
        module = LinearNF4(96, 48)
        module.load_state_dict(source.state_dict())
        assert module.weight.blocksize == blocksize
        same_state(module.state_dict(), source.state_dict())

    def test_a_quantized_target_keeps_its_memory(self):
        module = LinearNF4(96, 48).to("cpu")
        weight, address = module.weight, module.weight.data_ptr()
        module.load_state_dict(LinearNF4(96, 48).to("cpu").state_dict())
        assert module.weight is weight and weight.data_ptr() == address

    def test_shared_weights_stay_shared(self):
        model = nn.Sequential(LinearNF4(64, 64), LinearNF4(64, 64))
        model[1].weight = model[0].weight
        source = copy.deepcopy(model).to("cpu")
        model.load_state_dict(source.state_dict())
        assert model[1].weight is model[0].weight
        assert model[0].quant_state is model[1].quant_state is model[0].weight.quant_state

    def test_a_layer_of_one_format_refuses_the_other(self):
        for source, target in ((LinearFP4, LinearNF4), (LinearNF4, LinearFP4)):
            saved = source(96, 48).to("cpu").state_dict()
            with pytest.raises(RuntimeError, match=r"holds (nf4|fp4), the checkpoint (nf4|fp4)"):
                target(96, 48).load_state_dict(saved)
        with pytest.raises(RuntimeError, match="EmbeddingNF4 holds nf4, the checkpoint fp4"):
            EmbeddingNF4(20, 64).load_state_dict(EmbeddingFP4(20, 64).to("cpu").state_dict())

    @ASSIGN
    def test_float_checkpoints_load_into_unquantized_layers(self, device, assign):
        linear = nn.Linear(96, 48)
        layer = LinearNF4(96, 48)
        layer.load_state_dict(linear.state_dict(), assign=assign)
        assert torch.equal(layer.weight, linear.weight) and not layer.weight.bnb_quantized
        assert type(layer.weight) is Params4bit and layer.weight.module is layer
        assert layer.to(device).quant_state is not None

    def test_keys_of_an_unquantized_layer(self):
        assert list(LinearNF4(96, 48).state_dict()) == ["weight", "bias"]
        assert list(EmbeddingNF4(20, 64).state_dict()) == ["weight"]

    def test_values_are_detached_unless_asked(self):
        layer = LinearNF4(96, 48).to("cpu")
        assert type(layer.state_dict()["weight"]) is torch.Tensor
        kept = layer.state_dict(keep_vars=True)
        assert kept["weight"] is layer.weight and kept["bias"] is layer.bias

    def test_files_are_small(self):
        def size(state):
            return sum(v.nbytes for v in state.values())

        exact = nn.Linear(400, 300)
        four, eight = Linear4bit(400, 300).to("cpu"), Linear8bitLt(400, 300, has_fp16_weights=False).to("cpu")
        assert size(four.state_dict()) < 0.29 * size(exact.half().state_dict())
        assert size(eight.state_dict()) < 0.50 * size(exact.float().state_dict())


def damaged_json(state):
    blob = state[BLOB].clone()
    blob[5] = 0xFF
    return {**state, BLOB: blob}


def edited_json(**changes):
    def edit(state):
        facts = {**unpack_tensor_to_dict(state[BLOB]), **changes}
        return {**state, BLOB: pack_dict_to_tensor({k: v for k, v in facts.items() if v != "removed"})}

    return edit


def without(*keys):
    return lambda state: {k: v for k, v in state.items() if k not in keys}


def with_entry(key, change):
    return lambda state: {**state, key: change(state.get(key))}


FOUR_BIT_DAMAGE = {
    "no weight": (without("weight"), r"Missing key.*weight"),
    "no absmax": (without("weight.absmax"), r"While loading weight.*absmax.*missing"),
    "no quant_map": (without("weight.quant_map"), r"quant_map.*missing"),
    "no blob": (without(BLOB), r"Expected packed or unpacked quant_state items"),
    "no nested_quant_map": (without("weight.nested_quant_map"), r"nested_quant_map.*missing"),
    "no nested_absmax": (without("weight.nested_absmax"), r"absmax must be floating point without nested"),
    "no statistics": (
        lambda s: {k: s[k] for k in ("weight", "bias")},
        r"size mismatch for weight.*without their stat",
    ),
    "truncated codes": (with_entry("weight", lambda t: t[:-3]), r"must have 3072 bytes, got 3069"),
    "too many codes": (with_entry("weight", lambda t: torch.cat([t, t])), r"must have 3072 bytes, got 6144"),
    "codes of another dtype": (with_entry("weight", lambda t: t.int()), r"packed codes must be one of"),
    "codes that are no tensor": (with_entry("weight", lambda t: t.tolist()), r"expected a tensor"),
    "truncated absmax": (with_entry("weight.absmax", lambda t: t[:-1]), r"absmax must have 96 values"),
    "truncated nested_absmax": (
        with_entry("weight.nested_absmax", lambda t: t[:0]),
        r"nested_absmax must have 1 val",
    ),
    "truncated quant_map": (
        with_entry("weight.quant_map", lambda t: t[:-1]),
        r"quant_map must have 16 values",
    ),
    "truncated blob": (with_entry(BLOB, lambda t: t[:-1]), r"blob is damaged"),
    "empty blob": (with_entry(BLOB, lambda t: t[:0]), r"blob is damaged"),
    "damaged blob": (damaged_json, r"blob is damaged"),
    "blob that is a list": (with_entry(BLOB, lambda t: pack_dict_to_tensor([1])), r"expected a JSON object"),
    "unknown format": (edited_json(quant_type="nf5"), r"'nf5'"),
    "format unlike the key": (edited_json(quant_type="fp4"), r"bitsandbytes__nf4.*'fp4'"),
    "unknown block size": (edited_json(blocksize=65), r"blocksize must be one of.*65"),
    "block size of text": (edited_json(blocksize="64"), r"blocksize must be one of.*'64'"),
    "unknown dtype": (edited_json(dtype="float17"), r"float17"),
    "integer dtype": (edited_json(dtype="int8"), r"dtype must be one of"),
    "another shape": (edited_json(shape=[96, 48]), r"size mismatch.*\[96, 48\].*\[64, 96\]"),
    "no shape": (edited_json(shape=None), r"size mismatch"),
    "shape of text": (edited_json(shape=["64", "96"]), r"cannot be read"),
    "no dtype": (edited_json(dtype="removed"), r"dtype.*missing"),
    "unknown fact": (edited_json(rotation="hadamard"), r"rotation"),
    "unknown second level": (edited_json(nested_blocksize=0), r"nested_blocksize"),
    "two blobs": (
        with_entry("weight.quant_state.bitsandbytes__fp4", lambda _: torch.zeros(3, dtype=torch.uint8)),
        r"exactly one",
    ),
    "unknown key": (
        with_entry("weight.zero_point", lambda _: torch.zeros(1)),
        r"Unexpected key.*weight.zero_point",
    ),
    "unknown key of the layer": (with_entry("scale", lambda _: torch.zeros(1)), r"Unexpected key.*scale"),
    "float values": (
        lambda s: {"weight": torch.randn(64, 96), "bias": s["bias"]},
        r"(size mismatch for weight.*this layer is quantized)|accepted",
    ),
}


@ASSIGN
@pytest.mark.parametrize("quantized", [False, True], ids=["fresh", "quantized"])
@pytest.mark.parametrize("damage", FOUR_BIT_DAMAGE)
def test_damaged_4_bit_checkpoints_are_named_and_change_no_weight(damage, quantized, assign):
    edit, message = FOUR_BIT_DAMAGE[damage]
    saved = edit(LinearNF4(96, 64).to("cpu").state_dict())
    module = Linear4bit(96, 64, quant_type="nf4")
    if quantized:
        module.to("cpu")
    elif damage == "float values":
        pytest.skip("an unquantized layer takes float values")
    before = copy.deepcopy(module.state_dict())

    if damage == "no statistics" and quantized:
        message = r"Missing key.*weight\.absmax"
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(saved, assign=assign)

    if "unknown key" not in damage and damage not in ("no weight", "no statistics"):
        assert_same_bytes(module.state_dict()["weight"], before["weight"])
        assert module.state_dict().keys() == before.keys()


@pytest.mark.parametrize("cls", [LinearNF4, Linear8bitLt])
def test_a_program_may_quantize_in_a_hook_of_its_own(cls):
    """A quantized layer that takes float checkpoints because its owner quantizes them on the way in."""
    options = {} if cls is LinearNF4 else {"has_fp16_weights": False}
    layer, exact = cls(96, 64, **options).to("cpu"), nn.Linear(96, 64)

    def quantize(state_dict, *_):
        layer.weight = type(layer.weight)(state_dict.pop("weight"), requires_grad=False).to("cpu")

    layer._register_load_state_dict_pre_hook(quantize)
    result = layer.load_state_dict(exact.state_dict(), strict=False)

    assert result.missing_keys == ["weight"]
    x = torch.randn(2, 96)
    assert (layer(x) - exact(x)).norm() < 0.2 * exact(x).norm()


def test_unknown_keys_are_skipped_when_loading_is_not_strict():
    source = LinearNF4(96, 64).to("cpu")
    module = LinearNF4(96, 64)
    result = module.load_state_dict(
        {**source.state_dict(), "weight.zero_point": torch.zeros(1)}, strict=False
    )
    assert result.unexpected_keys == ["weight.zero_point"] and not result.missing_keys
    same_state(module.state_dict(), source.state_dict())


def test_damage_raises_when_loading_is_not_strict_either():
    saved = LinearNF4(96, 64).to("cpu").state_dict()
    del saved["weight.absmax"]
    with pytest.raises(RuntimeError, match="absmax"):
        LinearNF4(96, 64).load_state_dict(saved, strict=False)


class TestEightBit:
    @pytest.fixture
    def saved(self):
        return dict(golden("linear8bitlt_state_dict"))

    @pytest.fixture
    def layer(self):
        return Linear8bitLt(64, 24, has_fp16_weights=False)

    @ASSIGN
    @pytest.mark.parametrize("used", [False, True])
    def test_published_file(self, saved, layer, used, assign):
        if used:
            layer.to("cpu")(torch.randn(2, 64))
        layer.load_state_dict(saved, assign=assign)
        own = layer.state_dict()
        assert own.keys() == saved.keys()
        for key in saved:
            assert_same_bytes(own[key], saved[key])
        layer(torch.randn(2, 64))
        assert layer.state.CB.data_ptr() == layer.weight.data_ptr()
        assert torch.equal(layer.state.SCB, saved["SCB"])

    def test_a_used_layer_keeps_its_statistics_tensor(self, saved, layer):
        layer.to("cpu")(torch.randn(2, 64))
        address = layer.state.SCB.data_ptr()
        layer.load_state_dict(saved)
        assert layer.state.SCB.data_ptr() == address
        assert torch.equal(layer.state.SCB, saved["SCB"])

    @pytest.mark.parametrize("found", [0, "row", torch.tensor(0), torch.tensor(0, dtype=torch.uint8), None])
    def test_row_major_in_every_spelling(self, saved, layer, found):
        layer.load_state_dict(replaced(saved, weight_format=found))
        assert_same_bytes(layer.state_dict()["weight"], saved["weight"])

    @pytest.mark.parametrize(
        ("found", "message"),
        [
            (1, "Only 'row' weight format is supported, got col32"),
            (2, "Only 'row' weight format is supported, got col_turing"),
            (torch.tensor(3, dtype=torch.uint8), "Only 'row' weight format is supported, got col_ampere"),
            ("col_turing", "Only 'row' weight format is supported, got col_turing"),
            (4, "Expected supported weight format - got 4"),
        ],
    )
    @pytest.mark.parametrize("quantized", [False, True])
    def test_other_layouts_are_refused(self, saved, layer, found, message, quantized):
        if quantized:
            layer.to("cpu")
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(ValueError, match=message):
            layer.load_state_dict(replaced(saved, weight_format=found))
        same_state(layer.state_dict(), before)

    def test_the_hook_ignores_checkpoints_without_the_weight(self, saved, layer):
        with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
            layer.to("cpu").load_state_dict({"bias": saved["bias"], "SCB": saved["SCB"]})

    def test_float_layers_refuse_codes(self, saved):
        message = "Loading a quantized checkpoint into non-quantized Linear8bitLt is not supported"
        with pytest.raises(RuntimeError, match=message):
            Linear8bitLt(64, 24, has_fp16_weights=True).load_state_dict(saved)

    def test_missing_statistics_leave_the_old_ones(self, saved, layer):
        layer.to("cpu")
        old = layer.weight.SCB.clone()
        layer.load_state_dict(replaced(saved, SCB=None, weight_format=None))
        assert torch.equal(layer.weight.SCB, old)
        assert torch.equal(layer.weight.data, saved["weight"])

    @pytest.mark.parametrize(
        ("edit", "message", "quantized"),
        [
            (lambda s: replaced(s, SCB=None), "size mismatch for weight.*without their statistics", False),
            (lambda s: replaced(s, SCB=s["SCB"][:-1]), "SCB must hold 24", True),
            (lambda s: replaced(s, SCB=s["SCB"][:-1]), "SCB must hold 24", False),
            (lambda s: replaced(s, SCB=s["SCB"].int()), "SCB must hold 24", True),
            (lambda s: replaced(s, weight=s["weight"][:, :-1]), "size mismatch", True),
            (lambda s: replaced(s, weight=s["weight"].float()), "expected int8 codes", True),
            (lambda s: {"weight": s["weight"].float(), "bias": s["bias"]}, "expected int8 codes", True),
            (lambda s: replaced(s, other=s["SCB"]), "Unexpected key", True),
            (lambda s: {"SCB": s["SCB"][:-1], "bias": s["bias"]}, "size mismatch for SCB", True),
        ],
    )
    def test_what_does_not_fit_is_named(self, saved, layer, edit, message, quantized):
        if quantized:
            layer.to("cpu")
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(edit(saved))
        if "Unexpected" not in message:
            same_state(
                {k: v for k, v in layer.state_dict().items() if k != "bias"}, replaced(before, bias=None)
            )

    def test_a_tied_float_weight_refuses_codes(self, saved, layer):
        layer.weight = nn.Parameter(torch.randn(24, 64))
        with pytest.raises(RuntimeError, match="not supported"):
            layer.load_state_dict(saved)

    def test_an_embedding_takes_a_layer_s_rows(self, saved):
        """The same keys mean the same thing: tied output layers and embeddings exchange them."""
        embedding = Embedding8bit(24, 64)
        embedding.load_state_dict(replaced(saved, bias=None))
        assert list(embedding.state_dict()) == ["weight", "SCB", "weight_format"]
        expected = saved["weight"] * (saved["SCB"] / 127).view(-1, 1)
        torch.testing.assert_close(embedding(torch.arange(24)), expected)


def test_every_pair_of_devices(accelerators):
    """What one device saved, another loads; the codes stay the same bytes."""
    for source_device, device in itertools.product(["cpu", *accelerators], repeat=2):
        for name in MODULES:
            source = MODULES[name]().to(source_device)
            module = MODULES[name]().to(device)
            module.load_state_dict(source.state_dict())
            assert module.weight.device.type == device
            own, saved = module.state_dict(), source.state_dict()
            same_state({k: v.cpu() for k, v in own.items()}, {k: v.cpu() for k, v in saved.items()})
