// Activations times a packed 4-bit weight, accumulated in float32.
//
// Up to four rows stream the weight once from memory (half a byte per weight), decode it in registers and scale each
// block's partial sum. More rows decode a panel of kPanel weight rows into the cache, where all activations reuse it.
// Activations are widened to float32 once. Each output is summed by one thread in one order.

BNB_NAMESPACE_BEGIN

constexpr int64_t kPanel = 4;          // weight rows decoded together
constexpr int64_t kMaxStreamRows = 4;  // activations that share one pass over the weight
constexpr int64_t kMaxRows = 64;       // activations widened at a time
constexpr int64_t kPrefetchBytes = 2048;
constexpr int kTileRows = kWidth >= 16 ? 4 : 2;  // accumulators of the tile must fit the register file

// Activations in float32. `depth` is K rounded up to whole vectors, padded with zeros. Rows lie one cache line further
// apart, so that those of a tile do not compete for the same cache sets when K is a power of two.
struct Activations {
    const float* values;
    int64_t rows, depth, stride;
};

template <class T>
void widen(const T* source, float* target, int64_t count, int64_t depth) {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(target + i, load(source + i));
    if (i < count) {
        store(target + i, load_partial(source + i, count - i));
        i += kWidth;
    }
    for (; i < depth; ++i) target[i] = 0.0f;
}

template <class T>
BNB_INLINE void write_output(const GemmProblem<T>& p, int64_t m, int64_t n, float sum) {
    p.out[m * p.N + n] = from_float<T>(p.bias ? sum + to_float(p.bias[n]) : sum);
}

// One weight row against kRows activations; rows and blocks begin at whole vectors.
template <int kRows, class T>
void stream_row(const GemmProblem<T>& p, const Activations& a, const Table16& table, int64_t m, int64_t n) {
    F32 sum[kRows];
    for (int r = 0; r < kRows; ++r) sum[r] = broadcast(0.0f);
    const int64_t origin = n * p.K;
    for (int64_t k = 0; k < p.K;) {
        const int64_t block = (origin + k) / p.blocksize;
        const int64_t rest = (block + 1) * p.blocksize - origin;
        const int64_t stop = rest < p.K ? rest : p.K;
        F32 partial[kRows];
        for (int r = 0; r < kRows; ++r) partial[r] = broadcast(0.0f);
        BNB_PREFETCH(p.packed + (origin + k) / 2 + kPrefetchBytes);
        for (; k < stop; k += kWidth) {
            const F32 weight = lookup(table, unpack_4bit(p.packed + (origin + k) / 2));
            for (int r = 0; r < kRows; ++r) partial[r] = fma(weight, load(a.values + r * a.stride + k), partial[r]);
        }
        const F32 scale = broadcast(p.absmax[block]);
        for (int r = 0; r < kRows; ++r) sum[r] = fma(partial[r], scale, sum[r]);
    }
    for (int r = 0; r < kRows; ++r) write_output(p, m + r, n, reduce_add(sum[r]));
}

template <class T>
void stream_rows(
    const GemmProblem<T>& p, const Activations& a, const Table16& table, int64_t m, int64_t first, int64_t last) {
    const auto run = a.rows == 1   ? stream_row<1, T>
                     : a.rows == 2 ? stream_row<2, T>
                     : a.rows == 3 ? stream_row<3, T>
                                   : stream_row<4, T>;
    for (int64_t n = first; n < last; ++n) run(p, a, table, m, n);
}

// kRows activations against one decoded panel.
template <int kRows, class T>
BNB_INLINE void multiply_tile(
    const GemmProblem<T>& p, const Activations& a, const float* panel, int64_t m, int64_t row, int64_t n,
    int64_t columns) {
    F32 sum[kRows][kPanel];
    for (int r = 0; r < kRows; ++r) {
        for (int c = 0; c < kPanel; ++c) sum[r][c] = broadcast(0.0f);
    }
    for (int64_t k = 0; k < a.depth; k += kWidth) {
        F32 weight[kPanel];
        for (int c = 0; c < kPanel; ++c) weight[c] = load(panel + c * a.stride + k);
        for (int r = 0; r < kRows; ++r) {
            const F32 x = load(a.values + (row + r) * a.stride + k);
            for (int c = 0; c < kPanel; ++c) sum[r][c] = fma(x, weight[c], sum[r][c]);
        }
    }
    for (int r = 0; r < kRows; ++r) {
        for (int c = 0; c < columns; ++c) write_output(p, m + row + r, n + c, reduce_add(sum[r][c]));
    }
}

template <class T>
void multiply_panels(
    const GemmProblem<T>& p, const Activations& a, const Table16& table, int64_t m, int64_t first, int64_t last) {
    const Scratch memory(static_cast<size_t>(kPanel * a.stride) * sizeof(float));
    float* const panel = memory.as<float>();
    for (int64_t n = first; n < last; n += kPanel) {
        const int64_t columns = last - n < kPanel ? last - n : kPanel;
        for (int64_t c = 0; c < kPanel; ++c) {
            float* const row = panel + c * a.stride;
            const int64_t begin = (n + c) * p.K;
            const int64_t decoded = c < columns ? p.K : 0;
            dequantize_4bit_range(p.packed, p.absmax, table, row, begin, begin + decoded, p.blocksize);
            for (int64_t k = decoded; k < a.depth; ++k) row[k] = 0.0f;
        }
        int64_t row = 0;
        for (; row + kTileRows <= a.rows; row += kTileRows) {
            multiply_tile<kTileRows>(p, a, panel, m, row, n, columns);
        }
        for (; row < a.rows; ++row) multiply_tile<1>(p, a, panel, m, row, n, columns);
    }
}

template <class T>
void gemm_4bit(const GemmProblem<T>& p, int32_t threads) {
    if (p.M == 0 || p.N == 0) return;
    const int64_t depth = (p.K + kWidth - 1) / kWidth * kWidth;
    const int64_t stride = depth + 16;
    const int64_t most = p.M < kMaxRows ? p.M : kMaxRows;
    const Scratch memory(static_cast<size_t>(most * stride) * sizeof(float));
    float* const widened = memory.as<float>();
    const bool aligned = p.K % kWidth == 0 && p.blocksize % kWidth == 0;
    const int64_t grain = ((1 << 16) / (p.K + 1) / kPanel + 1) * kPanel;
    for (int64_t m = 0; m < p.M; m += most) {
        const Activations a{widened, p.M - m < most ? p.M - m : most, depth, stride};
        parallel_for(a.rows, 32768 / (stride + 1) + 1, threads, [&](int64_t first, int64_t last) {
            for (int64_t r = first; r < last; ++r) widen(p.A + (m + r) * p.K, widened + r * stride, p.K, depth);
        });
        parallel_for(p.N, grain, threads, [&](int64_t first, int64_t last) {
            const Table16 table(p.code);
            if (aligned && a.rows <= kMaxStreamRows) {
                stream_rows(p, a, table, m, first, last);
            } else {
                multiply_panels(p, a, table, m, first, last);
            }
        });
    }
}

BNB_NAMESPACE_END
