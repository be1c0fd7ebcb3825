"""Every backend against the plain-torch one: codes exactly, values within what their dtype rounds away.

One test walks every operator on every device, and again in processes that are told which CPU instruction set to use
or find no native library at all. A new backend adds nothing here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import processes
from bitsandbytes import _native, functional as F
from bitsandbytes._ops import OPERATORS
from oracles import BLOCKSIZES, FLOAT_DTYPES, QUANT_TYPES, assert_same_bytes, relative_error
from samples import OPERATOR_NAMES, OUT_OVERLOADS, samples
from shapes import block_edges

EXACT = (
    "quantize_4bit",
    "dequantize_4bit",
    "dequantize_4bit_nested",
    "embedding_4bit",
    "embedding_8bit",
    "quantize_blockwise",
    "dequantize_blockwise",
    "int8_linear_matmul",
    "round_to_bfloat16",
)
INT8_CODES = ("int8_vectorwise_quant", "int8_double_quant")
OPTIMIZERS = ("optimizer_update_32bit", "optimizer_update_8bit_blockwise")

_INSTRUCTION_SETS = ("scalar", "avx2", "avx512", "avx512bf16", "avx512amx", "neon")
IN_SUBPROCESS = "BNB_CPU_ISA" in os.environ


def assert_values_agree(actual: Tensor, expected: Tensor, rounding: float) -> None:
    assert (actual.shape, actual.dtype, actual.device) == (expected.shape, expected.dtype, expected.device)
    if actual.is_floating_point() and actual.numel():
        assert relative_error(actual, expected) <= rounding
    else:
        assert torch.equal(actual, expected)


def assert_agree(name: str, device: str, actual, expected) -> None:
    """Exact where the format fixes every bit; one rounding of the result's dtype each way elsewhere."""
    if actual is None or expected is None:
        assert actual is expected
    elif name in EXACT or (name in INT8_CODES and device == "cpu"):
        assert actual.device == expected.device
        assert_same_bytes(actual, expected)
    elif name in INT8_CODES and actual.dtype == torch.int8:  # a GPU may divide approximately
        assert (actual.int() - expected.int()).abs().max() <= 1
    elif actual.dtype == torch.uint8:  # 8-bit optimizer state: a value at a threshold may fall on either side
        assert (actual.int() - expected.int()).abs().max() <= 1
        assert int((actual != expected).sum()) <= max(1, actual.numel() // 200)
    else:
        eps = torch.finfo(actual.dtype).eps if actual.is_floating_point() else 0.0
        assert_values_agree(actual, expected, eps + 2e-6)


def _clones(arguments: tuple) -> tuple:
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in arguments)


@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_every_operator_agrees_with_the_default_backend(device, name):
    operator = OPERATORS[name]
    for arguments in samples(name, device):
        mine, theirs = arguments, _clones(arguments)

        actual = getattr(torch.ops.bitsandbytes, name)(*mine)
        expected = operator.run_with("default", *theirs)

        if name in OPTIMIZERS:
            actual, expected = mine, theirs
        for one, other in zip(
            actual if isinstance(actual, tuple) else (actual,),
            expected if isinstance(expected, tuple) else (expected,),
            strict=True,
        ):
            if isinstance(one, Tensor) or one is None:
                assert_agree(name, device, one, other)


@pytest.mark.parametrize("layout", ["plain", "strided"])
@pytest.mark.parametrize("name", OUT_OVERLOADS)
def test_out_overload_fills_the_same_values(device, name, layout):
    packet = getattr(torch.ops.bitsandbytes, name)
    for arguments in samples(name, device):
        results = packet(*arguments)
        expected = results if isinstance(results, tuple) else (results,)
        wide = [torch.full((2, *one.shape), 77, device=device).to(one.dtype) for one in expected]
        outs = [both[0] if layout == "plain" else both.movedim(0, -1).contiguous()[..., 0] for both in wide]

        assert packet.out(*arguments, *outs) is None
        assert all(map(torch.equal, outs, expected))


def test_out_may_share_memory_with_an_input(device):
    """Results are as if the inputs had been read first."""
    codes = torch.randint(0, 256, (64,), dtype=torch.uint8, device=device)
    absmax = torch.rand(64, device=device)
    code = F.create_dynamic_map().to(device)
    expected = torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax, code, 1, torch.float32)

    torch.ops.bitsandbytes.dequantize_blockwise.out(codes, absmax, code, 1, torch.float32, absmax)

    assert torch.equal(absmax, expected)


