// 8-bit optimizer state on the GPU: codes to values and back, by tables in shared memory.
//
// Decoding reads a table that every lane has its own column of, so a warp never meets a bank conflict. Encoding is
// exact for any ascending map, yet takes one look-up: the leading bits of a scaled value choose a word with the code of
// the smallest value that has them and the remaining bits of the one threshold that may lie among them. Where more than
// one does (no map in use has such a place) the map is searched instead. The sign rule of state1 is part of the table:
// a negative value never takes the code of zero, nor a positive one a negative code.
//
// Half of the time of an 8-bit update goes into these look-ups, so tables are addressed by number: through pointers,
// each look-up would add the address where shared memory starts.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/encode.h"
#include "../common/platform.h"

namespace bnb {

constexpr int kMapEntries = 256;
constexpr int kColumns = 32;  // one per lane and bank
constexpr uint32_t kTableBytes = kMapEntries * kColumns * sizeof(float);

template <int kOffset>
__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
    uint32_t word;
    asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(word) : "r"(address), "n"(kOffset));
    return word;
}

// kMantissaBits of a magnitude join its exponent to choose a word: enough that the densest octave of the map, the
// highest, has at most one threshold per word.
template <bool kSigned, int kMantissaBits>
struct StateCodec {
    static constexpr int kRest = 23 - kMantissaBits;
    static constexpr float kLeast = 1.0f / (1 << 24);           // smaller magnitudes share its code
    static constexpr uint32_t kLowest = (127u - 24u) << 23;     // its bits
    static constexpr int kPerSign = (24 << kMantissaBits) + 1;  // up to and including 1
    static constexpr int kWords = kSigned ? 2 * kPerSign : kPerSign;
    static constexpr uint32_t kCrowded = 0x100u;
    static constexpr uint32_t kNoThreshold = ~0u << (32 - kRest);

    struct Encoder {
        uint32_t words[kWords];
        float midpoints[kMapEntries];
        int first_positive;  // index of the first entry without a sign
    };

    // Fill the encoder; all threads of the CTA take part, and synchronise afterwards. Whether words are crowded, so
    // that the thread has to search.
    __device__ static bool build(Encoder& encoder, const float* __restrict__ map) {
        for (int i = threadIdx.x; i < kMapEntries - 1; i += blockDim.x) {
            encoder.midpoints[i] = midpoint(map[i], map[i + 1]) + 0.0f;  // no negative zero
        }
        if (threadIdx.x == 0) encoder.first_positive = kMapEntries;
        __syncthreads();
        for (int i = threadIdx.x; i < kMapEntries; i += blockDim.x) {
            if (!(__float_as_uint(map[i]) >> 31)) atomicMin(&encoder.first_positive, i);
        }
        __syncthreads();
        uint32_t flags = 0;
        for (int i = threadIdx.x; i < kWords; i += blockDim.x) {
            encoder.words[i] = word(encoder, i);
            flags |= encoder.words[i];
        }
        return __syncthreads_or(flags & kCrowded);
    }

    // The word whose low byte is the code of a scaled value in [-1, 1], if no word is crowded. -0 is a negative value.
    // `encoder` is an address in shared memory; kOffset is added to it.
    template <int kOffset>
    __device__ static __forceinline__ uint32_t encode(uint32_t encoder, float scaled) {
        const uint32_t magnitude = __float_as_uint(fmaxf(kSigned ? fabsf(scaled) : scaled, kLeast));
        uint32_t rest = magnitude;
        if constexpr (kSigned) {
            const int32_t negative = __float_as_int(scaled) >> 31;
            encoder += static_cast<uint32_t>(negative * -static_cast<int32_t>(kPerSign * sizeof(uint32_t)));
            rest ^= static_cast<uint32_t>(negative);  // ascends with the value, not its magnitude
        }
        uint32_t address;  // left alone, the compiler shifts only once, but then has to mask
        asm("mad.lo.u32 %0, %1, 4, %2;" : "=r"(address) : "r"(magnitude >> kRest), "r"(encoder));
        constexpr int kFirstWord = kOffset - static_cast<int>((kLowest >> kRest) * sizeof(uint32_t));
        uint32_t word = load_shared<kFirstWord>(address);
        rest *= 1u << (32 - kRest);
        // Left alone, the compiler computes both outcomes and selects.
        asm("{\n .reg .pred above;\n setp.gt.u32 above, %1, %0;\n @above add.u32 %0, %0, 1;\n}"
            : "+r"(word)
            : "r"(rest));
        return word;
    }

