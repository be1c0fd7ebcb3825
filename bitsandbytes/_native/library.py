"""The ``lib`` object: attribute access gives a bound C function, or a callable that explains why there is none.

Attribute access never raises, because programs probe symbols with ``hasattr(lib.name, "restype")``: a real handle is
a ctypes function pointer, a deferred failure is a plain Python function without that attribute. Only names with two
leading underscores raise AttributeError, so that copying and inspecting the object behave.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NoReturn

from .abi import Abi, AbiError, error_check, parse_header
from .legacy import legacy_types
from .specs import BNB_BACKEND, PACKAGE_DIR, PACKAGE_GITHUB_URL

__all__ = [
    "BNBNativeLibrary",
    "CudaBNBNativeLibrary",
    "ErrorHandlerMockBNBNativeLibrary",
    "XpuBNBNativeLibrary",
]


class BNBNativeLibrary:
    """A loaded shared library, bound to the header that lies beside the package.

    Raises:
        AbiError: the header is missing, unreadable, or of another ABI version than the library.
    """

    compiled_with_cuda = False

    def __init__(self, lib: ctypes.CDLL) -> None:
        self._lib = lib
        self._abi: Abi | None = None
        self._check: Callable | None = None
        if hasattr(lib, "bnb_abi_version"):
            self._abi = parse_header(PACKAGE_DIR / "bnb.h")
            self._check = error_check(lib, self._abi.enums["bnb_status"])
            ours, theirs = self._abi.constants["BNB_ABI_VERSION"], lib.bnb_abi_version()
            if ours != theirs:
                raise AbiError(
                    f"bnb.h is ABI version {ours}, but the native library is version {theirs}: rebuild it"
                )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        function = getattr(self._lib, name, None)
        bound = self._unavailable(name) if function is None else self._bind(function, name)
        self.__dict__[name] = bound
        return bound

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def has(self, name: str) -> bool:
        """Whether the symbol is really there."""
        return getattr(self._lib, name, None) is not None

    def _bind(self, function: Any, name: str) -> Any:
        if self._abi is None:
            return function
        if name in self._abi.prototypes:
            return self._abi.bind(function, name, self._check)  # type: ignore[arg-type]
        types = legacy_types(name)
        if types is not None:
            function.argtypes, function.restype = types
            if (
                function.restype is not ctypes.c_bool
            ):  # questions cannot fail, so the last status is not theirs
                function.errcheck = self._raise_last
        return function

    def _raise_last(self, result: Any, function: Any, arguments: tuple) -> Any:
        """Earlier symbols return nothing, so their failure is read from the last call's status."""
        self._check(self._lib.bnb_last_status(), function, arguments)  # type: ignore[misc]
        return result

    def _unavailable(self, name: str) -> Callable[..., NoReturn]:
        def fail(*args: Any, **kwargs: Any) -> NoReturn:
            kind = "this" if self.compiled_with_cuda else "CPU-only"
            raise RuntimeError(
                f"Method '{name}' not available in {kind} version of bitsandbytes. "
                "A GPU function needs the library built for that GPU: check `python -m bitsandbytes`, or compile "
                "from source with -DCOMPUTE_BACKEND=cuda."
            )

        return fail


class CudaBNBNativeLibrary(BNBNativeLibrary):
    """A library with CUDA or ROCm functions besides the CPU ones."""

    compiled_with_cuda = True

    def __init__(self, lib: ctypes.CDLL) -> None:
        super().__init__(lib)
        _return_pointers(lib, "get_context", "cget_managed_ptr")


