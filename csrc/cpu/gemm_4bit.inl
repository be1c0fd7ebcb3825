// Activations times a packed 4-bit weight, accumulated in float32, and times its transpose.
//
// Half a byte is read for a weight; each output is summed by one thread in one order. Few activations stream the weight
// through registers (stream_rows); more decode it panel by panel into the cache, once for up to kMaxRows of them
// (multiply_tile). Activations are packed once into the order the kernels read them in. Products in pairs of bfloat16
// have kernels of their own where blocks allow (gemm_4bit_pairs.inl), and so have tiles of them (gemm_4bit_amx.inl) and
// integers (gemm_4bit_integers.inl).
#pragma once

#include "gemm_4bit_activations.inl"
#include "gemm_4bit_amx.inl"
#include "gemm_4bit_amx_transposed.inl"
#include "gemm_4bit_integers.inl"
#include "gemm_4bit_pairs.inl"
#include "gemm_4bit_panel.inl"

BNB_NAMESPACE_BEGIN

constexpr int64_t kMaxRows = 384;  // activations that share one decoded panel: they stay in the second-level cache

template <class Engine, class Panel, int kRows = kTileRows>
BNB_INLINE auto tile_kernel(int64_t rows) {
    if constexpr (kRows == 1) {
        return &multiply_tile<Engine, Panel, 1>;
    } else {
        return rows == kRows ? &multiply_tile<Engine, Panel, kRows> : tile_kernel<Engine, Panel, kRows - 1>(rows);
    }
}

// Words of an activation row at a time, so that all rows stay in the first-level cache; or in the second, where the
// weight rows that share them follow each other and what a piece costs beside its products weighs more.
constexpr int64_t stream_steps(int rows) {
    if (kRegistersAreFew) return rows == 1 ? 8192 : 4096;
    return rows <= 4 ? 2048 * (4 / rows) : 1024;
}

// Segments that a vector of codes is a multiple of, or the other way round.
BNB_INLINE bool can_stream(int64_t segment) { return segment >= 32 && (segment & (segment - 1)) == 0; }

// Columns [first, last) of a product with kRows activation rows, which pack_vectors has packed.
template <class Engine, int kRows, int kScales, class T>
void stream_range(
    const WordPanels<Engine>& source, const uint32_t* activations, const Output<T>& output, int64_t first,
    int64_t last) {
    constexpr int kWeights = stream_weights(kRows);
    const int64_t chunk = stream_steps(kRows) * Engine::kDepth, segments = source.segments();
    const int64_t columns = (last - first + kWeights - 1) / kWeights * kWeights;
    const bool direct = source.segment == source.blocksize;
    const int64_t sums_size = columns * (kRows + 1), spread_size = direct ? 0 : columns * segments;
    const int64_t expanded_size = source.expanded_scales(columns);
    const Scratch memory(static_cast<size_t>(sums_size + spread_size + expanded_size) * sizeof(float));
    float* const sums = memory.as<float>();
    float* const spread = sums + sums_size;
    memset(sums, 0, static_cast<size_t>(columns * kRows) * sizeof(float));
    const float* const blocks = source.block_scales(first, last - first, spread + spread_size);
    for (int64_t row = first; row < last && !direct; ++row) {
        source.segment_scales(blocks, first, row, 0, spread + (row - first) * segments, 1);
    }
    const float* const scales = direct ? blocks : spread;
    for (int64_t k = 0; k < source.depth; k += chunk) {
        const int64_t codes = source.depth - k < chunk ? source.depth - k : chunk;
        const int64_t vectors = codes / kVectorCodes, tail = codes % kVectorCodes;
        const uint32_t* const chunk_activations = activations + k / Engine::kDepth * kRows;
        for (int64_t column = first; column < last; column += kWeights) {
            WeightRows<kWeights> rows;
            rows.next = NextCodes::of(
                source.row_at(column + kWeights) + k / 2, kWeights, source.depth / 2, codes == source.depth);
            const int64_t count = last - column < kWeights ? last - column : kWeights;
            for (int64_t w = 0; w < kWeights; ++w) {
                const int64_t row = column + (w < count ? w : count - 1);
                rows.packed[w] = source.row_at(row) + k / 2;
                rows.scales[w] = scales + (row - first) * segments + k / source.segment;
            }
            float* const target = sums + (column - first) * kRows;
            const int64_t segment = source.segment / kVectorCodes;
            stream_rows<Engine, kRows, kScales>(
                rows, source.table, segment ? segment : 1, vectors, chunk_activations, target);
            if (tail == 0) continue;
            uint8_t codes_left[kWeights][kVectorBytes] = {};
            float scales_left[kWeights][4] = {};
            for (int w = 0; w < kWeights; ++w) {
                memcpy(codes_left[w], rows.packed[w] + vectors * kVectorBytes, static_cast<size_t>(tail / 2));
                const int64_t done = vectors * kVectorCodes / source.segment;
                for (int64_t s = 0; s < (tail + source.segment - 1) / source.segment; ++s) {
                    scales_left[w][s] = rows.scales[w][done + s];
                }
                rows.packed[w] = codes_left[w];
                rows.scales[w] = scales_left[w];
            }
            stream_rows<Engine, kRows, kScales>(
                rows, source.table, 1, 1, chunk_activations + vectors * (kVectorCodes / Engine::kDepth) * kRows,
                target);
        }
    }
    float* const row = sums + columns * kRows;
    for (int64_t r = 0; r < kRows; ++r) {
        for (int64_t c = 0; c < last - first; ++c) row[c] = sums[c * kRows + r];
        output.write(r, first, last - first, row);
    }
}

