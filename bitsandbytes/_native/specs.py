"""What torch was built for, and where this package lies: the facts the loader chooses a library by.

Nothing here creates a CUDA context except :func:`get_compute_capabilities`, and the loader does not call that: a
process that has imported the package must still be able to fork and use CUDA in the child.
"""

from __future__ import annotations

import logging
import platform
import re
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

__all__ = [
    "BNB_BACKEND",
    "DYNAMIC_LIBRARY_SUFFIX",
    "HIP_ENVIRONMENT",
    "NONPYTORCH_DOC_URL",
    "PACKAGE_DIR",
    "PACKAGE_GITHUB_URL",
    "CUDASpecs",
    "get_compute_capabilities",
    "get_cuda_specs",
    "get_cuda_version_string",
    "get_cuda_version_tuple",
    "get_rocm_gpu_arch",
    "get_rocm_warpsize",
]

PACKAGE_DIR = Path(__file__).resolve().parent.parent
DYNAMIC_LIBRARY_SUFFIX = {"Darwin": ".dylib", "Windows": ".dll"}.get(platform.system(), ".so")
PACKAGE_GITHUB_URL = "https://github.com/bitsandbytes-foundation/bitsandbytes"
NONPYTORCH_DOC_URL = "https://huggingface.co/docs/bitsandbytes/main/en/installation"

HIP_ENVIRONMENT: bool = bool(torch.version.hip)


def has_cuda_device() -> bool:
    """Whether torch sees a CUDA or ROCm device, asked so that forked processes can still use it.

    ``torch.cuda.is_available()`` starts the driver, which no process survives a fork; counting asks the driver's
    management library first.
    """
    return torch.cuda.device_count() > 0


def _built_for() -> Literal["CPU", "CUDA", "ROCm", "XPU"]:
    if getattr(torch._C, "_has_xpu", False):
        return "XPU"
    if HIP_ENVIRONMENT:
        return "ROCm"
    return "CUDA" if has_cuda_device() else "CPU"


BNB_BACKEND: Literal["CPU", "CUDA", "ROCm", "XPU"] = _built_for()


@dataclass(frozen=True)
class CUDASpecs:
    """The best device here and the toolkit version torch was built with."""

    highest_compute_capability: tuple[int, int]
    cuda_version_string: str
    cuda_version_tuple: tuple[int, int]

    @property
    def has_imma(self) -> bool:
        """Whether the device has int8 tensor cores."""
        return HIP_ENVIRONMENT or self.highest_compute_capability >= (7, 5)


def get_compute_capabilities() -> list[tuple[int, int]]:
    """Compute capabilities of the visible devices, ascending."""
    return sorted(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))


@lru_cache(None)
def get_cuda_version_tuple() -> tuple[int, int] | None:
    """(major, minor) of the CUDA or ROCm toolkit torch was built with; None if it was built with neither."""
    version = torch.version.cuda or torch.version.hip
    if not version:
        return None
    numbers = re.findall(r"\d+", version)
    return int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 0


def get_cuda_version_string() -> str | None:
    """The version as library names spell it: ``"128"`` for 12.8."""
    version = get_cuda_version_tuple()
    return None if version is None else f"{version[0]}{version[1]}"


def get_cuda_specs() -> CUDASpecs | None:
    """None without CUDA or devices, or when asking for them fails."""
    try:
        capabilities = get_compute_capabilities() if has_cuda_device() else []
        version, text = get_cuda_version_tuple(), get_cuda_version_string()
    except Exception:  # whatever a broken driver raises: this is a question, not a demand
        return None
    if not capabilities or version is None or text is None:
        return None
    return CUDASpecs(capabilities[-1], text, version)


def _rocminfo(pattern: str) -> str | None:
    try:
        output = subprocess.run(["rocminfo"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        logging.getLogger("bitsandbytes.cuda_specs").warning(
            "rocminfo cannot be asked about the device: %s", error
        )
        return None
    found = re.search(pattern, output)
    return found.group(1) if found else None


def get_rocm_gpu_arch() -> str:
    """For instance ``"gfx942"``; ``"unknown"`` off ROCm."""
    return (HIP_ENVIRONMENT and _rocminfo(r"Name:\s+(gfx[a-zA-Z\d]+)")) or "unknown"


def get_rocm_warpsize() -> int:
    """Lanes of a wavefront, 32 or 64; 32 off ROCm."""
    return int((HIP_ENVIRONMENT and _rocminfo(r"Wavefront Size:\s+(\d+)\(0x\w+\)\s+[\s\S]*?gfx")) or 32)
