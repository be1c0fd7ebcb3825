// 8-bit optimizer state on the GPU: codes to values and back, by tables in shared memory.
//
// Decoding reads a table that every lane has its own column of, so a warp never meets a bank conflict. Encoding is
// exact for any ascending map, yet takes one look-up: the leading bits of a scaled value choose a word with the code of
// the smallest value that has them and the remaining bits of the one threshold that may lie among them. Where more than
// one does (no map in use has such a place) the word says so and the map is searched. The sign rule of state1 is part
// of the table: a negative value never takes the code of zero, nor a positive one a negative code.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/encode.h"
#include "../common/platform.h"

namespace bnb {

constexpr int kMapEntries = 256;
constexpr int kColumns = 32;  // one per lane and bank

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

    struct Tables {
        float values[kMapEntries * kColumns];
        uint32_t words[kWords];
        float midpoints[kMapEntries];
        int first_positive;  // index of the first entry without a sign
    };

    // Fill the tables; all threads of the CTA take part, and synchronise afterwards.
    __device__ static void build(Tables& tables, const float* __restrict__ map) {
        for (int i = threadIdx.x; i < kMapEntries * kColumns; i += blockDim.x) tables.values[i] = map[i / kColumns];
        for (int i = threadIdx.x; i < kMapEntries - 1; i += blockDim.x) {
            tables.midpoints[i] = midpoint(map[i], map[i + 1]) + 0.0f;  // no negative zero
        }
        if (threadIdx.x == 0) tables.first_positive = kMapEntries;
        __syncthreads();
        for (int i = threadIdx.x; i < kMapEntries; i += blockDim.x) {
            if (!(__float_as_uint(map[i]) >> 31)) atomicMin(&tables.first_positive, i);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < kWords; i += blockDim.x) tables.words[i] = word(tables, i);
    }

    // The value of code `i` of four in a word: shift and mask make the offset of its row, 128 bytes long.
    __device__ static __forceinline__ float decode(const Tables& tables, uint32_t codes, int i, int lane) {
        static_assert(kColumns * sizeof(float) == 1 << 7);
        const uint32_t row = i == 0 ? codes << 7 : codes >> (8 * i - 7);
        const uint32_t offset = (row & 0x7f80u) | static_cast<uint32_t>(lane * sizeof(float));
        return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(tables.values) + offset);
    }

    // The word whose low byte is the code of a scaled value in [-1, 1], unless kCrowded is set. -0 is a negative value.
    __device__ static __forceinline__ uint32_t encode(const Tables& tables, float scaled) {
        const uint32_t magnitude = __float_as_uint(fmaxf(kSigned ? fabsf(scaled) : scaled, kLeast));
        // Multiplications by powers of two run beside the integer pipe, which is the busiest.
        uint32_t offset = magnitude >> (kRest - 2) & ~3u;
        uint32_t rest = magnitude;
        if constexpr (kSigned) {
            const int32_t negative = __float_as_int(scaled) >> 31;
            offset += static_cast<uint32_t>(negative * -static_cast<int32_t>(kPerSign * sizeof(uint32_t)));
            rest ^= static_cast<uint32_t>(negative);  // ascends with the value, not its magnitude
        }
        rest *= 1u << (32 - kRest);
        const char* first = reinterpret_cast<const char*>(&tables) + (offsetof(Tables, words) - (kLowest >> kRest) * 4);
        uint32_t word = *reinterpret_cast<const uint32_t*>(first + offset);
        // Left alone, the compiler computes both outcomes and selects.
        asm("{\n .reg .pred above;\n setp.gt.u32 above, %1, %0;\n @above add.u32 %0, %0, 1;\n}"
            : "+r"(word)
            : "r"(rest));
        return word;
    }

    // The code, by search.
    __device__ static uint32_t search(const Tables& tables, float scaled) {
        int code = bucket_of(scaled, tables.midpoints, kMapEntries - 1);
        if constexpr (kSigned) {
            const bool negative = __float_as_uint(scaled) >> 31;
            const int highest_negative = max(tables.first_positive - 1, 0);
            if (negative) code = min(code, highest_negative);
            if (scaled > 0.0f) code = max(code, min(tables.first_positive, kMapEntries - 1));
        }
        return static_cast<uint32_t>(code);
    }

  private:
    __device__ static uint32_t word(const Tables& tables, int index) {
        const bool negative = index >= kPerSign;
        const uint32_t bucket = kLowest + (static_cast<uint32_t>(negative ? index - kPerSign : index) << kRest);
        const uint32_t sign = negative ? 0x80000000u : 0u;
        const bool lowest = bucket == kLowest;  // also has everything below it, down to zero
        const uint32_t small = sign | (lowest ? 0u : bucket), large = sign | (bucket + (1u << kRest) - 1);
        const uint32_t below = search(tables, __uint_as_float(negative ? large : small));
        const uint32_t above = search(tables, __uint_as_float(negative ? small : large));
        if (below == above) return kNoThreshold | below;
        const uint32_t threshold = __float_as_uint(tables.midpoints[below]);
        // The rest of a threshold counts only within its own bucket.
        const bool inside = (threshold & 0x7fffffffu) >= bucket && (threshold & 0x7fffffffu) < bucket + (1u << kRest);
        if (above != below + 1 || !inside) return kCrowded | below;
        return (negative ? ~threshold : threshold) << (32 - kRest) | below;
    }
};

using Codec1 = StateCodec<true, 6>;   // state1 is signed: 64 codes in [0.1, 1]
using Codec2 = StateCodec<false, 7>;  // state2 is not: 128

}  // namespace bnb