// One panel times all activations, added to sums [rows][kPanelColumns].
template <class Engine, class Panel>
void multiply_panel(
    const Activations& a, const Panel& panel, int64_t step, int64_t steps, int64_t segment_steps, const float* scales,
    float* sums) {
    for (int64_t r = 0; r < a.rows; r += a.group) {
        const int64_t rows = a.rows - r < a.group ? a.rows - r : a.group;
        tile_kernel<Engine, Panel>(rows)(
            a.at(r) + step * rows, panel, step, steps, segment_steps, scales, sums + r * kPanelColumns);
    }
}

// Columns [first, last) of a product. The panels take turns at some steps, whose activations stay in the cache.
template <class Engine, class Source, class T>
void multiply_range(const Source& source, const Activations& a, const Output<T>& output, int64_t first, int64_t last) {
    const int64_t segment_steps = source.segment / Engine::kDepth + source.segment % Engine::kDepth;
    const int64_t panels = (last - first + kPanelColumns - 1) / kPanelColumns;
    const int64_t panel_size = kPanelSteps * kPanelColumns, scales_size = source.segments() * kPanelColumns;
    const int64_t sums_size = a.rows * kPanelColumns;
    const Scratch memory(
        static_cast<size_t>(panel_size + panels * (scales_size + sums_size) + source.expanded_scales()) *
        sizeof(float));
    uint32_t* const words = memory.as<uint32_t>();
    float* const scales = memory.as<float>() + panel_size;
    float* const sums = scales + panels * scales_size;
    float* const expanded = sums + panels * sums_size;
    memset(words, 0, static_cast<size_t>(panel_size + panels * (scales_size + sums_size)) * sizeof(float));
    const auto count_at = [&](int64_t column) { return last - column < kPanelColumns ? last - column : kPanelColumns; };
    for (int64_t i = 0; i < panels; ++i) {
        const int64_t column = first + i * kPanelColumns, count = count_at(column);
        for (int64_t c = 0; c < count; c += kWidth) {
            const int64_t rows = count - c < kWidth ? count - c : kWidth;
            source.load_scales(column + c, rows, scales + i * scales_size + c, kPanelColumns, expanded);
        }
    }
    for (int64_t step = 0; step < a.steps; step += kPanelSteps) {
        const int64_t steps = a.steps - step < kPanelSteps ? a.steps - step : kPanelSteps;
        for (int64_t i = 0; i < panels; ++i) {
            const int64_t column = first + i * kPanelColumns;
            const auto panel = source.load_panel(column, count_at(column), step, steps, words);
            multiply_panel<Engine>(
                a, panel, step, steps, segment_steps, scales + i * scales_size, sums + i * sums_size);
        }
    }
    for (int64_t i = 0; i < panels; ++i) {
        const int64_t column = first + i * kPanelColumns;
        for (int64_t r = 0; r < a.rows; ++r) {
            output.write(r, column, count_at(column), sums + i * sums_size + r * kPanelColumns);
        }
    }
}

// Pack the activations and call body(activations, output, first, last) for ranges of columns, kMaxRows rows at a time.
// Where the columns of a weight row lie together, `wide` ranges use whole cache lines of it.
template <class Engine, class T, class Body>
void for_activations(
    const GemmProblem<T>& p, int64_t columns, int64_t depth, bool wide, int32_t threads, const Body& body) {
    const int64_t most = p.M < kMaxRows ? p.M : kMaxRows;
    const int64_t steps = (depth + Engine::kDepth - 1) / Engine::kDepth;
    const Scratch memory(static_cast<size_t>(most * steps) * sizeof(uint32_t));
    uint32_t* const words = memory.as<uint32_t>();
    for (int64_t m = 0; m < p.M; m += most) {
        const int64_t rows = p.M - m < most ? p.M - m : most, groups = (rows + kTileRows - 1) / kTileRows;
        const Activations a{words, rows, steps, (rows + groups - 1) / groups};
        const int64_t pack_grain = (kTaskProducts / 8 / (depth + 1) / a.group + 1) * a.group;
        parallel_for(rows, pack_grain, threads, [&](int64_t first, int64_t last) {
            pack_groups<Engine>(p.A + m * depth, a, words, depth, first, last);
        });
        const Output<T> output{p.out + m * columns, p.bias, columns};
        const int64_t panels =
            wide || rows > 4 * kTileRows ? 4 : kTaskProducts / (depth + 1) / rows / kPanelColumns + 1;
        parallel_for(columns, panels * kPanelColumns, threads, [&](int64_t first, int64_t last) {
            body(a, output, first, last);
        });
    }
}

