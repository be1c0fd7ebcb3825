"""The header is the binding: what the parser takes, what it refuses, and that header, library and tables agree."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from bitsandbytes import _native
from bitsandbytes._formats.table import FORMATS
from bitsandbytes._native.abi import AbiError, parse_header
from bitsandbytes._native.legacy import legacy_types
from bitsandbytes._native.library import BNBNativeLibrary
from bitsandbytes._native.specs import PACKAGE_DIR

GOOD = """
/* a comment; with a semicolon */
#ifndef BNB_H
#define BNB_H
#include <stdint.h>
#define BNB_ABI_VERSION 7
#ifdef __cplusplus
extern "C" {
#endif
typedef enum bnb_status { BNB_STATUS_OK = 0, BNB_STATUS_BAD = 3 } bnb_status;
typedef struct bnb_options {
    float rate;
    int64_t steps;
} bnb_options;
typedef void* bnb_stream;
BNB_API int32_t bnb_plain(void);
BNB_API const char* bnb_text(void);
BNB_API bnb_status bnb_run(
    const float* code, void* out, bnb_status kind,
    int64_t n, bool flag, float x, const bnb_options* options, bnb_stream stream);
#ifdef __cplusplus
}
#endif
#endif
"""


def parse(tmp_path: Path, text: str):
    header = tmp_path / "bnb.h"
    header.write_text(text)
    return parse_header(header)


def test_every_form_of_declaration_is_read(tmp_path):
    abi = parse(tmp_path, GOOD)

    assert abi.constants == {"BNB_ABI_VERSION": 7}
    assert {m.name: int(m) for m in abi.enums["bnb_status"]} == {"OK": 0, "BAD": 3}
    assert abi.structs["bnb_options"]._fields_ == [("rate", ctypes.c_float), ("steps", ctypes.c_int64)]
    assert abi.prototypes["bnb_plain"] == (ctypes.c_int32, [], [], False)
    assert abi.prototypes["bnb_text"].restype is ctypes.c_char_p
    run = abi.prototypes["bnb_run"]
    assert run.returns_status
    assert run.argnames == ["code", "out", "kind", "n", "flag", "x", "options", "stream"]
    assert run.argtypes == [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int32,
        ctypes.c_int64,
        ctypes.c_bool,
        ctypes.c_float,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]


def test_a_packed_struct_is_that_of_ctypes(tmp_path):
    fields = "bool flag; const float* values; int32_t count; double rate; uint8_t kind;"
    line = f"typedef struct bnb_mixed {{ {fields} }} bnb_mixed;"
    abi = parse(tmp_path, GOOD.replace("typedef void* bnb_stream;", f"typedef void* bnb_stream;\n{line}"))
    given = (True, 2**40, -3, 0.5, 7)

    packed = abi.packer("bnb_mixed")(*given)

    assert packed == bytes(abi.structs["bnb_mixed"](*given))


@pytest.mark.parametrize("name", ["bnb_cpu_gemm_4bit_with", "bnb_cpu_int8_linear_with"])
def test_arguments_in_a_struct_are_checked(library, name):
    with pytest.raises(ValueError, match="null pointer"):
        getattr(library, name)(None)


@pytest.mark.parametrize(
    "line",
    [
        "BNB_API unsigned bnb_f(void);",
        "BNB_API int32_t bnb_f(size_t n);",
        "BNB_API int32_t bnb_f(int32_t);",
        "BNB_API int32_t bnb_f(int32_t values[4]);",
        "int32_t bnb_f(void);",
        "typedef enum bnb_x { BNB_X_A } bnb_x;",
        "typedef enum bnb_x { OTHER_A = 0 } bnb_x;",
        "typedef struct bnb_s { struct bnb_t* next; } bnb_s;",
        "typedef int bnb_number;",
        "#define BNB_F(x) x",
        "#pragma once",
        "static const int kValue = 3;",
    ],
)
def test_an_unknown_line_is_refused(tmp_path, line):
    with pytest.raises(AbiError, match=r"bnb\.h"):
        parse(tmp_path, GOOD.replace("typedef void* bnb_stream;", f"typedef void* bnb_stream;\n{line}"))


def test_a_missing_header_is_an_error_that_names_it(tmp_path):
    with pytest.raises(AbiError, match="header"):
        parse_header(tmp_path / "bnb.h")


def test_the_library_has_every_declared_function_of_its_backend(library):
    cuda = library.bnb_has_cuda()
    missing = [
        name
        for name in _native.ABI.prototypes
        if not library.has(name) and (cuda or not name.startswith("bnb_cuda_"))
    ]
    assert missing == []


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm to list symbols")
def test_the_library_exports_nothing_else(library_file):
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", library_file], capture_output=True, text=True, check=True
    )
    exported = {line.split()[-1] for line in listed.stdout.splitlines()}

    unknown = {name for name in exported if name not in _native.ABI.prototypes and legacy_types(name) is None}

    assert unknown == set()


def test_every_cuda_function_is_called_for_the_sanitizer():
    root = Path(__file__).parents[2]
    declared = {name for name in parse_header(root / "csrc" / "bnb.h").prototypes if "_cuda_" in name}
    called = "".join(file.read_text() for file in (root / "tests" / "native" / "sanitize").glob("*.py"))

    assert len(declared) > 10
    assert {name for name in declared if f'"{name}"' not in called} - {"bnb_has_cuda"} == set()


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_header_is_plain_c99(library, tmp_path):
    source = tmp_path / "user.c"
    source.write_text('#include "bnb.h"\nint main(void) { return (int)BNB_STATUS_OK; }\n')
    subprocess.run(
        [
            "cc",
            "-std=c99",
            "-pedantic",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-fsyntax-only",
            f"-I{PACKAGE_DIR}",
            source,
        ],
        check=True,
    )


def test_a_library_of_another_abi_version_is_refused(library_file, monkeypatch, tmp_path):
    text = (PACKAGE_DIR / "bnb.h").read_text()
    (tmp_path / "bnb.h").write_text(re.sub(r"(BNB_ABI_VERSION) \d+", r"\1 99", text))
    monkeypatch.setattr("bitsandbytes._native.library.PACKAGE_DIR", tmp_path)

    with pytest.raises(AbiError, match=r"version 99.*rebuild"):
        BNBNativeLibrary(ctypes.CDLL(str(library_file)))


@pytest.mark.parametrize("name", FORMATS)
def test_codebooks_are_those_of_python(library, name):
    """The one place where the C++ and the Python table meet."""
    values, thresholds = torch.empty(16), torch.empty(15)
    library.bnb_codebook(_native.FORMAT_ID[name], values.data_ptr(), thresholds.data_ptr())

    expected = torch.tensor(FORMATS[name].values, dtype=torch.float32)
    ascending = expected.sort().values
    assert torch.equal(values, expected)
    assert torch.equal(thresholds, (ascending[1:] + ascending[:-1]) / 2)


def test_every_dtype_and_format_has_an_id(library):
    assert set(_native.DTYPE_ID) == {torch.float32, torch.float16, torch.bfloat16}
    assert set(_native.FORMAT_ID) == set(FORMATS)
