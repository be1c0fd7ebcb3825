// Stochastic rounding of float32 to bfloat16: memory bound, some twenty integer operations a value that vectorize.

#include "../common/stochastic_rounding.h"

BNB_NAMESPACE_BEGIN

inline void round_to_bfloat16(
    const float* values, BFloat16* rounded, int64_t n, int64_t key, int64_t offset, int32_t threads) {
    parallel_for(n, int64_t(1) << 14, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            rounded[i] = round_stochastic(values[i], random_bits(uint64_t(key), uint64_t(offset + i)));
        }
    });
}

BNB_NAMESPACE_END
