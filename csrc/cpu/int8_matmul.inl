// int8 products: sums [M, N] = A [M, K] times the transpose of B [N, K], exact modulo 2^32, scaled as they are written.
//
// Both operands lie along K, so a vector of either is kDotBytes products and needs no packing: a tile keeps the sums of
// kTileRows rows of A and 4 of B in registers, a lane of each, over all of K. A task takes as many rows of B as fit the
// second-level cache and runs all of A past them. With few rows of A it is the reading of B that costs, so the first
// pass asks for the tile after next in advance.
//
// Outlier columns are zero in the quantized A; their products are added in float32 before the one rounding.
#pragma once

#include "int8_rows.inl"
#include "int8_tiles.inl"

BNB_NAMESPACE_BEGIN

constexpr int64_t kTileColumns = 4;
constexpr int64_t kTaskBytes = 384 << 10;  // of B: leaves room for A in a second-level cache of 1 MiB
// The sums of a tile. Rows are a recursion and not a loop, because only what has a constant index from the start is
// kept in registers.
template <int rows>
struct Int8Tile {
    I32 acc[kTileColumns];
    Int8Tile<rows - 1> rest;

    BNB_INLINE void clear() {
        acc[0] = acc[1] = acc[2] = acc[3] = broadcast(int32_t(0));
        rest.clear();
    }

    BNB_INLINE void add(const Activation* a, int64_t stride, Weights w0, Weights w1, Weights w2, Weights w3) {
        acc[0] = dot(acc[0], a, w0);
        acc[1] = dot(acc[1], a, w1);
        acc[2] = dot(acc[2], a, w2);
        acc[3] = dot(acc[3], a, w3);
        rest.add(a + stride, stride, w0, w1, w2, w3);
    }

    BNB_INLINE void store(int32_t* sums) const {
        store_sums(sums, acc);
        rest.store(sums + kTaskColumns);
    }
};

template <>
struct Int8Tile<0> {
    BNB_INLINE void clear() {}
    BNB_INLINE void add(const Activation*, int64_t, Weights, Weights, Weights, Weights) {}
    BNB_INLINE void store(int32_t*) const {}
};

// What a tile reads: rows of A, 4 rows of B, and where those of B begin that are wanted next, if they are.
struct Int8Operands {
    const Activation* a;
    int64_t stride;
    const int8_t* b[kTileColumns];
    const int8_t* next;
};

// Sums of `rows` rows of A and 4 of B over whole steps of K.
template <int rows, bool prefetch>
void int8_tile(const Int8Operands& operands, int64_t K, int32_t* sums) {
    const Activation* const a = operands.a;
    const int8_t *b0 = operands.b[0], *b1 = operands.b[1], *b2 = operands.b[2], *b3 = operands.b[3];
    const int8_t* const next = operands.next;
    const int64_t stride = operands.stride;
    Int8Tile<rows> tile;
    tile.clear();
    for (int64_t k = 0; k < K; k += kDotBytes) {
        if (prefetch && k % 64 == 0) {  // in the order of addresses, which memory serves faster than four rows at once
            for (int64_t c = 0; c < kTileColumns; ++c) BNB_PREFETCH(next + kTileColumns * k + 64 * c);
        }
        const Weights w0 = load_weights(b0 + k), w1 = load_weights(b1 + k);
        const Weights w2 = load_weights(b2 + k), w3 = load_weights(b3 + k);
        tile.add(a + k, stride, w0, w1, w2, w3);
    }
    tile.store(sums);
}

template <int rows>
BNB_INLINE void int8_tile_of(int64_t count, const Int8Operands& operands, int64_t K, int32_t* sums) {
    if constexpr (rows > 1) {
        if (count < rows) return int8_tile_of<rows - 1>(count, operands, K, sums);
    }
    if (operands.next) {
        int8_tile<rows, true>(operands, K, sums);
    } else {
        int8_tile<rows, false>(operands, K, sums);
    }
}

