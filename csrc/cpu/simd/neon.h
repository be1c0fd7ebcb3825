// AArch64 NEON: four lanes.
#pragma once

#include <arm_neon.h>

BNB_NAMESPACE_BEGIN

constexpr int kWidth = 4;

struct F32 {
    float32x4_t v;
};

struct I32 {
    int32x4_t v;
};

BNB_INLINE F32 broadcast(float value) { return {vdupq_n_f32(value)}; }
BNB_INLINE I32 broadcast(int32_t value) { return {vdupq_n_s32(value)}; }

BNB_INLINE F32 load(const float* source) { return {vld1q_f32(source)}; }

BNB_INLINE F32 load(const Half* source) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(source))))};
}

BNB_INLINE F32 load(const BFloat16* source) {
    return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(source)), 16))};
}

BNB_INLINE void store(float* target, F32 x) { vst1q_f32(target, x.v); }

BNB_INLINE void store(Half* target, F32 x) {
    vst1_u16(reinterpret_cast<uint16_t*>(target), vreinterpret_u16_f16(vcvt_f16_f32(x.v)));
}

BNB_INLINE void store(BFloat16* target, F32 x) {
    const uint32x4_t raw = vreinterpretq_u32_f32(x.v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(raw, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(raw, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t number = vceqq_f32(x.v, x.v);
    const uint32x4_t upper = vbslq_u32(number, vshrq_n_u32(rounded, 16), vdupq_n_u32(0x7fc0));
    vst1_u16(reinterpret_cast<uint16_t*>(target), vmovn_u32(upper));
}

BNB_INLINE I32 load_u8(const uint8_t* source) {
    uint32_t raw;
    memcpy(&raw, source, sizeof(raw));
    const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(raw));
    return {vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))))};
}

BNB_INLINE uint32_t narrow_u8(I32 x) {
    const uint16x4_t halves = vmovn_u32(vreinterpretq_u32_s32(x.v));
    return vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(halves, halves))), 0);
}

BNB_INLINE void store_u8(uint8_t* target, I32 x) {
    const uint32_t raw = narrow_u8(x);
    memcpy(target, &raw, sizeof(raw));
}

BNB_INLINE void store_i8(int8_t* target, I32 x) { store_u8(reinterpret_cast<uint8_t*>(target), x); }

BNB_INLINE F32 operator+(F32 a, F32 b) { return {vaddq_f32(a.v, b.v)}; }
BNB_INLINE F32 operator-(F32 a, F32 b) { return {vsubq_f32(a.v, b.v)}; }
BNB_INLINE F32 operator*(F32 a, F32 b) { return {vmulq_f32(a.v, b.v)}; }
BNB_INLINE F32 operator/(F32 a, F32 b) { return {vdivq_f32(a.v, b.v)}; }
BNB_INLINE F32 sqrt(F32 a) { return {vsqrtq_f32(a.v)}; }
BNB_INLINE F32 fma(F32 a, F32 b, F32 c) { return {vfmaq_f32(c.v, a.v, b.v)}; }

// NEON's min and max return NaN when either operand is.
BNB_INLINE F32 clamp(F32 x, F32 low, F32 high) { return {vmaxq_f32(low.v, vminq_f32(high.v, x.v))}; }

BNB_INLINE I32 operator+(I32 a, I32 b) { return {vaddq_s32(a.v, b.v)}; }
BNB_INLINE I32 operator-(I32 a, I32 b) { return {vsubq_s32(a.v, b.v)}; }
BNB_INLINE I32 operator&(I32 a, I32 b) { return {vandq_s32(a.v, b.v)}; }
BNB_INLINE I32 operator|(I32 a, I32 b) { return {vorrq_s32(a.v, b.v)}; }
BNB_INLINE I32 min(I32 a, I32 b) { return {vminq_s32(a.v, b.v)}; }
BNB_INLINE I32 max(I32 a, I32 b) { return {vmaxq_s32(a.v, b.v)}; }

template <int k>
BNB_INLINE I32 shift_left(I32 a) {
    return {vshlq_n_s32(a.v, k)};
}

template <int k>
BNB_INLINE I32 shift_right(I32 a) {
    return {vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.v), k))};
}

BNB_INLINE I32 bits(F32 x) { return {vreinterpretq_s32_f32(x.v)}; }
BNB_INLINE F32 from_bits(I32 x) { return {vreinterpretq_f32_s32(x.v)}; }

BNB_INLINE I32 nan_mask(F32 x) { return {vreinterpretq_s32_u32(vmvnq_u32(vceqq_f32(x.v, x.v)))}; }
BNB_INLINE I32 at_least_mask(F32 a, F32 b) { return {vreinterpretq_s32_u32(vcgeq_f32(a.v, b.v))}; }

BNB_INLINE F32 select(I32 mask, F32 yes, F32 no) { return {vbslq_f32(vreinterpretq_u32_s32(mask.v), yes.v, no.v)}; }

BNB_INLINE I32 select(I32 mask, I32 yes, I32 no) { return {vbslq_s32(vreinterpretq_u32_s32(mask.v), yes.v, no.v)}; }

