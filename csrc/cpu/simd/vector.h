// The vector every CPU kernel is written in: kWidth floats (F32) or 32-bit integers (I32) of one instruction set.
//
// Each set provides, with the same results bit for bit:
//
//   broadcast(float | int32_t)           load(const T*), store(T*, F32)      T: float, Half, BFloat16; unaligned
//   load_u8(const uint8_t*) -> I32       store_u8(uint8_t*, I32 in 0..255)   store_i8(int8_t*, I32 in -128..127)
//   F32: + - * /, sqrt, fma(a, b, c) = a * b + c (rounding once or twice), clamp(x, low, high) keeping NaN
//   I32: + - & |, min, max, shift_left<k>, shift_right<k> (logical), bits(F32), from_bits(I32)
//   masks are I32, all ones or zero:     nan_mask(x)   at_least_mask(a, b) = a >= b   select(mask, yes, no)
//   round_to_int(F32): ties to even; a NaN gives any value
//   descend(index, x, t): 2 * index + !(x <= t), one level of a binary search where NaN goes right
//   Table4, Table8, Table16: floats in registers, made of 8 or 16; lookup(table, I32)
//   gather(const float*, I32)
//   lookup_many<n>(const float*, I32): n a power of two up to 256, may read 16 floats; whether that avoids a gather
//   is kPermutesTables
//   lookup_codes(const float*, const uint8_t*): the entries of 256 that kWidth bytes name
//   unpack_4bit(const uint8_t*): kWidth / 2 bytes -> kWidth codes, high nibble first; pack_4bit the inverse
//   load_words(const void*), store_words(void*, I32): kWidth 32-bit words
//   load_transposed(rows, offset, words): words[i] has the i-th word of each of kWidth rows, from a byte offset on
//   repeat<n>(const float*): n floats, 1, 2 or 4, each in kWidth / n neighbouring lanes
//   load_codes(rows, offset, codes): codes[j] has the eight codes of the j-th word of each row, in an order of the
//   set's own; lookup_code<i>(NibbleTable, codes[j]): the entry that the i-th of each row names. Whether each tile
//   looks weights up anew, because that is faster than to load them, is kLooksUpInTiles
//   reduce_add(F32), reduce_max(I32), any_above(I32 a, I32 b): whether a > b in any lane
//   with BNB_HAVE_HALF_TABLES also HalfTable<T>(Table16, F32 scale): the sixteen products rounded to 16 bits;
//   look_up(packed, T*) decodes kCodes codes to them
//   with BNB_HAVE_JOINT_PACK also pack_4bit of kPackedTogether vectors at once
//   with BNB_HAVE_SCALED_CODES also, for the T that kScalesCodes<T> names, scale_codes(table, codes, F32 scale, T*):
//   kCodesScaled products of entries and a scale, none of which may be NaN
//   with BNB_HAVE_CELLS also encode_by_cell of kEncodedTogether values, which map_codes_gather.inl has for the others
//   with BNB_HAVE_PAIRS also the products of bfloat16 pairs in avx512bf16.h; with BNB_HAVE_AMX those of whole tiles
//
// A trick only one set knows goes into that set's file, behind a name that all of them have.
#pragma once

#include "../../common/dtype.h"
#include "../../common/encode.h"

#if defined(BNB_SIMD_AVX512AMX)
#include "avx512.h"
#include "avx512amx.h"
#elif defined(BNB_SIMD_AVX512BF16)
#include "avx512.h"
#include "avx512bf16.h"
#elif defined(BNB_SIMD_AVX512)
#include "avx512.h"
#elif defined(BNB_SIMD_AVX2)
#include "avx2.h"
#elif defined(BNB_SIMD_NEON)
#include "neon.h"
#else
#include "scalar.h"
#endif

BNB_NAMESPACE_BEGIN

#ifndef BNB_HAVE_JOINT_PACK
constexpr int kPackedTogether = 1;
BNB_INLINE void pack_4bit(uint8_t* packed, const I32 (&codes)[1]) { pack_4bit(packed, codes[0]); }
#endif

#ifndef BNB_HAVE_CELLS
constexpr int kEncodedTogether = kWidth;
#endif

#ifdef BNB_HAVE_BYTE_TABLES
constexpr bool kByteTables = true;
#else
constexpr bool kByteTables = false;
using NibbleTable = Table16;

BNB_INLINE void load_codes(const void* const (&row)[kWidth], int64_t offset, I32 (&codes)[kWidth]) {
    load_transposed(row, offset, codes);
}

template <int i>
BNB_INLINE F32 lookup_code(const NibbleTable& table, const I32& codes) {
    return lookup_nibble<8 * (i / 2) + (i % 2 ? 0 : 4)>(table, codes);
}
#endif

// |x| as an integer: magnitudes order like their bits, and NaN is above infinity, so it wins every max.
BNB_INLINE I32 magnitude_bits(F32 x) { return bits(x) & broadcast(int32_t(0x7fffffff)); }

// The first `count` < kWidth elements, the others zero; reads nothing beyond them.
template <class T>
BNB_INLINE F32 load_partial(const T* source, int64_t count) {
    T padded[kWidth] = {};
    memcpy(padded, source, static_cast<size_t>(count) * sizeof(T));
    return load(padded);
}

template <class T>
BNB_INLINE void store_partial(T* target, F32 x, int64_t count) {
    T padded[kWidth];
    store(padded, x);
    memcpy(target, padded, static_cast<size_t>(count) * sizeof(T));
}

BNB_NAMESPACE_END
