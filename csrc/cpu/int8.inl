// LLM.int8() quantization: each row, or column, scaled to 127 by its largest magnitude, outlier columns zeroed.
//
// Memory bound: a row is read twice, the second time from cache. Outliers are rare, so a row reports them only when a
// vector holds one; zeroing their columns is a last pass over those columns alone. Columns are reduced in strips as
// wide as a few cache lines, every row of a strip in turn.

BNB_NAMESPACE_BEGIN

constexpr int64_t kInt8Grain = 1 << 15;
constexpr int64_t kStripColumns = 512;
constexpr double kUnit = 1.0 / 127.0;
constexpr float kInt8Scale = static_cast<float>(kUnit);
constexpr float kInt8ProductScale = static_cast<float>(kUnit * kUnit);

BNB_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
BNB_INLINE F32 load_upto(const T* row, int64_t count) {
    return count >= kWidth ? load(row) : load_partial(row, count);
}

template <class T>
BNB_INLINE void store_upto(T* target, F32 x, int64_t count) {
    if (count >= kWidth) {
        store(target, x);
    } else {
        store_partial(target, x, count);
    }
}

BNB_INLINE void store_i8_upto(int8_t* target, I32 x, int64_t count) {
    if (count >= kWidth) {
        store_i8(target, x);
    } else {
        int8_t padded[kWidth];
        store_i8(padded, x);
        memcpy(target, padded, static_cast<size_t>(count));
    }
}

BNB_INLINE F32 load_i8(const int8_t* source) {
    const I32 raw = load_u8(reinterpret_cast<const uint8_t*>(source));
    return to_float((raw & broadcast(int32_t(127))) - (raw & broadcast(int32_t(128))));
}

// Flags are bytes that several threads may set to the same 1.
BNB_INLINE void flag_column(uint8_t* flag) {
#if defined(__GNUC__)
    __atomic_store_n(flag, uint8_t(1), __ATOMIC_RELAXED);
#else
    *static_cast<volatile uint8_t*>(flag) = 1;
#endif
}

// Largest magnitude of a row. With outlier_cols, only of the elements below the threshold; the others are flagged.
template <class T>
float row_statistic(const T* row, int64_t cols, float threshold, uint8_t* outlier_cols) {
    I32 best[2] = {broadcast(int32_t(0)), broadcast(int32_t(0))};
    int64_t i = 0;
    if (!outlier_cols) {
        for (; i + 2 * kWidth <= cols; i += 2 * kWidth) {
            best[0] = max(best[0], magnitude_bits(load(row + i)));
            best[1] = max(best[1], magnitude_bits(load(row + i + kWidth)));
        }
        for (; i < cols; i += kWidth) best[0] = max(best[0], magnitude_bits(load_upto(row + i, cols - i)));
        return bits_float(static_cast<uint32_t>(reduce_max(max(best[0], best[1]))));
    }
    const F32 limit = broadcast(threshold);
    for (; i < cols; i += kWidth) {
        const I32 magnitude = magnitude_bits(load_upto(row + i, cols - i));
        const I32 outlier = at_least_mask(from_bits(magnitude), limit);
        best[0] = max(best[0], select(outlier, broadcast(int32_t(0)), magnitude));
        if (any_lane(outlier)) {
            for (int64_t j = i; j < cols && j < i + kWidth; ++j) {
                const float value = to_float(row[j]);
                if ((value < 0.0f ? -value : value) >= threshold) flag_column(outlier_cols + j);
            }
        }
    }
    return bits_float(static_cast<uint32_t>(reduce_max(best[0])));
}

// 127 times the reciprocal, in two roundings: torch forms 127 / x this way, and published checkpoints hold it.
BNB_INLINE F32 int8_factor(F32 statistic) {
    const F32 factor = (broadcast(1.0f) / statistic) * broadcast(127.0f);
    return select(at_least_mask(statistic, broadcast(bits_float(1))), factor, broadcast(0.0f));
}

BNB_INLINE I32 to_int8(F32 x, F32 factor) {
    const F32 scaled = clamp(x * factor, broadcast(-127.0f), broadcast(127.0f));
    return select(nan_mask(scaled), broadcast(int32_t(0)), round_to_int(scaled));
}

