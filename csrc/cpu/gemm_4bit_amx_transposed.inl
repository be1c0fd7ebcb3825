// Products with the transpose of a 4-bit weight in tiles, for the same blocks as those with the weight.
//
// Two weight rows make the pairs of the second operand, and the sum's columns come out in the order of decoded codes.
#pragma once

#include "gemm_4bit_amx_tiles.inl"

#ifdef BNB_HAVE_AMX

BNB_NAMESPACE_BEGIN

constexpr int64_t kMostTransposedRows = 512;               // activations of a pass
constexpr int64_t kTransposedColumns = 256;                // of a task
constexpr int kTransposedTiles = kVectorCodes / kAmxRows;  // tiles side by side that a vector of codes becomes

// Activations from which on tiles are faster than what multiplies in float32.
constexpr int64_t least_transposed_rows(int parts) { return parts == 1 ? 1 : 9; }

// Depth of a panel, which lies in the second-level cache, by the parts of its values.
constexpr int64_t transposed_piece(int parts) { return 512 / parts / kAmxDepth * kAmxDepth; }

struct FetchNothing {
    BNB_INLINE void operator()() const {}
};

// 32 values of 16 activations into a tile.
BNB_INLINE void pack_amx_rows(const BFloat16* const (&values)[kAmxRows], uint32_t* target) {
    for (int i = 0; i < kAmxRows; ++i) memcpy(target + i * kAmxRows, values[i], kAmxDepth * sizeof(BFloat16));
}

// Tiles [kTransposedTiles][part][steps] of the columns from k on, as many as a vector has, and weight rows from n on.
struct TransposedWeight {
    const uint8_t* packed;
    const float* absmax;
    Table16 table;
    int64_t N, K, blocksize;

    template <int kParts>
    void decode(int64_t n, int64_t k, int64_t steps, uint32_t* target) const {
        const Table16 local = table;
        Block block{(n * K + k) / blocksize, (n * K + k) % blocksize, K / blocksize, K % blocksize};
        for (int64_t pair = 0; pair < steps * kAmxRows; ++pair) {
            const auto even = row<kParts>(local, n + 2 * pair, k, block);
            const auto odd = row<kParts>(local, n + 2 * pair + 1, k, block);
            unrolled<kParts>([&](auto part) {
                constexpr int p = part.number;
                uint32_t* const line = target + p * steps * kAmxTile + pair * kAmxRows;
                unrolled<kStepsOfVector>([&](auto s) {
                    I32 low, high;
                    interleave(scaled_pairs<s.number, p>(even), scaled_pairs<s.number, p>(odd), low, high);
                    store_words(line + (2 * s.number) * kParts * steps * kAmxTile, low);
                    store_words(line + (2 * s.number + 1) * kParts * steps * kAmxTile, high);
                });
            });
        }
    }

  private:
    static constexpr int64_t kAhead = 16;  // rows

    // The block that a row's vector begins in, the values of it before that, and how far on those of the next row are.
    struct Block {
        int64_t number, before, step, rest;
    };

    // Row n; its block becomes that of row n + 1.
    template <int kParts>
    BNB_INLINE ScaledCodes<kParts> row(const Table16& local, int64_t n, int64_t k, Block& block) const {
        float scales[2] = {};
        if (n >= N) return ScaledCodes<kParts>(local, broadcast(int32_t(0)), scales);
        const uint8_t* const source = packed + (n * K + k) / 2;
        BNB_PREFETCH(source + kAhead * K / 2);
        scales[0] = absmax[block.number];
        const int64_t second = block.before + kScaledCodes < blocksize ? block.number : block.number + 1;
        block.number += block.step;
        block.before += block.rest;
        if (block.before >= blocksize) block.before -= blocksize, ++block.number;
        if (K - k < kVectorCodes) {
            uint8_t half[kVectorBytes] = {};
            memcpy(half, source, kVectorBytes / 2);
            return ScaledCodes<kParts>(local, load_words(half), scales);
        }
        scales[1] = absmax[second];
        return ScaledCodes<kParts>(local, load_words(source), scales);
    }
};

