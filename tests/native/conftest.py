"""The native library, and copies of it that run one instruction set each."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitsandbytes import _native
from bitsandbytes._native.library import BNBNativeLibrary
from emulated import EmulatedLibrary, find_neon

HAVE_LIBRARY = _native.ABI is not None
EMULATED_AMX = Path(__file__).parents[2] / "build" / "amx" / "libbitsandbytes_cpu.so"


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
def variants(library_file, tmp_path_factory) -> Iterator[dict[str, BNBNativeLibrary | EmulatedLibrary]]:
    """Instruction set -> the library running it; a copy of the file is a library of its own to the dynamic loader.

    With ``make neon`` the instruction set of another processor is among them, with ``make amx`` AMX.
    """
    folder = tmp_path_factory.mktemp("variants")
    found: dict[str, BNBNativeLibrary | EmulatedLibrary] = {}
    files = dict.fromkeys(_native.lib.bnb_cpu_isa_available().decode().split(","), library_file)
    if EMULATED_AMX.exists() and "avx512bf16" in files:
        files.setdefault("avx512amx", EMULATED_AMX)
    with pytest.MonkeyPatch.context() as patch:
        for name, file in files.items():
            copy = folder / f"{name}{library_file.suffix}"
            shutil.copy(file, copy)
            patch.setenv("BNB_CPU_ISA", name)
            found[name] = BNBNativeLibrary(ctypes.CDLL(str(copy)))
            assert found[name].bnb_cpu_isa() == name.encode()
    command = find_neon()
    if command is None:
        yield found
        return
    neon = EmulatedLibrary(command, "neon")
    assert neon.bnb_cpu_isa() == b"neon"
    yield {**found, "neon": neon}
    neon.close()
