"""The C signatures of earlier releases' symbols, for programs that still call them through ``functional.lib``.

They are kept apart from ``bnb.h``: those functions return nothing, take 32-bit sizes and have their types in their
names. One letter an argument: ``p`` pointer, ``i`` int32, ``l`` int64, ``f`` float, ``b`` bool, ``z`` size_t.
"""

from __future__ import annotations

import ctypes
import re
from typing import Any

__all__ = ["legacy_types"]

_LETTERS: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int32,
    "l": ctypes.c_int64,
    "f": ctypes.c_float,
    "b": ctypes.c_bool,
    "z": ctypes.c_size_t,
    "": None,
}

_FLOATS = "(?:fp32|fp16|bf16)"

# pattern, arguments, result
_SIGNATURES: tuple[tuple[str, str, str], ...] = (
    (rf"cquantize_blockwise_{_FLOATS}(?:_fp4|_nf4)?", "ppppii", ""),
    (rf"cdequantize_blockwise_{_FLOATS}(?:_fp4|_nf4)?", "ppppiip", ""),
    (rf"cquantize_blockwise_cpu_{_FLOATS}", "ppppll", ""),
    (rf"cdequantize_blockwise_cpu_{_FLOATS}", "ppppll", ""),
    (rf"cdequantize_blockwise_cpu_(?:fp4|nf4)_{_FLOATS}", "ppplll", ""),
    (r"gemv_4bit_inference_cpu_(?:fp4|nf4)_bf16", "lllpppplll", ""),
    (rf"cgemm_4bit_inference_naive_{_FLOATS}", "iiipppppiiiip", ""),
    (rf"cgemm_4bit_{_FLOATS}", "ppppppppiiiiip", ""),
    (rf"cgemv_4bit_inference_{_FLOATS}", "iiipppppiiiip", ""),
    (r"cigemm", "pbbiiipppiii", ""),
    (r"cbatched_igemm", "pbbiiipppiiillli", ""),
    (r"cigemmlt_(?:32|8|8_rowscale)", "piiippppiiip", "i"),
    (r"cdequant_mm_int32_fp16", "pppppiip", ""),
    (r"cint8_vector_quant", "pppfiip", ""),
    (r"c(?:adam|lion|ademamix)32bit_grad_(?:fp32|fp16|bf16)", "pppppffffffffiffbi", ""),
    (r"c(?:momentum|rmsprop|adagrad)32bit_grad_(?:32|16)", "pppppffffffffiffbi", ""),
    (
        rf"c(?:adam|momentum|rmsprop|adagrad|lion|ademamix)_8bit_blockwise_grad_{_FLOATS}",
        "ppppfffffifppppffbi",
        "",
    ),
    (r"get_context", "", "p"),
    (r"cget_managed_ptr", "z", "p"),
    (r"cprefetch", "pzi", ""),
    (r"cfill_(?:fp32|uint8)|carange_fp32|c_mul_fp32", "ppfl", ""),
    (r"cquantize", "pppi", ""),
    (r"cdequantize", "pppip", ""),
    (r"has_avx512f_cpu|has_avx512bf16_cpu", "", "b"),
)
_COMPILED = tuple((re.compile(pattern), arguments, result) for pattern, arguments, result in _SIGNATURES)


def legacy_types(name: str) -> tuple[list[Any], Any] | None:
    """(argtypes, restype) of an earlier symbol; None if there was none of that name."""
    for pattern, arguments, result in _COMPILED:
        if pattern.fullmatch(name):
            return [_LETTERS[letter] for letter in arguments], _LETTERS[result]
    return None
