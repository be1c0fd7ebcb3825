// Optimizer updates: one pass over parameter, gradient and state, whatever the rule.
//
// 32-bit state is memory bound. A limit on the update's norm costs a pass of its own over the same data, which
// recomputes the direction instead of storing it. State of 8 and 4 bits has files of its own.

#include "../common/optimizer_rules.h"

BNB_NAMESPACE_BEGIN

constexpr int64_t kOptimizerGrain = 1 << 14;  // elements per task
constexpr int64_t kLongestGrain = 1 << 18;
constexpr float kSmallest = 1.401298464e-45f;  // the least float above zero
constexpr float kLargest = 3.402823466e38f;    // the largest that is finite

// Elements per task of an update of n: where there is much to do, long enough for the machine to fetch ahead in.
inline int64_t optimizer_grain(int64_t n) {
    int64_t grain = kOptimizerGrain;
    while (grain < kLongestGrain && grain * 256 < n) grain *= 2;
    return grain;
}

BNB_INLINE I32 positive_mask(F32 x) { return at_least_mask(x, broadcast(kSmallest)); }
BNB_INLINE I32 negative_mask(F32 x) { return at_least_mask(broadcast(-kSmallest), x); }
BNB_INLINE I32 finite_mask(F32 x) { return at_least_mask(broadcast(kLargest), from_bits(magnitude_bits(x))); }

BNB_INLINE F32 sign(F32 x) {
    return select(positive_mask(x), broadcast(1.0f), select(negative_mask(x), broadcast(-1.0f), broadcast(0.0f)));
}

BNB_INLINE I32 zero_mask(F32 x) { return at_least_mask(x, broadcast(0.0f)) & at_least_mask(broadcast(0.0f), x); }

inline StepScalars<F32> vector_scalars(const bnb_optimizer_config& config) {
    return {config, [](float value) { return broadcast(value); }};
}

// A whole vector of memory, or the first `count` lanes at the end of a range.
struct WholeVector {
    template <class T>
    BNB_INLINE F32 get(const T* source) const {
        return load(source);
    }
    template <class T>
    BNB_INLINE void put(T* target, F32 x) const {
        store(target, x);
    }
    BNB_INLINE I32 get_codes(const uint8_t* source) const { return load_u8(source); }
    BNB_INLINE void put_codes(uint8_t* target, I32 x) const { store_u8(target, x); }
};

struct PartialVector {
    int64_t count;

    template <class T>
    BNB_INLINE F32 get(const T* source) const {
        return load_partial(source, count);
    }
    template <class T>
    BNB_INLINE void put(T* target, F32 x) const {
        store_partial(target, x, count);
    }
    BNB_INLINE I32 get_codes(const uint8_t* source) const {
        uint8_t padded[kWidth] = {};
        memcpy(padded, source, static_cast<size_t>(count));
        return load_u8(padded);
    }
    BNB_INLINE void put_codes(uint8_t* target, I32 x) const {
        uint8_t padded[kWidth];
        store_u8(padded, x);
        memcpy(target, padded, static_cast<size_t>(count));
    }
};

// Call body(vector, i) for the vectors of [begin, end).
template <class Body>
BNB_INLINE void for_each_vector(int64_t begin, int64_t end, const Body& body) {
    int64_t i = begin;
    for (; i + kWidth <= end; i += kWidth) body(WholeVector{}, i);
    if (i < end) body(PartialVector{end - i}, i);
}

// ---- 32-bit state ----

template <class Rule, class T>
class Updater32bit {
  public:
    explicit Updater32bit(const Update32bit<T>& problem)
        : problem_(problem),
          h_(vector_scalars(*problem.config)),
          size_(h_.step_size) {
        for (int k = 0; k < Rule::kStates; ++k) {
            states_[k] = k < Rule::kFirst ? problem.state1 + k * problem.n : problem.state2;
        }
    }

    // Sum of the squares of the direction, which is not kept; values that are not finite do not count.
    double squared_norm(int64_t begin, int64_t end) const {
        const StepScalars<F32> h = h_;
        F32 sum = broadcast(0.0f);
        for_each_vector(begin, end, [&](auto vector, int64_t i) {
            F32 state[Rule::kStates];
            const F32 u = direction(vector, i, vector.get(problem_.g + i), vector.get(problem_.p + i), state, h);
            const F32 counted = select(finite_mask(u), u, broadcast(0.0f));
            sum = sum + counted * counted;
        });
        return reduce_add(sum);
    }

    void set_step_size(float size) { size_ = broadcast(size); }

    void run(int64_t begin, int64_t end) const {
        const StepScalars<F32> h = h_;
        for_each_vector(begin, end, [&](auto vector, int64_t i) {
            const F32 g = vector.get(problem_.g + i), p = vector.get(problem_.p + i);
            F32 state[Rule::kStates];
            F32 moved = h.moved(p, direction(vector, i, g, p, state, h), size_);
            if (h.skip_zeros) {
                const I32 keep = zero_mask(g);
                moved = select(keep, p, moved);
                for (int k = 0; k < Rule::kStates; ++k) state[k] = select(keep, vector.get(states_[k] + i), state[k]);
            }
            vector.put(problem_.p + i, moved);
            for (int k = 0; k < Rule::kStates; ++k) vector.put(states_[k] + i, state[k]);
        });
    }

  private:
    template <class Vector>
    BNB_INLINE F32
    direction(const Vector& vector, int64_t i, F32 g, F32 p, F32* state, const StepScalars<F32>& h) const {
        for (int k = 0; k < Rule::kStates; ++k) state[k] = vector.get(states_[k] + i);
        return Rule::direction(h.gradient(g, p), state, h);
    }

    Update32bit<T> problem_;
    StepScalars<F32> h_;
    F32 size_;
    float* states_[Rule::kStates];
};

// The step size that keeps the norm of the update within the limit; writes the norm.
template <class Rule, class T>
float limited_step_size(const Updater32bit<Rule, T>& updater, const Update32bit<T>& problem, int32_t threads) {
    const int64_t tasks = (problem.n + kOptimizerGrain - 1) / kOptimizerGrain;
    const Scratch sums(static_cast<size_t>(tasks + 1) * sizeof(double));
    parallel_for(problem.n, kOptimizerGrain, threads, [&](int64_t begin, int64_t end) {
        sums.as<double>()[begin / kOptimizerGrain] = updater.squared_norm(begin, end);
    });
    double total = 0.0;
    for (int64_t task = 0; task < tasks; ++task) total += sums.as<double>()[task];
    const float norm = static_cast<float>(::sqrt(total));
    *problem.unorm = norm;
    const float limit = problem.config->limit, size = problem.config->step_size;
    return limit > 0.0f && norm > limit ? limit / norm * size : size;
}

template <class T>
void optimizer_update_32bit(const Update32bit<T>& problem, int32_t threads) {
    visit_rule(problem.rule, [&](auto rule) {
        Updater32bit<decltype(rule), T> updater(problem);
        if (problem.unorm) updater.set_step_size(limited_step_size(updater, problem, threads));
        parallel_for(problem.n, optimizer_grain(problem.n), threads, [&](int64_t begin, int64_t end) {
            updater.run(begin, end);
        });
    });
}

BNB_NAMESPACE_END
