// Products in tiles of bfloat16 (AMX) of what gemm_4bit_amx.inl and gemm_4bit_amx_transposed.inl decode.
//
// Values that bfloat16 does not hold are sums of two or three that it does, and products of float16 and float32 are
// those of such parts, the smallest left out: 16 and 24 bits of a value count. The instruction takes what is below
// 2^-126 for zero, parts too. A part of something infinite is NaN, so where a sum is not finite the caller starts again
// without tiles.
//
// A tile is 16 rows of 16 pairs; one instruction adds the products of two. Activations are packed into tiles once.
#pragma once

#include "gemm_4bit_pairs.inl"

#ifdef BNB_HAVE_AMX

BNB_NAMESPACE_BEGIN

constexpr int64_t kAmxDepth = 2 * kAmxRows;                    // values of a tile's row
constexpr int64_t kAmxVectorTiles = kVectorCodes / kAmxDepth;  // tiles that a vector of 16 rows' codes becomes

// Parts that values of a dtype are sums of: all that float16 has, and those that make a sum as good as one in float32.
template <class T>
constexpr int kPartsOf = 3;
template <>
constexpr int kPartsOf<Half> = 2;
template <>
constexpr int kPartsOf<BFloat16> = 1;

// Which parts of two values are multiplied, one after the other: never both parts change, so that one stays loaded.
struct PartProducts {
    int count;
    int first[6], second[6];
};
constexpr PartProducts part_products(int parts) {
    return parts == 1   ? PartProducts{1, {0}, {0}}
           : parts == 2 ? PartProducts{3, {1, 0, 0}, {0, 0, 1}}
                        : PartProducts{6, {2, 1, 1, 0, 0, 0}, {0, 0, 1, 1, 2, 0}};
}

// Rows in tiles: [piece of the depth][16 rows][part][tile of the piece]. Rows and depth are padded with zeros.
template <int kParts>
struct AmxActivations {
    const uint32_t* words;
    int64_t rows, depth, piece;  // rows and depth are multiples of a tile's

    int64_t groups() const { return rows / kAmxRows; }
    int64_t piece_at(int64_t k) const { return depth - k < piece ? depth - k : piece; }
    int64_t part_size(int64_t k) const { return piece_at(k) / kAmxDepth * kAmxTile; }
    int64_t offset(int64_t k, int64_t group) const {
        return (k * rows / PairEngine::kDepth + part_size(k) * group) * kParts;
    }
    const uint32_t* at(int64_t k, int64_t group) const { return words + offset(k, group); }
};

// One step of a product of kFirst by kSecond tiles, whose sums are registers from kSum on, of 0 to 3. Parts of an
// operand's tile are `part` words apart, and so many parts are a tile.
template <int kParts, int kFirst, int kSecond, int kSum = 0>
BNB_INLINE void add_tile_step(const uint32_t* first, const uint32_t* second, int64_t part) {
    constexpr PartProducts kProducts = part_products(kParts);
    unrolled<kProducts.count>([&](auto product) {
        constexpr int p = product.number;
        constexpr int kFirstPart = kProducts.first[p], kSecondPart = kProducts.second[p];
        constexpr bool kNewFirst = p == 0 || kProducts.first[p ? p - 1 : 0] != kFirstPart;
        constexpr bool kNewSecond = p == 0 || kProducts.second[p ? p - 1 : 0] != kSecondPart;
        static_assert(p == 0 || kNewFirst != kNewSecond);
        const uint32_t* const left = first + kFirstPart * part;
        const uint32_t* const right = second + kSecondPart * part;
        if constexpr (kFirst == 2 && kSecond == 2) {
            if constexpr (kNewFirst) amx_load<4>(left);
            if constexpr (kNewSecond) amx_load<6>(right);
            amx_add_products<0, 4, 6>();
            if constexpr (kNewSecond) amx_load<7>(right + kParts * part);
            amx_add_products<1, 4, 7>();
            if constexpr (kNewFirst) amx_load<5>(left + kParts * part);
            amx_add_products<2, 5, 6>();
            amx_add_products<3, 5, 7>();
        } else if constexpr (kFirst == 1 && kSecond == 1) {
            constexpr int kRegister = 4 + kSecondPart;
            if constexpr (kNewFirst) amx_load<7>(left);
            if constexpr (kNewSecond && p + 1 < 6) amx_load<kRegister>(right);  // the last one is the first again
            amx_add_products<kSum, 7, kRegister>();
        } else if constexpr (kSecond == 1) {
            if constexpr (kNewSecond) amx_load<7>(right);
            unrolled<kFirst>([&](auto i) {
                constexpr int kRegister = 4 + i.number % 3;
                if constexpr (kNewFirst || kFirst > 3) amx_load<kRegister>(left + i.number * kParts * part);
                amx_add_products<kSum + i.number, kRegister, 7>();
            });
        } else {
            static_assert(kFirst == 1);
            if constexpr (kNewFirst) amx_load<7>(left);
            unrolled<kSecond>([&](auto i) {
                constexpr int kRegister = 4 + i.number % 3;
                if constexpr (kNewSecond || kSecond > 3) amx_load<kRegister>(right + i.number * kParts * part);
                amx_add_products<kSum + i.number, 7, kRegister>();
            });
        }
    });
}

