// The 256 values of a map, from codes and back: the nearest entry of an ascending map, exactly, a tie to the lower.
//
// Both directions are look-ups in tables too large for a register, and a gather costs a load for every lane. So each
// instruction set does what it is good at: AVX-512 permutes whole tables, with VBMI a byte at a time
// (map_codes_vbmi.inl); the others gather (map_codes_gather.inl). A code is the number of midpoints below the value.
// Both files provide, for kChunk values at a time,
//
//   MapDecoder(map): decode(const uint8_t*) -> Chunk
//   MapEncoder(midpoints, amount), `amount` values being expected: encode<kMayBeNaN>(values, n, codes), where values(i)
//       is the chunk from i on, in [-1, 1] or NaN, which takes 255, and n counts whole chunks

BNB_NAMESPACE_BEGIN

#if defined(__AVX512VBMI__)
constexpr int kChunk = 64;
#else
constexpr int kChunk = kEncodedTogether;
#endif
constexpr int kChunkVectors = kChunk / kWidth;

struct Chunk {
    F32 part[kChunkVectors];
};

template <class T>
BNB_INLINE Chunk load_chunk(const T* source) {
    Chunk chunk;
    for (int i = 0; i < kChunkVectors; ++i) chunk.part[i] = load(source + i * kWidth);
    return chunk;
}

template <class T>
BNB_INLINE void store_chunk(T* target, const Chunk& chunk) {
    for (int i = 0; i < kChunkVectors; ++i) store(target + i * kWidth, chunk.part[i]);
}

// The first `count` < kChunk values, the others zero.
template <class T>
BNB_INLINE Chunk load_partial_chunk(const T* source, int64_t count) {
    T padded[kChunk] = {};
    memcpy(padded, source, static_cast<size_t>(count) * sizeof(T));
    return load_chunk(padded);
}

template <class T>
BNB_INLINE void store_partial_chunk(T* target, const Chunk& chunk, int64_t count) {
    T padded[kChunk];
    store_chunk(padded, chunk);
    memcpy(target, padded, static_cast<size_t>(count) * sizeof(T));
}

template <class Body>
BNB_INLINE Chunk each_part(const Chunk& chunk, const Body& body) {
    Chunk result;
    for (int i = 0; i < kChunkVectors; ++i) result.part[i] = body(chunk.part[i]);
    return result;
}

// The midpoints between neighbours, ascending; nothing lies above the last, so that every code has one.
struct Midpoints {
    float value[256];

    explicit Midpoints(const float* map) {
        for (int i = 0; i < 255; ++i) value[i] = midpoint(map[i], map[i + 1]);
        value[255] = bits_float(0x7f800000u);
    }
};

// Finds the code of a value in any map, in eight steps; level k of the tree stands from 2^k on.
class MidpointTree {
  public:
    explicit MidpointTree(const Midpoints& midpoints) {
        for (int level = 0; level < 8; ++level) {
            for (int i = 0; i < 1 << level; ++i) {
                nodes_[(1 << level) + i] = midpoints.value[((2 * i + 1) << (7 - level)) - 1];
            }
        }
    }

    BNB_INLINE I32 encode(F32 x) const { return descend_from<0>(broadcast(int32_t(0)), x); }

  private:
    template <int level>
    BNB_INLINE I32 descend_from(I32 index, F32 x) const {
        if constexpr (level < 8) {
            const F32 threshold = lookup_many<(1 << level)>(nodes_ + (1 << level), index);
            return descend_from<level + 1>(descend(index, x, threshold), x);
        } else {
            return index;
        }
    }

    float nodes_[256 + 8] = {};  // permutations read a register, however small the table
};

BNB_NAMESPACE_END

#if defined(__AVX512VBMI__)
#include "map_codes_vbmi.inl"
#else
#include "map_codes_gather.inl"
#endif
