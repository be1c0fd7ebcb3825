// What int8 products need of an instruction set, behind names that all sets have.
//
//   kDotBytes                            weights that one step takes
//   Activation                           what activations are stored as: int8_t, or int16_t where products are of 16
//   bits kOffset                              what load_weights adds to each weight; the caller takes it out of the sum
//   Weights, load_weights(const int8_t*) kDotBytes weights of a row, made ready for dot
//   ones()                               weights of 1, without the offset
//   dot(acc, const Activation*, Weights) acc plus products, some in each lane; exact modulo 2^32
//   store_sums(int32_t[4], I32[4])       the sum of each vector's lanes
//   widen(Activation*, const int8_t*)    kDotBytes activations
//   to_float(I32), load_sums(const int32_t*), any_lane(I32 mask)
//   kTileRows                            rows of activations times 4 of weights whose accumulators fit the registers
//
// VNNI multiplies unsigned by signed bytes, so weights are made unsigned there: flipping the top bit adds 128.
#pragma once

#include "vector.h"

BNB_NAMESPACE_BEGIN

#if defined(BNB_SIMD_AVX512) || defined(BNB_SIMD_AVX512BF16) || defined(BNB_SIMD_AVX512AMX)

BNB_INLINE F32 to_float(I32 x) { return {_mm512_cvtepi32_ps(x.v)}; }
BNB_INLINE I32 load_sums(const int32_t* source) { return {_mm512_loadu_si512(source)}; }
BNB_INLINE bool any_lane(I32 mask) { return _mm512_movepi32_mask(mask.v) != 0; }

// Neighbours are added as they are interleaved: after two rounds each 128-bit part holds a sum of every vector.
BNB_INLINE void store_sums(int32_t* target, const I32* x) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(x[0].v, x[1].v), _mm512_unpackhi_epi32(x[0].v, x[1].v));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(x[2].v, x[3].v), _mm512_unpackhi_epi32(x[2].v, x[3].v));
    const __m512i parts = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(parts), _mm512_extracti64x4_epi64(parts, 1));
    const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), sums);
}

constexpr int kTileRows = 6;

struct Weights {
    __m512i v;
};

#if defined(__AVX512VNNI__)

using Activation = int8_t;
constexpr int kDotBytes = 64;
constexpr int32_t kOffset = 128;

BNB_INLINE Weights load_weights(const int8_t* source) {
    return {_mm512_xor_si512(_mm512_loadu_si512(source), _mm512_set1_epi8(-128))};
}

BNB_INLINE Weights ones() { return {_mm512_set1_epi8(1)}; }

// Spelled out, because GCC 12 does not see that the intrinsic works in place and keeps every accumulator twice: those
// of a tile then live in memory, at less than half the speed.
BNB_INLINE I32 dot(I32 acc, const Activation* activations, Weights weights) {
    __m512i sum = acc.v;
    const __m512i loaded = _mm512_loadu_si512(activations);
    asm("vpdpbusd {%2, %1, %0|%0, %1, %2}" : "+v"(sum) : "v"(weights.v), "v"(loaded));
    return {sum};
}

BNB_INLINE void widen(Activation* target, const int8_t* source) {
    _mm512_storeu_si512(target, _mm512_loadu_si512(source));
}

#else

using Activation = int16_t;
constexpr int kDotBytes = 32;
constexpr int32_t kOffset = 0;

BNB_INLINE Weights load_weights(const int8_t* source) {
    return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)))};
}

BNB_INLINE Weights ones() { return {_mm512_set1_epi16(1)}; }

BNB_INLINE I32 dot(I32 acc, const Activation* activations, Weights weights) {
    return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(weights.v, _mm512_loadu_si512(activations)))};
}

BNB_INLINE void widen(Activation* target, const int8_t* source) { _mm512_storeu_si512(target, load_weights(source).v); }

#endif

#elif defined(BNB_SIMD_AVX2)

BNB_INLINE F32 to_float(I32 x) { return {_mm256_cvtepi32_ps(x.v)}; }
BNB_INLINE I32 load_sums(const int32_t* source) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source))};
}
BNB_INLINE bool any_lane(I32 mask) { return _mm256_movemask_epi8(mask.v) != 0; }

BNB_INLINE void store_sums(int32_t* target, const I32* x) {
    const __m256i parts = _mm256_hadd_epi32(_mm256_hadd_epi32(x[0].v, x[1].v), _mm256_hadd_epi32(x[2].v, x[3].v));
    const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(parts), _mm256_extracti128_si256(parts, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), sums);
}