// Sums over all of K. The last, short step works on copies that end in zeros.
inline void int8_sums(int64_t count, const Int8Operands& operands, int64_t K, int32_t* sums) {
    const int64_t whole = K / kDotBytes * kDotBytes;
    int8_tile_of<kTileRows>(count, operands, whole, sums);
    if (whole == K) return;

    int8_t padded[kTileColumns][kDotBytes] = {};
    Int8Operands rest{operands.a + whole, operands.stride, {}, nullptr};
    for (int c = 0; c < kTileColumns; ++c) {
        memcpy(padded[c], operands.b[c] + whole, static_cast<size_t>(K - whole));
        rest.b[c] = padded[c];
    }
    int32_t added[kTileRows * kTaskColumns];
    int8_tile_of<kTileRows>(count, rest, kDotBytes, added);
    for (int64_t r = 0; r < count; ++r) {
        for (int64_t i = r * kTaskColumns; i < r * kTaskColumns + kTileColumns; ++i) {
            sums[i] = static_cast<int32_t>(static_cast<uint32_t>(sums[i]) + static_cast<uint32_t>(added[i]));
        }
    }
}

// For each range of columns of the result make a `Range(finish, first, last)`, and call its row(m, sums) for each row
// once the sums of that range are known. Sums still have their row's surplus; they may be read to the end of a vector.
template <class Range, class Finish>
void int8_product(const Int8Rows& A, const int8_t* B, int64_t N, int32_t threads, const Finish& finish) {
    const int64_t K = A.K();
#ifdef BNB_HAVE_AMX
    if (A.rows() >= kLeastTiledRows && K > 0) return int8_tiled_product<Range>(A, B, N, threads, finish);
#endif
    const int64_t fitting = kTaskBytes / (K + 1) / 16 * 16;
    const int64_t columns = fitting < 16 ? 16 : smaller(fitting, kTaskColumns);
    parallel_for(N, columns, threads, [&](int64_t first, int64_t last) {
        alignas(64) int32_t sums[kTileRows * kTaskColumns];
        Range range(finish, first, last);
        for (int64_t m = 0; m < A.rows(); m += kTileRows) {
            const int64_t rows = smaller(kTileRows, A.rows() - m);
            for (int64_t n = first; n < last; n += kTileColumns) {
                const bool fetches = m == 0 && n + 2 * kTileColumns <= N;
                Int8Operands operands{A.row(m), A.stride(), {}, fetches ? B + (n + kTileColumns) * K : nullptr};
                for (int64_t c = 0; c < kTileColumns; ++c) operands.b[c] = B + smaller(n + c, last - 1) * K;
                int8_sums(rows, operands, K, sums + (n - first));
            }
            for (int64_t r = 0; r < rows; ++r) range.row(m + r, sums + r * kTaskColumns);
        }
    });
}

inline void int8_take_rows(Int8Rows& rows, const int8_t* A, int32_t threads) {
    const int64_t K = rows.K();
    parallel_for(rows.rows(), kInt8Grain / (K + 1) + 1, threads, [&](int64_t first, int64_t last) {
        const Scratch codes(static_cast<size_t>(rows.stride()));
        for (int64_t r = first; r < last; ++r) {
            memcpy(codes.as<int8_t>(), A + r * K, static_cast<size_t>(K));
            rows.set(r, codes.as<int8_t>());
        }
    });
}

// Sums as they are.
struct Int8Sums {
    const Int8Rows& rows;
    int32_t* out;
    int64_t N;

    struct Range {
        const Int8Sums& finish;
        int64_t first, last;
        Range(const Int8Sums& finish, int64_t first, int64_t last) : finish(finish), first(first), last(last) {}

        void row(int64_t m, const int32_t* sums) {
            const uint32_t surplus = static_cast<uint32_t>(finish.rows.surplus(m));
            int32_t* target = finish.out + m * finish.N;
            for (int64_t n = first; n < last; ++n) {
                target[n] = static_cast<int32_t>(static_cast<uint32_t>(sums[n - first]) - surplus);
            }
        }
    };
};

