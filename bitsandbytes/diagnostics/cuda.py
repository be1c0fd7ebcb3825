"""What a machine with CUDA or ROCm devices has, and which runtime libraries its environment points at.

Several runtimes on the search path are the usual reason for a library that loads in one shell and not in another,
so every variable that may hold a path is looked through.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from .._native.loader import get_cuda_bnb_library_path
from .._native.specs import HIP_ENVIRONMENT, NONPYTORCH_DOC_URL, CUDASpecs
from .utils import print_dedented

__all__ = [
    "find_cuda_libraries_in_path_list",
    "find_cudart_libraries",
    "get_potentially_lib_path_containing_env_vars",
    "is_relevant_candidate_env_var",
    "print_diagnostics",
    "print_runtime_diagnostics",
]

CUDART_PATH_PREFERRED_ENVVARS = ("CONDA_PREFIX", "LD_LIBRARY_PATH")

# They hold paths, but never one of a runtime library.
CUDART_PATH_IGNORED_ENVVARS = {
    "DBUS_SESSION_BUS_ADDRESS",
    "GOOGLE_VM_CONFIG_LOCK_FILE",
    "HOME",
    "LESSCLOSE",
    "LESSOPEN",
    "MAIL",
    "OLDPWD",
    "PATH",
    "PWD",
    "SHELL",
    "SSH_AUTH_SOCK",
    "SSH_TTY",
    "TERMCAP",
    "TMUX",
    "XDG_DATA_DIRS",
    "XDG_GREETER_DATA_DIR",
    "XDG_RUNTIME_DIR",
    "_",
}

CUDA_RUNTIME_LIB_PATTERNS = (
    ("libamdhip64.so*", "amdhip64*.dll")
    if HIP_ENVIRONMENT
    else ("libcudart*.so*", "cudart64*.dll", "nvcuda*.dll")
)
_OLDEST_CAPABILITY = (7, 5)
_OLDEST_ROCM = (6, 1)

logger = logging.getLogger(__name__)


def find_cuda_libraries_in_path_list(paths_list_candidate: str) -> Iterable[Path]:
    """Runtime libraries in the folders of a search path, and in ``lib`` and ``lib64`` below them."""
    for text in filter(None, paths_list_candidate.split(os.pathsep)):
        folder = Path(text)
        for place in (folder, folder / "lib", folder / "lib64"):
            try:
                if place.is_dir():
                    for pattern in CUDA_RUNTIME_LIB_PATTERNS:
                        yield from sorted(path for path in place.glob(pattern) if path.is_file())
            except OSError as error:  # no permission, or a text that is no path at all
                logger.debug("%s cannot be searched: %s", place, error)


def is_relevant_candidate_env_var(env_var: str, value: str) -> bool:
    """Whether a variable may point at libraries: an absolute-looking path or list of paths, not one known not to."""
    return env_var in CUDART_PATH_PREFERRED_ENVVARS or (
        os.sep in value
        and env_var not in CUDART_PATH_IGNORED_ENVVARS
        and "CONDA" not in env_var
        and "BASH_FUNC" not in env_var
        and "\n" not in value
        and "://" not in value
    )


def get_potentially_lib_path_containing_env_vars() -> dict[str, str]:
    """The environment's relevant variables."""
    return {name: value for name, value in os.environ.items() if is_relevant_candidate_env_var(name, value)}


def find_cudart_libraries() -> Iterator[Path]:
    """Runtime libraries the environment points at: ``CONDA_PREFIX``, ``LD_LIBRARY_PATH``, then the others."""
    candidates = get_potentially_lib_path_containing_env_vars()
    for name in CUDART_PATH_PREFERRED_ENVVARS:
        if name in candidates:
            yield from find_cuda_libraries_in_path_list(candidates.pop(name))
    for value in candidates.values():
        yield from find_cuda_libraries_in_path_list(value)


def print_diagnostics(cuda_specs: CUDASpecs) -> None:
    """The toolkit version torch has, the best device, and what is wrong with either."""
    name = "ROCM" if HIP_ENVIRONMENT else "CUDA"
    print(
        f"PyTorch settings found: {name}_VERSION={cuda_specs.cuda_version_string}"
        + (
            "."
            if HIP_ENVIRONMENT
            else f", Highest Compute Capability: {cuda_specs.highest_compute_capability}."
        )
    )
    variable = f"BNB_{name}_VERSION"
    if os.environ.get(variable):
        print(f"{variable}={os.environ[variable]} overrides the version of the library that is loaded.")

    library = get_cuda_bnb_library_path(cuda_specs)
    if not library.exists():
        print_dedented(
            f"""
            Library not found: {library}. Maybe you need to compile it from source?
            To load a library for another version, set {variable}; a library that matches torch is better.
            Instructions: {NONPYTORCH_DOC_URL}
            """
        )
    if HIP_ENVIRONMENT and cuda_specs.cuda_version_tuple < _OLDEST_ROCM:
        print("WARNING: ROCm older than 6.1 is not supported.")
    if not HIP_ENVIRONMENT and cuda_specs.highest_compute_capability < _OLDEST_CAPABILITY:
        print(
            "WARNING: compute capability < 7.5 detected! Int8 matrix multiplication will be slow on this device."
        )


def print_runtime_diagnostics() -> None:
    """The runtime libraries found, with a warning when there are several."""
    kind = "ROCm" if HIP_ENVIRONMENT else "CUDA"
    found = list(dict.fromkeys(path.resolve() for path in find_cudart_libraries()))
    if not found:
        print(f"{kind} runtime libraries: none in the paths of the environment (PyTorch brings its own).")
        return
    print(f"{kind} runtime libraries in the paths of the environment:")
    for path in found:
        print(f"  {path}")
    if len(found) > 1:
        print_dedented(
            f"""
            WARNING: several {kind} runtimes. If the library does not load, leave only the one that matches
            PyTorch in LD_LIBRARY_PATH.
            """
        )
