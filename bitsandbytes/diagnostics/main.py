"""The report of ``python -m bitsandbytes``, for a user who wants to know what is wrong, and for bug reports."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
import traceback

import torch

from .. import __version__
from .._native import lib
from .._native.library import ErrorHandlerMockBNBNativeLibrary
from .._native.specs import BNB_BACKEND, PACKAGE_GITHUB_URL, get_cuda_specs
from .cuda import print_diagnostics, print_runtime_diagnostics
from .utils import print_header

__all__ = ["get_package_version", "main", "sanity_check", "show_environment"]

_RELATED_PACKAGES = (
    "accelerate",
    "diffusers",
    "numpy",
    "pip",
    "peft",
    "safetensors",
    "transformers",
    "triton",
    "trl",
)


def get_package_version(name: str) -> str:
    """The installed version of a distribution, or ``"not found"``."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not found"


def show_environment() -> None:
    """Platform, Python, torch, and the packages that people use together with this one."""
    print(f"Platform: {platform.platform()}")
    if platform.system() == "Linux":
        print(f"  libc: {'-'.join(platform.libc_ver())}")
    print(f"Python: {platform.python_version()}")
    print(f"PyTorch: {torch.__version__}")
    print(f"  CUDA: {torch.version.cuda or 'N/A'}")
    print(f"  HIP: {torch.version.hip or 'N/A'}")
    print(f"  XPU: {getattr(torch.version, 'xpu', None) or 'N/A'}")
    print("Related packages:")
    for name in _RELATED_PACKAGES:
        print(f"  {name}: {get_package_version(name)}")


def sanity_check() -> None:
    """One optimizer step on a GPU must change the parameter.

    Raises:
        RuntimeError: it did not, or the native library cannot be called.
    """
    from ..optim import Adam

    parameter = torch.nn.Parameter(torch.rand(10, 10, device="cuda"))
    before = parameter.detach().clone()
    parameter.sum().backward()
    Adam([parameter]).step()
    if torch.equal(before, parameter.detach()):
        raise RuntimeError("an optimizer step left its parameter as it was")


def main() -> None:
    """Print the report. Leaves with exit code 1 when there is a GPU that the library cannot use."""
    print_header(f"bitsandbytes v{__version__}")
    show_environment()
    print_header("")

    loaded = not isinstance(lib, ErrorHandlerMockBNBNativeLibrary)
    if BNB_BACKEND == "XPU":
        _report_xpu(loaded)
        return
    cuda_specs = get_cuda_specs()
    if cuda_specs is None:
        state = "loaded successfully" if loaded else "failed to load"
        print(f"No CUDA, ROCm, or XPU detected; CPU library {state}.")
        return

    print_diagnostics(cuda_specs)
    print_runtime_diagnostics()
    if not loaded:
        print(f"The native library did not load. If the lines above do not help: {PACKAGE_GITHUB_URL}/issues")
        sys.exit(1)
    _check_importable()


def _report_xpu(loaded: bool) -> None:
    if loaded:
        print("XPU: native library loaded.")
    elif importlib.util.find_spec("triton") is not None:
        print("XPU: no native library; Triton kernels are used instead.")
    else:
        print("XPU: neither the native library nor Triton is available; plain PyTorch kernels are used.")


def _check_importable() -> None:
    print("Checking that the library is importable and callable...")
    try:
        sanity_check()
    except RuntimeError as error:
        if "not available in CPU-only" in str(error):
            print("WARNING: bitsandbytes is running as CPU-only!")
            print("The GPU is there, but the loaded library has no functions for it.")
            return
        traceback.print_exc()
        sys.exit(1)
    except Exception:  # the report ends with the reason, whatever it is
        traceback.print_exc()
        sys.exit(1)
    print("SUCCESS!")
