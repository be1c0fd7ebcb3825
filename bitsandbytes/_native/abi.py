"""Binds ctypes to ``bnb.h``: enums become IntEnums, structs Structures, prototypes argtypes and an error check.

The header is the only list of native functions, so this parses it when the library loads. It understands the small
subset that the header's first comment promises and refuses anything else: a declaration that is silently skipped
would be a function called with guessed types.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Abi", "AbiError", "Prototype", "error_check", "parse_header"]

_SCALARS: dict[str, Any] = {
    "void": None,
    "bool": ctypes.c_bool,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "int8_t": ctypes.c_int8,
    "uint8_t": ctypes.c_uint8,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
}

_PREPROCESSOR = re.compile(
    r"#\s*(?:include\s*<std(?:bool|def|int)\.h>|(?:if|elif)\s+defined\(\w+\)|ifndef BNB_H|define BNB_H"
    r"|define BNB_API\b.*|else|endif)$"
)
_CONSTANT = re.compile(r"#\s*define\s+(BNB_\w+)\s+(-?\d+)$")
_ENUM = re.compile(r"typedef enum (\w+) \{([^{}]*)\} (\w+);")
_STRUCT = re.compile(r"typedef struct (\w+) \{([^{}]*)\} (\w+);")
_ALIAS = re.compile(r"typedef void\* (\w+);")
_FUNCTION = re.compile(r"BNB_API ([\w ]+?[ *]+)(\w+)\(([^()]*)\);")
_DECLARATOR = re.compile(r"((?:const )?\w+(?: ?\*)* ?)(\w+)$")


class AbiError(RuntimeError):
    """The header holds something this parser does not know, or does not fit the library."""


class Prototype(NamedTuple):
    restype: Any
    argtypes: list[Any]
    argnames: list[str]
    returns_status: bool


class Abi:
    """Everything a header declares, by name."""

    def __init__(self) -> None:
        self.constants: dict[str, int] = {}
        self.enums: dict[str, type[IntEnum]] = {}
        self.structs: dict[str, type[ctypes.Structure]] = {}
        self.prototypes: dict[str, Prototype] = {}
        self._types: dict[str, Any] = dict(_SCALARS)

    def bind(self, function: Any, name: str, check: Callable) -> Any:
        """Give a ctypes function the types of its prototype."""
        prototype = self.prototypes[name]
        function.argtypes = prototype.argtypes
        function.restype = prototype.restype
        if prototype.returns_status:
            function.errcheck = check
        return function

    def packer(self, name: str) -> Callable[..., bytes]:
        """Makes the bytes of a struct from its fields, null pointers as 0: sooner than ctypes converts one argument."""
        kind = self.structs[name]
        fields: Any = kind._fields_
        codes = "@" + "".join(field._type_ for _, field in fields)  # ctypes names types as `struct` does
        padding = ctypes.sizeof(kind) - struct.calcsize(codes)
        return struct.Struct(f"{codes}{padding}x").pack

    def _type(self, text: str) -> Any:
        text = text.replace("const ", "").strip()
        if text.replace(" ", "") == "char*":
            return ctypes.c_char_p
        if text.endswith("*"):
            return ctypes.c_void_p
        if text not in self._types:
            raise AbiError(f"bnb.h: unknown type {text!r}")
        return self._types[text]

    def _declarators(self, text: str, separator: str) -> list[tuple[str, Any]]:
        pairs = []
        for part in filter(None, (piece.strip() for piece in text.split(separator))):
            found = _DECLARATOR.match(part)
            if not found or found[1].strip() == "void":
                raise AbiError(f"bnb.h: cannot read declaration {part!r}")
            pairs.append((found[2], self._type(found[1])))
        return pairs

    def _add_enum(self, tag: str, body: str, name: str) -> None:
        prefix = name.upper() + "_"
        members = {}
        for entry in filter(None, (piece.strip() for piece in body.split(","))):
            found = re.fullmatch(r"(\w+) = (-?\d+)", entry)
            if not found or not found[1].startswith(prefix) or tag != name:
                raise AbiError(f"bnb.h: enum {name}: {entry!r} is not {prefix}<NAME> = <integer>")
            members[found[1].removeprefix(prefix)] = int(found[2])
        self.enums[name] = IntEnum(name, members)  # type: ignore[assignment]
        self._types[name] = ctypes.c_int32

    def _add_struct(self, tag: str, body: str, name: str) -> None:
        if tag != name:
            raise AbiError(f"bnb.h: struct {tag} has another name, {name}")
        fields = self._declarators(body, ";")
        self.structs[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
        self._types[name] = self.structs[name]

    def _add_function(self, returns: str, name: str, arguments: str) -> None:
        pairs = [] if arguments.strip() == "void" else self._declarators(arguments, ",")
        self.prototypes[name] = Prototype(
            self._type(returns),
            [kind for _, kind in pairs],
            [arg for arg, _ in pairs],
            returns.strip() == "bnb_status",
        )

    def add(self, text: str) -> None:
        """Read declarations until the text is used up; the first that fits no known form is an error."""
        forms = (
            (_ENUM, self._add_enum),
            (_STRUCT, self._add_struct),
            (_ALIAS, lambda name: self._types.__setitem__(name, ctypes.c_void_p)),
            (_FUNCTION, self._add_function),
        )
        position = 0
        while position < len(text):
            for pattern, add in forms:
                found = pattern.match(text, position)
                if found:
                    add(*found.groups())
                    position = found.end() + 1  # the space between declarations
                    break
            else:
                raise AbiError(f"bnb.h: cannot read {text[position : position + 80]!r}")


def _without_preprocessor(text: str, constants: dict[str, int]) -> str:
    kept = []
    in_cplusplus = False
    for line in text.splitlines():
        line = line.strip()
        if in_cplusplus:
            in_cplusplus = line != "#endif"
        elif line == "#ifdef __cplusplus":
            in_cplusplus = True
        elif constant := _CONSTANT.match(line):
            constants[constant[1]] = int(constant[2])
        elif line.startswith("#"):
            if not _PREPROCESSOR.match(line):
                raise AbiError(f"bnb.h: unknown directive {line!r}")
        else:
            kept.append(line)
    return " ".join(" ".join(kept).split())


def parse_header(path: Path) -> Abi:
    """Parse a header file.

    Raises:
        AbiError: the file is missing or holds a line of unknown form.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise AbiError(f"the header of the native library cannot be read: {error}") from error
    abi = Abi()
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)
    abi.add(_without_preprocessor(text, abi.constants))
    return abi


def error_check(library: ctypes.CDLL, status: type[IntEnum]) -> Callable:
    """An ``errcheck`` that turns a status into an exception carrying the native text."""
    last_error = library.bnb_last_error
    last_error.argtypes, last_error.restype = [], ctypes.c_char_p
    kinds: dict[int, type[Exception]] = {
        status["INVALID_ARGUMENT"]: ValueError,
        status["UNSUPPORTED"]: NotImplementedError,
    }

    def check(result: int, function: Any, arguments: tuple) -> int:
        if result:
            raise kinds.get(result, RuntimeError)(last_error().decode("utf-8", "replace"))
        return result

    return check
