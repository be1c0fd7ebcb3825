"""The native library, and copies of it that run one instruction set each."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest

from bitsandbytes import _native
from bitsandbytes._native.library import BNBNativeLibrary

HAVE_LIBRARY = _native.ABI is not None


@pytest.fixture
def library() -> BNBNativeLibrary:
    if not HAVE_LIBRARY:
        pytest.skip("no native library is built")
    return _native.lib


@pytest.fixture(scope="session")
def library_file() -> Path:
    if not HAVE_LIBRARY:
        pytest.skip("no native library is built")
    return Path(_native.lib._lib._name)


@pytest.fixture(scope="session")
def variants(library_file, tmp_path_factory) -> dict[str, BNBNativeLibrary]:
    """Instruction set -> the library running it; a copy of the file is a library of its own to the dynamic loader."""
    folder = tmp_path_factory.mktemp("variants")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in _native.lib.bnb_cpu_isa_available().decode().split(","):
            copy = folder / f"{name}{library_file.suffix}"
            shutil.copy(library_file, copy)
            patch.setenv("BNB_CPU_ISA", name)
            found[name] = BNBNativeLibrary(ctypes.CDLL(str(copy)))
            assert found[name].bnb_cpu_isa() == name.encode()
    return found
