// LLM.int8() row quantization: each row scaled to 127 by its largest magnitude, outlier columns zeroed.
//
// Two passes over a row, the second from cache. Outliers are rare, so a row reports them only when a vector holds one;
// zeroing their columns is a last pass over those columns alone.

BNB_NAMESPACE_BEGIN

constexpr int64_t kInt8Grain = 1 << 15;

template <class T>
BNB_INLINE F32 load_upto(const T* row, int64_t count) {
    return count >= kWidth ? load(row) : load_partial(row, count);
}

// Flags are bytes that several threads may set to the same 1.
BNB_INLINE void flag_column(uint8_t* flag) {
#if defined(__GNUC__)
    __atomic_store_n(flag, uint8_t(1), __ATOMIC_RELAXED);
#else
    *static_cast<volatile uint8_t*>(flag) = 1;
#endif
}

// Largest magnitude of a row's elements below the threshold; flags the columns of the others.
template <class T>
float row_statistic(const T* row, int64_t cols, float threshold, uint8_t* outlier_cols) {
    const F32 limit = broadcast(threshold);
    I32 best = broadcast(int32_t(0));
    for (int64_t i = 0; i < cols; i += kWidth) {
        const I32 magnitude = magnitude_bits(load_upto(row + i, cols - i));
        const I32 outlier = at_least_mask(from_bits(magnitude), limit);
        best = max(best, select(outlier, broadcast(int32_t(0)), magnitude));
        if (reduce_max(outlier & broadcast(int32_t(1)))) {
            for (int64_t j = i; j < cols && j < i + kWidth; ++j) {
                const float value = to_float(row[j]);
                if ((value < 0.0f ? -value : value) >= threshold) flag_column(outlier_cols + j);
            }
        }
    }
    return bits_float(static_cast<uint32_t>(reduce_max(best)));
}

template <class T>
void quantize_row(const T* row, int8_t* quantized, int64_t cols, float statistic) {
    // 127 times the reciprocal, in two roundings: torch forms 127 / x this way, and published checkpoints hold it.
    const F32 factor = broadcast(statistic == 0.0f ? 0.0f : (1.0f / statistic) * 127.0f);
    const F32 low = broadcast(-127.0f), high = broadcast(127.0f);
    const auto round = [&](F32 x) {
        const F32 scaled = clamp(x * factor, low, high);
        return select(nan_mask(scaled), broadcast(int32_t(0)), round_to_int(scaled));
    };
    int64_t i = 0;
    for (; i + kWidth <= cols; i += kWidth) store_i8(quantized + i, round(load(row + i)));
    if (i < cols) {
        int8_t padded[kWidth];
        store_i8(padded, round(load_partial(row + i, cols - i)));
        memcpy(quantized + i, padded, static_cast<size_t>(cols - i));
    }
}

template <class T>
void int8_vectorwise_quant(
    const T* A, int8_t* quantized, float* row_stats, uint8_t* outlier_cols, int64_t rows, int64_t cols, float threshold,
    int32_t threads) {
    const int64_t grain = kInt8Grain / (cols + 1) + 1;
    parallel_for(rows, grain, threads, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) {
            const T* row = A + r * cols;
            row_stats[r] =
                outlier_cols ? row_statistic(row, cols, threshold, outlier_cols) : largest_magnitude(row, cols);
            quantize_row(row, quantized + r * cols, cols, row_stats[r]);
        }
    });
    if (!outlier_cols) return;
    parallel_for(rows, grain, threads, [&](int64_t first, int64_t last) {
        for (int64_t c = 0; c < cols; ++c) {
            if (!outlier_cols[c]) continue;
            for (int64_t r = first; r < last; ++r) quantized[r * cols + c] = 0;
        }
    });
}

BNB_NAMESPACE_END
