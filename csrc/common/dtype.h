// The element types of the ABI and their conversions to and from float.
//
// Rounding is to nearest, ties to even, with denormals kept, so that a value converts to the same bits on every
// instruction set, on the GPU and in torch. The conversions here are the portable ones; simd/*.h uses the
// machine's where it has them.
#pragma once

#include <cstdint>
#include <cstring>

#include "../bnb.h"
#include "platform.h"

namespace bnb {

struct Half {
    uint16_t bits;
};

struct BFloat16 {
    uint16_t bits;
};

template <class T>
struct TypeTag {
    using type = T;
};

}  // namespace bnb

BNB_NAMESPACE_BEGIN

BNB_HOST_DEVICE inline uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

BNB_HOST_DEVICE inline float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

BNB_HOST_DEVICE inline float to_float(float value) { return value; }

BNB_HOST_DEVICE inline float to_float(BFloat16 value) { return bits_float(uint32_t(value.bits) << 16); }

BNB_HOST_DEVICE inline float to_float(Half value) {
    const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
    const uint32_t magnitude = value.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) {  // infinity, or NaN made quiet as the hardware does
        const uint32_t mantissa = (magnitude & 0x3ffu) << 13;
        return bits_float(sign | 0x7f800000u | mantissa | (mantissa ? 0x400000u : 0u));
    }
    if (magnitude >= 0x400u) return bits_float(sign | ((magnitude << 13) + 0x38000000u));
    return bits_float(sign | float_bits(float(magnitude) * 5.9604644775390625e-8f));  // denormal: units of 2^-24
}

template <class T>
BNB_HOST_DEVICE inline T from_float(float value);

template <>
BNB_HOST_DEVICE inline float from_float<float>(float value) {
    return value;
}

template <>
BNB_HOST_DEVICE inline BFloat16 from_float<BFloat16>(float value) {
    const uint32_t bits = float_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0u};
    return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
BNB_HOST_DEVICE inline Half from_float<Half>(float value) {
    const uint32_t bits = float_bits(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu))};
    if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds past 65504
    if (magnitude >= 0x38800000u) {
        const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
        return {uint16_t(sign | ((rounded - 0x38000000u) >> 13))};
    }
    if (magnitude < 0x33000000u) return {uint16_t(sign)};  // below half of the smallest denormal
    const uint32_t shift = 126u - (magnitude >> 23);       // 14..24: bits below the denormal's last place
    const uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    const uint32_t kept = mantissa >> shift;
    const uint32_t rest = mantissa & ((1u << shift) - 1u);
    const uint32_t half = 1u << (shift - 1u);
    return {uint16_t(sign | (kept + (rest > half || (rest == half && (kept & 1u)) ? 1u : 0u)))};
}

// Call body(TypeTag<T>{}) for the C++ type behind a dtype; false if there is none.
template <class Body>
bool visit(bnb_dtype dtype, Body&& body) {
    switch (dtype) {
        case BNB_DTYPE_FLOAT32: body(TypeTag<float>{}); return true;
        case BNB_DTYPE_FLOAT16: body(TypeTag<Half>{}); return true;
        case BNB_DTYPE_BFLOAT16: body(TypeTag<BFloat16>{}); return true;
    }
    return false;
}

BNB_NAMESPACE_END
