// 4-bit quantization: the largest magnitude of each block, then two codes per byte, the first in the high nibble.
//
// Memory bound: sizeof(T) bytes in, half a byte and 4 / blocksize bytes of absmax out per value. Encoding is one
// look-up: even buckets over [-1, 1] (over magnitudes for FP4) are narrower than the closest thresholds, so a bucket
// holds at most one. The lanes of a warp hold the table, a bucket each, and ask one another by shuffle, which unlike
// shared memory knows no bank conflicts.

#include <cuda_fp16.h>

#include "../common/codebooks.h"
#include "device.cuh"
#include "launchers.h"
#include "scaled_blocks.cuh"

namespace bnb {
namespace {

constexpr int kWarpsPerCta = 8;

struct Grid {
    float scale, shift;  // shift is whole: the kernel adds it to a number whose last bit is worth one
};
constexpr Grid kNf4Grid{15.49f, 16.0f};  // [-1, 1] -> buckets 1..31
constexpr Grid kFp4Grid{15.3f, 0.0f};    // magnitudes -> buckets 0..15

// A value's rank among the thresholds is `base` of its bucket, plus one if it is above the bucket's threshold.
struct Buckets {
    float threshold[kLanes];
    int base[kLanes];
};

constexpr double place_in(const Grid& grid, float threshold) {
    return double(threshold) * grid.scale + grid.shift + 0.5;
}

constexpr Buckets make_buckets(const Grid& grid, const float* thresholds, int count) {
    Buckets buckets{};
    for (int lane = 0; lane < kLanes; ++lane) {
        buckets.threshold[lane] = 3.0f;  // above every scaled value
        for (int i = 0; i < count; ++i) {
            const int home = static_cast<int>(place_in(grid, thresholds[i]));
            if (home < lane) buckets.base[lane] = i + 1;
            if (home == lane) buckets.threshold[lane] = thresholds[i];
        }
    }
    return buckets;
}

// No two thresholds share a bucket, and none lies within rounding of a bucket's edge.
constexpr bool separates(const Grid& grid, const float* thresholds, int count) {
    for (int i = 0; i < count; ++i) {
        const double place = place_in(grid, thresholds[i]);
        const double part = place - static_cast<int>(place);
        if (part < 1e-4 || part > 1 - 1e-4) return false;
        if (i > 0 && static_cast<int>(place_in(grid, thresholds[i - 1])) == static_cast<int>(place)) return false;
    }
    return true;
}

static_assert(separates(kNf4Grid, kNf4.thresholds, 15), "NF4 needs another grid");
static_assert(separates(kFp4Grid, kFp4.thresholds + 8, 7), "FP4 needs another grid");
__constant__ Buckets kNf4Buckets = make_buckets(kNf4Grid, kNf4.thresholds, 15);
__constant__ Buckets kFp4Buckets = make_buckets(kFp4Grid, kFp4.thresholds + 8, 7);

// One lane's share of the bucket table and the encoder that asks its neighbours for theirs. All lanes of the warp
// must call encode together.
template <bnb_format kFormat>
class Encoder {
  public:
    __device__ explicit Encoder(int lane) {
        const Buckets& buckets = kFormat == BNB_FORMAT_NF4 ? kNf4Buckets : kFp4Buckets;
        threshold_ = buckets.threshold[lane];
        base_ = buckets.base[lane];
    }

    // Put a scaled value's code at bit `at` of a word. NaN takes the highest bucket.
    template <int kAt>
    __device__ __forceinline__ void encode(float scaled, uint32_t& word) const {
        if constexpr (kFormat == BNB_FORMAT_NF4) {
            // NaN's bits choose the last bucket, past the highest threshold.
            const int bucket = bucket_of_grid(kNf4Grid, scaled);
            word += static_cast<uint32_t>(__shfl_sync(~0u, base_, bucket)) << kAt;
            if (scaled > __shfl_sync(~0u, threshold_, bucket)) word += 1u << kAt;
        } else {
            word |= encode_fp4(scaled) << kAt;
        }
    }

  private:
    __device__ static int bucket_of_grid(const Grid grid, float x) {
        constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the rounded integer
        return __float_as_int(fmaf(x, grid.scale, grid.shift + kMagic));
    }

