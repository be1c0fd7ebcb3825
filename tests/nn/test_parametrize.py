"""4-bit parametrization: access, checkpoints, the cache that one forward uses, moves and copies."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize as P
from torch.utils.checkpoint import checkpoint

from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import parametrize as bnb_parametrize
from bitsandbytes.nn.parametrize import (
    Bnb4bitParametrization,
    replace_parameter_4bit,
    replace_parameter_4bit_prequantized,
)
from oracles import QUANT_TYPES, assert_same_bytes


class Experts(nn.Module):
    """A stack of expert weights, as mixture-of-experts models keep them; reads each parameter twice."""

    def __init__(self, shape=(4, 24, 16), dtype=torch.float32):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(shape, dtype=dtype))
        self.down = nn.Parameter(torch.randn(shape, dtype=dtype))
        self.bias = nn.Parameter(torch.randn(shape[-1]))

    def forward(self, x):
        return x * self.gate.float().sum() + self.gate.float().mean() * self.down.float().mean() + self.bias


def quantized_experts(device="cpu", **options):
    module = Experts().to(device)
    for name in ("gate", "down"):
        replace_parameter_4bit(module, name, **options)
    return module


@pytest.fixture(autouse=True)
def _cache_is_left_as_it_was():
    yield
    assert P._cache_enabled == 0
    assert P._cache == {}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(7,), (33, 5), (4, 24, 16), (2, 3, 5, 7)])
def test_any_rank_reads_as_it_was(device, shape, dtype, quant_type, nested):
    module = nn.Module()
    module.stack = nn.Parameter(torch.randn(shape, device=device, dtype=dtype))
    packed, state = quantize_4bit(
        module.stack.data, blocksize=32, compress_statistics=nested, quant_type=quant_type
    )

    replace_parameter_4bit(module, "stack", compress_statistics=nested, quant_type=quant_type, blocksize=32)

    assert module.stack.shape == shape and module.stack.dtype == dtype and not module.stack.requires_grad
    assert torch.equal(module.stack, dequantize_4bit(packed, state))
    assert_same_bytes(module.parametrizations.stack.original.data, packed)
    parametrization = module.parametrizations.stack[0]
    assert type(parametrization) is Bnb4bitParametrization and parametrization.quant_state == state


def test_defaults_are_nf4_plain_blocks_of_64():
    state = quantized_experts().parametrizations.gate[0].quant_state
    assert (state.quant_type, state.blocksize, state.nested) == ("nf4", 64, False)


@pytest.mark.parametrize("nested", [False, True])
def test_prequantized(device, nested):
    values = torch.randn(4, 24, 16)
    packed, state = quantize_4bit(values, compress_statistics=nested, quant_type="nf4")
    entries = {f"experts.gate.{k}": v for k, v in state.as_dict(packed=True).items()}
    module = nn.Module()
    module.gate = nn.Parameter(packed, requires_grad=False)

    replace_parameter_4bit_prequantized(module, "gate", entries, device)

    assert module.gate.device.type == device
    assert torch.equal(module.gate.cpu(), dequantize_4bit(packed, state))


@pytest.mark.parametrize("replace", [replace_parameter_4bit, replace_parameter_4bit_prequantized])
def test_what_is_no_parameter_is_named(replace):
    more = () if replace is replace_parameter_4bit else ({}, "cpu")
    module = Experts()
    module.number = 3
    with pytest.raises(AttributeError, match="Module does not have parameter 'missing'"):
        replace(module, "missing", *more)
    with pytest.raises(TypeError, match=r"Parameter 'number' is not an instance of nn\.Parameter"):
        replace(module, "number", *more)


@pytest.mark.parametrize("options", [{"quant_type": "int4"}, {"blocksize": 48}])
def test_bad_options_are_named_and_change_nothing(options):
    module = Experts()
    with pytest.raises(ValueError, match=next(iter(options))):
        replace_parameter_4bit(module, "gate", **options)
    assert isinstance(module.gate, nn.Parameter) and not P.is_parametrized(module)


class TestCheckpoints:
    @pytest.mark.parametrize("nested", [False, True])
    def test_keys_are_those_of_a_4_bit_layer(self, nested):
        state = nn.Sequential(quantized_experts(compress_statistics=nested)).state_dict()
        entries = [
            "absmax",
            "quant_map",
            "nested_absmax",
            "nested_quant_map",
            "quant_state.bitsandbytes__nf4",
        ]
        entries = [e for e in entries if nested or not e.startswith("nested")]
        expected = {"0.bias"} | {f"0.{n}" for n in ("gate", "down")}
        expected |= {f"0.{n}.{e}" for n in ("gate", "down") for e in entries}
        assert set(state) == expected

    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("target", ["same device", "meta"])
    @pytest.mark.parametrize("nested", [False, True])
    def test_round_trip(self, device, nested, target, assign):
        source = nn.Sequential(quantized_experts(device, compress_statistics=nested))
        saved = source.state_dict()
        loaded = nn.Sequential(quantized_experts(device, compress_statistics=not nested, quant_type="fp4"))
        if target == "meta":
            loaded.to("meta")
            if not assign:
                loaded[0].bias = nn.Parameter(torch.empty_like(loaded[0].bias, device=device))

        loaded.load_state_dict(saved, strict=True, assign=assign)

        assert loaded.state_dict().keys() == saved.keys()
        for key, value in saved.items():
            assert_same_bytes(loaded.state_dict()[key], value)
        assert torch.equal(loaded[0].gate, source[0].gate)
        x = torch.randn(2, 16, device=device)
        assert torch.equal(loaded(x), source(x))
        shares = loaded[0].parametrizations.gate.original.data_ptr() == saved["0.gate"].data_ptr()
        assert shares == assign

    def test_loading_leaves_the_checkpoint_alone(self):
        saved = quantized_experts().state_dict()
        keys, values = list(saved), {k: v.clone() for k, v in saved.items()}
        module = quantized_experts()
        module.load_state_dict(saved)
        module.parametrizations.gate.original.data.zero_()
        assert list(saved) == keys
        for key, value in values.items():
            assert_same_bytes(saved[key], value)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda s: s.pop("gate"), "Missing key"),
            (lambda s: s.pop("gate.absmax"), "gate.*absmax"),
            (lambda s: [s.pop(k) for k in list(s) if k.startswith("gate.")], "no quantization entries"),
            (lambda s: s.update({"gate": s["gate"][:-1]}), "gate.*bytes"),
            (lambda s: s.update({"gate.absmax": s["gate.absmax"][:-1]}), "absmax must have"),
            (lambda s: s.update({"gate.extra": torch.ones(1)}), "gate.extra"),
            (lambda s: s["gate.quant_state.bitsandbytes__nf4"].__setitem__(0, 0), "damaged"),
            (lambda s: s.update({"gate": torch.randn(4, 24, 16)}), "gate"),
        ],
    )
    def test_damage_is_named_and_changes_nothing(self, damage, message):
        saved = copy.deepcopy(quantized_experts().state_dict())
        damage(saved)
        module = quantized_experts()
        before = module.gate.clone()
        with pytest.raises(RuntimeError, match=message):
            module.load_state_dict(saved)
        if "extra" not in message and "Missing" not in message:
            assert torch.equal(module.gate, before)

    def test_another_shape_is_refused(self):
        module = Experts((4, 24, 8))
        for name in ("gate", "down"):
            replace_parameter_4bit(module, name)
        with pytest.raises(RuntimeError, match="size mismatch"):
            module.load_state_dict(quantized_experts().state_dict())


class TestCache:
    def test_one_forward_decodes_once(self, monkeypatch):
        module = quantized_experts()
        count = []
        decode = bnb_parametrize.dequantize_4bit
        monkeypatch.setattr(bnb_parametrize, "dequantize_4bit", lambda *a: count.append(1) or decode(*a))
        module(torch.randn(2, 16))
        assert len(count) == 2, "gate is read twice, down once"
        module(torch.randn(2, 16))
        assert len(count) == 4

    def test_counter_is_balanced_when_a_forward_raises(self):
        module = quantized_experts()
        with pytest.raises(RuntimeError):
            module(torch.randn(2, 17))
        assert P._cache_enabled == 0

    def test_counter_is_balanced_under_checkpointing(self):
        """Non-reentrant checkpointing stops a recomputation by raising from inside the forward."""
        module = quantized_experts()
        x = torch.randn(2, 16, requires_grad=True)
        expected = torch.autograd.grad(module(x).sum(), x)[0]
        for _ in range(2):
            (gradient,) = torch.autograd.grad(checkpoint(module, x, use_reentrant=False).sum(), x)
            assert torch.equal(gradient, expected)
        assert P._cache_enabled == 0

    def test_counter_never_goes_negative(self):
        bnb_parametrize._disable_parametrization_cache(nn.Module(), (), None)
        assert P._cache_enabled == 0
        bnb_parametrize._enable_parametrization_cache(nn.Module(), ())
        assert P._cache_enabled == 1
        bnb_parametrize._disable_parametrization_cache(nn.Module(), (), None)


def test_moves_take_the_state_along_and_casts_leave_it_alone(device):
    module = nn.Sequential(quantized_experts("cpu", compress_statistics=True))
    before = module[0].gate.clone()
    module.half().to(device)
    assert module[0].gate.device.type == device
    assert torch.equal(module[0].gate.cpu(), before)
    saved = module.state_dict()
    module.to("meta")
    assert module[0].gate.is_meta and module[0].gate.shape == before.shape
    module.to_empty(device=device).load_state_dict(saved)
    assert torch.equal(module[0].gate.cpu(), before)


def test_deepcopy_computes_the_same_and_shares_nothing():
    module = quantized_experts()
    twin = copy.deepcopy(module)
    x = torch.randn(2, 16)
    assert torch.equal(twin(x), module(x))
    twin.parametrizations.gate.original.data.zero_()
    assert not torch.equal(twin.gate, module.gate)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin.gate, module.gate)
    assert list(twin.state_dict()) == list(module.state_dict())


def test_a_copy_inside_another_forward_reads_its_own_values():
    class Outer(Experts):
        def forward(self, x):
            return self.first.gate, self.second.gate

    outer = Outer()
    replace_parameter_4bit(outer, "gate")
    outer.first = quantized_experts()
    outer.second = copy.deepcopy(outer.first)
    outer.second.parametrizations.gate.original.data.zero_()
    first, second = outer(None)
    assert torch.equal(first, outer.first.gate)
    assert torch.equal(second, outer.second.gate)
    assert not torch.equal(first, second)


def test_assignment_is_refused():
    module = quantized_experts()
    with pytest.raises(RuntimeError, match="right_inverse"):
        module.gate = torch.zeros(4, 24, 16)


def test_removing_the_parametrization_leaves_the_packed_parameter():
    module = quantized_experts()
    packed = module.parametrizations.gate.original
    P.remove_parametrizations(module, "gate", leave_parametrized=False)
    assert module.gate is packed
    assert "gate.absmax" not in module.state_dict()
    module.load_state_dict(module.state_dict())


def test_memory_returns_without_the_garbage_collector():
    gc.collect()
    gc.disable()
    try:
        module = quantized_experts()
        module(torch.randn(2, 16))
        watched = [weakref.ref(module), weakref.ref(module.parametrizations.gate.original)]
        del module
        assert [w() for w in watched] == [None, None]
    finally:
        gc.enable()


def test_state_dict_hook_without_a_packed_parameter_does_nothing():
    state = {"other": torch.ones(1)}
    bnb_parametrize._parametrized_state_dict_post_hook(
        quantized_experts(), state, "prefix.", {}, param_name="gate"
    )
    assert list(state) == ["other"]


def test_repr_tells_the_format():
    text = repr(quantized_experts())
    for part in ("nf4", "blocksize=64", "nested=False", "shape=[4, 24, 16]", "dtype=torch.float32"):
        assert part in text