@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_every_operator_has_a_kernel_for_any_device(name):
    assert "default" in OPERATORS[name].kernels


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_4bit_codes_and_values_at_every_edge_of_a_block(device, quant_type, dtype):
    """Wherever a vector loop ends, codes and values are those of the plain loop."""
    quantize, dequantize = OPERATORS["quantize_4bit"], OPERATORS["dequantize_4bit"]
    for blocksize in BLOCKSIZES:
        for count in {*block_edges(blocksize), 5 * blocksize + 31}:
            values = (torch.randn(count) * 3).to(dtype).to(device)
            values[::17] = 0.0

            packed, absmax = torch.ops.bitsandbytes.quantize_4bit(values, blocksize, quant_type, torch.uint8)
            expected, expected_absmax = quantize.run_with(
                "default", values, blocksize, quant_type, torch.uint8
            )
            assert_same_bytes(packed, expected)
            assert_same_bytes(absmax, expected_absmax)

            arguments = (packed, absmax, blocksize, quant_type, [count], dtype)
            assert_same_bytes(
                torch.ops.bitsandbytes.dequantize_4bit(*arguments), dequantize.run_with("default", *arguments)
            )


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("signed", [True, False])
def test_8bit_codes_and_values_at_every_edge_of_a_block(device, signed, dtype):
    quantize, dequantize = OPERATORS["quantize_blockwise"], OPERATORS["dequantize_blockwise"]
    code = F.create_dynamic_map(signed).to(device)
    for blocksize in (64, 256, 4096):
        for count in {*block_edges(blocksize), 5 * blocksize + 31}:
            values = (torch.randn(count) * 3).to(dtype).to(device)
            values[::17] = 0.0

            codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(values, code, blocksize)
            expected, expected_absmax = quantize.run_with("default", values, code, blocksize)
            assert_same_bytes(codes, expected)
            assert_same_bytes(absmax, expected_absmax)

            arguments = (codes, absmax, code, blocksize, dtype)
            assert_same_bytes(
                torch.ops.bitsandbytes.dequantize_blockwise(*arguments),
                dequantize.run_with("default", *arguments),
            )


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_every_half_number_gets_the_same_code(device, quant_type):
    """All finite float16 values, each in a block whose absmax is 1 or the value's own magnitude."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[every.isfinite()]
    small = every[every.abs() <= 1.0]
    small = torch.cat([small, small.new_zeros(-small.numel() % 31)]).view(-1, 31)
    blocks = torch.cat([torch.ones(small.shape[0], 1, dtype=torch.float16), small], dim=1)

    for values in (blocks, every):
        arguments = (values.to(device), 32, quant_type, torch.uint8)
        for one, other in zip(
            torch.ops.bitsandbytes.quantize_4bit(*arguments),
            OPERATORS["quantize_4bit"].run_with("default", *arguments),
            strict=True,
        ):
            assert_same_bytes(one, other)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf, 0.0, 1e-40, 3e38])
def test_special_values_agree(device, special, quant_type):
    for count in (64, 100):
        values = torch.randn(count, device=device)
        values[count - 3] = special
        arguments = (values, 64, quant_type, torch.uint8)
        packed, absmax = torch.ops.bitsandbytes.quantize_4bit(*arguments)
        expected, expected_absmax = OPERATORS["quantize_4bit"].run_with("default", *arguments)
        assert_same_bytes(packed, expected)
        assert_same_bytes(absmax, expected_absmax)

        code = F.create_dynamic_map().to(device)
        codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(values, code, 64)
        expected, expected_absmax = OPERATORS["quantize_blockwise"].run_with("default", values, code, 64)
        assert_same_bytes(codes, expected)
        assert_same_bytes(absmax, expected_absmax)


def test_threads_do_not_change_results():
    values = torch.randn(300_001)
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            packed, state = F.quantize_4bit(values, quant_type="nf4", compress_statistics=False)
            results.append((packed, state.absmax, F.dequantize_4bit(packed, state)))
    finally:
        torch.set_num_threads(before)

    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS = {
    "bfloat16 by default": lambda device: _default_dtype(torch.bfloat16),
    "float64 by default": lambda device: _default_dtype(torch.float64),
    "meta by default": lambda device: torch.device("meta"),
    "autocast": lambda device: torch.autocast(device, dtype=torch.bfloat16),
    "inference mode": lambda device: torch.inference_mode(),
}


@pytest.mark.parametrize("backend", ["own", "default"])
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_the_callers_settings_do_not_change_results(device, name, surroundings, backend):
    """Models are built and run under default dtypes and devices, autocast and inference mode."""
    operator = OPERATORS[name]
    run = getattr(torch.ops.bitsandbytes, name) if backend == "own" else partial(operator.run_with, "default")
    for arguments in samples(name, device)[:3] + samples(name, device)[-2:]:
        mine, plain = arguments, _clones(arguments)
        expected = run(*plain)
        with SURROUNDINGS[surroundings](device):
            actual = run(*mine)

        pairs = zip(
            (*(actual if isinstance(actual, tuple) else (actual,)), *mine),
            (*(expected if isinstance(expected, tuple) else (expected,)), *plain),
            strict=True,
        )
        for one, other in pairs:
            if isinstance(one, Tensor):
                assert_same_bytes(one, other)
            else:
                assert one == other


def test_several_threads_at_once_get_their_own_results(device):
    """Forward passes run in parallel: no kernel may keep anything between calls."""
    inputs = [torch.randn(4096 + 17 * i, device=device) for i in range(8)]

    def work(values: Tensor):
        packed, state = F.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
        q, stats, columns = F.int8_vectorwise_quant(values.view(1, -1).half(), threshold=2.0)
        return packed, F.dequantize_4bit(packed, state), q, stats, columns

    alone = [work(values) for values in inputs]
    with ThreadPoolExecutor(max_workers=4) as pool:
        together = list(pool.map(work, inputs * 4))

    for index, results in enumerate(together):
        for one, other in zip(results, alone[index % len(inputs)], strict=True):
            assert torch.equal(one, other)


# --- the same, told otherwise ----------------------------------------------------------------------------------


def _run_tests(
    *paths: Path, only: str, env: dict[str, str] | None = None, package: Path | None = None
) -> None:
    arguments = ["-q", "-x", "-p", "no:cacheprovider", "-k", only, *map(str, paths)]
    processes.run_python(
        f"import sys, pytest; sys.exit(pytest.main({arguments!r}))",
        env=env,
        paths=[] if package is None else [package],
    )


def _available_instruction_sets() -> list[str]:
    if not _native.has_native("bnb_cpu_isa_available"):
        return []
    names = _native.lib.bnb_cpu_isa_available()
    return (names.decode() if isinstance(names, bytes) else names).split(",")


@pytest.mark.skipif(IN_SUBPROCESS, reason="this is the subprocess")
@pytest.mark.parametrize("instruction_set", _INSTRUCTION_SETS)
def test_every_instruction_set_agrees(instruction_set):
    if instruction_set not in _available_instruction_sets():
        pytest.skip(f"needs a CPU and a native library with {instruction_set}")

    _run_tests(Path(__file__), only="cpu or threads or instruction_set", env={"BNB_CPU_ISA": instruction_set})


def test_the_instruction_set_asked_for_is_used():
    wanted = os.environ.get("BNB_CPU_ISA")
    if wanted is None:
        pytest.skip("needs BNB_CPU_ISA")
    name = _native.lib.bnb_cpu_isa()

    assert (name.decode() if isinstance(name, bytes) else name) == wanted


@pytest.fixture
def package_without_library(tmp_path):
    """A copy of the package, less its shared library; the folder it is in."""
    if not _native.has_native("bnb_cpu_quantize_4bit"):
        pytest.skip("needs a native library to take away")
    source = processes.PACKAGE_PARENT / "bitsandbytes"
    for path in source.rglob("*.py"):
        copy = tmp_path / "bitsandbytes" / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    shutil.copy(Path(processes.__file__).parent / "without_native" / "sitecustomize.py", tmp_path)
    return tmp_path


@pytest.mark.skipif(IN_SUBPROCESS, reason="this is the subprocess")
def test_without_the_native_library_only_the_default_backend_is_left(package_without_library):
    processes.run_python(
        f"""
        import bitsandbytes
        from bitsandbytes import _native, _ops
        assert bitsandbytes.__file__.startswith({str(package_without_library)!r}), bitsandbytes.__file__
        assert not _native.has_native("bnb_cpu_quantize_4bit")
        for name in ("quantize_4bit", "dequantize_4bit", "gemm_4bit", "quantize_blockwise", "int8_vectorwise_quant"):
            assert "cpu" not in _ops.OPERATORS[name].kernels, name
        """,
        paths=[package_without_library],
    )


@pytest.mark.skipif(IN_SUBPROCESS, reason="this is the subprocess")
def test_without_the_native_library_quantization_gives_the_same_results(package_without_library):
    """The tests with published vectors and exact oracles: passing them is giving the same results."""
    functions = Path(__file__).parent.parent / "quant"
    files = [
        functions / f"test_{name}.py"
        for name in ("packing", "blockwise", "fourbit", "fourbit_published", "int8")
    ]

    _run_tests(
        *files, only="published or gpu or shapes or odd or nan or layout", package=package_without_library
    )


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
@pytest.mark.skipif(IN_SUBPROCESS, reason="this is the subprocess")
def test_kernels_work_in_a_forked_process():
    """Worker processes of a data loader quantize too; a thread pool of the parent's must not be waited for."""
    processes.run_python(
        """
        import os, torch
        from bitsandbytes import functional as F
        values = torch.randn(1 << 20)
        expected, _ = F.quantize_4bit(values, quant_type="nf4")
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            packed, _ = F.quantize_4bit(values, quant_type="nf4")
            os._exit(0 if torch.equal(packed, expected) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        """
    )
