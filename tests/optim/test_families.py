"""The classes: signatures, bases, and what their constructors refuse."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch

import bitsandbytes.optim as optim
from bitsandbytes.optim.optimizer import MockArgs, Optimizer1State, Optimizer2State, Optimizer8bit
from optim_cases import CLASSES, FAMILIES, NEEDED, TWO_STATES, family_of, make
from processes import run_python

_BETAS = "betas=(0.9, 0.999)"
_STORAGE = "optim_bits=32, args=None, min_8bit_size=4096"
_SGD = "momentum=0, dampening=0, weight_decay=0, nesterov=False"
# As published, in order. What a variant leaves out is below.
SIGNATURES = {
    "Adam": f"lr=0.001, {_BETAS}, eps=1e-08, weight_decay=0, amsgrad=False, {_STORAGE}, is_paged=False",
    "AdamW": f"lr=0.001, {_BETAS}, eps=1e-08, weight_decay=0.01, amsgrad=False, {_STORAGE}, is_paged=False",
    "AdEMAMix": "lr=0.001, betas=(0.9, 0.999, 0.9999), alpha=5.0, t_alpha=None, t_beta3=None, eps=1e-08, "
    "weight_decay=0.01, optim_bits=32, min_8bit_size=4096, is_paged=False",
    "LAMB": f"lr=0.001, bias_correction=True, {_BETAS}, eps=1e-08, weight_decay=0, amsgrad=False, "
    f"adam_w_mode=True, {_STORAGE}, max_unorm=1.0",
    "LARS": f"lr, {_SGD}, {_STORAGE}, max_unorm=0.02",
    "Lion": f"lr=0.0001, betas=(0.9, 0.99), weight_decay=0, {_STORAGE}, is_paged=False",
    "RMSprop": f"lr=0.01, alpha=0.99, eps=1e-08, weight_decay=0, momentum=0, centered=False, {_STORAGE}",
    "SGD": f"lr, {_SGD}, {_STORAGE}",
    "Adagrad": f"lr=0.01, lr_decay=0, weight_decay=0, initial_accumulator_value=0, eps=1e-10, {_STORAGE}",
}


def left_out(name: str) -> set[str]:
    """Parameters that a variant does not have."""
    family, hidden = family_of(name), set()
    if name.endswith("bit") and family not in ("Adam", "AdamW", "Adagrad"):
        hidden.add("optim_bits")
    if name.startswith("Paged") and family != "Adam":
        hidden.add("is_paged")
    return hidden


def signature_of(cls: type) -> str:
    parameters = list(inspect.signature(cls).parameters.values())
    assert parameters[0].name == "params"
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters[1:])


def parameter(n: int = 8, device: str = "cpu") -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.ones(n, device=device))
    p.grad = torch.ones_like(p)
    return p


def test_exports_are_the_published_ones_and_ours():
    ours = {"AdamW4bit", "Muon8bit", "create", "record_sizes"}
    assert set(optim.__all__) == {*CLASSES, "PytorchLARS", "GlobalOptimManager"} | ours


@pytest.mark.parametrize("name", CLASSES)
def test_signature_is_the_published_one(name):
    expected = [p for p in SIGNATURES[family_of(name)].split(", ") if p.split("=")[0] not in left_out(name)]
    text = ", ".join(expected)
    if name == "Adagrad8bit":
        text = text.replace("optim_bits=32", "optim_bits=8")

    assert signature_of(getattr(optim, name)) == text


def test_base_signatures_are_the_published_ones():
    shared = "optim_bits=32, args=None, min_8bit_size=4096, max_unorm=0.0, skip_zeros=False, is_paged=False"

    def text(cls: type) -> str:
        parameters = inspect.signature(cls).parameters.values()
        return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)

    assert text(Optimizer8bit) == "params, defaults, optim_bits=32, is_paged=False"
    assert text(Optimizer1State) == (
        f"optimizer_name, params, lr=0.001, betas=(0.9, 0.0), eps=1e-08, weight_decay=0.0, {shared}"
    )
    assert text(Optimizer2State) == (
        f"optimizer_name, params, lr=0.001, {_BETAS}, eps=1e-08, weight_decay=0.0, {shared}, "
        "alpha=0.0, t_alpha=None, t_beta3=None"
    )


@pytest.mark.parametrize("name", CLASSES)
def test_bases(name):
    cls, family = getattr(optim, name), family_of(name)

    assert issubclass(cls, Optimizer2State if family in TWO_STATES else Optimizer1State)
    assert issubclass(cls, Optimizer8bit)
    assert issubclass(cls, torch.optim.Optimizer)
    assert str(cls).startswith("<class 'bitsandbytes.optim.")
    siblings = [getattr(optim, other) for other in CLASSES if family_of(other) == family and other != name]
    if family == "AdEMAMix":
        assert issubclass(cls, optim.AdEMAMix)
    else:
        assert not any(issubclass(cls, sibling) for sibling in siblings)


def test_paged_ademamix_is_its_unpaged_twin():
    assert issubclass(optim.PagedAdEMAMix8bit, optim.AdEMAMix8bit)
    assert issubclass(optim.PagedAdEMAMix32bit, optim.AdEMAMix32bit)


@pytest.mark.parametrize("name", CLASSES)
def test_class_decides_how_state_is_kept(name, device):
    p = parameter(4096, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # paged on a CPU
        optimizer = make(name, [p])
        optimizer.step()

    assert optimizer.state[p]["state1"].dtype == (torch.uint8 if name.endswith("8bit") else torch.float32)
    assert optimizer.is_paged == name.startswith("Paged")
    assert optimizer.args.optim_bits == (8 if name.endswith("8bit") else 32)
    assert {"initialized", "mng", "page_mng", "optimizer_name"} <= set(vars(optimizer))


@pytest.mark.parametrize("name", CLASSES)
def test_positional_arguments_take_their_published_places(name):
    cls = getattr(optim, name)
    defaults = {k: p.default for k, p in inspect.signature(cls).parameters.items() if k != "params"}
    values = [NEEDED.get(family_of(name), {}).get(k, default) for k, default in defaults.items()]

    optimizer = cls([parameter()], *values)

    assert optimizer.param_groups[0]["lr"] == values[0]
    with pytest.raises(TypeError):
        cls([parameter()], *values, None)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("keyword", ["foreach", "fused", "maximize", "differentiable"])
def test_unknown_keyword_is_a_type_error(name, keyword):
    with pytest.raises(TypeError, match=keyword):
        make(name, [parameter()], **{keyword: True})


# --- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", CLASSES)
def test_nonsensical_settings_are_refused(name, value):
    for key in ("lr", "eps", "weight_decay", "alpha", "t_alpha", "t_beta3", "max_unorm"):
        if key in inspect.signature(getattr(optim, name)).parameters:
            if key == "max_unorm" and value == float("inf"):
                continue
            with pytest.raises(ValueError):
                make(name, [parameter()], **{key: value})


@pytest.mark.parametrize("beta", [-0.1, 1.0, 2.0, float("nan")])
@pytest.mark.parametrize("family", FAMILIES)
def test_betas_outside_their_range_are_refused(family, beta):
    names = inspect.signature(getattr(optim, family)).parameters
    if "betas" in names:
        for betas in ((beta, 0.9), (0.9, beta)):
            with pytest.raises(ValueError, match="beta"):
                make(family, [parameter()], betas=betas)
    elif family != "Adagrad":
        for key in ("momentum", *(["dampening"] if "dampening" in names else ["alpha"])):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with pytest.raises(ValueError, match="beta"):
                    make(family, [parameter()], **{key: beta})


def test_settings_of_a_group_are_checked():
    optimizer = optim.Adam([parameter()])

    with pytest.raises(ValueError, match="learning rate"):
        optimizer.add_param_group({"params": [parameter()], "lr": -1.0})

    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "name", [c for c in CLASSES if c.endswith("8bit") and family_of(c) in ("Adam", "AdamW", "LAMB")]
)
def test_8bit_refuses_amsgrad(name):
    with pytest.raises(ValueError, match="amsgrad"):
        make(name, [parameter()], amsgrad=True)


@pytest.mark.parametrize(
    ("name", "settings"),
    [(f"{prefix}{family}8bit", {"optim_bits": 8}) for prefix in ("", "Paged") for family in ("Adam", "AdamW")]
    + [("Adagrad8bit", {"optim_bits": 32}), ("LAMB8bit", {"max_unorm": 2.0})],
)
def test_8bit_refuses_what_it_cannot_change(name, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        make(name, [parameter()], **settings)


@pytest.mark.parametrize(
    ("name", "settings", "error"),
    [
        ("SGD", {"momentum": 0}, NotImplementedError),
        ("LARS8bit", {"momentum": 0}, NotImplementedError),
        ("RMSprop", {"alpha": 0}, NotImplementedError),
        ("RMSprop8bit", {"centered": True}, NotImplementedError),
        ("Adagrad", {"lr_decay": 0.1}, ValueError),
        ("Adagrad", {"initial_accumulator_value": 0.1}, ValueError),
        ("Lion", {"betas": "(0.9, 0.99)"}, TypeError),
    ],
)
def test_what_is_not_available_is_refused(name, settings, error):
    with pytest.raises(error):
        make(name, [parameter()], **settings)


@pytest.mark.parametrize("name", ["Adam", "AdEMAMix", "Lion", "RMSprop"])
def test_unknown_bits_are_refused_at_the_first_step(name):
    optimizer = make(name, [parameter()], optim_bits=16)

    with pytest.raises(NotImplementedError, match="optim_bits must be 8 or 32, got 16"):
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("AdamW", {"amsgrad": True}),
        ("SGD", {"nesterov": True}),
        ("LAMB", {"bias_correction": False}),
        ("LAMB", {"adam_w_mode": False}),
        ("RMSprop", {"momentum": 0.5}),
    ],
)
def test_settings_without_effect_warn(name, settings):
    with pytest.warns(UserWarning, match=f"{next(iter(settings))}=.* no effect"):
        make(name, [parameter()], **settings)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"lr": -1.0}, "learning rate"),
        ({"momentum": -1.0}, "momentum"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"nesterov": True}, "Nesterov"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "Nesterov"),
    ],
)
def test_pytorch_lars_refuses(settings, error):
    with pytest.raises(ValueError, match=error):
        optim.PytorchLARS([parameter()], **settings)


def test_pytorch_lars_works_without_momentum():
    p = parameter()

    optim.PytorchLARS([p], lr=0.1).step()

    torch.testing.assert_close(p.detach(), torch.full((8,), 1 - 0.1 * 0.02))


# --- older keywords, args, closures ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_older_keywords_are_accepted(name):
    """But stand in no signature: programs look there to learn whether to pass them."""
    assert (
        not {"percentile_clipping", "block_wise"} & inspect.signature(getattr(optim, name)).parameters.keys()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(name, [parameter()], percentile_clipping=100, block_wise=True)

    with pytest.warns(UserWarning, match="block_wise=False"):
        make(name, [parameter()], block_wise=False)
    with pytest.raises(ValueError, match="percentile_clipping"):
        make(name, [parameter()], percentile_clipping=0)


@pytest.mark.parametrize("base", [Optimizer1State, Optimizer2State])
def test_base_classes_accept_older_keywords(base):
    optimizer = base("lion" if base is Optimizer1State else "adam", [parameter()], percentile_clipping=5)

    assert optimizer.get_config(0, 0, optimizer.param_groups[0])["percentile_clipping"] == 5


def test_percentile_clipping_still_clips(device):
    """A gradient above the percentile of its history is scaled down to it; the first one sets the history."""
    p, q = parameter(4096, device), parameter(4096, device)
    clipped, plain = (
        optim.SGD8bit([x], lr=0.1, momentum=0.5, **s) for x, s in ((p, {"percentile_clipping": 5}), (q, {}))
    )
    for factor, expected in ((1.0, 1.0), (10.0, 1.0)):
        p.grad, q.grad = torch.full_like(p, factor), torch.full_like(q, expected)
        clipped.step()
        plain.step()

    torch.testing.assert_close(p, q)
    assert clipped.state[p]["gnorm_vec"].shape == (100,)


def test_args_replace_the_classes_settings(device):
    args = MockArgs({"optim_bits": 32, "min_8bit_size": 1, "max_unorm": 0.0, "skip_zeros": False})
    p = parameter(5000, device)

    optimizer = optim.Adam8bit([p], args=args)
    optimizer.step()

    assert optimizer.args is args
    assert optimizer.state[p]["state1"].dtype == torch.float32


def test_betas_may_be_text():
    """Configuration files hold them so."""
    assert optim.AdamW([parameter()], betas="(0.9, 0.95)").param_groups[0]["betas"] == [0.9, 0.95]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"betas": (0.9, 0.999), "t_alpha": 10}, "three betas"),
        ({"betas": (0.0, 0.999, 0.9999), "t_beta3": 10}, "beta1 > 0"),
    ],
)
def test_ademamix_schedules_need_their_betas(settings, error):
    optimizer = optim.AdEMAMix([parameter()], **settings)

    with pytest.raises(ValueError, match=error):
        optimizer.step()


def test_closure_runs_with_gradients(device):
    p = parameter(8, device)
    optimizer = optim.Adam([p])

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 8.0
    assert optimizer.step() is None


def test_step_hooks_run():
    calls = []
    optimizer = optim.Adam([parameter()])
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    optimizer.step()

    assert calls == ["before", "after"]


def test_groups_have_their_own_settings(device):
    p, q, late = parameter(8, device), parameter(8, device), parameter(8, device)
    optimizer = optim.SGD([{"params": [p], "lr": 0.1}, {"params": [q]}], lr=0.5, momentum=0.9)

    optimizer.step()
    optimizer.add_param_group({"params": [late], "lr": 1.0})
    optimizer.step()

    assert [optimizer.state[x]["step"] for x in (p, q, late)] == [2, 2, 1]
    assert [x[0].item() for x in (p, q, late)] == pytest.approx([1 - 0.1 * 2.9, 1 - 0.5 * 2.9, 0.0])


def test_parameter_without_gradient_has_no_state(device):
    p, idle = parameter(8, device), torch.nn.Parameter(torch.ones(8, device=device))
    optimizer = optim.Adam([p, idle])

    optimizer.step()

    assert idle not in optimizer.state
    assert torch.equal(idle.detach(), torch.ones_like(idle))


def test_learning_rate_may_be_a_tensor(device):
    p = parameter(8, device)

    optim.SGD([p], lr=torch.tensor(0.5), momentum=0.9).step()

    assert p[0] == 0.5


@pytest.mark.parametrize("size", [4095, 4096])
def test_small_parameters_keep_32_bits(size, device):
    p = parameter(size, device)
    optimizer = optim.AdamW8bit([p])

    optimizer.step()

    assert (optimizer.state[p]["state1"].dtype == torch.uint8) == (size >= 4096)


def test_import_is_light():
    run_python("""
        import sys, bitsandbytes.optim
        heavy = {"torch._dynamo", "numpy.testing", "scipy", "packaging", "triton"} & set(sys.modules)
        assert not heavy, heavy
    """)
