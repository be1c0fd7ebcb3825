// How weights and activations are multiplied: what one step of the sum is, for both kernels of gemm_4bit.inl.
//
// A step is what one 32-bit word of an activation row holds: one float, or, where the instruction set has products of
// bfloat16 pairs, two of those. A weight vector holds the same step of kWidth outputs. Eight codes of a row are one
// word of the packed weight, so a vector of words, one from each of kWidth rows, decodes to 8 / kDepth weight vectors
// without touching memory. Codes are decoded as they stand; the block's absmax scales the sum over the block.
#pragma once

#include "unrolled.inl"

BNB_NAMESPACE_BEGIN

struct FloatEngine {
    using Weight = F32;
    using Table = NibbleTable;
    static constexpr int64_t kDepth = 1;  // values of one step

    // Which word of the activations meets a lane of a step, of those that belong to a vector of codes.
    static constexpr int position(int step, int lane) { return 8 * lane + step; }

    template <int step>
    static BNB_INLINE Weight decode(const Table& table, I32 words) {
        return lookup_code<step>(table, words);
    }
    static BNB_INLINE Weight load_weight(const uint32_t* source) {
        return load(reinterpret_cast<const float*>(source));
    }
    static BNB_INLINE void store_weight(uint32_t* target, Weight w) { store(reinterpret_cast<float*>(target), w); }
    static BNB_INLINE Weight load_step(const uint32_t* word) {
        return broadcast(*reinterpret_cast<const float*>(word));
    }
    static BNB_INLINE F32 add_product(F32 sum, Weight w, Weight a) { return fma(w, a, sum); }
    static BNB_INLINE Weight join(const F32* values) { return values[0]; }  // the kDepth values of one step
};

#ifdef BNB_HAVE_BYTE_TABLES
// For streaming alone, because lanes mix words. With two bytes the weights' values are rounded to bfloat16.
template <int kBytes>
struct ByteEngine : FloatEngine {
    using Table = ByteTable<kBytes>;

    static constexpr int position(int step, int lane) { return byte_step_code<kBytes>(step, lane); }
    template <int step>
    static BNB_INLINE Weight decode(const Table& table, I32 words) {
        return lookup_bytes<step>(table, words);
    }
};
#endif

#ifdef BNB_HAVE_PAIRS
struct PairEngine {
    using Weight = I32;
    using Table = PairTable;
    static constexpr int64_t kDepth = 2;

    static constexpr int position(int step, int lane) { return 4 * lane + step; }

    template <int step>
    static BNB_INLINE Weight decode(const Table& table, I32 words) {
        return lookup_pair<step>(table, words);
    }
    static BNB_INLINE Weight load_weight(const uint32_t* source) { return load_words(source); }
    static BNB_INLINE void store_weight(uint32_t* target, Weight w) { store_words(target, w); }
    static BNB_INLINE Weight load_step(const uint32_t* word) {
        return broadcast(*reinterpret_cast<const int32_t*>(word));
    }
    static BNB_INLINE F32 add_product(F32 sum, Weight w, Weight a) { return add_pair_products(sum, w, a); }
    static BNB_INLINE Weight join(const F32* values) { return round_to_pairs(values[0], values[1]); }
};
#endif

template <class T>
struct EngineOf {
    using type = FloatEngine;
};
#ifdef BNB_HAVE_PAIRS
template <>
struct EngineOf<BFloat16> {
    using type = PairEngine;
};
#endif

// The engine that streams: its weights are as exact as the activations, or more. Processors with AMX stream float32
// faster than pairs.
template <class T>
struct StreamEngineOf {
#ifdef BNB_HAVE_BYTE_TABLES
    using type = ByteEngine<4>;
#elif defined(BNB_HAVE_AMX)
    using type = FloatEngine;
#else
    using type = typename EngineOf<T>::type;
#endif
};
#ifdef BNB_HAVE_BYTE_TABLES
template <>
struct StreamEngineOf<BFloat16> {
    using type = ByteEngine<2>;
};
#endif

BNB_NAMESPACE_END
