// Optimizer updates with 4-bit state: decode a block of 128 into the first-level cache, advance, encode.
//
// Bound by the look-ups: a code is the number of levels, or of midpoints between them, below a value, which fifteen
// compares count without a branch. state1 takes the nearest level; state2 takes the level below or above at random,
// right on average (backends/default/optimizer_4bit.py says why).

#include "../common/stochastic_rounding.h"

BNB_NAMESPACE_BEGIN

constexpr int64_t kNibbleBlock = 128;  // values that share an absmax
constexpr int kLevels = 16;

// A map of sixteen ascending levels, and what an encoder compares with.
struct Levels {
    float level[kLevels] = {};
    float midpoint[kLevels - 1] = {};

    explicit Levels(const float* map) {
        for (int k = 0; k < kLevels; ++k) level[k] = map[k];
        for (int k = 0; k + 1 < kLevels; ++k) midpoint[k] = (map[k] + map[k + 1]) / 2.0f;
    }

    void decode(const uint8_t* packed, float scale, int64_t count, float* values) const {
        float scaled[kLevels];
        for (int k = 0; k < kLevels; ++k) scaled[k] = level[k] * scale;
        for (int64_t i = 0; i < count; ++i) values[i] = scaled[(packed[i / 2] >> (i % 2 ? 0 : 4)) & 15];
    }

    void nearest(const float* values, int32_t* codes) const {
        for (int64_t i = 0; i < kNibbleBlock; ++i) codes[i] = 0;
        for (int k = 0; k + 1 < kLevels; ++k) {
            for (int64_t i = 0; i < kNibbleBlock; ++i) codes[i] += midpoint[k] < values[i];
        }
    }

    // Element i of the block takes its dice from (key, first + i).
    void stochastic(const float* values, uint64_t key, uint64_t first, int32_t* codes) const {
        for (int64_t i = 0; i < kNibbleBlock; ++i) codes[i] = 0;
        for (int k = 1; k + 1 < kLevels; ++k) {
            for (int64_t i = 0; i < kNibbleBlock; ++i) codes[i] += level[k] <= values[i];
        }
        for (int64_t i = 0; i < kNibbleBlock; ++i) {
            const float low = level[codes[i]], high = level[codes[i] + 1];
            const float share = (values[i] - low) / (high - low);
            codes[i] += float(random_bits(key, first + uint64_t(i)) & 0xffffu) < share * 65536.0f;
        }
    }
};

template <class Rule, class T>
class Updater4bit {
  public:
    explicit Updater4bit(const Update4bit<T>& problem)
        : problem_(problem),
          h_(vector_scalars(*problem.config)),
          first_(problem.qmap1),
          second_(problem.state2 ? problem.qmap2 : problem.qmap1) {
        for (int k = 0; k < Rule::kStates; ++k) {
            codes_[k] = k < Rule::kFirst ? problem.state1 : problem.state2;
            absmax_[k] = k < Rule::kFirst ? problem.absmax1 : problem.absmax2;
        }
    }

    void run(int64_t block) const {
        const StepScalars<F32> h = h_;
        const int64_t begin = block * kNibbleBlock;
        const int64_t count = problem_.n - begin < kNibbleBlock ? problem_.n - begin : kNibbleBlock;
        float values[Rule::kStates][kNibbleBlock] = {};
        for (int k = 0; k < Rule::kStates; ++k) {
            levels(k).decode(codes_[k] + begin / 2, absmax_[k][block], count, values[k]);
        }
        for_each_vector(0, count, [&](auto vector, int64_t i) {
            const F32 g = vector.get(problem_.g + begin + i), p = vector.get(problem_.p + begin + i);
            F32 state[Rule::kStates];
            for (int k = 0; k < Rule::kStates; ++k) state[k] = vector.get(values[k] + i);
            const F32 moved = h.moved(p, Rule::direction(h.gradient(g, p), state, h), h.step_size);
            // An element whose state is not finite starts anew and stays put; its block must not notice.
            I32 good = finite_mask(state[0]);
            for (int k = 1; k < Rule::kStates; ++k) good = good & finite_mask(state[k]);
            for (int k = 0; k < Rule::kStates; ++k) {
                vector.put(values[k] + i, select(good, state[k], broadcast(0.0f)));
            }
            vector.put(problem_.p + begin + i, select(good, moved, p));
        });
        for (int k = 0; k < Rule::kStates; ++k) encode(k, block, begin, count, values[k]);
    }

  private:
    const Levels& levels(int k) const { return k < Rule::kFirst ? first_ : second_; }

    void encode(int k, int64_t block, int64_t begin, int64_t count, float* values) const {
        const float largest = largest_magnitude(values, count);
        absmax_[k][block] = largest;
        const float factor = 1.0f / floored_absmax(largest);
        for (int64_t i = 0; i < kNibbleBlock; ++i) values[i] *= factor;
        int32_t codes[kNibbleBlock];
        if (k < Rule::kFirst) {
            levels(k).nearest(values, codes);
        } else {
            levels(k).stochastic(values, uint64_t(problem_.key), uint64_t(begin), codes);
        }
        for (int64_t i = count; i < kNibbleBlock; ++i) codes[i] = 0;
        uint8_t* packed = codes_[k] + begin / 2;
        for (int64_t i = 0; i < (count + 1) / 2; ++i) packed[i] = uint8_t(codes[2 * i] << 4 | codes[2 * i + 1]);
    }

    Update4bit<T> problem_;
    StepScalars<F32> h_;
    Levels first_, second_;
    uint8_t* codes_[Rule::kStates];
    float* absmax_[Rule::kStates];
};

template <class T>
void optimizer_update_4bit(const Update4bit<T>& problem, int32_t threads) {
    const int64_t blocks = (problem.n + kNibbleBlock - 1) / kNibbleBlock;
    visit_rule(problem.rule, [&](auto rule) {
        const Updater4bit<decltype(rule), T> updater(problem);
        parallel_for(blocks, kOptimizerGrain / kNibbleBlock, threads, [&](int64_t begin, int64_t end) {
            for (int64_t block = begin; block < end; ++block) updater.run(block);
        });
    });
}

BNB_NAMESPACE_END