inline void int8_linear_matmul(const Int8Product& p, int32_t* out, int32_t threads) {
    Int8Rows rows(p.M, p.K);
    int8_take_rows(rows, p.A, threads);
    int8_product<Int8Sums::Range>(rows, p.B, p.N, threads, Int8Sums{rows, out, p.N});
}

// Columns [first, last) of one row of values. `extra` is null or has one float32 a column, added before the rounding.
template <class T>
BNB_INLINE void int8_scale_row(
    const Int8Scaling<T>& s, int64_t m, int64_t first, int64_t last, const int32_t* sums, int32_t surplus,
    const float* extra) {
    const F32 scale = broadcast(s.row_stats[m] * kInt8ProductScale);
    for (int64_t n = first; n < last; n += kWidth) {
        I32 sum = load_sums(sums + (n - first));
        if (kOffset) sum = sum - broadcast(surplus);
        F32 value = (to_float(sum) * scale) * load_upto(s.col_stats + n, last - n);
        if (s.bias) value = value + load_upto(s.bias + n, last - n);
        if (extra) value = value + load(extra + (n - first));
        store_upto(s.out + m * s.N + n, value, last - n);
    }
}

template <class T>
void int8_mm_dequant(const int32_t* sums, const Int8Scaling<T>& scaling, int32_t threads) {
    const int64_t N = scaling.N, whole = N / kWidth * kWidth;
    parallel_for(scaling.M, kInt8Grain / (N + 1) + 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m) {
            int32_t rest[kWidth] = {};
            if (whole < N) memcpy(rest, sums + m * N + whole, static_cast<size_t>(N - whole) * sizeof(int32_t));
            int8_scale_row(scaling, m, 0, whole, sums + m * N, 0, nullptr);
            int8_scale_row(scaling, m, whole, N, rest, 0, nullptr);
        }
    });
}

// The outlier columns of a call: which they are, and their activations [M, count] in float32.
struct Int8Outliers {
    const int64_t* columns;
    const float* activations;
    int64_t count;
};

// Sums as scaled values, with the products of the outlier columns.
template <class T>
struct Int8Values {
    const Int8Rows& rows;
    const Int8Scaling<T>& scaling;
    const int8_t* B;
    Int8Outliers outliers;

    class Range {
      public:
        Range(const Int8Values& finish, int64_t first, int64_t last)
            : finish_(finish),
              first_(first),
              last_(last),
              weights_(static_cast<size_t>(finish.outliers.count * kTaskColumns) * sizeof(float)) {}

        void row(int64_t m, const int32_t* sums) {
            const int64_t count = finish_.outliers.count;
            if (count == 0) {
                int8_scale_row(finish_.scaling, m, first_, last_, sums, finish_.rows.surplus(m), nullptr);
                return;
            }
            if (!decoded_) decode();
            decoded_ = true;
            float extra[kTaskColumns];
            multiply(finish_.outliers.activations + m * count, extra);
            int8_scale_row(finish_.scaling, m, first_, last_, sums, finish_.rows.surplus(m), extra);
        }

      private:
        // The outlier columns of this range of B times the rows' scales, [count, kTaskColumns]. Not before the first
        // row is wanted: by then a tile has brought B into the cache.
        void decode() {
            const Int8Outliers& outliers = finish_.outliers;
            float* weights = weights_.template as<float>();
            memset(weights, 0, static_cast<size_t>(outliers.count * kTaskColumns) * sizeof(float));
            for (int64_t n = first_; n < last_; ++n) {
                const float scale = finish_.scaling.col_stats[n] * kInt8Scale;
                const int8_t* row = finish_.B + n * finish_.rows.K();
                for (int64_t j = 0; j < outliers.count; ++j) {
                    weights[j * kTaskColumns + (n - first_)] = static_cast<float>(row[outliers.columns[j]]) * scale;
                }
            }
        }

