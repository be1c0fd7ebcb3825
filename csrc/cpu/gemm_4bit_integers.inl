// Streaming in integers of 16 bits, for one or two rows of 16-bit activations and blocks of whole vectors.
//
// Where a code is looked up byte by byte, half as many instructions make integers of it as make floats, and one
// multiplies two of them. Codes are multiples of 2^-14 of the largest and activations of the largest of the 64 that
// meet a vector of codes, each rounded less than bfloat16 rounds most, and the sum of a vector is exact. Where the
// largest is much more than most, what rounding leaves of them is multiplied too.
#pragma once

#include "gemm_4bit_activations.inl"
#include "gemm_4bit_panel.inl"

#ifdef BNB_HAVE_BYTE_TABLES

BNB_NAMESPACE_BEGIN

constexpr int32_t kCodeUnits = (1 << 14) - 1;  // of the largest code: eight products of such integers fit 32 bits
constexpr float kLeadingUnits = 1 << 13;       // of the power of two that the largest activation begins with
constexpr float kRestUnits = 1 << 14;          // of one of those
constexpr int kIntegerRows = 2;                // activations from more on are multiplied as fast in float32
constexpr int kIntegerSteps = 4;               // of a vector of codes
constexpr int kIntegerWeights = 4;             // weight rows that are read together
constexpr int64_t kIntegerDepth = 8192;        // codes times rows at a time: half the first-level cache

// What rounding leaves of a vector's activations counts if most of them are smaller than the largest by more than this;
// else it is less than what the dtype itself rounds off an output. A mean would miss that where two are large.
template <class T>
constexpr float kWide = 8.0f;
template <>
constexpr float kWide<BFloat16> = 64.0f;

// If the largest value is between these, its unit neither underflows nor overflows.
constexpr float kLeastLargest = 0x1p-40f, kMostLargest = 0x1p80f;

// A codebook in units of its largest value.
struct IntegerCode {
    int16_t values[16];
    float unit;
    bool fits = false;

    explicit IntegerCode(const float* code) {
        float largest = 0.0f;
        for (int i = 0; i < 16; ++i) {
            const float magnitude = code[i] < 0.0f ? -code[i] : code[i];
            if (!(magnitude <= kMostLargest)) return;
            if (magnitude > largest) largest = magnitude;
        }
        if (largest < kLeastLargest) return;
        unit = largest / kCodeUnits;
        for (int i = 0; i < 16; ++i) {
            const float units = code[i] / largest * kCodeUnits;
            values[i] = static_cast<int16_t>(static_cast<int32_t>(units + (units < 0.0f ? -0.5f : 0.5f)));
        }
        fits = true;
    }
};

// Activations of a vector of codes, row by row: integers in the order of its steps, what they leave, and their unit.
struct IntegerVector {
    alignas(32) int16_t values[kVectorCodes];
    alignas(32) int16_t rest[kVectorCodes];
    float unit;
    bool is_wide;
};

// Integers of a vector in the order of its steps.
BNB_INLINE void order_integers(const int32_t* integers, int16_t* target) {
    for (int step = 0; step < kIntegerSteps; ++step) {
        for (int i = 0; i < 2 * kWidth; ++i) {
            target[step * 2 * kWidth + i] = static_cast<int16_t>(integers[integer_step_code(step, i)]);
        }
    }
}

// Returns false if values are not finite, or too large or small for integers.
template <class T>
bool pack_integers(const T* source, float code_unit, IntegerVector& target) {
    static_assert(kVectorCodes == kIntegerSteps * 2 * kWidth);
    F32 values[kWordCodes];
    I32 largest_bits = broadcast(int32_t(0));
    for (int i = 0; i < kWordCodes; ++i) {
        values[i] = load(source + i * kWidth);
        largest_bits = max(largest_bits, magnitude_bits(values[i]));
    }
    const auto bits_of_largest = static_cast<uint32_t>(reduce_max(largest_bits));
    const float largest = bits_float(bits_of_largest), power = bits_float(bits_of_largest & 0x7f800000u);
    if (largest == 0.0f) {
        memset(&target, 0, sizeof(target));
        return true;
    }
    if (!(largest >= kLeastLargest && largest <= kMostLargest)) return false;
    target.unit = power / kLeadingUnits * code_unit;
    const F32 scale = broadcast(kLeadingUnits / power);
    int32_t integers[kVectorCodes], rest[kVectorCodes];
    for (int i = 0; i < kWordCodes; ++i) {
        const F32 units = values[i] * scale;
        const I32 integer = round_to_int(units);
        store_words(integers + i * kWidth, integer);
        store_words(rest + i * kWidth, round_to_int((units - to_floats(integer)) * broadcast(kRestUnits)));
    }
    const auto small = static_cast<int32_t>(kLeadingUnits / power * largest / kWide<T>);
    int32_t rounded = 0;
    for (int i = 0; i < kVectorCodes; ++i) {
        rounded += (rest[i] != 0) & (integers[i] < small) & (integers[i] > -small);
    }
    target.is_wide = rounded > kVectorCodes / 2;
    order_integers(integers, target.values);
    if (target.is_wide) order_integers(rest, target.rest);
    return true;
}

