// int8 products in tiles (AMX): of 16 rows of B as they lie in memory, and of 16 rows of A, packed once a pass.
//
// One instruction adds the products of 16 by 16 rows over 64 bytes of them. Rows of B are its first operand, which
// needs no packing; the sum is the transpose. Sums stay in registers over a span of K, for which the activations of a
// pass and some rows of B stay in the second-level cache; if there are several, columns take turns at them.
#pragma once

#include "fetch_lines.inl"
#include "int8_rows.inl"
#include "unrolled.inl"

#ifdef BNB_HAVE_AMX

BNB_NAMESPACE_BEGIN

constexpr int64_t kLeastTiledRows = 7;   // of A: more than the other kernel takes at once
constexpr int64_t kMostTiledRows = 256;  // of A, in a pass
constexpr int64_t kSpanSteps = 64;       // of 64 bytes
constexpr int64_t kTiledColumns = 256;   // that take turns at the spans: four ranges

// Rows of A in tiles whose words are four bytes of each row: [span][16 rows][step].
struct Int8Tiles {
    uint32_t* words;
    int64_t groups, steps;

    int64_t span_at(int64_t step) const { return smaller(kSpanSteps, steps - step); }
    uint32_t* at(int64_t span, int64_t group) const {
        return words + (span * groups + group * span_at(span)) * kAmxTile;
    }

    // Take over the group of 16 rows from m on; past the last they repeat it.
    void pack(const Int8Rows& rows, int64_t m, int64_t group) const {
        const void* row[kWidth];
        for (int64_t i = 0; i < kAmxRows; ++i) row[i] = rows.row(smaller(m + group * kAmxRows + i, rows.rows() - 1));
        for (int64_t span = 0; span < steps; span += kSpanSteps) {
            uint32_t* target = at(span, group);
            for (int64_t step = span; step < span + span_at(span); ++step) {
                I32 words[kWidth];
                load_transposed(row, step * kAmxBytes, words);
                for (int i = 0; i < kAmxRows; ++i, target += kAmxRows) store_words(target, words[i]);
            }
        }
    }
};

// sums [kTiles][kGroups] tiles, `stride` tiles from row to row, (+)= tiles of B's rows, `pitch` bytes apart, times
// those of A over `count` steps.
template <int kTiles, int kGroups>
void add_int8_tiles(
    const int8_t* b, int64_t pitch, const uint32_t* a, int64_t count, bool first, int32_t* sums, int64_t stride,
    FetchLines& fetch) {
    const auto tile_at = [&](int i) { return sums + (i / kGroups * stride + i % kGroups) * kAmxTile; };
    unrolled<kTiles * kGroups>([&](auto i) {
        if (first) {
            amx_zero<i.number>();
        } else {
            amx_load<i.number>(tile_at(i.number));
        }
    });
    const int64_t tile_rows = kAmxRows * pitch, group = count * kAmxTile;
    for (int64_t step = 0; step < count; ++step, b += kAmxBytes, a += kAmxTile) {
        if constexpr (kGroups == 2) {
            static_assert(kTiles == 2);
            amx_load<4>(b, pitch);
            amx_load<6>(a);
            amx_add_int8_products<0, 4, 6>();
            amx_load<7>(a + group);
            amx_add_int8_products<1, 4, 7>();
            amx_load<5>(b + tile_rows, pitch);
            amx_add_int8_products<2, 5, 6>();
            amx_add_int8_products<3, 5, 7>();
        } else {
            static_assert(kGroups == 1);
            amx_load<7>(a);
            unrolled<kTiles>([&](auto i) {
                constexpr int kRegister = 4 + i.number % 3;
                amx_load<kRegister>(b + i.number * tile_rows, pitch);
                amx_add_int8_products<i.number, kRegister, 7>();
            });
        }
        fetch();
    }
    unrolled<kTiles * kGroups>([&](auto i) { amx_store<i.number>(tile_at(i.number)); });
}

// Rows of B as tiles read them, `rows` together: where they are, or a copy where reading whole steps would go past the
// last one.
class WeightTiles {
  public:
    WeightTiles(const int8_t* B, int64_t N, int64_t K, int64_t rows, int64_t last)
        : B_(B),
          N_(N),
          K_(K),
          rows_(rows),
          padded_((K + kAmxBytes - 1) / kAmxBytes * kAmxBytes),
          copy_(last + rows + kAmxBytes / K > N ? static_cast<size_t>(rows * padded_) : 0) {}

    struct Rows {
        const int8_t* first;
        int64_t pitch;  // bytes from row to row
    };

    Rows at(int64_t n) const {
        if ((n + rows_ - 1) * K_ + padded_ <= N_ * K_) return {B_ + n * K_, K_};
        int8_t* const copy = copy_.as<int8_t>();
        memset(copy, 0, static_cast<size_t>(rows_ * padded_));
        for (int64_t r = 0; r < rows_ && n + r < N_; ++r) {
            memcpy(copy + r * padded_, B_ + (n + r) * K_, static_cast<size_t>(K_));
        }
        return {copy, padded_};
    }