        void multiply(const float* activations, float* extra) const {
            constexpr int kVectors = kTaskColumns / kWidth < 4 ? kTaskColumns / kWidth : 4;
            const float* weights = weights_.template as<float>();
            for (int64_t n = 0; n < kTaskColumns; n += kVectors * kWidth) {
                F32 acc[kVectors];
                for (int v = 0; v < kVectors; ++v) acc[v] = broadcast(0.0f);
                for (int64_t j = 0; j < finish_.outliers.count; ++j) {
                    const F32 a = broadcast(activations[j]);
                    const float* row = weights + j * kTaskColumns + n;
                    for (int v = 0; v < kVectors; ++v) acc[v] = acc[v] + a * load(row + v * kWidth);
                }
                for (int v = 0; v < kVectors; ++v) store(extra + n + v * kWidth, acc[v]);
            }
        }

        const Int8Values& finish_;
        const int64_t first_, last_;
        const Scratch weights_;
        bool decoded_ = false;
    };
};

template <class T>
void int8_scaled_mm(const Int8Product& p, const Int8Scaling<T>& scaling, int32_t threads) {
    Int8Rows rows(p.M, p.K);
    int8_take_rows(rows, p.A, threads);
    const Int8Values<T> finish{rows, scaling, p.B, {nullptr, nullptr, 0}};
    int8_product<typename Int8Values<T>::Range>(rows, p.B, p.N, threads, finish);
}

// The statistics of A's rows, its outlier columns, and its rows quantized with those columns zeroed. Returns how many
// columns there are.
template <class T>
int64_t int8_quantize_rows(
    const Int8Linear<T>& p, Int8Rows& rows, float* row_stats, int64_t* columns, int32_t threads) {
    const int64_t K = p.K, grain = kInt8Grain / (K + 1) + 1;
    int64_t count = 0;
    if (p.outlier_cols) {
        parallel_for(p.M, grain, threads, [&](int64_t first, int64_t last) {
            for (int64_t r = first; r < last; ++r) {
                row_stats[r] = row_statistic(p.A + r * K, K, p.threshold, p.outlier_cols);
            }
        });
        for (int64_t k = 0; k < K; ++k) {
            if (p.outlier_cols[k]) columns[count++] = k;
        }
    }
    parallel_for(p.M, grain, threads, [&](int64_t first, int64_t last) {
        const Scratch codes(static_cast<size_t>(rows.stride()));
        for (int64_t r = first; r < last; ++r) {
            const T* row = p.A + r * K;
            if (!p.outlier_cols) row_stats[r] = row_statistic<T>(row, K, 0.0f, nullptr);
            quantize_row(row, codes.as<int8_t>(), K, row_stats[r]);
            for (int64_t j = 0; j < count; ++j) codes.as<int8_t>()[columns[j]] = 0;
            rows.set(r, codes.as<int8_t>());
        }
    });
    return count;
}

template <class T>
void int8_linear(const Int8Linear<T>& p, int32_t threads) {
    const Scratch row_stats(static_cast<size_t>(p.M) * sizeof(float));
    const Scratch columns(static_cast<size_t>(p.outlier_cols ? p.K : 0) * sizeof(int64_t));
    Int8Rows rows(p.M, p.K);
    const int64_t count = int8_quantize_rows(p, rows, row_stats.as<float>(), columns.as<int64_t>(), threads);

    const Scratch activations(static_cast<size_t>(p.M * count) * sizeof(float));
    for (int64_t m = 0; m < p.M; ++m) {
        for (int64_t j = 0; j < count; ++j) {
            activations.as<float>()[m * count + j] = to_float(p.A[m * p.K + columns.as<int64_t>()[j]]);
        }
    }
    const Int8Scaling<T> scaling{row_stats.as<float>(), p.col_stats, p.bias, p.out, p.M, p.N};
    const Int8Values<T> finish{rows, scaling, p.B, {columns.as<int64_t>(), activations.as<float>(), count}};
    int8_product<typename Int8Values<T>::Range>(rows, p.B, p.N, threads, finish);
}

BNB_NAMESPACE_END
