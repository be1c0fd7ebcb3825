// 8-bit block-wise quantization with an arbitrary ascending map, and its inverse.
//
// One byte and sizeof(T) bytes move per value; the look-ups of map_codes.inl take about as long as memory. Blocks run
// over the flattened tensor; the block size is any positive number.

#include "map_codes.inl"

BNB_NAMESPACE_BEGIN

constexpr int64_t kBlockwiseGrain = 1 << 14;

// Largest magnitude of n values; NaN if there is one.
template <class T>
float largest_magnitude(const T* values, int64_t n) {
    I32 best = broadcast(int32_t(0));
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) best = max(best, magnitude_bits(load(values + i)));
    if (i < n) best = max(best, magnitude_bits(load_partial(values + i, n - i)));
    return bits_float(static_cast<uint32_t>(reduce_max(best)));
}

// Encode one block; scale(x) divides a vector by the block's magnitude.
template <class T, class Scale>
BNB_INLINE void encode_8bit_block(
    const MapEncoder& encoder, const T* values, uint8_t* codes, int64_t n, const Scale& scale) {
    const F32 low = broadcast(-1.0f), high = broadcast(1.0f);
    const auto scaled = [&](F32 x) { return clamp(scale(x), low, high); };
    const int64_t whole = n / kChunk * kChunk;
    encoder.encode<true>([&](int64_t i) { return each_part(load_chunk(values + i), scaled); }, whole, codes);
    if (whole < n) {
        const Chunk last = each_part(load_partial_chunk(values + whole, n - whole), scaled);
        uint8_t padded[kChunk];
        encoder.encode<true>([&](int64_t) { return last; }, kChunk, padded);
        memcpy(codes + whole, padded, static_cast<size_t>(n - whole));
    }
}

template <class T>
void quantize_blockwise(
    const float* code, const T* values, uint8_t* codes, float* absmax, int64_t n, int64_t blocksize, int32_t threads) {
    const MapEncoder encoder(Midpoints(code), n);
    const int64_t blocks = n / blocksize + (n % blocksize != 0);
    parallel_for(blocks, kBlockwiseGrain / blocksize + 1, threads, [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; ++block) {
            const int64_t begin = block * blocksize;
            const bool whole = n - begin >= blocksize;
            const int64_t count = whole ? blocksize : n - begin;
            const float largest = largest_magnitude(values + begin, count);
            const float floored = floored_absmax(largest);
            absmax[block] = whole ? largest : floored;
            if (whole) {
                const F32 factor = broadcast(1.0f / floored);
                encode_8bit_block(encoder, values + begin, codes + begin, count, [&](F32 x) { return x * factor; });
            } else {
                const F32 divisor = broadcast(floored);
                encode_8bit_block(encoder, values + begin, codes + begin, count, [&](F32 x) { return x / divisor; });
            }
        }
    });
}

template <class T>
void dequantize_blockwise(
    const float* code, const uint8_t* codes, const float* absmax, T* values, int64_t n, int64_t blocksize,
    int32_t threads) {
    const MapDecoder shared(code);
    parallel_for(n, kBlockwiseGrain, threads, [&](int64_t begin, int64_t end) {
        const MapDecoder& decoder = shared;  // locals, because stores might change what is captured
        const uint8_t* const from = codes;
        T* const to = values;
        for (int64_t i = begin; i < end;) {
            const int64_t block = i / blocksize;
            const int64_t stop = end - block * blocksize < blocksize ? end : (block + 1) * blocksize;
            const F32 scale = broadcast(absmax[block]);
            const auto scaled = [&](F32 x) { return x * scale; };
#ifdef BNB_HAVE_SCALED_CODES
            if constexpr (kScalesCodes<T>) {
                if (decoder.may_scale(absmax[block])) {
                    for (; i + kCodesScaled <= stop; i += kCodesScaled) decoder.scale(from + i, scale, to + i);
                }
            }
#endif
            for (; i + kChunk <= stop; i += kChunk) {
                store_chunk(to + i, each_part(decoder.decode(from + i), scaled));
            }
            if (i < stop) {
                uint8_t padded[kChunk] = {};
                memcpy(padded, from + i, static_cast<size_t>(stop - i));
                store_partial_chunk(to + i, each_part(decoder.decode(padded), scaled), stop - i);
                i = stop;
            }
        }
    });
}

BNB_NAMESPACE_END
