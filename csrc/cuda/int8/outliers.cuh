// Outlier columns, which the device alone knows: flags of all columns, and lists of those that are set.
#pragma once

#include <cstdint>

#include "problem.h"
#include "scaling.cuh"

namespace bnb {

constexpr int kOutliersAtOnce = 16;  // columns that one instruction adds

// A barrier of some of a CTA's threads; 0 with all of them is __syncthreads.
__device__ __forceinline__ void synchronize_threads(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Whether any of them says so.
__device__ __forceinline__ bool any_of_threads(int barrier, int threads, bool value) {
    int any;
    asm volatile(
        "{\n.reg .pred mine, all;\n"
        "setp.ne.s32 mine, %3, 0;\n"
        "bar.red.or.pred all, %1, %2, mine;\n"
        "selp.s32 %0, 1, 0, all;\n}"
        : "=r"(any)
        : "r"(barrier), "r"(threads), "r"(int(value))
        : "memory");
    return any != 0;
}

// Which of 16 flags are set.
__device__ __forceinline__ uint32_t set_among(const uint4& flags) {
    const auto of_word = [](uint32_t word) { return __vsetne4(word, 0) * 0x10204080u >> 28; };
    return of_word(flags.x) | of_word(flags.y) << 4 | of_word(flags.z) << 8 | of_word(flags.w) << 12;
}

// kThreads threads with a barrier of their own collect the flagged columns: their number, and a list of the first. Each
// looks at a run of flags, whose loads do not wait for one another.
template <int kThreads, int kMost>
struct OutlierList {
    int columns[kMost];  // ascending
    int before[kThreads / 32];

    // The list may be read when this returns.
    __device__ __forceinline__ int collect(const uint8_t* flags, int64_t K, int thread, int barrier) {
        const int64_t each = (K + kThreads * kVector - 1) / (kThreads * kVector) * kVector;
        const int64_t begin = min(thread * each, K), end = min(begin + each, K);
        int mine = 0;
        visit(flags, begin, end, [&](int64_t, uint32_t set) { mine += __popc(set); });
        int upto = mine;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(~0u, upto, step);
            if (thread % 32 >= step) upto += other;
        }
        if (thread % 32 == 31) before[thread / 32] = upto;
        synchronize_threads(barrier, kThreads);
        int position = upto - mine, all = 0;
        for (int w = 0; w < kThreads / 32; ++w) {
            if (w < thread / 32) position += before[w];
            all += before[w];
        }
        if (all == 0) return 0;
        if (mine > 0 && position < kMost) {
            visit(flags, begin, end, [&](int64_t first, uint32_t set) {
                for (; set && position < kMost; set &= set - 1) {
                    columns[position++] = static_cast<int>(first) + __ffs(set) - 1;
                }
            });
        }
        synchronize_threads(barrier, kThreads);
        return all;
    }

  private:
    static constexpr int kVector = 16;

    // Call body with where each 16 flags begin, and which of them are set.
    template <class Body>
    __device__ __forceinline__ static void visit(const uint8_t* flags, int64_t begin, int64_t end, Body&& body) {
        if (reinterpret_cast<uintptr_t>(flags) % kVector == 0) {
#pragma unroll 4
            for (; begin + kVector <= end; begin += kVector) {
                body(begin, set_among(*reinterpret_cast<const uint4*>(flags + begin)));
            }
        }
        for (; begin < end; ++begin) body(begin, flags[begin] != 0);
    }
};

// The same of a chunk, one after the other, where all are wanted.
template <int kThreads>
struct OutlierChunk {
    static constexpr int kFlags = 8;  // that a thread looks at
    static constexpr int kColumns = kThreads * kFlags;

    uint16_t columns[kColumns];  // from the start of the chunk, ascending
    int before[kThreads / 32];

