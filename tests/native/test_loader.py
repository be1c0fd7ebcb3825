"""Which library is chosen, and what a program sees when there is none."""

from __future__ import annotations

import ctypes
import logging
import shutil
from pathlib import Path

import pytest

from bitsandbytes import cextension
from bitsandbytes._native import library as library_module
from bitsandbytes._native.specs import DYNAMIC_LIBRARY_SUFFIX as SUFFIX
from bitsandbytes.cextension import (
    BNBNativeLibrary,
    CudaBNBNativeLibrary,
    CUDASpecs,
    ErrorHandlerMockBNBNativeLibrary,
    get_cuda_bnb_library_path,
)
from processes import PACKAGE_PARENT, run_python

TORCH_12_8 = CUDASpecs((9, 0), "128", (12, 8))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """``package("cuda128", ...)`` makes a package directory with these libraries, and no override variables."""
    for variable in ("BNB_CUDA_VERSION", "BNB_ROCM_VERSION"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(cextension, "PACKAGE_DIR", tmp_path)

    def fill(*variants: str) -> Path:
        for variant in variants:
            (tmp_path / f"libbitsandbytes_{variant}{SUFFIX}").touch()
        return tmp_path

    return fill


@pytest.mark.parametrize(
    ("packaged", "chosen"),
    [
        (["cpu", "cuda118", "cuda128", "cuda130"], "cuda128"),
        (["cuda121", "cuda126", "cuda129", "cuda130"], "cuda126"),  # the highest lower minor
        (["cuda129", "cuda1210", "cuda130"], "cuda129"),  # else the lowest higher one
        (["cuda118", "cuda130"], "cuda128"),  # never another major: the path of what is missing
        ([], "cuda128"),
    ],
)
def test_nearest_version_of_the_same_major(package, caplog, packaged, chosen):
    package(*packaged)

    with caplog.at_level(logging.WARNING):
        path = get_cuda_bnb_library_path(TORCH_12_8)

    assert path.name == f"libbitsandbytes_{chosen}{SUFFIX}"
    assert bool(caplog.records) == (chosen in packaged and chosen != "cuda128")


def test_override_decides_alone_and_says_so(package, caplog, monkeypatch):
    package("cuda128")
    monkeypatch.setenv("BNB_CUDA_VERSION", "118")

    path = get_cuda_bnb_library_path(TORCH_12_8)

    assert path.name == f"libbitsandbytes_cuda118{SUFFIX}"
    assert "BNB_CUDA_VERSION" in caplog.text


@pytest.mark.parametrize("value", ["12.8", "cpu", "../128", "\uff11\uff12\uff18"])
def test_override_takes_digits_only(package, monkeypatch, value):
    package()
    monkeypatch.setenv("BNB_CUDA_VERSION", value)
    with pytest.raises(RuntimeError, match="digits only"):
        get_cuda_bnb_library_path(TORCH_12_8)


def test_each_platform_reads_its_own_override(package, monkeypatch):
    package()
    monkeypatch.setenv("BNB_ROCM_VERSION", "72")
    assert get_cuda_bnb_library_path(TORCH_12_8).name == f"libbitsandbytes_cuda128{SUFFIX}"

    monkeypatch.setattr(cextension, "HIP_ENVIRONMENT", True)
    rocm = CUDASpecs((9, 0), "71", (7, 1))
    assert get_cuda_bnb_library_path(rocm).name == f"libbitsandbytes_rocm72{SUFFIX}"


def test_an_empty_override_is_none(package, monkeypatch):
    package()
    monkeypatch.setenv("BNB_CUDA_VERSION", "")
    assert get_cuda_bnb_library_path(TORCH_12_8).name == f"libbitsandbytes_cuda128{SUFFIX}"


def test_available_versions_are_sorted_as_numbers(package):
    package("cpu", "cuda130", "cuda118", "cuda1210", "cuda129", "cudaX", "rocm72")
    assert cextension.get_available_cuda_binary_versions() == ["11.8", "12.9", "12.10", "13.0"]


def test_finding_libraries_can_be_replaced(monkeypatch, package):
    package()
    found = {(12, 6): Path("/elsewhere/libbitsandbytes_cuda126.so")}
    monkeypatch.setattr(cextension, "_find_cuda_libs", lambda prefix, is_hip: found)
    assert get_cuda_bnb_library_path(TORCH_12_8) == found[12, 6]


@pytest.mark.parametrize(
    ("hip", "text", "version"),
    [
        (False, "118", "11.8"),
        (False, "1210", "12.10"),
        (True, "713", "7.13"),
        (False, "cpu", "cpu"),
        (False, "12", "12"),
    ],
)
def test_version_of_a_file_name(monkeypatch, hip, text, version):
    monkeypatch.setattr(cextension, "HIP_ENVIRONMENT", hip)
    assert cextension.parse_cuda_version(text) == version


def test_real_symbol_has_a_restype_and_a_missing_one_has_not(library):
    assert hasattr(library.bnb_cpu_quantize_4bit, "restype")
    assert library["bnb_cpu_quantize_4bit"] is library.bnb_cpu_quantize_4bit
    missing = library.no_such_function
    assert callable(missing) and not hasattr(missing, "restype")
    with pytest.raises(RuntimeError, match="Method 'no_such_function' not available in"):
        missing(1, 2)
    assert not hasattr(library, "__wrapped__")


def test_class_constants():
    assert (BNBNativeLibrary.compiled_with_cuda, CudaBNBNativeLibrary.compiled_with_cuda) == (False, True)


class TestStandIn:
    """What the first native call says when nothing was loaded."""

    ALWAYS = (
        "Attempted to use bitsandbytes native library functionality but it's not available.",
        "cmake",
        "Original error: boom",
        "python -m bitsandbytes",
        "/issues",
    )

    def text(self, monkeypatch, backend: str, error: str = "boom") -> str:
        monkeypatch.setattr(library_module, "BNB_BACKEND", backend)
        monkeypatch.setattr("bitsandbytes._native.loader.get_cuda_version_tuple", lambda: (12, 8))
        stand_in = ErrorHandlerMockBNBNativeLibrary(error)
        for call in (stand_in.cquantize, stand_in["cquantize"]):
            assert not hasattr(call, "restype")
            with pytest.raises(RuntimeError) as raised:
                call(1, x=2)
        text = str(raised.value)
        assert text.endswith("Native code method attempted to call: lib.cquantize()")
        return text

    def test_cpu(self, package, monkeypatch):
        text = self.text(monkeypatch, "CPU")
        assert "Failed to load CPU-only bitsandbytes library" in text
        for part in self.ALWAYS:
            assert part in text

    def test_missing_dependency(self, package, monkeypatch):
        error = "libcudart.so.12: cannot open shared object file: No such file or directory"
        text = self.text(monkeypatch, "CUDA", error)
        assert "CUDA SETUP ERROR: Missing dependency: libcudart.so.12" in text
        assert "LD_LIBRARY_PATH" in text and f"Original error: {error}" in text

    def test_another_version(self, package, monkeypatch):
        package("cuda118", "cuda130")
        text = self.text(monkeypatch, "CUDA")
        for part in (*self.ALWAYS, "CUDA VERSION MISMATCH", "12.8", "- 11.8", "- 13.0", "BNB_CUDA_VERSION"):
            assert part in text

    def test_no_gpu_library_at_all(self, package, monkeypatch):
        text = self.text(monkeypatch, "ROCm")
        assert "source checkout" in text and "compiled" in text

    def test_attributes(self, package):
        package("cuda118")
        stand_in = ErrorHandlerMockBNBNativeLibrary("boom")
        assert stand_in.error_msg == "boom"
        assert stand_in.available_versions == ["11.8"]
        with pytest.raises(RuntimeError) as raised:
            stand_in.f()
        assert str(raised.value).startswith(stand_in.formatted_error)
        assert isinstance(stand_in.requested_version, str)
        assert not stand_in.has("bnb_abi_version")


def _package_copy(tmp_path: Path) -> Path:
    """The package without its native files."""
    shutil.copytree(
        PACKAGE_PARENT / "bitsandbytes",
        tmp_path / "bitsandbytes",
        ignore=shutil.ignore_patterns(f"*{SUFFIX}", "bnb.h", "__pycache__"),
    )
    shutil.copy(Path(__file__).parents[1] / "without_native" / "sitecustomize.py", tmp_path)
    return tmp_path


USE = """
import bitsandbytes, torch
from bitsandbytes import functional as F
assert bitsandbytes.__file__.startswith({root!r}), bitsandbytes.__file__
packed, state = F.quantize_4bit(torch.linspace(-1, 1, 100), quant_type="nf4")
assert (F.dequantize_4bit(packed, state) - torch.linspace(-1, 1, 100)).abs().max() < 0.2
try:
    F.lib.bnb_cpu_isa()
except RuntimeError as error:
    assert {expected!r} in str(error), error
else:
    raise SystemExit("the stand-in did not raise")
"""


@pytest.mark.parametrize("broken", ["missing", "garbage", "no header"])
def test_everything_with_a_plain_kernel_works_without_the_library(request, tmp_path, broken):
    root = _package_copy(tmp_path)
    target = root / "bitsandbytes" / f"libbitsandbytes_cpu{SUFFIX}"
    expected = "not found at"
    if broken == "garbage":
        target.write_bytes(b"not a library")
        expected = str(target)
    elif broken == "no header":
        shutil.copy(request.getfixturevalue("library_file"), target)
        expected = "header"

    done = run_python(
        USE.format(root=str(root), expected=expected), paths=[root], env={"CUDA_VISIBLE_DEVICES": ""}
    )

    assert done.stdout == ""


def test_a_foreign_library_is_wrapped_as_it_is():
    """Without ABI information a symbol is handed out untyped, as ctypes would."""
    libc = BNBNativeLibrary(ctypes.CDLL(None))
    assert libc.abs(-3) == 3