BNB_INLINE F32 integer_sum(const I32 (&weight)[kIntegerSteps], const int16_t* activations) {
    I32 sum = integer_products(weight[0], load_words(activations));
    unrolled<kIntegerSteps - 1>([&](auto i) BNB_INLINE_BODY {
        constexpr int kStep = i.number + 1;
        sum = sum + integer_products(weight[kStep], load_words(activations + kStep * 2 * kWidth));
    });
    return to_floats(sum);
}

// sums [kIntegerWeights][kRows] += products over some vectors, whose activations are [vectors][kRows]. A segment is so
// many vectors.
template <int kRows>
void stream_integer_rows(
    const WeightRows<kIntegerWeights>& rows, const IntegerTable& shared, int64_t segment, int64_t vectors,
    const IntegerVector* activations, float* sums) {
    const IntegerTable table = shared;
    const WeightRows<kIntegerWeights> row = rows;
    F32 total[kIntegerWeights * kRows];
    unrolled<kIntegerWeights * kRows>([&](auto i) { total[i.number] = broadcast(0.0f); });
    int64_t index = 0, left = segment;
    for (int64_t vector = 0; vector < vectors; ++vector, activations += kRows) {
        unrolled<kIntegerWeights>([&](auto w) BNB_INLINE_BODY {
            const I32 words = load_words(row.packed[w.number] + vector * kVectorBytes);
            BNB_PREFETCH(row.next.at(w.number, vector));
            I32 weight[kIntegerSteps];
            unrolled<kIntegerSteps>(
                [&](auto step) BNB_INLINE_BODY { weight[step.number] = lookup_integers<step.number>(table, words); });
            const F32 scale = broadcast(row.scales[w.number][index]);
            unrolled<kRows>([&](auto r) BNB_INLINE_BODY {
                const IntegerVector& a = activations[r.number];
                F32& target = total[w.number * kRows + r.number];
                const F32 unit = broadcast(a.unit) * scale;
                target = fma(integer_sum(weight, a.values), unit, target);
                if (a.is_wide) {
                    target = fma(integer_sum(weight, a.rest), unit * broadcast(1.0f / kRestUnits), target);
                }
            });
        });
        if (--left == 0) left = segment, ++index;
    }
    unrolled<kIntegerWeights * kRows>([&](auto i) { sums[i.number] += reduce_add(total[i.number]); });
}

// Columns [first, last).
template <int kRows, class Engine, class T>
void stream_integer_range(
    const WordPanels<Engine>& source, const IntegerTable& table, const IntegerVector* activations,
    const Output<T>& output, int64_t first, int64_t last) {
    const int64_t segments = source.segments(), segment = source.segment / kVectorCodes;
    const int64_t columns = (last - first + kIntegerWeights - 1) / kIntegerWeights * kIntegerWeights;
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
    const int64_t most = kIntegerDepth / kRows / source.segment * source.segment;
    const int64_t chunk = most ? most : source.segment;
    for (int64_t k = 0; k < source.depth; k += chunk) {
        const int64_t codes = source.depth - k < chunk ? source.depth - k : chunk;
        for (int64_t column = first; column < last; column += kIntegerWeights) {
            WeightRows<kIntegerWeights> rows;
            rows.next = NextCodes::of(
                source.row_at(column + kIntegerWeights) + k / 2, kIntegerWeights, source.depth / 2,
                codes == source.depth);
            for (int64_t w = 0; w < kIntegerWeights; ++w) {
                const int64_t row = column + w < last ? column + w : last - 1;
                rows.packed[w] = source.row_at(row) + k / 2;
                rows.scales[w] = scales + (row - first) * segments + k / source.segment;
            }
            stream_integer_rows<kRows>(
                rows, table, segment, codes / kVectorCodes, activations + k / kVectorCodes * kRows,
                sums + (column - first) * kRows);
        }
    }
    float* const row = sums + columns * kRows;
    for (int64_t r = 0; r < kRows; ++r) {
        for (int64_t c = 0; c < last - first; ++c) row[c] = sums[c * kRows + r];
        output.write(r, first, last - first, row);
    }
}

// Returns false where integers do not fit the activations or the codebook.
template <class Engine, class T>
bool stream_integers(const GemmProblem<T>& p, const WordPanels<Engine>& source, int32_t threads) {
    const IntegerCode code(p.code);
    if (p.M > kIntegerRows || source.segment % kVectorCodes != 0 || !code.fits) return false;
    const int64_t vectors = p.K / kVectorCodes;
    const Scratch memory(static_cast<size_t>(p.M * vectors) * sizeof(IntegerVector));
    IntegerVector* const activations = memory.as<IntegerVector>();
    for (int64_t i = 0; i < p.M * vectors; ++i) {
        const T* const values = p.A + i % p.M * p.K + i / p.M * kVectorCodes;
        if (!pack_integers(values, code.unit, activations[i])) return false;
    }
    const IntegerTable table(code.values);
    const Output<T> output{p.out, p.bias, p.N};
    const int64_t grain = (kTaskProducts / (p.K + 1) / kPanelColumns + 1) * kPanelColumns;
    parallel_for(p.N, grain, threads, [&](int64_t first, int64_t last) {
        with_constant<kIntegerRows>(p.M, [&](auto rows) {
            stream_integer_range<rows.number>(source, table, activations, output, first, last);
        });
    });
    return true;
}

BNB_NAMESPACE_END

#endif
