"""Optimizers on CUDA: the kernels against plain torch, many tensors in one launch, graphs, streams, no waiting."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import bitsandbytes.optim as optim
from bitsandbytes._formats.rules import RULES
from bitsandbytes._native import has_native
from bitsandbytes._ops import OPERATORS
from optim_cases import BLOCK, CASES, CLASSES, give_gradients, make, one_by_one, parameters, run_case
from optim_updates import (
    WITHOUT_ROOT,
    State,
    each_step,
    fresh_8bit,
    fresh_32bit,
    gradients,
    run,
    step_8bit,
    step_32bit,
)

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and has_native("bnb_cuda_optimizer_update_many")),
    reason="needs a CUDA device and the library built for it",
)

LENGTHS = [1, 7, 255, 256, 257, 4096, 17_001]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CLOSE = {torch.float32: (2e-6, 4e-6), torch.float16: (1e-4, 2e-3), torch.bfloat16: (1e-3, 1.6e-2)}
FAMILIES = ["Adam", "AdamW", "AdEMAMix", "LAMB", "LARS", "SGD", "RMSprop", "Adagrad", "Lion"]


@functools.cache
def golden_cuda(case: str) -> dict[str, Tensor]:
    """The float32 arrays of one case of ``golden/cuda/optim_cuda.npz``."""
    with np.load(Path(__file__).parents[1] / "golden" / "cuda" / "optim_cuda.npz") as file:
        keys = [key for key in file.files if key.startswith(f"{case}/") and "_fp32_" in key]
        return {key.removeprefix(f"{case}/"): torch.from_numpy(file[key]) for key in keys}


def assert_agree(name: str, ours: State, oracle: State) -> None:
    """Bit for bit where no root is taken; others take a root and a quotient, approximate with 8-bit state."""
    codes_may_differ = oracle["state1"].dtype == torch.uint8
    for key, value in oracle.items():
        if value is None:
            assert ours[key] is None
        elif name in WITHOUT_ROOT:
            torch.testing.assert_close(ours[key], value, atol=0.0, rtol=0.0, equal_nan=True)
        elif value.dtype == torch.uint8:
            differing = (ours[key].int() - value.int()).abs()
            assert differing.max() <= 1
            assert (differing > 0).float().mean() <= 1e-3
        else:
            atol, rtol = CLOSE[value.dtype]
            wrong = ~torch.isclose(ours[key].float(), value.float(), atol=atol, rtol=rtol, equal_nan=True)
            assert wrong.sum() <= (2e-3 * wrong.numel() if codes_may_differ else 0)


def waits_of(call) -> Counter:
    """How often the host waits for the device."""
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
        call()
    return Counter({e.key: e.count for e in profile.key_averages() if "ynchronize" in e.key})


# --- the kernels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip_zeros", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", RULES)
def test_32bit_agrees_with_plain_torch(name, n, dtype, skip_zeros):
    start, grads = torch.randn(n).to(dtype).cuda(), gradients(n, dtype, "cuda")

    for _, ours, oracle in each_step(
        step_32bit, "cuda", name, fresh_32bit(name, start), grads, skip_zeros=skip_zeros
    ):
        assert_agree(name, ours, oracle)


@pytest.mark.parametrize("extras", ["plain", "scaled", "skip_zeros"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", RULES)
def test_8bit_agrees_with_plain_torch(name, n, dtype, extras):
    """A step without extras has a loop of its own, in which coupled decay is an extra."""
    start, grads = torch.randn(n).to(dtype).cuda(), gradients(n, dtype, "cuda")
    settings = (
        {"scale": 1.0, "decay": 0.0 if RULES[name].coupled_decay else 0.1}
        if extras == "plain"
        else {"skip_zeros": extras == "skip_zeros"}
    )

    for _, ours, oracle in each_step(step_8bit, "cuda", name, fresh_8bit(name, start), grads, **settings):
        assert_agree(name, ours, oracle)
        if name in ("adam", "ademamix"):  # their state takes no root
            for key in ("state1", "state2", "absmax1", "absmax2"):
                assert torch.equal(ours[key], oracle[key])


@pytest.mark.parametrize("param_norm", [0.0, 1e-3, 1e9])
@pytest.mark.parametrize("name", RULES)
def test_norm_limit_agrees_with_plain_torch(name, param_norm):
    start, grads = torch.randn(17_001, device="cuda"), gradients(17_001, torch.float32, "cuda")
    for g in grads:
        g[272] = 1.0  # its square overflows the oracle's sum, not ours

    ours, oracle = (
        run(step_32bit, k, name, fresh_32bit(name, start), grads, max_unorm=0.5, param_norm=param_norm)
        for k in ("cuda", "default")
    )

    assert ours["unorm"].item() == pytest.approx(oracle["unorm"].item(), rel=1e-5)
    torch.testing.assert_close(ours["p"], oracle["p"], atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("skip_zeros", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("name", sorted(RULES.keys() - {"ademamix"}))  # which takes no limit
def test_limits_of_one_launch_agree_with_plain_torch(name, bits, dtype, skip_zeros):
    """Short and unaligned tensors, and elements that are not finite, which must not count."""
    base = optim.optimizer.Optimizer2State if RULES[name].states == 2 else optim.optimizer.Optimizer1State
    settings = {"betas": (0.9, 0.99), "min_8bit_size": 0, "max_unorm": 0.3, "weight_decay": 0.1, "lr": 1e-2}
    starts = [torch.randn(n, device="cuda").to(dtype) for n in (1, 255, 256, 257, 17_001, 65_537)]
    starts.append(torch.randn(5001, device="cuda").to(dtype)[1:])
    pair = [[torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2)]
    pair[0][-1].data = starts[-1].clone().new_empty(5001)[1:].copy_(starts[-1])
    optimizers = [base(name, params, optim_bits=bits, skip_zeros=skip_zeros, **settings) for params in pair]
    update = optimizers[1].update_step
    optimizers[1].update_step = lambda *args: update(*args)

    for _ in range(3):
        for p, q in zip(*pair, strict=True):
            p.grad = torch.randn_like(p)
            p.grad[::5] = 0.0
            if p.numel() > 300:
                p.grad[270:272] = torch.tensor([math.inf, math.nan])
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(*pair, strict=True):
            ours, expected = (o.state[x]["unorm_vec"].item() for o, x in zip(optimizers, (p, q), strict=True))
            assert ours == pytest.approx(expected, rel=2e-3 if bits == 8 or dtype != torch.float32 else 1e-4)
            atol, rtol = (5e-3, 2e-2) if dtype != torch.float32 else (1e-4, 1e-3)
            wrong = ~torch.isclose(p.float(), q.float(), atol=atol, rtol=rtol, equal_nan=True)
            assert wrong.sum() <= 2e-3 * wrong.numel()
            with torch.no_grad():  # differences of a step must not add up
                p.copy_(q)
                for key, value in optimizers[1].state[q].items():
                    if isinstance(value, Tensor):
                        optimizers[0].state[p][key].copy_(value)


def test_strided_and_unaligned_tensors_agree():
    base = torch.randn(5001, 2, device="cuda")
    grads = gradients(5001, torch.float32, "cuda")
    expected = run(step_8bit, "default", "adam", fresh_8bit("adam", base[:, 0].contiguous()), grads)

    ours = fresh_8bit("adam", base[:, 0])
    ours["p"] = base.clone()[:, 0]
    assert not ours["p"].is_contiguous()
    run(step_8bit, "cuda", "adam", ours, grads)
    unaligned = torch.zeros(5002, device="cuda")[1:].copy_(base[:, 0])
    p = torch.nn.Parameter(unaligned)
    optimizer = optim.Adam8bit([p], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    q = torch.nn.Parameter(base[:, 0].contiguous())
    twin = one_by_one("Adam8bit", [q], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for g in grads:
        p.grad, q.grad = g.clone(), g.clone()
        optimizer.step()
        twin.step()

    torch.testing.assert_close(ours["p"], expected["p"], atol=2e-6, rtol=4e-6, equal_nan=True)
    torch.testing.assert_close(p, q, atol=0.0, rtol=0.0, equal_nan=True)


@pytest.mark.parametrize("qmap", ["linear", "crowded"])
def test_any_ascending_map_encodes_to_the_nearest(qmap):
    """Maps with more thresholds to a bucket than the encoder's tables hold are searched."""
    entries = torch.linspace(-1, 1, 256) if qmap == "linear" else torch.linspace(0.9, 1.0, 254)
    if qmap == "crowded":
        entries = torch.cat((torch.tensor([-1.0, 0.0]), entries))
    n, results = 5000, []
    g = torch.randn(n, device="cuda").abs()
    for kernel in ("cuda", "default"):
        p, state1 = torch.zeros(n, device="cuda"), torch.zeros(n, dtype=torch.uint8, device="cuda")
        absmax1 = torch.zeros(-(n // -BLOCK), device="cuda")
        OPERATORS["optimizer_update_8bit_blockwise"].run_with(
            kernel, "momentum", g, p, state1, None, 0.9, 0.0, 0.0, 0.0, 0.0, 1, 1e-2, entries.cuda(), None, absmax1,
            None, 0.0, 1.0, False,
        )  # fmt: skip
        results.append((p, state1, absmax1))

    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


# --- published trajectories --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["adam", "sgd", "sgd_wd", "lion", "rmsprop", "rmsprop_wd", "adagrad", "adagrad_wd"]
)
def test_32bit_follows_the_trajectory_published_for_cuda(name):
    """Cases whose decay order and norm are the same on both devices in the published library."""
    expected = golden_cuda(name)

    p, state = run_case(CASES[name], 32, torch.float32, "cuda")

    torch.testing.assert_close(p, expected["b32_fp32_param"], atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(state["state1"], expected["b32_fp32_state1"], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "sgd", "lion", "rmsprop", "adagrad"])
def test_8bit_follows_the_trajectory_published_for_cuda(name):
    """Their rule rounds a tie to the even code, so a few codes, and what follows from them, may differ."""
    expected = golden_cuda(name)

    p, state = run_case(CASES[name], 8, torch.float32, "cuda")

    differing = (state["state1"].int() - expected["b8_fp32_state1"].int()).abs()
    zero_blocks = expected["b8_fp32_absmax1"].repeat_interleave(BLOCK)[: p.numel()].view(p.shape) == 0
    differing = differing[~zero_blocks]  # whose codes mean nothing
    assert (differing > 0).float().mean() <= 2e-3
    assert differing.max() <= 1
    difference = (p - expected["b8_fp32_param"]).abs()
    assert difference.mean() <= 3e-6
    torch.testing.assert_close(state["absmax1"], expected["b8_fp32_absmax1"], atol=1e-6, rtol=1e-4)


# --- many tensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_launch_does_what_single_steps_do(family, bits, dtype):
    settings = (
        {"weight_decay": 0.1} if family != "AdEMAMix" else {"weight_decay": 0.1, "t_alpha": 3, "t_beta3": 3}
    )
    together, apart = parameters(25, dtype), None
    apart = [torch.nn.Parameter(p.detach().clone()) for p in together]
    name = f"{family}{bits}bit"
    ours, twin = make(name, together, **settings), one_by_one(name, apart, **settings)

    for _ in range(4):
        give_gradients(together, apart)
        ours.step()
        twin.step()

    limited = family in ("LAMB", "LARS")
    atol, rtol = CLOSE[dtype] if limited else (0.0, 0.0)
    for p, q in zip(together, apart, strict=True):
        torch.testing.assert_close(p, q, atol=atol, rtol=rtol)
        assert ours.state[p]["step"] == 4
        for key, value in twin.state[q].items():
            if isinstance(value, Tensor) and value.dtype != torch.uint8 and not limited:
                torch.testing.assert_close(ours.state[p][key], value, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["AdamW8bit", "AdamW32bit", "AdEMAMix8bit", "Lion8bit", "SGD8bit", "RMSprop32bit"]
)
def test_one_launch_rolls_the_dice_of_single_steps(name):
    params = parameters(25, torch.bfloat16)
    twins, nearest = ([torch.nn.Parameter(p.detach().clone()) for p in params] for _ in range(2))
    torch.manual_seed(1)
    ours = make(name, params, stochastic_rounding=True)
    torch.manual_seed(1)
    twin, other = one_by_one(name, twins, stochastic_rounding=True), make(name, nearest)

    for _ in range(3):
        give_gradients(params, twins, nearest)
        for optimizer in (ours, twin, other):
            optimizer.step()

    assert not ours._many._rest
    assert all(map(torch.equal, params, twins))
    assert not torch.equal(params[-1], nearest[-1])


def test_replayed_graph_rolls_new_dice():
    params = parameters(10, torch.bfloat16)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizers = []
    for own in (params, twins):
        torch.manual_seed(1)
        optimizers.append(make("AdamW8bit", own, stochastic_rounding=True))
    give_gradients(params, twins)
    for optimizer in optimizers:
        optimizer.step()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[0].step()
    for _ in range(3):
        graph.replay()
        optimizers[1].step()

    assert all(map(torch.equal, params, twins))


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16bit_parameters_take_float32_gradients(dtype, bits):
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch ties the gradient's dtype to the parameter's")
    p = torch.nn.Parameter((torch.randn(5000, device="cuda") * 0.1).to(dtype))
    q = torch.nn.Parameter(p.detach().float())
    ours, exact = make(f"AdamW{bits}bit", [p]), make(f"AdamW{bits}bit", [q])

    for _ in range(3):
        give_gradients([q], [p], dtype=torch.float32)
        ours.step()
        exact.step()

    assert p.grad.dtype == torch.float32
    torch.testing.assert_close(ours.state[p]["state1"], exact.state[q]["state1"], atol=0.0, rtol=0.0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(p.float(), q, atol=0.01 * eps, rtol=4 * eps)


def test_groups_overrides_and_changing_settings_count_at_every_step():
    together = parameters(10, smallest=4096)
    apart = [torch.nn.Parameter(p.detach().clone()) for p in together]
    optimizers = []
    for params, maker in ((together, make), (apart, one_by_one)):
        groups = [{"params": params[:4]}, {"params": params[4:], "lr": 3e-3, "betas": (0.8, 0.9)}]
        optim.GlobalOptimManager.get_instance().override_config(params[1], "lr", 0.1)
        optim.GlobalOptimManager.get_instance().override_config(params[5], "optim_bits", 32)
        optimizers.append(maker("AdamW8bit", groups))

    for step in range(5):
        give_gradients(together, apart)
        if step == 2:  # some have none, and then take fewer steps
            together[3].grad = apart[3].grad = together[7].grad = apart[7].grad = None
        for optimizer, params in zip(optimizers, (together, apart), strict=True):
            optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)
            if step == 3:
                optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(4096, device="cuda"))]})
                optimizer.param_groups[-1]["params"][0].grad = torch.ones(4096, device="cuda")
                optim.GlobalOptimManager.get_instance().override_config(params[2], "weight_decay", 0.5)
            optimizer.step()

    for p, q in zip(together, apart, strict=True):
        assert torch.equal(p, q)
        assert optimizers[0].state[p]["step"] == optimizers[1].state[q]["step"]
    assert optimizers[0].state[together[5]]["state1"].dtype == torch.float32
    assert optimizers[0].state[together[3]]["step"] == 4


