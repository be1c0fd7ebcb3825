// The plain version: eight lanes in a loop. Runs everywhere and is what the other sets are compared with.
#pragma once

#include <math.h>

BNB_NAMESPACE_BEGIN

constexpr int kWidth = 8;

struct F32 {
    float lane[kWidth];
};

struct I32 {
    int32_t lane[kWidth];
};

template <class Result, class Body>
BNB_INLINE Result each_lane(const Body& body) {
    Result result;
    for (int i = 0; i < kWidth; ++i) result.lane[i] = body(i);
    return result;
}

#define BNB_F32(expression) each_lane<F32>([&](int i) { return float(expression); })
#define BNB_I32(expression) each_lane<I32>([&](int i) { return int32_t(expression); })

BNB_INLINE F32 broadcast(float value) { return BNB_F32((void(i), value)); }
BNB_INLINE I32 broadcast(int32_t value) { return BNB_I32((void(i), value)); }

template <class T>
BNB_INLINE F32 load(const T* source) {
    return BNB_F32(to_float(source[i]));
}

template <class T>
BNB_INLINE void store(T* target, const F32& x) {
    for (int i = 0; i < kWidth; ++i) target[i] = from_float<T>(x.lane[i]);
}

BNB_INLINE I32 load_u8(const uint8_t* source) { return BNB_I32(source[i]); }

BNB_INLINE void store_u8(uint8_t* target, const I32& x) {
    for (int i = 0; i < kWidth; ++i) target[i] = static_cast<uint8_t>(x.lane[i]);
}

BNB_INLINE void store_i8(int8_t* target, const I32& x) {
    for (int i = 0; i < kWidth; ++i) target[i] = static_cast<int8_t>(x.lane[i]);
}

BNB_INLINE F32 operator+(const F32& a, const F32& b) { return BNB_F32(a.lane[i] + b.lane[i]); }
BNB_INLINE F32 operator-(const F32& a, const F32& b) { return BNB_F32(a.lane[i] - b.lane[i]); }
BNB_INLINE F32 operator*(const F32& a, const F32& b) { return BNB_F32(a.lane[i] * b.lane[i]); }
BNB_INLINE F32 operator/(const F32& a, const F32& b) { return BNB_F32(a.lane[i] / b.lane[i]); }
BNB_INLINE F32 sqrt(const F32& a) { return BNB_F32(::sqrtf(a.lane[i])); }
BNB_INLINE F32 fma(const F32& a, const F32& b, const F32& c) { return BNB_F32(a.lane[i] * b.lane[i] + c.lane[i]); }

BNB_INLINE F32 clamp(const F32& x, const F32& low, const F32& high) {
    return BNB_F32(x.lane[i] > high.lane[i] ? high.lane[i] : x.lane[i] < low.lane[i] ? low.lane[i] : x.lane[i]);
}

BNB_INLINE I32 operator+(const I32& a, const I32& b) { return BNB_I32(a.lane[i] + b.lane[i]); }
BNB_INLINE I32 operator-(const I32& a, const I32& b) { return BNB_I32(a.lane[i] - b.lane[i]); }
BNB_INLINE I32 operator&(const I32& a, const I32& b) { return BNB_I32(a.lane[i] & b.lane[i]); }
BNB_INLINE I32 operator|(const I32& a, const I32& b) { return BNB_I32(a.lane[i] | b.lane[i]); }
BNB_INLINE I32 min(const I32& a, const I32& b) { return BNB_I32(a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]); }
BNB_INLINE I32 max(const I32& a, const I32& b) { return BNB_I32(a.lane[i] < b.lane[i] ? b.lane[i] : a.lane[i]); }

template <int k>
BNB_INLINE I32 shift_left(const I32& a) {
    return BNB_I32(uint32_t(a.lane[i]) << k);
}

template <int k>
BNB_INLINE I32 shift_right(const I32& a) {
    return BNB_I32(uint32_t(a.lane[i]) >> k);
}

BNB_INLINE I32 bits(const F32& x) { return BNB_I32(float_bits(x.lane[i])); }
BNB_INLINE F32 from_bits(const I32& x) { return BNB_F32(bits_float(uint32_t(x.lane[i]))); }

