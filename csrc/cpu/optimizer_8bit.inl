// Optimizer updates with 8-bit state: decode a block of 256 into the first-level cache, advance, encode.
//
// The smallest step moves 10 bytes an element (AdamW, bfloat16), which memory gives in about the time that the
// look-ups of map_codes.inl and the square root take; so nothing else may cost anything. A block is done in short
// loops, each with a short chain of operations, and what the next blocks need is fetched meanwhile.

BNB_NAMESPACE_BEGIN

constexpr int64_t kOptimizerBlock = 256;  // values that share an absmax
constexpr int64_t kAhead = 1024;          // elements between what is computed and what is fetched

// Encodes a block of finite values with one absmax. In state1 a negative value never takes the code of zero, nor a
// positive one a negative code, so that a decayed average keeps its sign.
class StateEncoder {
  public:
    StateEncoder(const float* map, int64_t amount, bool keep_sign)
        : first_positive_(keep_sign ? count_negative(map) : 0),
          keep_sign_(keep_sign),
          threshold_keeps_sign_(keep_sign && first_positive_ > 0 && first_positive_ < 256),
          encoder_(midpoints(map), amount) {}

    // `values` has room for whole chunks, as `codes` has.
    BNB_INLINE void encode(const float* values, int64_t count, float inverse, uint8_t* codes) const {
        const F32 factor = broadcast(inverse);
        const auto scaled = [&](F32 x) { return x * factor; };
        const int64_t whole = (count + kChunk - 1) / kChunk * kChunk;
        encoder_.encode<false>([&](int64_t i) { return each_part(load_chunk(values + i), scaled); }, whole, codes);
        // A factor below 1 may round a negative value to zero.
        if (keep_sign_ && !(threshold_keeps_sign_ && inverse >= 1.0f)) keep_signs(values, whole, codes);
    }

  private:
    static int count_negative(const float* map) {
        int count = 0;
        while (count < 256 && float_bits(map[count]) >> 31) ++count;
        return count;
    }

    // With the threshold between the signs just below zero, codes keep them for nothing.
    Midpoints midpoints(const float* map) {
        Midpoints result(map);
        threshold_keeps_sign_ = threshold_keeps_sign_ && result.value[first_positive_ - 1] < 0.0f;
        if (threshold_keeps_sign_) result.value[first_positive_ - 1] = -kSmallest;
        return result;
    }

    void keep_signs(const float* values, int64_t count, uint8_t* codes) const {
        const I32 lowest = broadcast(int32_t(first_positive_));
        const I32 highest = broadcast(int32_t(first_positive_ > 0 ? first_positive_ - 1 : 0));
        for (int64_t i = 0; i < count; i += kWidth) {
            const F32 x = load(values + i);
            I32 code = load_u8(codes + i);
            code = select(negative_mask(x), min(code, highest), code);
            code = select(positive_mask(x), max(code, lowest), code);
            store_u8(codes + i, code);
        }
    }

    int first_positive_;
    bool keep_sign_, threshold_keeps_sign_;
    MapEncoder encoder_;
};

// The maps of state1 and state2, ready for use by any number of tensors; qmap2 may be null.
struct StateMaps {
    MapDecoder decoders[2];
    StateEncoder encoders[2];

    StateMaps(const float* qmap1, const float* qmap2, int64_t amount)
        : decoders{MapDecoder(qmap1), MapDecoder(qmap2 ? qmap2 : qmap1)},
          encoders{{qmap1, amount, true}, {qmap2 ? qmap2 : qmap1, amount, false}} {}
};

template <class Rule, class T>
class Updater8bit {
  public:
    Updater8bit(const Update8bit<T>& problem, const StateMaps& maps)
        : problem_(problem),
          h_(vector_scalars(*problem.config)),
          maps_(maps) {
        const int64_t blocks = (problem.n + kOptimizerBlock - 1) / kOptimizerBlock;
        for (int k = 0; k < Rule::kStates; ++k) {
            const bool first = k < Rule::kFirst;
            codes_[k] = first ? problem.state1 + k * problem.n : problem.state2;
            absmax_[k] = first ? problem.absmax1 + k * blocks : problem.absmax2;
        }
    }

    void run(int64_t first, int64_t last) const {
        for (int64_t block = first; block < last; ++block) run(block);
    }

  private:
    void run(int64_t block) const {
        const int64_t begin = block * kOptimizerBlock;
        if (problem_.n - begin >= kOptimizerBlock) {
            uint8_t* codes[Rule::kStates];
            for (int k = 0; k < Rule::kStates; ++k) codes[k] = codes_[k] + begin;
            run_on(block, kOptimizerBlock, codes);
            return;
        }
        const int64_t count = problem_.n - begin;
        uint8_t padded[Rule::kStates][kOptimizerBlock] = {};
        uint8_t* codes[Rule::kStates];
        for (int k = 0; k < Rule::kStates; ++k) {
            codes[k] = padded[k];
            memcpy(padded[k], codes_[k] + begin, static_cast<size_t>(count));
        }
        run_on(block, count, codes);
        for (int k = 0; k < Rule::kStates; ++k) memcpy(codes_[k] + begin, padded[k], static_cast<size_t>(count));
    }