  private:
    const int8_t* B_;
    int64_t N_, K_, rows_, padded_;
    const Scratch copy_;
};

// Hand rows [m, m + 16) of A to a range, from the tiles of its columns, `stride` tiles apart.
template <class Range>
void write_int8_rows(const Int8Rows& A, const int32_t* tiles, int64_t stride, int64_t m, Range& range) {
    alignas(64) int32_t sums[kAmxRows][kTaskColumns];
    for (int64_t n = 0; n < kTaskColumns; n += kAmxRows, tiles += stride * kAmxTile) {
        const void* row[kWidth];
        for (int i = 0; i < kAmxRows; ++i) row[i] = tiles + i * kAmxRows;
        I32 words[kWidth];
        load_transposed(row, 0, words);
        for (int i = 0; i < kAmxRows && m + i < A.rows(); ++i) {
            store_words(sums[i] + n, words[i] + broadcast(A.surplus(m + i)));  // that the range takes out again
        }
    }
    for (int i = 0; i < kAmxRows && m + i < A.rows(); ++i) range.row(m + i, sums[i]);
}

// Columns [first, last) of the sums of a pass: [columns / 16][groups] tiles.
template <int kTiles, int kGroups>
void add_int8_columns(
    const int8_t* B, int64_t N, int64_t K, const Int8Tiles& a, int64_t first, int64_t last, int32_t* sums) {
    constexpr int64_t kRows = kTiles * kAmxRows;
    const WeightTiles weight(B, N, K, kRows, last);
    for (int64_t span = 0; span < a.steps; span += kSpanSteps) {
        const int64_t count = a.span_at(span), turns = (a.groups + kGroups - 1) / kGroups * count;
        for (int64_t n = first; n < last; n += kRows) {
            const WeightTiles::Rows rows = weight.at(n);
            const int8_t* const b = rows.first + span * kAmxBytes;
            const int8_t* const next = B + (n + kRows) * K + span * kAmxBytes;
            FetchLines fetch{reinterpret_cast<const uint8_t*>(next), K, count};
            fetch.share = (kRows * count + turns - 1) / turns;
            int32_t* const target = sums + (n - first) / kAmxRows * a.groups * kAmxTile;
            int64_t g = 0;
            for (; g + kGroups <= a.groups; g += kGroups) {
                add_int8_tiles<kTiles, kGroups>(
                    b, rows.pitch, a.at(span, g), count, span == 0, target + g * kAmxTile, a.groups, fetch);
            }
            if (g < a.groups) {
                add_int8_tiles<kTiles, 1>(
                    b, rows.pitch, a.at(span, g), count, span == 0, target + g * kAmxTile, a.groups, fetch);
            }
        }
    }
}

// int8_product, which see.
template <class Range, class Finish>
void int8_tiled_product(const Int8Rows& A, const int8_t* B, int64_t N, int32_t threads, const Finish& finish) {
    const int64_t M = A.rows(), K = A.K(), steps = (K + kAmxBytes - 1) / kAmxBytes;
    const int64_t passes = (M + kMostTiledRows - 1) / kMostTiledRows;
    const int64_t most = ((M + passes - 1) / passes + kAmxRows - 1) / kAmxRows * kAmxRows;
    const Scratch memory(static_cast<size_t>(most * steps * kAmxBytes));
    for (int64_t m = 0; m < M; m += most) {
        const int64_t rows = smaller(most, M - m);
        const Int8Tiles a{memory.as<uint32_t>(), (rows + kAmxRows - 1) / kAmxRows, steps};
        parallel_for(a.groups, kInt8Grain / K / kAmxRows + 1, threads, [&](int64_t first, int64_t last) {
            for (int64_t g = first; g < last; ++g) a.pack(A, m, g);
        });
        parallel_for(N, kTiledColumns, threads, [&](int64_t first, int64_t last) {
            const AmxRegisters registers;
            const int64_t columns = (last - first + kTaskColumns - 1) / kTaskColumns * kTaskColumns;
            const Scratch tiles(static_cast<size_t>(columns * a.groups * kAmxRows) * sizeof(int32_t));
            int32_t* const sums = tiles.as<int32_t>();
            if (a.groups == 1) {
                add_int8_columns<4, 1>(B, N, K, a, first, last, sums);
            } else {
                add_int8_columns<2, 2>(B, N, K, a, first, last, sums);
            }
            for (int64_t n = first; n < last; n += kTaskColumns) {
                Range range(finish, n, smaller(last, n + kTaskColumns));
                const int32_t* const of_range = sums + (n - first) / kAmxRows * a.groups * kAmxTile;
                for (int64_t r = 0; r < rows; r += kAmxRows) {
                    write_int8_rows(A, of_range + r / kAmxRows * kAmxTile, a.groups, m + r, range);
                }
            }
        });
    }
}

BNB_NAMESPACE_END

#endif
