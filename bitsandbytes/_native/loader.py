"""Which shared library to load, in which order, and what happens when there is none.

Exactly one is loaded: the GPU's if torch can see a GPU, else the CPU's (a GPU library contains the CPU functions as
well). A failure is kept and raised by the first native call, so importing the package always works; every function
that has a plain-torch kernel keeps working too.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

from .library import (
    BNBNativeLibrary,
    CudaBNBNativeLibrary,
    ErrorHandlerMockBNBNativeLibrary,
    XpuBNBNativeLibrary,
)
from .specs import (
    BNB_BACKEND,
    DYNAMIC_LIBRARY_SUFFIX,
    HIP_ENVIRONMENT,
    PACKAGE_DIR,
    CUDASpecs,
    get_cuda_version_string,
    get_cuda_version_tuple,
    has_cuda_device,
)

__all__ = [
    "get_available_cuda_binary_versions",
    "get_cuda_bnb_library_path",
    "get_native_library",
    "get_xpu_bnb_library_path",
    "load",
    "override_value",
    "parse_cuda_version",
]

logger = logging.getLogger("bitsandbytes.cextension")


def _face(name: str, ours: Any) -> Any:
    """A name as `bitsandbytes.cextension` has it now: tests and tools replace names there, where users know them."""
    return getattr(sys.modules.get("bitsandbytes.cextension"), name, ours)


def _split_cuda_version(digits: str, is_hip: bool) -> tuple[int, int] | None:
    """(major, minor) of a file name's digits: a CUDA major has two digits, a ROCm major one."""
    major = 1 if is_hip else 2
    if not digits.isdigit() or len(digits) <= major:
        return None
    return int(digits[:major]), int(digits[major:])


def parse_cuda_version(version_str: str) -> str:
    """``"118"`` -> ``"11.8"``, on ROCm ``"713"`` -> ``"7.13"``; anything that is no such version comes back as is."""
    version = _split_cuda_version(version_str, _face("HIP_ENVIRONMENT", HIP_ENVIRONMENT))
    return version_str if version is None else f"{version[0]}.{version[1]}"


def _find_cuda_libs(prefix: str, is_hip: bool) -> dict[tuple[int, int], Path]:
    """Packaged GPU libraries whose name starts with ``prefix`` ("cuda" or "rocm"), by version."""
    found = {}
    for path in _face("PACKAGE_DIR", PACKAGE_DIR).glob(f"libbitsandbytes_{prefix}*{DYNAMIC_LIBRARY_SUFFIX}"):
        digits = path.name.removeprefix(f"libbitsandbytes_{prefix}").removesuffix(DYNAMIC_LIBRARY_SUFFIX)
        version = _split_cuda_version(digits, is_hip)
        if version is not None:
            found[version] = path
    return found


def _prefix(is_hip: bool) -> str:
    return "rocm" if is_hip else "cuda"


def override_value() -> str:
    """The user's choice of GPU library version, digits only; empty if there is none."""
    return os.environ.get(
        "BNB_ROCM_VERSION" if _face("HIP_ENVIRONMENT", HIP_ENVIRONMENT) else "BNB_CUDA_VERSION", ""
    )


def get_available_cuda_binary_versions() -> list[str]:
    """Versions of the packaged GPU libraries, ascending, as "major.minor"."""
    is_hip = _face("HIP_ENVIRONMENT", HIP_ENVIRONMENT)
    return [
        f"{major}.{minor}"
        for major, minor in sorted(_face("_find_cuda_libs", _find_cuda_libs)(_prefix(is_hip), is_hip))
    ]