constexpr int kTileRows = 2;

struct Weights {
    __m256i v;
};

using Activation = int16_t;
constexpr int kDotBytes = 16;
constexpr int32_t kOffset = 0;

BNB_INLINE Weights load_weights(const int8_t* source) {
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)))};
}

BNB_INLINE Weights ones() { return {_mm256_set1_epi16(1)}; }

BNB_INLINE I32 dot(I32 acc, const Activation* activations, Weights weights) {
    const __m256i loaded = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(activations));
    return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(weights.v, loaded))};
}

BNB_INLINE void widen(Activation* target, const int8_t* source) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), load_weights(source).v);
}

#elif defined(BNB_SIMD_NEON)

BNB_INLINE F32 to_float(I32 x) { return {vcvtq_f32_s32(x.v)}; }
BNB_INLINE I32 load_sums(const int32_t* source) { return {vld1q_s32(source)}; }
BNB_INLINE bool any_lane(I32 mask) { return vmaxvq_u32(vreinterpretq_u32_s32(mask.v)) != 0; }

BNB_INLINE void store_sums(int32_t* target, const I32* x) {
    vst1q_s32(target, vpaddq_s32(vpaddq_s32(x[0].v, x[1].v), vpaddq_s32(x[2].v, x[3].v)));
}

constexpr int kTileRows = 4;

struct Weights {
    int8x16_t v;
};

using Activation = int8_t;
constexpr int kDotBytes = 16;
constexpr int32_t kOffset = 0;

BNB_INLINE Weights load_weights(const int8_t* source) { return {vld1q_s8(source)}; }
BNB_INLINE Weights ones() { return {vdupq_n_s8(1)}; }

BNB_INLINE I32 dot(I32 acc, const Activation* activations, Weights weights) {
    const int8x16_t loaded = vld1q_s8(activations);
    const int32x4_t first = vpadalq_s16(acc.v, vmull_s8(vget_low_s8(loaded), vget_low_s8(weights.v)));
    return {vpadalq_s16(first, vmull_s8(vget_high_s8(loaded), vget_high_s8(weights.v)))};
}

BNB_INLINE void widen(Activation* target, const int8_t* source) { vst1q_s8(target, vld1q_s8(source)); }

#else

BNB_INLINE F32 to_float(const I32& x) {
    return each_lane<F32>([&](int i) { return static_cast<float>(x.lane[i]); });
}

BNB_INLINE I32 load_sums(const int32_t* source) {
    return each_lane<I32>([&](int i) { return source[i]; });
}

BNB_INLINE bool any_lane(const I32& mask) {
    int32_t any = 0;
    for (int i = 0; i < kWidth; ++i) any |= mask.lane[i];
    return any != 0;
}

BNB_INLINE void store_sums(int32_t* target, const I32* x) {
    for (int j = 0; j < 4; ++j) {
        uint32_t sum = 0;
        for (int i = 0; i < kWidth; ++i) sum += static_cast<uint32_t>(x[j].lane[i]);
        target[j] = static_cast<int32_t>(sum);
    }
}

constexpr int kTileRows = 1;

struct Weights {
    int16_t lane[16];
};

using Activation = int16_t;
constexpr int kDotBytes = 16;
constexpr int32_t kOffset = 0;

BNB_INLINE Weights load_weights(const int8_t* source) {
    Weights result;
    for (int i = 0; i < kDotBytes; ++i) result.lane[i] = source[i];
    return result;
}

BNB_INLINE Weights ones() {
    Weights result;
    for (int i = 0; i < kDotBytes; ++i) result.lane[i] = 1;
    return result;
}

// Sums may wrap, which only unsigned numbers do by definition.
BNB_INLINE I32 dot(const I32& acc, const Activation* activations, const Weights& weights) {
    return each_lane<I32>([&](int i) {
        const int32_t pair =
            activations[2 * i] * weights.lane[2 * i] + activations[2 * i + 1] * weights.lane[2 * i + 1];
        return static_cast<int32_t>(static_cast<uint32_t>(acc.lane[i]) + static_cast<uint32_t>(pair));
    });
}

BNB_INLINE void widen(Activation* target, const int8_t* source) {
    for (int i = 0; i < kDotBytes; ++i) target[i] = source[i];
}

#endif

BNB_NAMESPACE_END
