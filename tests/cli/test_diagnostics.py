"""``python -m bitsandbytes``: the report, piece by piece, and its exit codes with and without a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import bitsandbytes
from bitsandbytes._native.library import ErrorHandlerMockBNBNativeLibrary
from bitsandbytes._native.specs import CUDASpecs
from bitsandbytes.diagnostics import cuda, main, utils

SPECS = CUDASpecs((9, 0), "128", (12, 8))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that seems to have a GPU."""
    monkeypatch.setattr(main, "BNB_BACKEND", "CUDA")
    monkeypatch.setattr(main, "get_cuda_specs", lambda: SPECS)
    monkeypatch.setattr(main, "print_diagnostics", lambda specs: print("specs", specs.cuda_version_string))
    monkeypatch.setattr(main, "print_runtime_diagnostics", lambda: None)
    monkeypatch.setattr(main, "lib", object())
    return monkeypatch


def test_the_report_of_this_machine(start):
    process = start()
    out, err = process.communicate(timeout=120)
    lines = out.splitlines()
    assert lines[0] == f" bitsandbytes v{bitsandbytes.__version__} ".center(60, "=")
    for label in (
        "Platform: ",
        "Python: ",
        "PyTorch: ",
        "  CUDA: ",
        "  HIP: ",
        "  XPU: ",
        "Related packages:",
    ):
        assert any(line.startswith(label) for line in lines), label
    for name in (
        "accelerate",
        "diffusers",
        "numpy",
        "pip",
        "peft",
        "safetensors",
        "transformers",
        "triton",
        "trl",
    ):
        assert any(line.startswith(f"  {name}: ") for line in lines)
    assert "=" * 60 in lines
    assert process.returncode == 0, err


@pytest.mark.parametrize("loaded", [True, False])
def test_without_an_accelerator(monkeypatch, capsys, loaded):
    monkeypatch.setattr(main, "BNB_BACKEND", "CPU")
    monkeypatch.setattr(main, "get_cuda_specs", lambda: None)
    monkeypatch.setattr(main, "lib", object() if loaded else ErrorHandlerMockBNBNativeLibrary("gone"))
    main.main()
    state = "loaded successfully." if loaded else "failed to load."
    assert f"No CUDA, ROCm, or XPU detected; CPU library {state}" in capsys.readouterr().out


@pytest.mark.parametrize("loaded", [True, False])
def test_xpu_is_one_line(monkeypatch, capsys, loaded):
    monkeypatch.setattr(main, "BNB_BACKEND", "XPU")
    monkeypatch.setattr(main, "lib", object() if loaded else ErrorHandlerMockBNBNativeLibrary("gone"))
    main.main()
    assert capsys.readouterr().out.splitlines()[-1].startswith("XPU:")


def test_a_gpu_that_works(gpu, capsys):
    gpu.setattr(main, "sanity_check", lambda: None)
    main.main()
    assert capsys.readouterr().out.endswith(
        "Checking that the library is importable and callable...\nSUCCESS!\n"
    )


def test_a_gpu_whose_library_did_not_load(gpu, capsys):
    gpu.setattr(main, "lib", ErrorHandlerMockBNBNativeLibrary("gone"))
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert stop.value.code == 1 and "/issues" in capsys.readouterr().out


def test_a_gpu_with_a_cpu_only_library(gpu, capsys):
    def fail() -> None:
        raise RuntimeError("Method 'x' not available in CPU-only version of bitsandbytes.")

    gpu.setattr(main, "sanity_check", fail)
    main.main()
    assert "WARNING: bitsandbytes is running as CPU-only!" in capsys.readouterr().out


@pytest.mark.parametrize("error", [RuntimeError("out of order"), OSError("gone")])
def test_a_gpu_that_fails(gpu, capsys, error):
    def fail() -> None:
        raise error

    gpu.setattr(main, "sanity_check", fail)
    with pytest.raises(SystemExit) as stop:
        main.main()
    captured = capsys.readouterr()
    assert stop.value.code == 1 and str(error) in captured.out + captured.err


@pytest.mark.parametrize(("capability", "warned"), [((7, 0), True), ((7, 5), False), ((9, 0), False)])
def test_specs(monkeypatch, capsys, tmp_path, capability, warned):
    monkeypatch.setattr(
        cuda, "get_cuda_bnb_library_path", lambda specs: tmp_path / "libbitsandbytes_cuda128.so"
    )
    monkeypatch.setenv("BNB_CUDA_VERSION", "128")
    cuda.print_diagnostics(CUDASpecs(capability, "128", (12, 8)))
    out = capsys.readouterr().out
    assert f"PyTorch settings found: CUDA_VERSION=128, Highest Compute Capability: {capability}." in out
    assert ("compute capability < 7.5" in out) == warned
    assert "Library not found" in out and "BNB_CUDA_VERSION=128" in out


def test_rocm_specs(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cuda, "HIP_ENVIRONMENT", True)
    monkeypatch.setattr(cuda, "get_cuda_bnb_library_path", lambda specs: tmp_path)
    cuda.print_diagnostics(CUDASpecs((9, 0), "60", (6, 0)))
    out = capsys.readouterr().out
    assert "ROCM_VERSION=60" in out and "6.1" in out and "compute capability" not in out


def test_runtime_libraries_in_the_environment(monkeypatch, capsys, tmp_path):
    for name in ("conda/lib", "ld", "other/lib64"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "libcudart.so.12").write_text("")
    monkeypatch.setattr(os, "environ", {
        "ELSE": str(tmp_path / "other"),
        "LD_LIBRARY_PATH": os.pathsep.join([str(tmp_path / "nothing"), str(tmp_path / "ld"), "\0bad"]),
        "CONDA_PREFIX": str(tmp_path / "conda"),
        "HOME": str(tmp_path / "ld"),
        "WORD": "x",
    })  # fmt: skip
    found = [path.relative_to(tmp_path) for path in cuda.find_cudart_libraries()]
    assert found == [Path(f"{name}/libcudart.so.12") for name in ("conda/lib", "ld", "other/lib64")]
    cuda.print_runtime_diagnostics()
    assert "WARNING: several CUDA runtimes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value", "relevant"),
    [
        ("LD_LIBRARY_PATH", "", True),
        ("CONDA_PREFIX", "x", True),
        ("CUDA_HOME", "/usr/local/cuda", True),
        ("HOME", "/home/me", False),
        ("PATH", "/bin", False),
        ("WORD", "word", False),
        ("URL", "https://a/b", False),
        ("CONDA_EXE", "/opt/conda/bin/conda", False),
        ("BASH_FUNC_x", "() { /bin/ls; }", False),
    ],
)
def test_relevant_variables(name, value, relevant):
    assert cuda.is_relevant_candidate_env_var(name, value) is relevant


def test_printing(capsys):
    utils.print_header("x", width=9)
    utils.print_header("")
    utils.print_dedented("""
        one

          two
        """)
    assert capsys.readouterr().out == "=== x ===\n" + "=" * 60 + "\none\n  two\n"


def test_versions():
    assert main.get_package_version("no-such-distribution") == "not found"
    assert main.get_package_version("pytest") == pytest.__version__


def test_the_command_line_without_a_known_command(cli):
    ran = cli("dequantise")
    assert ran.code == 2 and "dequantise" in ran.err
    ran = cli("--version")
    assert ran.code == 0 and ran.out.strip() == bitsandbytes.__version__
    for command in ("quantize", "inspect", "selftest"):
        assert cli(command, "--help").code == 0
