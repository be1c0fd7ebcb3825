// Activations as the kernels of gemm_4bit_tile.inl read them: 32-bit words of one or two values, packed once a product;
// and where their sums go.
#pragma once

#include "gemm_4bit_tile.inl"

BNB_NAMESPACE_BEGIN

constexpr int64_t kTaskProducts = 1 << 19;  // multiplications of a task; enough to pay for waking a thread

// out [rows, columns] of a product, `stride` elements from row to row.
template <class T>
struct Output {
    T* out;
    const T* bias;
    int64_t stride;

    // `count` columns of one row, from sums in whole vectors.
    BNB_INLINE void write(int64_t row, int64_t column, int64_t count, const float* sums) const {
        T* const target = out + row * stride + column;
        for (int64_t c = 0; c < count; c += kWidth) {
            const int64_t rest = count - c;
            F32 sum = load(sums + c);
            if (bias) sum = sum + (rest < kWidth ? load_partial(bias + column + c, rest) : load(bias + column + c));
            if (rest < kWidth) {
                store_partial(target + c, sum, rest);
            } else {
                store(target + c, sum);
            }
        }
    }
};

// For tiles: rows in groups of up to `group`, [steps][rows of the group]; what is beyond the depth is zero.
struct Activations {
    const uint32_t* words;
    int64_t rows, steps, group;

    const uint32_t* at(int64_t row) const { return words + row * steps; }  // row: the first of a group
};

// `count` values from position k on as words; zeros beyond the depth.
template <class Engine, class T>
BNB_INLINE void load_steps(const T* row, int64_t k, int64_t depth, int64_t count, uint32_t* words) {
    static_assert(Engine::kDepth == 1, "a word of two values holds them as they are");
    for (int64_t i = 0; i < count; i += kWidth) {
        const int64_t rest = depth - k - i;
        const F32 values = rest >= kWidth ? load(row + k + i)
                           : rest > 0     ? load_partial(row + k + i, rest)
                                          : broadcast(0.0f);
        store_words(words + i, bits(values));
    }
}

#ifdef BNB_HAVE_PAIRS
template <>
BNB_INLINE void load_steps<PairEngine, BFloat16>(
    const BFloat16* row, int64_t k, int64_t depth, int64_t count, uint32_t* words) {
    const int64_t inside = depth - k < count ? depth - k : count;
    words[inside / 2] = 0;
    memcpy(words, row + k, static_cast<size_t>(inside) * sizeof(*row));
    for (int64_t i = (inside + 1) / 2; i < count / 2; ++i) words[i] = 0;
}
#endif

// Rows [first, last), which begin and end with groups.
template <class Engine, class T>
void pack_groups(const T* A, const Activations& a, uint32_t* words, int64_t depth, int64_t first, int64_t last) {
    uint32_t piece[kVectorCodes];
    for (int64_t r = first; r < last; ++r) {
        const int64_t begin = r / a.group * a.group;
        const int64_t rows = a.rows - begin < a.group ? a.rows - begin : a.group;
        uint32_t* target = words + begin * a.steps + (r - begin);
        for (int64_t k = 0; k < depth; k += kVectorCodes) {
            load_steps<Engine>(A + r * depth, k, depth, kVectorCodes, piece);
            const int64_t left = a.steps - k / Engine::kDepth, most = kVectorCodes / Engine::kDepth;
            const int64_t count = left < most ? left : most;
            for (int64_t s = 0; s < count; ++s, target += rows) *target = piece[s];
        }
    }
}

// For streaming: [vectors][steps of a word][rows][kWidth], so that a vector of words meets the activations of its
// lanes.
template <class Engine, class T>
void pack_vectors(const T* A, int64_t rows, int64_t depth, uint32_t* words) {
    constexpr int64_t kSteps = kWordCodes / Engine::kDepth;
    uint32_t piece[kVectorCodes];
    for (int64_t k = 0; k < depth; k += kVectorCodes, words += kSteps * rows * kWidth) {
        for (int64_t r = 0; r < rows; ++r) {
            load_steps<Engine>(A + r * depth, k, depth, kVectorCodes, piece);
            for (int64_t s = 0; s < kSteps; ++s) {
                for (int64_t lane = 0; lane < kWidth; ++lane) {
                    words[(s * rows + r) * kWidth + lane] =
                        piece[Engine::position(static_cast<int>(s), static_cast<int>(lane))];
                }
            }
        }
    }
}

BNB_NAMESPACE_END