    // How many there are of [start, start + kColumns). The list may be read until the threads meet again.
    __device__ __forceinline__ int collect(const uint8_t* flags, int64_t start, int64_t K, int thread, int barrier) {
        const int64_t first = start + thread * kFlags;
        uint32_t mine = 0;
        if (first + kFlags <= K && reinterpret_cast<uintptr_t>(flags) % kFlags == 0) {
            const Pack<uint8_t, kFlags> pack = load_pack<uint8_t, kFlags>(flags + first);
#pragma unroll
            for (int i = 0; i < kFlags; ++i) mine |= uint32_t(pack.values[i] != 0) << i;
        } else {
            for (int i = 0; i < kFlags && first + i < K; ++i) mine |= uint32_t(flags[first + i] != 0) << i;
        }
        if (!any_of_threads(barrier, kThreads, mine != 0)) return 0;
        const int count = __popc(mine), lane = thread % 32;
        int end = count;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(~0u, end, step);
            if (lane >= step) end += other;
        }
        if (lane == 31) before[thread / 32] = end;
        synchronize_threads(barrier, kThreads);
        int position = end - count, all = 0;
        for (int w = 0; w < kThreads / 32; ++w) {
            if (w < thread / 32) position += before[w];
            all += before[w];
        }
        for (; mine; mine &= mine - 1) columns[position++] = static_cast<uint16_t>(thread * kFlags + __ffs(mine) - 1);
        synchronize_threads(barrier, kThreads);
        return all;
    }
};

// Up to 16 outlier columns of a tile side by side, in shared memory: what quantization left of the tokens, and the
// weights. Made by kThreads threads; a thread's column is thread % 16, and k if it exists.
template <class T>
struct OutlierBatch {
    T* left;     // [tokens, 16]
    T* weights;  // [rows, 16]

    // Where a column's values lie in a row: a lane finds the two pairs that it gives to an instruction side by side.
    __device__ static int place_in_row(int column) {
        return column / 16 * 16 + column % 8 / 2 * 4 + column % 16 / 8 * 2 + column % 2;
    }

    // Copy a batch that was gathered.
    template <int kThreads>
    __device__ __forceinline__ void copy(
        const Int8Product& p, int batch, int64_t m, int tokens, int64_t n, int rows, int thread) const {
        constexpr int kPieces = kOutliersAtOnce * sizeof(T) / 16;
        const auto copy_rows = [&](T* to, const void* gathered, int64_t first, int count, int64_t last) {
#pragma unroll 4
            for (int i = thread; i < count * kPieces; i += kThreads) {
                const int64_t row = first + i / kPieces;
                if (row >= last) break;
                const T* const from =
                    static_cast<const T*>(gathered) + row * kGatheredOutliers + batch * kOutliersAtOnce;
                reinterpret_cast<uint4*>(to)[i] = __ldg(reinterpret_cast<const uint4*>(from) + i % kPieces);
            }
        };
        copy_rows(left, p.gathered_values, m, tokens, p.M);
        copy_rows(weights, p.gathered_weights, n, rows, p.N);
    }

    // kAhead loads are in flight.
    template <int kThreads, int kAhead>
    __device__ __forceinline__ void gather(
        const Int8Product& p, int64_t m, int tokens, int64_t n, int rows, int thread, bool exists, int64_t k) const {
        constexpr int kStep = kThreads / kOutliersAtOnce;
        const int place = place_in_row(thread % kOutliersAtOnce), first = thread / kOutliersAtOnce;
        const int64_t stride = kStep * p.K;
        const auto upto = [&](int count, int64_t left_over) {  // how many rows are loaded; the others are zero
            return !exists ? 0 : left_over < count ? int(left_over) : count;
        };

        const int known_tokens = upto(tokens, p.M - m);
        int64_t at = (m + first) * p.K + k;
#pragma unroll 1
        for (int start = first; start < tokens; start += kAhead * kStep) {
            float rest[kAhead];
#pragma unroll
            for (int j = 0; j < kAhead; ++j, at += stride) {
                const int i = start + j * kStep;
                rest[j] = 0.0f;
                if (i >= known_tokens) continue;
                rest[j] = left_of(widened(static_cast<const T*>(p.values)[at]), p.A[at], __ldg(p.row_stats + m + i));
            }
#pragma unroll
            for (int j = 0; j < kAhead; ++j) {
                const int i = start + j * kStep;
                if (i < tokens) left[i * kOutliersAtOnce + place] = round_to<T>(rest[j]);
            }
        }

        const int known_rows = upto(rows, p.N - n);
        at = (n + first) * p.K + k;
#pragma unroll 1
        for (int start = first; start < rows; start += kAhead * kStep) {
            int8_t codes[kAhead];
#pragma unroll
            for (int j = 0; j < kAhead; ++j, at += stride) {
                codes[j] = start + j * kStep < known_rows ? p.B[at] : int8_t(0);
            }
#pragma unroll
            for (int j = 0; j < kAhead; ++j) {
                const int i = start + j * kStep;
                if (i < rows) weights[i * kOutliersAtOnce + place] = round_to<T>(float(codes[j]));
            }
        }
    }
};

}  // namespace bnb