// sums [kFirst][kSecond] tiles, `stride` tiles from row to row, += products of tiles over `count` steps. Parts of each
// operand's rows of tiles are `count` tiles apart. fetch() is called once a step.
template <int kParts, int kFirst, int kSecond, class Fetch>
void add_tile_products(
    const uint32_t* first, const uint32_t* second, int64_t count, float* sums, int64_t stride, Fetch&& fetch) {
    const auto for_sums = [&](const auto& body) {
        unrolled<kFirst * kSecond>(
            [&](auto i) { body(i, sums + (i.number / kSecond * stride + i.number % kSecond) * kAmxTile); });
    };
    for_sums([](auto i, float* tile) { amx_load<i.number>(tile); });
    for (int64_t step = 0; step < count; ++step, first += kAmxTile, second += kAmxTile) {
        add_tile_step<kParts, kFirst, kSecond>(first, second, count * kAmxTile);
        fetch();
    }
    for_sums([](auto i, float* tile) { amx_store<i.number>(tile); });
}

// `count` values as parts, each rounded from what those before it leave, `stride` apart.
template <int kParts, class T>
BNB_INLINE void split_values(const T* source, int64_t count, BFloat16* target, int64_t stride) {
    for (int64_t i = 0; i < count; i += kWidth) {
        const int64_t rest = count - i < kWidth ? count - i : kWidth;
        F32 value = rest < kWidth ? load_partial(source + i, rest) : load(source + i);
        for (int part = 0; part < kParts; ++part) {
            BFloat16* const to = target + part * stride + i;
            if (rest < kWidth) {
                store_partial(to, value, rest);
                if (part + 1 < kParts) value = value - load_partial(to, rest);
            } else {
                store(to, value);
                if (part + 1 < kParts) value = value - load(to);
            }
        }
    }
}

// Pack rows of A [M, depth] and call body(activations, first row, rows) for up to kMost of them at a time. Depth is
// padded to whole units of kUnit values; pack(a part of 16 rows' values of a unit, target) writes its tiles.
template <int kParts, int64_t kUnit, int64_t kMost, class T, class Pack, class Body>
void for_amx_activations(
    const T* A, int64_t M, int64_t depth, int64_t piece, int32_t threads, const Pack& pack, const Body& body) {
    const int64_t passes = (M + kMost - 1) / kMost;
    const int64_t most = ((M + passes - 1) / passes + kAmxRows - 1) / kAmxRows * kAmxRows;
    const int64_t padded = (depth + kUnit - 1) / kUnit * kUnit;
    const Scratch memory(static_cast<size_t>(kParts * most * padded) * sizeof(BFloat16));
    uint32_t* const words = memory.as<uint32_t>();
    for (int64_t m = 0; m < M; m += most) {
        const int64_t rows = M - m < most ? M - m : most;
        const AmxActivations<kParts> a{words, (rows + kAmxRows - 1) / kAmxRows * kAmxRows, padded, piece};
        parallel_for(a.groups(), kTaskProducts / 8 / padded / kAmxRows + 1, threads, [&](int64_t first, int64_t last) {
            BFloat16 copies[kParts][kAmxRows][kUnit];
            const BFloat16* values[kParts][kAmxRows];
            for (int64_t g = first; g < last; ++g) {
                for (int64_t k = 0; k < padded; k += kUnit) {
                    const int64_t inside = depth - k < kUnit ? depth - k : kUnit;
                    for (int64_t i = 0; i < kAmxRows; ++i) {
                        const int64_t row = g * kAmxRows + i, count = row < rows ? inside : 0;
                        const T* const source = A + (m + row) * depth + k;
                        for (int part = 0; part < kParts; ++part) {
                            values[part][i] = copies[part][i];
                            if (count < kUnit) memset(copies[part][i], 0, sizeof(copies[part][i]));
                        }
                        if constexpr (kParts > 1) {
                            split_values<kParts>(source, count, copies[0][i], kAmxRows * kUnit);
                        } else if (count == kUnit) {
                            values[0][i] = source;
                        } else if (count > 0) {
                            memcpy(copies[0][i], source, static_cast<size_t>(count) * sizeof(BFloat16));
                        }
                    }
                    const int64_t inside_piece = k % piece, begin = k - inside_piece;
                    uint32_t* const target = words + a.offset(begin, g) + inside_piece / kAmxDepth * kAmxTile;
                    for (int part = 0; part < kParts; ++part) pack(values[part], target + part * a.part_size(begin));
                }
            }
        });
        body(a, m, rows);
    }
}

// Whether sums are finite, found out vector by vector.
template <int kParts>
class FiniteSums {
  public:
    BNB_INLINE void look_at(F32 sums) {
        if constexpr (kParts > 1) differences_ = differences_ + (sums - sums);
    }
    bool all() const { return kParts == 1 || reduce_add(differences_) == 0.0f; }

  private:
    F32 differences_ = broadcast(0.0f);  // NaN of those that are not
};

// Whether no part of a codebook's values is taken for zero or infinite, as long as absmax is not extreme.
inline bool splits(const float* code) {
    constexpr float kLeast = 0x1p-64f, kMost = 0x1p64f;
    for (int i = 0; i < 16; ++i) {
        const float magnitude = code[i] < 0.0f ? -code[i] : code[i];
        if (!(code[i] == 0.0f || (magnitude >= kLeast && magnitude <= kMost))) return false;
    }
    return true;
}

BNB_NAMESPACE_END

#endif