    // Above a threshold means strictly above for positive values, hence at or above in magnitude for negative ones:
    // one step towards larger magnitudes moves the comparison. The two zeros are told apart by the sign of what
    // rounds to them, the other way round.
    __device__ __forceinline__ uint32_t encode_fp4(float scaled) const {
        const float magnitude = fminf(fabsf(scaled), 1.0f);
        const bool negative = scaled < 0.0f;
        const float compared = negative ? __uint_as_float(__float_as_uint(magnitude) + 1) : magnitude;
        const int bucket = bucket_of_grid(kFp4Grid, magnitude);
        uint32_t rank = __shfl_sync(~0u, base_, bucket);
        if (compared > __shfl_sync(~0u, threshold_, bucket)) ++rank;
        const uint32_t code = (0x32547610u >> (4 * rank)) & 7u;
        const bool sign = rank == 0 ? scaled > 0.0f : negative;
        return code | (sign ? 8u : 0u);
    }

    float threshold_;
    int base_;
};

// The whole blocks of a tensor; `whole` is a multiple of kBlock.
template <class T, bnb_format kFormat, int kBlock>
__global__ void __launch_bounds__(kWarpsPerCta* kLanes) quantize_4bit_kernel(
    const T* __restrict__ values, uint8_t* __restrict__ packed, float* __restrict__ absmax, int64_t whole,
    bool aligned) {
    const Encoder<kFormat> encoder(threadIdx.x % kLanes);
    const int64_t warp = int64_t(blockIdx.x) * kWarpsPerCta + threadIdx.x / kLanes;
    const int64_t start = warp * BlockShare<kBlock>::kValues;
    scale_blocks<kBlock>(values, absmax, start, whole, aligned, [&](int64_t at, const float (&scaled)[kChunk]) {
        uint32_t word = 0;
        encoder.template encode<4>(scaled[0], word);
        encoder.template encode<0>(scaled[1], word);
        encoder.template encode<12>(scaled[2], word);
        encoder.template encode<8>(scaled[3], word);
        encoder.template encode<20>(scaled[4], word);
        encoder.template encode<16>(scaled[5], word);
        encoder.template encode<28>(scaled[6], word);
        encoder.template encode<24>(scaled[7], word);
        if (at >= 0) __stcs(reinterpret_cast<uint32_t*>(packed + at / 2), word);
    });
}

// The short block at the end, by one warp.
template <class T, bnb_format kFormat>
__global__ void quantize_4bit_tail_kernel(
    const T* __restrict__ values, uint8_t* __restrict__ packed, float* __restrict__ absmax, int count) {
    const int lane = threadIdx.x;
    const Encoder<kFormat> encoder(lane);
    const float scale = scale_of_tail(values, count);
    if (lane == 0) *absmax = scale;
    for (int start = 0; start < count; start += 2 * kLanes) {  // as many rounds for every lane: they encode together
        const int i = start + 2 * lane;
        uint32_t byte = 0;
        encoder.template encode<4>(i < count ? __fdiv_rn(to_float(values[i]), scale) : 0.0f, byte);
        encoder.template encode<0>(i + 1 < count ? __fdiv_rn(to_float(values[i + 1]), scale) : 0.0f, byte);
        if (i < count) packed[i / 2] = static_cast<uint8_t>(byte);
    }
}

template <class T, bnb_format kFormat>
void launch(const T* values, uint8_t* packed, float* absmax, int64_t n, int64_t blocksize, cudaStream_t stream) {
    const int64_t whole = n - n % blocksize;
    const bool known = visit_blocksize(blocksize, [&](auto block) {
        if (whole == 0) return;
        constexpr int64_t kPerCta = int64_t(kWarpsPerCta) * BlockShare<block()>::kValues;
        const int64_t ctas = (whole + kPerCta - 1) / kPerCta;
        const bool aligned = reinterpret_cast<uintptr_t>(values) % 16 == 0;
        quantize_4bit_kernel<T, kFormat, block()>
            <<<grid_size(ctas), kWarpsPerCta * kLanes, 0, stream>>>(values, packed, absmax, whole, aligned);
        check_launch("quantize_4bit");
    });
    require(known, "blocksize must be a power of two from 32 to 4096, got ", blocksize);
    if (whole < n) {
        quantize_4bit_tail_kernel<T, kFormat><<<1, kLanes, 0, stream>>>(
            values + whole, packed + whole / 2, absmax + whole / blocksize, static_cast<int>(n - whole));
        check_launch("quantize_4bit");
    }
}

}  // namespace

void quantize_4bit(
    const void* values, bnb_dtype dtype, bnb_format format, uint8_t* packed, float* absmax, int64_t n,
    int64_t blocksize, cudaStream_t stream) {
    visit(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const T* typed = static_cast<const T*>(values);
        if (format == BNB_FORMAT_NF4) {
            launch<T, BNB_FORMAT_NF4>(typed, packed, absmax, n, blocksize, stream);
        } else {
            launch<T, BNB_FORMAT_FP4>(typed, packed, absmax, n, blocksize, stream);
        }
    });
}

}  // namespace bnb
