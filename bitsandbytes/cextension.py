"""Face: the native library object, its classes, how it is found, and what it was found for."""

from __future__ import annotations

from typing import Any

from ._native import lib
from ._native.library import (
    BNBNativeLibrary,
    CudaBNBNativeLibrary,
    ErrorHandlerMockBNBNativeLibrary,
    XpuBNBNativeLibrary,
)
from ._native.loader import (
    _find_cuda_libs,
    _split_cuda_version,
    get_available_cuda_binary_versions,
    get_cuda_bnb_library_path,
    get_native_library,
    get_xpu_bnb_library_path,
    logger,
    parse_cuda_version,
)
from ._native.specs import (
    BNB_BACKEND,
    DYNAMIC_LIBRARY_SUFFIX,
    HIP_ENVIRONMENT,
    PACKAGE_DIR,
    CUDASpecs,
    get_cuda_specs,
    get_cuda_version_tuple,
    get_rocm_gpu_arch,
    get_rocm_warpsize,
)

__all__ = [
    "BNB_BACKEND",
    "DYNAMIC_LIBRARY_SUFFIX",
    "HIP_ENVIRONMENT",
    "PACKAGE_DIR",
    "ROCM_GPU_ARCH",
    "ROCM_WARP_SIZE_64",
    "BNBNativeLibrary",
    "CUDASpecs",
    "CudaBNBNativeLibrary",
    "ErrorHandlerMockBNBNativeLibrary",
    "XpuBNBNativeLibrary",
    "_find_cuda_libs",
    "_split_cuda_version",
    "get_available_cuda_binary_versions",
    "get_cuda_bnb_library_path",
    "get_cuda_specs",
    "get_cuda_version_tuple",
    "get_native_library",
    "get_rocm_gpu_arch",
    "get_rocm_warpsize",
    "get_xpu_bnb_library_path",
    "lib",
    "logger",
    "parse_cuda_version",
]

ROCM_GPU_ARCH: str
ROCM_WARP_SIZE_64: bool


def __getattr__(name: str) -> Any:
    """The two ROCm constants ask a tool on ROCm, so they are found when first wanted."""
    if name == "ROCM_GPU_ARCH":
        value: Any = get_rocm_gpu_arch()
    elif name == "ROCM_WARP_SIZE_64":
        value = get_rocm_warpsize() == 64
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value