template <class Engine, class T>
void stream(const GemmProblem<T>& p, const WordPanels<Engine>& shared, int32_t threads) {
    const int64_t vectors = (p.K + kVectorCodes - 1) / kVectorCodes;
    const Scratch memory(static_cast<size_t>(p.M * vectors * kVectorCodes / Engine::kDepth) * sizeof(uint32_t));
    uint32_t* const words = memory.as<uint32_t>();
    pack_vectors<Engine>(p.A, p.M, p.K, words);
    const Output<T> output{p.out, p.bias, p.N};
    const int64_t grain = (kTaskProducts / (p.K + 1) / kPanelColumns + 1) * kPanelColumns;
    parallel_for(p.N, grain, threads, [&](int64_t first, int64_t last) {
        const WordPanels<Engine> source = shared;
        with_constant<kStreamRows>(p.M, [&](auto rows) {
            if (source.segment >= kVectorCodes)
                return stream_range<Engine, rows.number, 1>(source, words, output, first, last);
            if constexpr (kVectorCodes > 32) {
                if (source.segment == kVectorCodes / 2)
                    return stream_range<Engine, rows.number, 2>(source, words, output, first, last);
            }
            if constexpr (kVectorCodes > 64) stream_range<Engine, rows.number, 4>(source, words, output, first, last);
        });
    });
}

template <class Engine, class T>
WordPanels<Engine> word_panels(const GemmProblem<T>& p, int64_t segment) {
    return {p.packed, p.scales, typename Engine::Table(p.code), p.N, p.K, p.blocksize, segment};
}

template <class T>
void gemm_4bit(const GemmProblem<T>& p, int32_t threads) {
    if (p.M == 0 || p.N == 0) return;
    using Engine = typename EngineOf<T>::type;
    const int64_t segment = greatest_common_divisor(p.K, p.blocksize);
#if defined(BNB_HAVE_AMX)
    const bool tiled = segment % kScaledCodes == 0 && p.K > 0 && p.M >= least_amx_rows(kPartsOf<T>);
    if (tiled && multiply_amx(p, threads)) return;
#elif defined(BNB_HAVE_PAIRS)
    if constexpr (Engine::kDepth == 2) {
        if (segment % kScaledCodes == 0 && p.K > 0) return multiply_pairs(p, threads);
    }
#endif
    if (segment % kWordCodes == 0) {
        if (p.M <= kStreamRows && can_stream(segment)) {
            using Streaming = typename StreamEngineOf<T>::type;
            const WordPanels<Streaming> source = word_panels<Streaming>(p, segment);
#ifdef BNB_HAVE_BYTE_TABLES
            if constexpr (sizeof(T) == 2) {
                if (stream_integers(p, source, threads)) return;
            }
#endif
            return stream(p, source, threads);
        }
        const auto multiply = [&](const auto& source) {
            for_activations<Engine>(
                p, p.N, p.K, false, threads,
                [&](const Activations& a, const Output<T>& output, int64_t first, int64_t last) {
                    multiply_range<Engine>(source, a, output, first, last);
                });
        };
        const WordPanels<Engine> decoded = word_panels<Engine>(p, segment);
        if constexpr (kPacksPanels<Engine>) {
            multiply(PackedPanels<Engine>{decoded});
        } else {
            multiply(decoded);
        }
    } else {
        const ExpandedScales scales(p, threads);
        for_activations<Engine>(
            p, p.N, p.K, false, threads,
            [&](const Activations& a, const Output<T>& output, int64_t first, int64_t last) {
                const DecodedWeight weight{p.packed, scales.absmax, Table16(p.code), p.N, p.K, p.blocksize};
                multiply_range<Engine>(RowPanels<Engine>{weight, p.N, p.K, p.K}, a, output, first, last);
            });
    }
}

// out [M, K] = A [M, N] times the weight [N, K]: the gradient of the activations.
template <class T>
void gemm_4bit_transposed(const GemmProblem<T>& p, int32_t threads) {
    if (p.M == 0 || p.K == 0) return;
    using Engine = typename EngineOf<T>::type;
#ifdef BNB_HAVE_AMX
    const bool has_blocks = greatest_common_divisor(p.K, p.blocksize) % kScaledCodes == 0 && p.N > 0;
    const bool tiled = has_blocks && p.M >= least_transposed_rows(kPartsOf<T>);
    if (tiled && multiply_amx_transposed(p, threads)) return;
#endif
    const ExpandedScales scales(p, threads);
    for_activations<Engine>(
        p, p.K, p.N, true, threads, [&](const Activations& a, const Output<T>& output, int64_t first, int64_t last) {
            const DecodedWeight weight{p.packed, scales.absmax, Table16(p.code), p.N, p.K, p.blocksize};
            multiply_range<Engine>(ColumnPanels<Engine>{weight, p.K, p.N, p.N}, a, output, first, last);
        });
}

BNB_NAMESPACE_END