    // The codes have room for a whole block.
    BNB_INLINE void run_on(int64_t block, int64_t count, uint8_t* const* codes) const {
        alignas(64) float values[Rule::kStates][kOptimizerBlock];
        for (int k = 0; k < Rule::kStates; ++k) {
            const F32 scale = broadcast(absmax_[k][block]);
            const MapDecoder& decoder = maps_.decoders[k >= Rule::kFirst];
            for (int64_t i = 0; i < count; i += kChunk) {
                const auto scaled = [&](F32 x) { return x * scale; };
                BNB_PREFETCH(codes[k] + i + kAhead);
                store_chunk(values[k] + i, each_part(decoder.decode(codes[k] + i), scaled));
            }
        }
        float largest[Rule::kStates], inverse[Rule::kStates];
        update(block * kOptimizerBlock, count, values, largest);
        for (int k = 0; k < Rule::kStates; ++k) {  // all first: the divisions overlap
            absmax_[k][block] = largest[k];
            inverse[k] = 1.0f / floored_absmax(largest[k]);
        }
        for (int k = 0; k < Rule::kStates; ++k) {
            maps_.encoders[k >= Rule::kFirst].encode(values[k], count, inverse[k], codes[k]);
        }
    }

    // Advance the parameter and the states' values; find the largest magnitude of each state.
    BNB_INLINE void update(
        int64_t begin, int64_t count, float (&values)[Rule::kStates][kOptimizerBlock],
        float (&largest)[Rule::kStates]) const {
        const StepScalars<F32> h = h_;
        I32 best[Rule::kStates];
        for (int k = 0; k < Rule::kStates; ++k) best[k] = broadcast(int32_t(0));
        for_each_vector(0, count, [&](auto vector, int64_t i) {
            BNB_PREFETCH(problem_.g + begin + i + kAhead);
            BNB_PREFETCH(problem_.p + begin + i + kAhead);
            const F32 g = vector.get(problem_.g + begin + i), p = vector.get(problem_.p + begin + i);
            F32 before[Rule::kStates], state[Rule::kStates];
            for (int k = 0; k < Rule::kStates; ++k) state[k] = before[k] = vector.get(values[k] + i);
            F32 moved = h.moved(p, Rule::direction(h.gradient(g, p), state, h), h.step_size);
            if (h.skip_zeros) {
                const I32 keep = zero_mask(g);
                moved = select(keep, p, moved);
                for (int k = 0; k < Rule::kStates; ++k) state[k] = select(keep, before[k], state[k]);
            }
            // An element whose state is not finite starts anew and stays put; its block must not notice.
            I32 widest = magnitude_bits(state[0]);
            for (int k = 1; k < Rule::kStates; ++k) widest = max(widest, magnitude_bits(state[k]));
            if (any_above(widest, bits(broadcast(kLargest)))) {
                const I32 good = at_least_mask(broadcast(kLargest), from_bits(widest));
                for (int k = 0; k < Rule::kStates; ++k) state[k] = select(good, state[k], broadcast(0.0f));
                moved = select(good, moved, p);
            }
            for (int k = 0; k < Rule::kStates; ++k) {
                best[k] = max(best[k], magnitude_bits(state[k]));  // 0 in lanes past the end
                vector.put(values[k] + i, state[k]);
            }
            vector.put(problem_.p + begin + i, moved);
        });
        for (int k = 0; k < Rule::kStates; ++k) largest[k] = bits_float(static_cast<uint32_t>(reduce_max(best[k])));
    }

    Update8bit<T> problem_;
    StepScalars<F32> h_;
    const StateMaps& maps_;
    uint8_t* codes_[Rule::kStates];
    float* absmax_[Rule::kStates];
};

template <class T>
void optimizer_update_8bit(const Update8bit<T>& problem, int32_t threads) {
    const int64_t blocks = (problem.n + kOptimizerBlock - 1) / kOptimizerBlock;
    const StateMaps maps(problem.qmap1, problem.qmap2, problem.n);
    visit_rule(problem.rule, [&](auto rule) {
        const Updater8bit<decltype(rule), T> updater(problem, maps);
        parallel_for(blocks, optimizer_grain(problem.n) / kOptimizerBlock, threads, [&](int64_t first, int64_t last) {
            updater.run(first, last);
        });
    });
}

BNB_NAMESPACE_END