BNB_INLINE I32 round_to_int(F32 x) { return {vcvtnq_s32_f32(x.v)}; }

BNB_INLINE I32 descend(I32 index, F32 x, F32 threshold) {
    const int32x4_t above = vreinterpretq_s32_u32(vmvnq_u32(vcleq_f32(x.v, threshold.v)));
    return {vsubq_s32(vaddq_s32(index.v, index.v), above)};
}

// Byte positions 4 * index + {0, 1, 2, 3} of each lane.
BNB_INLINE uint8x16_t byte_positions(I32 index) {
    const int32x4_t spread = vmulq_s32(index.v, vdupq_n_s32(0x04040404));
    return vreinterpretq_u8_s32(vaddq_s32(spread, vdupq_n_s32(0x03020100)));
}

struct Table8 {
    uint8x16x2_t v;
    explicit Table8(const float* values) {
        for (int i = 0; i < 2; ++i) v.val[i] = vreinterpretq_u8_f32(vld1q_f32(values + 4 * i));
    }
};

using Table4 = Table8;

struct Table16 {
    uint8x16x4_t v;
    explicit Table16(const float* values) {
        for (int i = 0; i < 4; ++i) v.val[i] = vreinterpretq_u8_f32(vld1q_f32(values + 4 * i));
    }
};

BNB_INLINE F32 lookup(const Table8& table, I32 index) {
    return {vreinterpretq_f32_u8(vqtbl2q_u8(table.v, byte_positions(index)))};
}

BNB_INLINE F32 lookup(const Table16& table, I32 index) {
    return {vreinterpretq_f32_u8(vqtbl4q_u8(table.v, byte_positions(index)))};
}

BNB_INLINE F32 gather(const float* table, I32 index) {
    const float values[4] = {
        table[vgetq_lane_s32(index.v, 0)], table[vgetq_lane_s32(index.v, 1)], table[vgetq_lane_s32(index.v, 2)],
        table[vgetq_lane_s32(index.v, 3)]};
    return load(values);
}

BNB_INLINE I32 unpack_4bit(const uint8_t* packed) {
    const int32_t codes[4] = {packed[0] >> 4, packed[0] & 15, packed[1] >> 4, packed[1] & 15};
    return {vld1q_s32(codes)};
}

BNB_INLINE void pack_4bit(uint8_t* packed, I32 codes) {
    packed[0] = static_cast<uint8_t>(vgetq_lane_s32(codes.v, 0) << 4 | vgetq_lane_s32(codes.v, 1));
    packed[1] = static_cast<uint8_t>(vgetq_lane_s32(codes.v, 2) << 4 | vgetq_lane_s32(codes.v, 3));
}

BNB_INLINE I32 load_words(const void* source) { return {vld1q_s32(static_cast<const int32_t*>(source))}; }
BNB_INLINE void store_words(void* target, I32 x) { vst1q_s32(static_cast<int32_t*>(target), x.v); }

template <int k>
BNB_INLINE F32 lookup_nibble(const Table16& table, I32 words) {
    const uint32x4_t shifted = vshlq_u32(vreinterpretq_u32_s32(words.v), vdupq_n_s32(-k));
    return lookup(table, I32{vreinterpretq_s32_u32(shifted)} & broadcast(int32_t(15)));
}

BNB_INLINE void load_transposed(const void* const (&row)[kWidth], int64_t offset, I32 (&words)[kWidth]) {
    const auto at = [&](int i) { return load_words(static_cast<const uint8_t*>(row[i]) + offset).v; };
    const int32x4x2_t upper = vtrnq_s32(at(0), at(1));
    const int32x4x2_t lower = vtrnq_s32(at(2), at(3));
    for (int i = 0; i < 2; ++i) {
        words[i].v = vcombine_s32(vget_low_s32(upper.val[i]), vget_low_s32(lower.val[i]));
        words[i + 2].v = vcombine_s32(vget_high_s32(upper.val[i]), vget_high_s32(lower.val[i]));
    }
}

template <int count>
BNB_INLINE F32 repeat(const float* values) {
    static_assert(count == 1, "a vector of codes is no longer than the smallest block");
    return broadcast(*values);
}

BNB_INLINE float reduce_add(F32 x) { return vaddvq_f32(x.v); }
BNB_INLINE int32_t reduce_max(I32 x) { return vmaxvq_s32(x.v); }

constexpr bool kPermutesTables = false;
constexpr bool kLooksUpInTiles = false;

template <int n>
BNB_INLINE F32 lookup_many(const float* table, I32 index) {
    return gather(table, index);
}

BNB_INLINE F32 lookup_codes(const float* table, const uint8_t* codes) {
    const float found[4] = {table[codes[0]], table[codes[1]], table[codes[2]], table[codes[3]]};
    return load(found);
}

BNB_INLINE bool any_above(I32 a, I32 b) { return vmaxvq_u32(vcgtq_s32(a.v, b.v)) != 0; }

BNB_NAMESPACE_END
