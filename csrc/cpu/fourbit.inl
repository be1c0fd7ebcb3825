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

    // The buckets of some vectors, level by level: each is a long chain of operations, and few schedulers hold several.
    template <int kVectors>
    BNB_INLINE void buckets(const F32 (&scaled)[kVectors], I32 (&index)[kVectors]) const {
        for (int v = 0; v < kVectors; ++v) index[v] = descend(broadcast(int32_t(0)), scaled[v], root_);
        for (int v = 0; v < kVectors; ++v) index[v] = descend(index[v], scaled[v], lookup(level1_, index[v]));
        for (int v = 0; v < kVectors; ++v) index[v] = descend(index[v], scaled[v], lookup(level2_, index[v]));
        for (int v = 0; v < kVectors; ++v) index[v] = descend(index[v], scaled[v], lookup(level3_, index[v]));
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
    Table4 level1_, level2_;
    Table8 level3_;
    Table16 codes_;
    bool sorted_ = true;
    int32_t zero_code_ = 0;
};

// Encode one block; scale(x) brings a vector of values into [-1, 1].
template <bool kSorted, class T, class Scale>
BNB_INLINE void encode_4bit_block(
    const FourBitEncoder& encoder, const T* values, int64_t n, uint8_t* packed, const Scale& scale) {
    const auto encode = [&](const auto& x, auto& codes) {
        encoder.buckets(x, codes);
        if constexpr (!kSorted) {
            for (I32& code : codes) code = encoder.code(code);
        }
    };
    int64_t i = 0;
    for (constexpr int64_t kStep = kPackedTogether * kWidth; i + kStep <= n; i += kStep) {
        F32 x[kPackedTogether];
        I32 codes[kPackedTogether];
        for (int v = 0; v < kPackedTogether; ++v) x[v] = scale(load(values + i + v * kWidth));
        encode(x, codes);
        pack_4bit(packed + i / 2, codes);
    }
    const auto encode_one = [&](F32 x) {
        const F32 one[1] = {scale(x)};
        I32 codes[1];
        encode(one, codes);
        return codes[0];
    };
    for (; i + kWidth <= n; i += kWidth) pack_4bit(packed + i / 2, encode_one(load(values + i)));
    if (i == n) return;
    uint8_t padded[kWidth / 2];
    pack_4bit(padded, encode_one(load_partial(values + i, n - i)));
    const int64_t bytes = (n - i + 1) / 2;
    if (n % 2) padded[bytes - 1] = static_cast<uint8_t>((padded[bytes - 1] & 0xf0) | encoder.zero_code());
    memcpy(packed + i / 2, padded, static_cast<size_t>(bytes));
}

// Values whose blocks' magnitudes are found before the first block is encoded: one after the other, each would wait for
// the reciprocal of its own. They stay in the first-level cache.
constexpr int64_t kScaledTogether = 2048;

template <bool kSorted, class T>
void quantize_4bit_blocks(
    const FourBitEncoder& shared, const T* values, uint8_t* packed, float* absmax, int64_t n, int64_t blocksize,
    int64_t first, int64_t last) {
    const FourBitEncoder encoder = shared;  // a local copy may live in registers
    float floored[kScaledTogether];
    const int64_t together = blocksize < kScaledTogether ? kScaledTogether / blocksize : 1;
    for (int64_t group = first; group < last; group += together) {
        const int64_t stop = last - group < together ? last : group + together;
        const auto each_block = [&](const auto& body) {
            for (int64_t block = group; block < stop; ++block) {
                const int64_t begin = block * blocksize;
                const bool whole = n - begin >= blocksize;
                body(block, values + begin, packed + begin / 2, whole ? blocksize : n - begin, whole);
            }
        };
        each_block([&](int64_t block, const T* from, uint8_t*, int64_t count, bool whole) {
            const float largest = largest_magnitude(from, count);
            floored[block - group] = floored_absmax(largest);
            absmax[block] = whole ? largest : floored[block - group];
        });
        each_block([&](int64_t block, const T* from, uint8_t* to, int64_t count, bool whole) {
            constexpr int64_t kLine = 64 / sizeof(T);  // fetch what the next group begins with
            for (int64_t i = 0; i < count; i += kLine) BNB_PREFETCH(from + together * blocksize + i);
            if (whole) {
                const F32 factor = broadcast(1.0f / floored[block - group]);
                encode_4bit_block<kSorted>(encoder, from, count, to, [&](F32 x) { return x * factor; });
            } else {
                const F32 divisor = broadcast(floored[block - group]);
                encode_4bit_block<kSorted>(encoder, from, count, to, [&](F32 x) { return x / divisor; });
            }
        });
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
#ifdef BNB_HAVE_HALF_TABLES
        // A block has sixteen results; where they are short, looking them up is faster than computing each anew.
        if constexpr (sizeof(T) == 2) {
            if (stop - i >= HalfTable<T>::kCodes) {
                const HalfTable<T> results(table, scale);
                for (; i + results.kCodes <= stop; i += results.kCodes) results.look_up(packed + i / 2, origin + i);
            }
        }
#endif
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