BNB_INLINE I32 nan_mask(const F32& x) { return BNB_I32(x.lane[i] != x.lane[i] ? -1 : 0); }
BNB_INLINE I32 at_least_mask(const F32& a, const F32& b) { return BNB_I32(a.lane[i] >= b.lane[i] ? -1 : 0); }

BNB_INLINE F32 select(const I32& mask, const F32& yes, const F32& no) {
    return BNB_F32(mask.lane[i] ? yes.lane[i] : no.lane[i]);
}

BNB_INLINE I32 select(const I32& mask, const I32& yes, const I32& no) {
    return BNB_I32(mask.lane[i] ? yes.lane[i] : no.lane[i]);
}

// Adding 1.5 * 2^23 leaves the rounded integer in the low bits of the sum; good for |x| < 2^22.
BNB_INLINE I32 round_to_int(const F32& x) { return BNB_I32(float_bits(x.lane[i] + 12582912.0f) - 0x4b400000u); }

BNB_INLINE I32 descend(const I32& index, const F32& x, const F32& threshold) {
    return BNB_I32(2 * index.lane[i] + (is_above(x.lane[i], threshold.lane[i]) ? 1 : 0));
}

struct Table8 {
    float value[8];
    explicit Table8(const float* values) { memcpy(value, values, sizeof(value)); }
};

using Table4 = Table8;

struct Table16 {
    float value[16];
    explicit Table16(const float* values) { memcpy(value, values, sizeof(value)); }
};

BNB_INLINE F32 lookup(const Table8& table, const I32& index) { return BNB_F32(table.value[index.lane[i]]); }
BNB_INLINE F32 lookup(const Table16& table, const I32& index) { return BNB_F32(table.value[index.lane[i]]); }
BNB_INLINE F32 gather(const float* table, const I32& index) { return BNB_F32(table[index.lane[i]]); }

BNB_INLINE I32 unpack_4bit(const uint8_t* packed) { return BNB_I32(i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4); }

BNB_INLINE void pack_4bit(uint8_t* packed, const I32& codes) {
    for (int i = 0; i < kWidth / 2; ++i) {
        packed[i] = static_cast<uint8_t>(codes.lane[2 * i] << 4 | codes.lane[2 * i + 1]);
    }
}

BNB_INLINE I32 load_words(const void* source) {
    I32 result;
    memcpy(result.lane, source, sizeof(result.lane));
    return result;
}

BNB_INLINE void store_words(void* target, const I32& x) { memcpy(target, x.lane, sizeof(x.lane)); }

template <int k>
BNB_INLINE F32 lookup_nibble(const Table16& table, const I32& words) {
    return BNB_F32(table.value[uint32_t(words.lane[i]) >> k & 15]);
}

BNB_INLINE void load_transposed(const void* const (&row)[kWidth], int64_t offset, I32 (&words)[kWidth]) {
    for (int i = 0; i < kWidth; ++i) {
        const I32 loaded = load_words(static_cast<const uint8_t*>(row[i]) + offset);
        for (int j = 0; j < kWidth; ++j) words[j].lane[i] = loaded.lane[j];
    }
}

template <int count>
BNB_INLINE F32 repeat(const float* values) {
    return BNB_F32(values[i * count / kWidth]);
}

BNB_INLINE float reduce_add(const F32& x) {
    float sum = 0.0f;
    for (int i = 0; i < kWidth; ++i) sum += x.lane[i];
    return sum;
}

BNB_INLINE int32_t reduce_max(const I32& x) {
    int32_t result = x.lane[0];
    for (int i = 1; i < kWidth; ++i) result = result < x.lane[i] ? x.lane[i] : result;
    return result;
}

constexpr bool kPermutesTables = false;
constexpr bool kLooksUpInTiles = false;

template <int n>
BNB_INLINE F32 lookup_many(const float* table, const I32& index) {
    return gather(table, index);
}

BNB_INLINE F32 lookup_codes(const float* table, const uint8_t* codes) { return BNB_F32(table[codes[i]]); }

BNB_INLINE bool any_above(const I32& a, const I32& b) {
    bool any = false;
    for (int i = 0; i < kWidth; ++i) any = any || a.lane[i] > b.lane[i];
    return any;
}

#undef BNB_F32
#undef BNB_I32

BNB_NAMESPACE_END
