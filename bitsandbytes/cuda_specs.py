"""Face: what torch was built for and which devices are here."""

from __future__ import annotations

from ._native.specs import (
    CUDASpecs,
    get_compute_capabilities,
    get_cuda_specs,
    get_cuda_version_string,
    get_cuda_version_tuple,
    get_rocm_gpu_arch,
    get_rocm_warpsize,
)

__all__ = [
    "CUDASpecs",
    "get_compute_capabilities",
    "get_cuda_specs",
    "get_cuda_version_string",
    "get_cuda_version_tuple",
    "get_rocm_gpu_arch",
    "get_rocm_warpsize",
]