    // The code, by search.
    __device__ static uint32_t search(const Encoder& encoder, float scaled) {
        int code = bucket_of(scaled, encoder.midpoints, kMapEntries - 1);
        if constexpr (kSigned) {
            const bool negative = __float_as_uint(scaled) >> 31;
            const int highest_negative = max(encoder.first_positive - 1, 0);
            if (negative) code = min(code, highest_negative);
            if (scaled > 0.0f) code = max(code, min(encoder.first_positive, kMapEntries - 1));
        }
        return static_cast<uint32_t>(code);
    }

  private:
    __device__ static uint32_t word(const Encoder& encoder, int index) {
        const bool negative = index >= kPerSign;
        const uint32_t bucket = kLowest + (static_cast<uint32_t>(negative ? index - kPerSign : index) << kRest);
        const uint32_t sign = negative ? 0x80000000u : 0u;
        const bool lowest = bucket == kLowest;  // also has everything below it, down to zero
        const uint32_t small = sign | (lowest ? 0u : bucket), large = sign | (bucket + (1u << kRest) - 1);
        const uint32_t below = search(encoder, __uint_as_float(negative ? large : small));
        const uint32_t above = search(encoder, __uint_as_float(negative ? small : large));
        if (below == above) return kNoThreshold | below;
        const uint32_t threshold = __float_as_uint(encoder.midpoints[below]);
        // The rest of a threshold counts only within its own bucket.
        const bool inside = (threshold & 0x7fffffffu) >= bucket && (threshold & 0x7fffffffu) < bucket + (1u << kRest);
        if (above != below + 1 || !inside) return kCrowded | below;
        return (negative ? ~threshold : threshold) << (32 - kRest) | below;
    }
};

using Codec1 = StateCodec<true, 6>;   // state1 is signed: 64 codes in [0.1, 1]
using Codec2 = StateCodec<false, 7>;  // state2 is not: 128

struct Encoders {
    Codec1::Encoder first;
    Codec2::Encoder second;
};

// The tables of up to two maps: the encoders where dynamic shared memory starts, and from the next multiple of
// kTableBytes on the values. A row's offset has bits of its own below that, so a code and a lane make an address with
// one instruction after a shift.
struct StateTables {
    uint32_t column;    // address of the lane's value of code 0 of the first map
    uint32_t encoders;  // address of Encoders
    bool crowded;

    // Dynamic shared memory to ask for. A little before it may be taken.
    static constexpr int bytes(int maps) { return (1 + maps) * kTableBytes; }
    static_assert(sizeof(Encoders) + 4096 <= kTableBytes);

    // The value of code `i` of four in a word.
    template <int kMap>
    __device__ __forceinline__ float decode(uint32_t codes, int i) const {
        const uint32_t row = i == 0 ? codes << 7 : codes >> (8 * i - 7);
        return __uint_as_float(load_shared<kMap * kTableBytes>((row & 0x7f80u) | column));
    }
};

static_assert(kColumns * sizeof(float) == 1 << 7 && kMapEntries << 7 == kTableBytes);

// Fill the tables that one map or two need; all threads of the CTA take part. Without kEncode, only for decoding.
template <bool kSecond, bool kEncode>
__device__ inline StateTables build_state_tables(void* shared, const float* map1, const float* map2) {
    StateTables tables{};
    tables.encoders = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    const uint32_t values = (tables.encoders + uint32_t(sizeof(Encoders)) + kTableBytes - 1) & ~(kTableBytes - 1);
    tables.column = values + threadIdx.x % kColumns * uint32_t(sizeof(float));
    auto* entries = reinterpret_cast<float*>(static_cast<char*>(shared) + (values - tables.encoders));
    for (int i = threadIdx.x; i < kMapEntries * kColumns; i += blockDim.x) {
        entries[i] = map1[i / kColumns];
        if constexpr (kSecond) entries[i + kMapEntries * kColumns] = map2[i / kColumns];
    }
    if constexpr (kEncode) {
        auto& encoders = *static_cast<Encoders*>(shared);
        tables.crowded = Codec1::build(encoders.first, map1);
        if constexpr (kSecond) tables.crowded |= Codec2::build(encoders.second, map2);
    }
    __syncthreads();
    return tables;
}

}  // namespace bnb
