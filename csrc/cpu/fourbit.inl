// 4-bit quantization and its inverse: two codes per byte, high nibble first, blocks over the flattened tensor.
//
// Memory bound when vectorised: sizeof(T) + half a byte per value. Encoding reads a block twice, the second time
// from the first-level cache, and finds each code by four levels of a binary search whose nodes sit in registers.

BNB_NAMESPACE_BEGIN

// Values per task; a task is long enough to pay for waking a thread.
constexpr int64_t kFourBitGrain = 1 << 15;

// The thresholds as a search tree (level k has 2^k nodes), and the bucket -> code table.
class FourBitEncoder {
  public:
    explicit FourBitEncoder(const FourBitFormat& format) : FourBitEncoder(Nodes(format), format.thresholds[7]) {
        sorted_ = true;
        for (int i = 0; i < 16; ++i) sorted_ = sorted_ && format.codes[i] == i;
        zero_code_ = format.codes[bucket_of(0.0f, format.thresholds, 15)];
    }

    BNB_INLINE I32 bucket(F32 scaled) const {
        I32 index = descend(broadcast(int32_t(0)), scaled, root_);
        index = descend(index, scaled, lookup(level1_, index));
        index = descend(index, scaled, lookup(level2_, index));
        return descend(index, scaled, lookup(level3_, index));
    }

    BNB_INLINE I32 code(I32 bucket) const { return bits(lookup(codes_, bucket)); }

    bool sorted() const { return sorted_; }           // codes equal buckets
    int32_t zero_code() const { return zero_code_; }  // pads the last byte of an odd count

  private:
    struct Nodes {
        float level[3][8] = {};
        float codes[16];

        explicit Nodes(const FourBitFormat& format) {
            for (int depth = 1; depth <= 3; ++depth) {
                for (int i = 0; i < 1 << depth; ++i) {
                    level[depth - 1][i] = format.thresholds[((2 * i + 1) << (3 - depth)) - 1];
                }
            }
            for (int i = 0; i < 16; ++i) codes[i] = bits_float(format.codes[i]);
        }
    };

    FourBitEncoder(const Nodes& nodes, float root)
        : root_(broadcast(root)),
          level1_(nodes.level[0]),
          level2_(nodes.level[1]),
          level3_(nodes.level[2]),
          codes_(nodes.codes) {}

    F32 root_;
    Table8 level1_, level2_, level3_;
    Table16 codes_;
    bool sorted_ = true;
    int32_t zero_code_ = 0;
};

// Encode one block; scale(x) brings a vector of values into [-1, 1].
template <bool kSorted, class T, class Scale>
BNB_INLINE void encode_4bit_block(
    const FourBitEncoder& encoder, const T* values, int64_t n, uint8_t* packed, const Scale& scale) {
    const auto encode = [&](F32 x) {
        const I32 bucket = encoder.bucket(scale(x));
        return kSorted ? bucket : encoder.code(bucket);
    };
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) pack_4bit(packed + i / 2, encode(load(values + i)));
    if (i == n) return;
    uint8_t padded[kWidth / 2];
    pack_4bit(padded, encode(load_partial(values + i, n - i)));
    const int64_t bytes = (n - i + 1) / 2;
    if (n % 2) padded[bytes - 1] = static_cast<uint8_t>((padded[bytes - 1] & 0xf0) | encoder.zero_code());
    memcpy(packed + i / 2, padded, static_cast<size_t>(bytes));
}

template <bool kSorted, class T>
void quantize_4bit_blocks(
    const FourBitEncoder& shared, const T* values, uint8_t* packed, float* absmax, int64_t n, int64_t blocksize,
    int64_t first, int64_t last) {
    const FourBitEncoder encoder = shared;  // a local copy may live in registers
    for (int64_t block = first; block < last; ++block) {
        const int64_t begin = block * blocksize;
        const bool whole = n - begin >= blocksize;
        const int64_t count = whole ? blocksize : n - begin;
        const float largest = largest_magnitude(values + begin, count);
        const float floored = floored_absmax(largest);
        absmax[block] = whole ? largest : floored;
        if (whole) {
            const F32 factor = broadcast(1.0f / floored);
            encode_4bit_block<kSorted>(
                encoder, values + begin, count, packed + begin / 2, [&](F32 x) { return x * factor; });
        } else {
            const F32 divisor = broadcast(floored);
            encode_4bit_block<kSorted>(
                encoder, values + begin, count, packed + begin / 2, [&](F32 x) { return x / divisor; });
        }
    }
}

template <class T>
void quantize_4bit(
    const T* values, const FourBitFormat& format, uint8_t* packed, float* absmax, int64_t n, int64_t blocksize,
    int32_t threads) {
    const FourBitEncoder encoder(format);
    const int64_t blocks = n / blocksize + (n % blocksize != 0);
    const int64_t grain = kFourBitGrain / blocksize + 1;
    parallel_for(blocks, grain, threads, [&](int64_t first, int64_t last) {
        const auto run = encoder.sorted() ? quantize_4bit_blocks<true, T> : quantize_4bit_blocks<false, T>;
        run(encoder, values, packed, absmax, n, blocksize, first, last);
    });
}

// Decode elements [begin, end) of the flattened tensor; `values` points to element `begin`.
template <class T>
BNB_INLINE void dequantize_4bit_range(
    const uint8_t* packed, const float* absmax, const Table16& table, T* values, int64_t begin, int64_t end,
    int64_t blocksize) {
    T* const origin = values - begin;
    int64_t i = begin;
    if (i % 2 && i < end) {  // starts in the middle of a byte
        const I32 code = broadcast(int32_t(packed[i / 2] & 15));
        store_partial(origin + i, lookup(table, code) * broadcast(absmax[i / blocksize]), 1);
        ++i;
    }
    while (i < end) {
        const int64_t block = i / blocksize;
        const int64_t stop = end - block * blocksize < blocksize ? end : (block + 1) * blocksize;
        const F32 scale = broadcast(absmax[block]);
        for (; i + kWidth <= stop; i += kWidth) {
            store(origin + i, lookup(table, unpack_4bit(packed + i / 2)) * scale);
        }
        if (i < stop) {
            uint8_t padded[kWidth / 2] = {};
            memcpy(padded, packed + i / 2, static_cast<size_t>((stop - i + 1) / 2));
            store_partial(origin + i, lookup(table, unpack_4bit(padded)) * scale, stop - i);
            i = stop;
        }
    }
}

template <class T>
void dequantize_4bit(
    const uint8_t* packed, const float* absmax, const FourBitFormat& format, T* values, int64_t n, int64_t blocksize,
    int32_t threads) {
    const Table16 table(format.values);
    parallel_for(n, kFourBitGrain, threads, [&](int64_t begin, int64_t end) {
        const Table16 local = table;
        dequantize_4bit_range(packed, absmax, local, values + begin, begin, end, blocksize);
    });
}

BNB_NAMESPACE_END
