// Look-ups in quantized tables: only the rows that are asked for are decoded, and each is read once.

BNB_NAMESPACE_BEGIN

inline constexpr int64_t kEmbeddingGrain = 1 << 13;  // values

template <class T>
void embedding_4bit(
    const int64_t* indices, const uint8_t* packed, const float* absmax, const FourBitFormat& format, T* out,
    int64_t count, int64_t columns, int64_t blocksize, int32_t threads) {
    const Table16 table(format.values);
    parallel_for(count, kEmbeddingGrain / (columns + 1) + 1, threads, [&](int64_t first, int64_t last) {
        const Table16 local = table;
        for (int64_t i = first; i < last; ++i) {
            const int64_t begin = indices[i] * columns;
            dequantize_4bit_range(packed, absmax, local, out + i * columns, begin, begin + columns, blocksize);
        }
    });
}

template <class T>
void embedding_8bit(
    const int64_t* indices, const int8_t* table, const float* absmax, T* out, int64_t count, int64_t columns,
    int32_t threads) {
    parallel_for(count, kEmbeddingGrain / (columns + 1) + 1, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const int8_t* row = table + indices[i] * columns;
            // Multiplied, not divided: devices divide by a constant in different ways.
            const float scale = absmax[indices[i]] * (1.0f / 127.0f);
            T* values = out + i * columns;
            for (int64_t c = 0; c < columns; ++c) values[c] = from_float<T>(float(row[c]) * scale);
        }
    });
}

BNB_NAMESPACE_END