class XpuBNBNativeLibrary(BNBNativeLibrary):
    """A library with SYCL functions besides the CPU ones."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        super().__init__(lib)
        _return_pointers(lib, "cget_managed_ptr")


def _return_pointers(lib: ctypes.CDLL, *names: str) -> None:
    for name in names:
        function = getattr(lib, name, None)
        if function is not None:
            function.restype = ctypes.c_void_p


class ErrorHandlerMockBNBNativeLibrary(BNBNativeLibrary):
    """Stands in when no library could be loaded: every attribute is a callable that raises the reason when called."""

    def __init__(self, error_msg: str) -> None:
        from . import loader

        self.error_msg = error_msg
        self.user_cuda_version = loader.get_cuda_version_tuple()
        self.available_versions = loader.get_available_cuda_binary_versions()
        self.override_value = loader.override_value()
        self.requested_version = (
            loader.parse_cuda_version(self.override_value)
            if self.override_value
            else ".".join(map(str, self.user_cuda_version))
            if self.user_cuda_version
            else "unknown"
        )
        self.compiled_with_cuda = BNB_BACKEND in ("CUDA", "ROCm")
        self.formatted_error = self._format()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def fail(*args: Any, **kwargs: Any) -> NoReturn:
            raise RuntimeError(f"{self.formatted_error}Native code method attempted to call: lib.{name}()")

        self.__dict__[name] = fail
        return fail

    def has(self, name: str) -> bool:
        return False

    def _format(self) -> str:
        if BNB_BACKEND in ("CPU", "XPU"):
            reason = f"Failed to load {'CPU-only' if BNB_BACKEND == 'CPU' else 'XPU'} bitsandbytes library."
        elif "cannot open shared object file" in self.error_msg:
            reason = self._missing_dependency()
        elif self.requested_version not in self.available_versions:
            reason = self._version_mismatch()
        else:
            reason = f"Failed to load the bitsandbytes library for {BNB_BACKEND} {self.requested_version}."
        backend = {"CUDA": "cuda", "ROCm": "hip", "XPU": "xpu"}.get(BNB_BACKEND, "cpu")
        original = f"Original error: {self.error_msg}\n\n" if self.error_msg else ""
        return (
            f"\n{reason}\n\n{original}"
            "Attempted to use bitsandbytes native library functionality but it's not available.\n\n"
            "This typically happens when the package was installed without a native library for this machine, or "
            "a library it depends on is missing.\n"
            f"To build it from a source checkout: cmake -DCOMPUTE_BACKEND={backend} -S . -B build && "
            "cmake --build build --target inplace\n\n"
            "Run this command for a diagnosis: python -m bitsandbytes\n"
            f"If that does not help, open an issue: {PACKAGE_GITHUB_URL}/issues\n\n"
        )

    def _missing_dependency(self) -> str:
        library = self.error_msg.split(":")[0].strip()
        major = self.requested_version.split(".")[0]
        folder = "/usr/local/cuda/lib64" if BNB_BACKEND == "CUDA" else "/opt/rocm/lib"
        return (
            f"{BNB_BACKEND} SETUP ERROR: Missing dependency: {library}\n\n"
            f"{BNB_BACKEND} {major}.x runtime libraries were not found by the dynamic loader.\n"
            f"1. Install the {BNB_BACKEND} {major} toolkit or its runtime packages.\n"
            f"2. If it is installed, extend the search path: export LD_LIBRARY_PATH=$LD_LIBRARY_PATH:{folder}"
        )

    def _version_mismatch(self) -> str:
        variable = "BNB_ROCM_VERSION" if BNB_BACKEND == "ROCm" else "BNB_CUDA_VERSION"
        found = ".".join(map(str, self.user_cuda_version)) if self.user_cuda_version else "unknown"
        if not self.available_versions:
            return (
                f"No bitsandbytes library for {BNB_BACKEND} was found (torch uses {BNB_BACKEND} {found}).\n"
                "A source checkout has none until it is compiled."
            )
        bullets = "\n".join(f"  - {version}" for version in self.available_versions)
        override = f" (from {variable}={self.override_value})" if self.override_value else ""
        return (
            f"{BNB_BACKEND} VERSION MISMATCH\n"
            f"Requested version:           {self.requested_version}{override}\n"
            f"Detected {BNB_BACKEND} version of torch: {found}\n"
            f"Available versions:\n{bullets}\n\n"
            "Options:\n"
            "1. Compile bitsandbytes from source against your toolkit.\n"
            f"2. Use one of the available versions: set {variable}, for instance "
            f"{variable}={self.available_versions[-1].replace('.', '')}, or install the matching torch."
        )