def get_cuda_bnb_library_path(cuda_specs: CUDASpecs) -> Path:
    """The library for a toolkit version; the file need not exist.

    An override variable decides alone. Otherwise the exact version, else the nearest of the same major version: the
    highest lower minor, then the lowest higher one.

    Raises:
        RuntimeError: the override is not made of digits only.
    """
    is_hip = _face("HIP_ENVIRONMENT", HIP_ENVIRONMENT)
    folder, prefix = _face("PACKAGE_DIR", PACKAGE_DIR), _prefix(is_hip)
    override = override_value()
    if override:
        variable = f"BNB_{prefix.upper()}_VERSION"
        if not (override.isascii() and override.isdigit()):
            raise RuntimeError(
                f"{variable} must be digits only, for instance 128 for version 12.8; got {override!r}"
            )
        logger.warning(
            "WARNING: %s=%s environment variable detected; loading the bitsandbytes library for version %s instead of "
            "the one torch was built with (%s). Unset the variable if this was not intended.",
            variable,
            override,
            parse_cuda_version(override),
            cuda_specs.cuda_version_string,
        )
        return folder / f"libbitsandbytes_{prefix}{override}{DYNAMIC_LIBRARY_SUFFIX}"

    exact = folder / f"libbitsandbytes_{prefix}{cuda_specs.cuda_version_string}{DYNAMIC_LIBRARY_SUFFIX}"
    packaged = _face("_find_cuda_libs", _find_cuda_libs)(prefix, is_hip)
    wanted = tuple(cuda_specs.cuda_version_tuple)
    if wanted in packaged:
        return packaged[wanted]
    same_major = sorted(version for version in packaged if version[0] == wanted[0])
    if exact.exists() or not same_major:
        return exact
    lower = [version for version in same_major if version < wanted]
    chosen = lower[-1] if lower else same_major[0]
    logger.warning(
        "No bitsandbytes library for %s %d.%d is packaged; using the one for %d.%d.",
        "ROCm" if is_hip else "CUDA",
        *wanted,
        *chosen,
    )
    return packaged[chosen]


def get_xpu_bnb_library_path() -> Path:
    """The XPU library of the year torch's toolkit is from, else the one without a year."""
    year = re.match(r"\d{4}", getattr(torch.version, "xpu", None) or "")
    folder = _face("PACKAGE_DIR", PACKAGE_DIR)
    if year:
        dated = folder / f"libbitsandbytes_xpu{year[0]}{DYNAMIC_LIBRARY_SUFFIX}"
        if dated.exists():
            return dated
    return folder / f"libbitsandbytes_xpu{DYNAMIC_LIBRARY_SUFFIX}"


def _torch_specs() -> CUDASpecs | None:
    """What choosing a file needs to know. The capability is left out: asking for it would initialise CUDA."""
    version, text = get_cuda_version_tuple(), get_cuda_version_string()
    if version is None or text is None or not has_cuda_device():
        return None
    return CUDASpecs((0, 0), text, version)


def _library_path() -> Path:
    if BNB_BACKEND == "XPU":
        return get_xpu_bnb_library_path()
    specs = _torch_specs()
    if specs is not None:
        return get_cuda_bnb_library_path(specs)
    return _face("PACKAGE_DIR", PACKAGE_DIR) / f"libbitsandbytes_cpu{DYNAMIC_LIBRARY_SUFFIX}"


def get_native_library() -> BNBNativeLibrary:
    """Load and bind the library for this machine.

    Raises:
        RuntimeError: it is missing or does not fit the header.
        OSError: the dynamic loader refused it.
    """
    path = _library_path()
    if not path.exists():
        raise RuntimeError(f"Configured {BNB_BACKEND} binary not found at {path}")
    dll = ctypes.CDLL(str(path))
    if BNB_BACKEND == "XPU":
        return XpuBNBNativeLibrary(dll)
    if hasattr(dll, "get_context"):
        return CudaBNBNativeLibrary(dll)
    return BNBNativeLibrary(dll)


def load() -> BNBNativeLibrary:
    """The library, or a stand-in that raises the reason at the first call."""
    try:
        return get_native_library()
    except Exception as error:  # importing must not fail, whatever the loader meets
        if BNB_BACKEND in ("CUDA", "ROCm"):
            logger.error("bitsandbytes library load error: %s", error, exc_info=True)
        return ErrorHandlerMockBNBNativeLibrary(str(error))
