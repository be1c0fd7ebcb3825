"""Checkpoints that earlier releases wrote load, and give the same numbers; what is written here has the same keys."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch

import bitsandbytes as bnb
import oracles
from bitsandbytes import functional as F
from oracles import assert_same_bytes, golden

FOUR_BIT = ["nf4", "nf4_nested", "fp4", "nf4_nested_bf16storage"]


def saved_linear4bit(name: str, prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + key: value.clone() for key, value in golden(f"linear4bit_{name}_state_dict").items()}


def options(name: str) -> dict:
    return {
        "quant_type": name.split("_")[0],
        "compress_statistics": "nested" in name,
        "quant_storage": torch.bfloat16 if "bf16storage" in name else torch.uint8,
        "compute_dtype": torch.float32,
    }


def expected_weight(name: str) -> torch.Tensor:
    """The weight as the published recipe decodes it."""
    saved, quant_type = golden(f"linear4bit_{name}_state_dict"), name.split("_")[0]
    absmax = saved["weight.absmax"]
    if "nested" in name:
        meta = json.loads(bytes(saved["weight.quant_state.bitsandbytes__nf4"].tolist()))
        offset = torch.tensor(meta["nested_offset"], dtype=torch.float32)
        absmax = oracles.expand_nested(
            absmax, saved["weight.nested_absmax"], saved["weight.nested_quant_map"], offset
        )
    return oracles.dequantize_4bit(saved["weight"], absmax, 64, quant_type, (160, 128), torch.float16)


def empty_linear4bit(name: str, device: str = "cpu") -> bnb.nn.Linear4bit:
    return bnb.nn.Linear4bit(128, 160, device=device, **options(name))


# --- through Params4bit.from_prequantized ----------------------------------------------------------------------


def prequantized(name: str, prefix: str = "", device="cpu", module=None) -> bnb.nn.Params4bit:
    saved = saved_linear4bit(name, prefix)
    stats = {key: value for key, value in saved.items() if key.startswith(prefix + "weight.")}
    return bnb.nn.Params4bit.from_prequantized(saved[prefix + "weight"], stats, device=device, module=module)


@pytest.mark.parametrize("prefix", ["", "model.layers.0.self_attn.q_proj."])
@pytest.mark.parametrize("name", FOUR_BIT)
def test_prequantized_weight_decodes_exactly(device, name, prefix):
    for where in (device, torch.device(device)):
        weight = prequantized(name, prefix, where)

        assert type(weight) is bnb.nn.Params4bit
        assert weight.device.type == device and weight.bnb_quantized and not weight.requires_grad
        assert weight.quant_type == name.split("_")[0] and weight.blocksize == 64
        assert weight.compress_statistics is ("nested" in name)
        assert weight.quant_storage == options(name)["quant_storage"] == weight.dtype
        assert_same_bytes(F.dequantize_4bit(weight.data, weight.quant_state), expected_weight(name))


@pytest.mark.parametrize("name", FOUR_BIT)
def test_prequantized_weight_hands_its_state_to_the_module(name):
    layer = empty_linear4bit(name)

    layer.weight = prequantized(name, module=layer)

    assert layer.quant_state is layer.weight.quant_state
    assert layer.weight.module is layer


@pytest.mark.parametrize("name", FOUR_BIT)
def test_statistics_without_the_weights_prefix(name):
    saved = saved_linear4bit(name)
    bare = {key.removeprefix("weight."): value for key, value in saved.items() if key.startswith("weight.")}

    weight = bnb.nn.Params4bit.from_prequantized(saved["weight"], bare, device="cpu")

    assert_same_bytes(F.dequantize_4bit(weight.data, weight.quant_state), expected_weight(name))


def test_prequantized_weight_refuses_what_is_not_its_own():
    saved = saved_linear4bit("nf4")
    stats = {key: value for key, value in saved.items() if key.startswith("weight.")}

    with pytest.raises(AssertionError):
        bnb.nn.Params4bit.from_prequantized(saved["weight"], {**stats, "bias": saved["bias"]}, device="cpu")
    blob = "weight.quant_state.bitsandbytes__nf4"
    without = {key: value for key, value in stats.items() if key != blob}
    with pytest.raises(ValueError, match="Expected packed or unpacked quant_state items"):
        bnb.nn.Params4bit.from_prequantized(saved["weight"], without, device="cpu")


@pytest.mark.parametrize("name", ["nf4", "nf4_nested", "fp4"])
def test_layer_gives_the_published_outputs_and_gradients(device, name):
    arrays = {key: value.to(device) for key, value in golden("linear4bit_io").items()}
    layer = empty_linear4bit(name).to(device)
    layer.weight = prequantized(name, device=device, module=layer)
    layer.bias = torch.nn.Parameter(golden(f"linear4bit_{name}_state_dict")["bias"].clone().to(device))
    x = arrays["x"].clone().requires_grad_()

    y = layer(x)
    y.backward(arrays["grad_out"])

    torch.testing.assert_close(y, arrays[f"{name}.y"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, arrays[f"{name}.grad_x"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, arrays[f"{name}.grad_bias"], rtol=1e-5, atol=1e-5)


# --- through load_state_dict -----------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("target", ["fresh", "quantized", "meta"])
@pytest.mark.parametrize("name", FOUR_BIT)
def test_linear4bit_loads_strictly(device, name, target, assign):
    if target == "meta" and not assign:
        assign = True  # torch copies nothing into a meta tensor
    layer = empty_linear4bit(name, "meta" if target == "meta" else "cpu")
    if target == "quantized":
        layer = layer.to(device)
    saved = {
        key: value.to(device if target == "quantized" else "cpu")
        for key, value in saved_linear4bit(name).items()
    }

    result = layer.load_state_dict(saved, strict=True, assign=assign)
    layer = layer.to(device)

    assert not result.missing_keys and not result.unexpected_keys
    assert type(layer.weight) is bnb.nn.Params4bit
    assert layer.weight.bnb_quantized
    decoded = F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert_same_bytes(decoded, expected_weight(name))
    again = layer.state_dict()
    assert list(again) == list(empty_order(name))
    for key, value in saved.items():
        assert_same_bytes(again[key], value)


def empty_order(name: str) -> list[str]:
    nested = ["weight.nested_absmax", "weight.nested_quant_map"] if "nested" in name else []
    blob = f"weight.quant_state.bitsandbytes__{name.split('_')[0]}"
    return ["weight", "bias", "weight.absmax", "weight.quant_map", *nested, blob]


@pytest.mark.parametrize("name", FOUR_BIT)
def test_model_of_several_layers_loads(name):
    model = torch.nn.Sequential(
        empty_linear4bit(name), torch.nn.ReLU(), torch.nn.ModuleDict({"q": empty_linear4bit(name)})
    )
    saved = {**saved_linear4bit(name, "0."), **saved_linear4bit(name, "2.q.")}

    model.load_state_dict(saved)

    for layer in (model[0], model[2]["q"]):
        assert_same_bytes(
            F.dequantize_4bit(layer.weight.data, layer.weight.quant_state), expected_weight(name)
        )


@pytest.mark.parametrize("name", FOUR_BIT)
def test_this_release_writes_the_same_file(name):
    """Quantizing the published weight gives the published checkpoint; the nested mean may sum in another order."""
    arrays = golden("quant4bit_nested")
    layer = empty_linear4bit(name)
    layer.weight = bnb.nn.Params4bit(
        arrays["w"].clone(), module=layer, **{k: v for k, v in options(name).items() if k != "compute_dtype"}
    )
    layer.bias = torch.nn.Parameter(golden(f"linear4bit_{name}_state_dict")["bias"].clone())

    written = layer.to("cpu").state_dict()

    expected = golden(f"linear4bit_{name}_state_dict")
    assert set(written) == set(expected)
    blob = next(key for key in expected if "quant_state" in key)
    for key, value in expected.items():
        if key != blob:
            assert written[key].shape == value.shape and written[key].dtype == value.dtype
    assert_same_bytes(written["weight"], expected["weight"])
    mine, theirs = (json.loads(bytes(entries[blob].tolist())) for entries in (written, expected))
    assert list(mine) == list(theirs)
    assert mine.pop("nested_offset", 0.0) == pytest.approx(theirs.pop("nested_offset", 0.0), rel=1e-6)
    assert mine == theirs


# --- other ways to store a module ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOUR_BIT)
def test_files_and_pickles_keep_the_layer(tmp_path, name):
    from safetensors.torch import load_file, save_file

    layer = empty_linear4bit(name)
    layer.load_state_dict(saved_linear4bit(name))
    x = torch.randn(3, 128)
    expected = layer(x)

    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = empty_linear4bit(name)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    pickled = torch.load(buffer, weights_only=False)

    for again in (other, pickled, copy.deepcopy(layer)):
        assert torch.equal(again(x), expected)
        assert type(again.weight) is bnb.nn.Params4bit


def test_compressed_file_sizes(tmp_path):
    from safetensors.torch import save_file

    def size(module: torch.nn.Module) -> int:
        save_file(
            {key: value.contiguous() for key, value in module.state_dict().items()}, tmp_path / "module"
        )
        return (tmp_path / "module").stat().st_size

    linear = torch.nn.Linear(400, 300)
    four = bnb.nn.Linear4bit(400, 300, quant_type="nf4", compress_statistics=True)
    four.weight.data, four.bias.data = linear.weight.data.half(), linear.bias.data.half()
    eight = bnb.nn.Linear8bitLt(400, 300, has_fp16_weights=False)
    eight.weight.data, eight.bias.data = linear.weight.data.clone(), linear.bias.data.clone()

    assert size(four.to("cpu")) < 0.29 * size(copy.deepcopy(linear).half())
    assert size(eight.to("cpu")) < 0.5 * size(linear)


# --- 8-bit layers ----------------------------------------------------------------------------------------------


def empty_linear8bit(device: str = "cpu", threshold: float = 0.0) -> bnb.nn.Linear8bitLt:
    return bnb.nn.Linear8bitLt(64, 24, has_fp16_weights=False, threshold=threshold, device=device)


def saved_linear8bit() -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in golden("linear8bitlt_state_dict").items()}


def weight_format_variants() -> dict:
    return {
        "tensor": torch.tensor(0, dtype=torch.uint8),
        "int": 0,
        "name": "row",
        "absent": None,
    }


@pytest.mark.parametrize("variant", weight_format_variants())
@pytest.mark.parametrize("forward_first", [False, True])
def test_linear8bit_loads_every_form_of_its_format(device, variant, forward_first):
    saved = saved_linear8bit()
    saved["weight_format"] = weight_format_variants()[variant]
    if variant == "absent":
        del saved["weight_format"]
    layer = empty_linear8bit().to(device)
    if forward_first:
        layer.eval()(torch.randn(2, 64, device=device, dtype=torch.float16))

    result = layer.load_state_dict(saved, strict=True)

    assert not result.missing_keys and not result.unexpected_keys
    again = layer.state_dict()
    for key, value in saved_linear8bit().items():
        if key != "bias":  # a forward leaves the bias in the dtype of its input
            assert_same_bytes(again[key], value)
    scale = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
    decoded = F.int8_vectorwise_dequant(layer.weight.data, scale)
    torch.testing.assert_close(decoded.cpu(), golden("int8")["CB_dequant_f32"], rtol=2.4e-7, atol=0)


@pytest.mark.parametrize("name", ["col32", "col_turing", "col_ampere"])
def test_tiled_8bit_checkpoints_are_refused_by_name(name):
    number = {"col32": 1, "col_turing": 2, "col_ampere": 3}[name]
    for form in (name, number, torch.tensor(number, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=rf"Only 'row' weight format is supported, got {name}"):
            empty_linear8bit().to("cpu").load_state_dict({**saved_linear8bit(), "weight_format": form})


def test_unknown_8bit_format_number_is_refused():
    with pytest.raises(ValueError, match="Expected supported weight format - got 9"):
        empty_linear8bit().to("cpu").load_state_dict({**saved_linear8bit(), "weight_format": 9})


@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"), [("f16", 1e-2, 2e-2), ("bf16", 1e-2, 2e-2), ("f32", 1e-4, 1e-3)]
)
@pytest.mark.parametrize("threshold", [0, 6])
def test_linear8bit_gives_the_published_outputs(device, threshold, dtype, rtol, atol):
    arrays = golden("linear8bitlt_io")
    layer = empty_linear8bit(threshold=float(threshold)).to(device)
    layer.load_state_dict(saved_linear8bit())
    expected = arrays[f"y_eval_t{threshold}_{dtype}"].to(device)

    y = layer.eval()(arrays["x_f16"].to(device).to(expected.dtype))

    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=rtol, atol=atol)


def test_training_on_the_cpu_gives_the_published_outputs_and_gradients():
    arrays = golden("linear8bitlt_io")
    layer = empty_linear8bit().to("cpu")
    layer.load_state_dict(saved_linear8bit())
    x = arrays["x_f16"].float().requires_grad_()

    y = layer.train()(x)
    y.backward(arrays["grad_out"])

    torch.testing.assert_close(y, arrays["y_train_f32"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, arrays["grad_x_f32"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, arrays["grad_bias_f32"], rtol=1e-5, atol=1e-5)


def test_gradient_through_the_int8_function_is_the_same(device):
    arrays = {key: value.to(device) for key, value in golden("linear8bitlt_io").items()}
    ints = golden("int8")
    state = bnb.MatmulLtState()
    state.CB, state.SCB = ints["CB"].to(device), ints["SCB"].to(device)
    state.has_fp16_weights, state.is_training, state.threshold = False, False, 6.0
    x = arrays["x_f16"].float().requires_grad_()

    bnb.matmul(x, state.CB, state=state, threshold=6.0).backward(arrays["grad_out"])

    torch.testing.assert_close(x.grad, arrays["grad_x_lt_t6_f32"], rtol=1e-5, atol=1e-5)


def test_saved_8bit_content_is_the_same_before_and_after_a_forward(device):
    layer = empty_linear8bit().to(device)
    before = {key: value.clone() for key, value in layer.state_dict().items()}

    layer.eval()(torch.randn(2, 64, device=device))

    after = layer.state_dict()
    assert list(after) == list(before) == ["weight", "bias", "SCB", "weight_format"]
    for key, value in before.items():
        assert_same_bytes(after[key], value)
    assert after["weight_format"].shape == () and after["weight_format"].item() == 0


def test_quantized_8bit_checkpoint_into_a_float_layer_is_refused_or_loaded():
    """Never silently: either the layer becomes quantized, or the error says that it is not."""
    layer = empty_linear8bit()

    try:
        layer.load_state_dict(saved_linear8bit())
    except RuntimeError as error:
        assert "Loading a quantized checkpoint into non-quantized Linear8bitLt is not supported" in str(error)
    else:
        assert_same_bytes(layer.state_dict()["SCB"], golden("linear8bitlt_state_dict")["SCB"])
        assert layer.weight.dtype == torch.int8


# --- damaged checkpoints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["weight", "weight.absmax", "weight.quant_map"])
def test_missing_parts_of_a_4bit_layer_are_an_error(key):
    saved = saved_linear4bit("nf4")
    del saved[key]

    with pytest.raises((RuntimeError, KeyError, ValueError), match=key.split(".")[-1]):
        empty_linear4bit("nf4").load_state_dict(saved)


def test_unknown_keys_beside_a_4bit_layer_are_reported():
    saved = {**saved_linear4bit("nf4"), "weight.scales": torch.ones(1)}

    with pytest.raises((RuntimeError, AssertionError), match="scales"):
        empty_linear4bit("nf4").load_state_dict(saved)


def test_damaged_blob_of_a_4bit_layer_is_an_error():
    saved = saved_linear4bit("nf4")
    key = "weight.quant_state.bitsandbytes__nf4"
    saved[key] = saved[key][:20]

    with pytest.raises((RuntimeError, ValueError), match="quant_state"):
        empty_linear4bit("nf4").load_state_dict(saved)


def test_checkpoint_of_another_shape_is_an_error():
    layer = bnb.nn.Linear4bit(64, 160, **options("nf4"))

    with pytest.raises((RuntimeError, ValueError), match=r"(?i)size mismatch|shape"):
        layer.load_state_dict(saved_linear4bit("nf4"))


def test_failed_load_leaves_the_layer_usable():
    layer = empty_linear4bit("nf4").to("cpu")
    x = torch.randn(2, 128)
    expected = layer(x)
    saved = saved_linear4bit("nf4")
    saved["weight.quant_state.bitsandbytes__nf4"] = saved["weight.quant_state.bitsandbytes__nf4"][:20]

    with pytest.raises((RuntimeError, ValueError)):
        layer.load_state_dict(
            {key: value for key, value in saved.items() if key != "bias"} | {"bias": layer.bias.data}
        )

    assert torch.equal(layer(x), expected)