def test_replaced_memory_is_noticed():
    p, q = (torch.nn.Parameter(torch.ones(5000, device="cuda")) for _ in range(2))
    ours, twin = optim.AdamW8bit([p]), one_by_one("AdamW8bit", [q])

    for step in range(6):
        give_gradients([p], [q])
        if step == 2:
            p.data, q.data = p.data.clone(), q.data.clone()
        if step == 3:
            ours.load_state_dict(copy.deepcopy(ours.state_dict()))
        if step == 4:
            ours.state[p]["state1"] = ours.state[p]["state1"].clone()
        if step == 5:
            ours.state[p]["step"] = twin.state[q]["step"] = 1
        ours.step()
        twin.step()

    assert torch.equal(p, q)
    assert ours.state[p]["step"] == 2


def test_subclass_that_defines_its_update_is_asked():
    class Mine(optim.AdamW8bit):
        calls = 0

        def update_step(self, group, p, gindex, pindex):
            Mine.calls += 1
            super().update_step(group, p, gindex, pindex)

    params = parameters(5)
    give_gradients(params)

    Mine(params).step()

    assert Mine.calls == 5


def test_zero_gradient_coordinates_never_move_and_bad_ones_stay_alone():
    p = torch.nn.Parameter(torch.randn(1024, device="cuda"))
    start = p.detach().clone()
    optimizer = optim.AdamW8bit([p], weight_decay=0.0, min_8bit_size=0)
    for _ in range(20):
        p.grad = torch.randn_like(p)
        p.grad[::7] = 0.0
        p.grad[300] = float("inf")
        p.grad[301] = float("nan")
        optimizer.step()

    assert torch.equal(p[::7], start[::7])
    assert torch.equal(p[300:302], start[300:302])
    assert p.isfinite().all()
    assert optimizer.state[p]["absmax1"].isfinite().all()