template <class T>
void quantize_row(const T* row, int8_t* quantized, int64_t cols, float statistic) {
    const F32 factor = broadcast(statistic == 0.0f ? 0.0f : (1.0f / statistic) * 127.0f);
    int64_t i = 0;
    for (; i + kWidth <= cols; i += kWidth) store_i8(quantized + i, to_int8(load(row + i), factor));
    if (i < cols) store_i8_upto(quantized + i, to_int8(load_partial(row + i, cols - i), factor), cols - i);
}

// Columns [first, last) by column. An outlier element does not count and becomes zero.
template <class T>
void quantize_columns(const Int8Quantization<T>& p, int64_t first, int64_t last) {
    float factors[kStripColumns];
    I32 best[kStripColumns / kWidth];
    const F32 limit = broadcast(p.outlier_cols ? p.threshold : bits_float(0x7f800001u));  // nothing is at least a NaN
    const I32 zero = broadcast(int32_t(0));
    for (int64_t i = 0; i < kStripColumns / kWidth; ++i) best[i] = zero;
    for (int64_t r = 0; r < p.rows; ++r) {
        const T* row = p.A + r * p.cols;
        for (int64_t c = first, i = 0; c < last; c += kWidth, ++i) {
            const I32 magnitude = magnitude_bits(load_upto(row + c, last - c));
            best[i] = max(best[i], select(at_least_mask(from_bits(magnitude), limit), zero, magnitude));
        }
    }
    for (int64_t c = first, i = 0; c < last; c += kWidth, ++i) {
        store_upto(p.col_stats + c, from_bits(best[i]), last - c);
        store(factors + i * kWidth, int8_factor(from_bits(best[i])));
    }
    for (int64_t r = 0; r < p.rows; ++r) {
        const T* row = p.A + r * p.cols;
        int8_t* target = p.by_column + r * p.cols;
        for (int64_t c = first; c < last; c += kWidth) {
            const F32 x = load_upto(row + c, last - c);
            const I32 outlier = at_least_mask(from_bits(magnitude_bits(x)), limit);
            store_i8_upto(target + c, select(outlier, zero, to_int8(x, load(factors + (c - first)))), last - c);
        }
    }
}

template <class T>
void int8_quantize(const Int8Quantization<T>& p, int32_t threads) {
    const int64_t grain = kInt8Grain / (p.cols + 1) + 1;
    parallel_for(p.rows, grain, threads, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) {
            const T* row = p.A + r * p.cols;
            p.row_stats[r] = row_statistic(row, p.cols, p.threshold, p.outlier_cols);
            quantize_row(row, p.by_row + r * p.cols, p.cols, p.row_stats[r]);
        }
    });
    if (p.outlier_cols) {
        parallel_for(p.rows, grain, threads, [&](int64_t first, int64_t last) {
            for (int64_t c = 0; c < p.cols; ++c) {
                if (!p.outlier_cols[c]) continue;
                for (int64_t r = first; r < last; ++r) p.by_row[r * p.cols + c] = 0;
            }
        });
    }
    if (p.by_column) {
        parallel_for(
            p.cols, kStripColumns, threads, [&](int64_t first, int64_t last) { quantize_columns(p, first, last); });
    }
}

inline void int8_vectorwise_dequant(
    const int8_t* codes, const float* row_stats, float* values, int64_t rows, int64_t cols, int32_t threads) {
    parallel_for(rows, kInt8Grain / (cols + 1) + 1, threads, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) {
            const int8_t* row = codes + r * cols;
            float* target = values + r * cols;
            const F32 scale = broadcast(row_stats[r]), unit = broadcast(kInt8Scale);
            int64_t c = 0;
            for (; c + kWidth <= cols; c += kWidth) store(target + c, (load_i8(row + c) * scale) * unit);
            for (; c < cols; ++c) target[c] = (static_cast<float>(row[c]) * row_stats[r]) * kInt8Scale;
        }
    });
}

BNB_NAMESPACE_END