// sums [groups][kTransposedTiles] of `stride` tiles a row += activations times a panel of the depth from n on.
template <int kParts>
void multiply_transposed_panel(
    const AmxActivations<kParts>& a, int64_t n, int64_t steps, const uint32_t* panel, float* sums, int64_t stride) {
    const int64_t groups = a.groups(), size = kParts * steps * kAmxTile;
    int64_t g = 0;
    for (; g + 2 <= groups; g += 2) {
        for (int tile = 0; tile < kTransposedTiles; tile += 2) {
            add_tile_products<kParts, 2, 2>(
                a.at(n, g), panel + tile * size, steps, sums + (g * stride + tile) * kAmxTile, stride, FetchNothing());
        }
    }
    for (int tile = 0; tile < kTransposedTiles && g < groups; tile += 4) {
        add_tile_products<kParts, 1, 4>(
            a.at(n, g), panel + tile * size, steps, sums + (g * stride + tile) * kAmxTile, stride, FetchNothing());
    }
}

// Returns false where the product has to be computed another way.
template <class T>
bool multiply_amx_transposed(const GemmProblem<T>& p, int32_t threads) {
    constexpr int kParts = kPartsOf<T>;
    constexpr int64_t kTiles = kTransposedColumns / kAmxRows, kPiece = transposed_piece(kParts);
    if (kParts > 1 && !splits(p.code)) return false;
    const ExpandedScales scales(p, threads);
    const TransposedWeight weight{p.packed, scales.absmax, Table16(p.code), p.N, p.K, p.blocksize};
    bool all_finite = true;
    for_amx_activations<kParts, kAmxDepth, kMostTransposedRows>(
        p.A, p.M, p.N, kPiece, threads, pack_amx_rows, [&](const AmxActivations<kParts>& a, int64_t m, int64_t rows) {
            const Output<T> output{p.out + m * p.K, p.bias, p.K};
            parallel_for(p.K, kTransposedColumns, threads, [&](int64_t first, int64_t last) {
                const AmxRegisters registers;
                const Scratch panel(static_cast<size_t>(kParts * kPiece * kVectorCodes) * sizeof(BFloat16));
                const Scratch memory(static_cast<size_t>(kTransposedColumns * a.rows) * sizeof(float));
                float* const sums = memory.as<float>();
                memset(sums, 0, static_cast<size_t>(kTransposedColumns * a.rows) * sizeof(float));
                for (int64_t n = 0; n < a.depth; n += kPiece) {
                    const int64_t steps = a.piece_at(n) / kAmxDepth;
                    for (int64_t k = first; k < last; k += kVectorCodes) {
                        weight.template decode<kParts>(n, k, steps, panel.as<uint32_t>());
                        multiply_transposed_panel(
                            a, n, steps, panel.as<uint32_t>(), sums + (k - first) / kAmxRows * kAmxTile, kTiles);
                    }
                }
                FiniteSums<kParts> finite;
                for (int64_t r = 0; r < rows; ++r) {
                    const float* const row = sums + r / kAmxRows * kTiles * kAmxTile + r % kAmxRows * kAmxRows;
                    for (int64_t k = first; k < last; k += kVectorCodes) {
                        F32 lanes[kTransposedTiles];
                        for (int i = 0; i < kTransposedTiles; ++i) {
                            lanes[i] = load(row + ((k - first) / kAmxRows + i) * kAmxTile);
                            finite.look_at(lanes[i]);
                        }
                        float line[kVectorCodes];
                        store_columns(lanes, line);
                        output.write(r, k, last - k < kVectorCodes ? last - k : kVectorCodes, line);
                    }
                }
                if (!finite.all()) __atomic_store_n(&all_finite, false, __ATOMIC_RELAXED);
            });
        });
    return all_finite;
}

BNB_NAMESPACE_END

#endif