# --- streams, graphs, waiting --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["AdamW8bit", "AdEMAMix8bit", "LAMB8bit", "Lion32bit", "AdamW32bit", "LARS32bit"]
)
def test_replayed_graph_takes_the_steps_of_eager_mode(name):
    params, twins = parameters(12), None
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    settings = {"t_alpha": 5, "t_beta3": 5} if name.startswith("AdEMAMix") else {}
    lrs = [torch.tensor(1e-2, device="cuda") for _ in range(2)]
    captured, eager = make(name, params, lr=lrs[0], **settings), make(name, twins, lr=lrs[1], **settings)
    give_gradients(params, twins)
    captured.step()
    eager.step()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for step in range(5):
        for p, q in zip(params, twins, strict=True):
            q.grad = torch.randn_like(q)
            p.grad.copy_(q.grad)
        for lr in lrs:
            lr.fill_(1e-2 / (step + 1))
        graph.replay()
        eager.step()

    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)
    steps = [state["step"] for state in captured.state_dict()["state"].values()]
    assert steps == [6] * len(params)
    assert all(type(step) is int for step in steps)
    give_gradients(params, twins)  # and goes on without the graph
    captured.step()
    eager.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    assert captured.state_dict()["state"][0]["step"] == 7


def test_first_step_cannot_be_captured():
    p = torch.nn.Parameter(torch.ones(4096, device="cuda"))
    p.grad = torch.ones_like(p)
    optimizer = optim.AdamW8bit([p])

    with pytest.raises(RuntimeError, match="take a step first"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


def test_steps_run_on_the_current_stream():
    p = torch.nn.Parameter(torch.ones(1 << 22, device="cuda"))
    p.grad = torch.zeros_like(p)
    optimizer, stream = optim.SGD8bit([p], lr=1.0, momentum=0.9), torch.cuda.Stream()
    optimizer.step()
    torch.cuda.synchronize()

    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        p.grad.fill_(1.0)
        optimizer.step()
    stream.synchronize()

    assert (p == 0.0).all()


@pytest.mark.parametrize("name", ["AdamW8bit", "LAMB8bit", "Lion32bit", "PagedAdamW8bit"])
def test_a_step_waits_for_nothing(name):
    params = [torch.nn.Parameter(torch.ones(120_000, device="cuda")) for _ in range(3)]
    lr = torch.tensor(1e-3, device="cuda")
    optimizer = make(name, params, lr=lr)
    for _ in range(2):
        give_gradients(params)
        optimizer.step()
    torch.cuda.synchronize()
    give_gradients(params)

    torch.cuda.set_sync_debug_mode("error")
    try:
        waits = waits_of(optimizer.step) - waits_of(lambda: None)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert not waits


@pytest.mark.parametrize(
    "name", [name for name in CLASSES if name.startswith("Paged") and name.endswith("8bit")]
)
def test_paged_state_follows_ordinary_state(name):
    p = torch.nn.Parameter(torch.randn(120_001, device="cuda"))
    q = torch.nn.Parameter(p.detach().clone())
    paged, plain = make(name, [p]), make(name.removeprefix("Paged"), [q])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            give_gradients([p], [q])
            paged.step()
            plain.step()

    assert torch.equal(p, q)
    saved = paged.state_dict()["state"][0]["__bnb_optimizer_quant_state__"]
    assert torch.equal(saved["state1"].cuda(), plain.state[q]["state1"])


@pytest.mark.large_memory
def test_more_than_two_to_the_31_elements():
    n = 2**31 + 1000
    p = torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.zeros_like(p)
    p.grad[-1000:] = 1.0
    optimizer = optim.Lion8bit([p], lr=0.5)

    optimizer.step()

    assert (p[-1000:] == 0.5).all()
    assert (p[:1000] == 1.0).all()
    assert (p[2**31 - 1000 : 2**31] == 1.0).all()
    assert (optimizer.state[p]["state1"][-1000:] == 255).all()
