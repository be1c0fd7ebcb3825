// 4-bit quantization: the largest magnitude of each block, then two codes per byte, the first in the high nibble.
//
// Memory bound: sizeof(T) bytes in, half a byte and 4 / blocksize bytes of absmax out per value, if encoding costs no
// more than a dozen instructions. Both formats are denser near zero, so a parabola through zero on either side guesses
// a value's rank among the thresholds to within one, and a comparison with one threshold settles it. The lanes of a
// warp hold the thresholds, one each, and ask one another by shuffle, which unlike shared memory knows no bank
// conflicts.

#include <cuda_fp16.h>

#include "../common/codebooks.h"
#include "device.cuh"
#include "launchers.h"
#include "scaled_blocks.cuh"

namespace bnb {
namespace {

constexpr int kWarpsPerCta = 4;
constexpr float kHighest = 1.0f;  // has the highest code, which is NaN's

// A guess is kZero + ceil(x * (kSlope - kCurve * |x|)): -1..15 in [-1, 1], and exact about the sign of x, as the
// rounding is upwards and the product fused.
constexpr float kSlope = 13.4f, kCurve = 6.1f;
constexpr int kZero = 6;

// A threshold's own guess must be its index: then values between two thresholds guess the index of either.
constexpr bool guesses(const float* thresholds, int count, int skipped) {
    for (int i = 0; i < count; ++i) {
        const double x = thresholds[i < skipped ? i : i + 1];
        const double guess = kZero + x * (kSlope - kCurve * (x < 0 ? -x : x));
        if (guess < i - 1 + 1e-3 || guess > i - 1e-3) return false;
    }
    return kSlope > 2 * kCurve;  // ascending up to one
}

// By guess. Of FP4's thresholds the one at zero, between its zeros of either sign, is left out.
struct Thresholds {
    float of[kLanes];
};

constexpr Thresholds make_thresholds(const FourBitFormat& format, int count, int skipped) {
    Thresholds thresholds{};
    for (int lane = 0; lane < kLanes; ++lane) thresholds.of[lane] = 3.0f;  // above every scaled value
    for (int i = 0; i < count; ++i) thresholds.of[i] = format.thresholds[i < skipped ? i : i + 1];
    thresholds.of[kLanes - 1] = -3.0f;  // the guess -1
    return thresholds;
}

static_assert(guesses(kNf4.thresholds, 15, 15), "NF4 needs another parabola");
static_assert(guesses(kFp4.thresholds, 14, 7) && kFp4.thresholds[7] == 0.0f, "FP4 needs another parabola");
__device__ const Thresholds kNf4Thresholds = make_thresholds(kNf4, 15, 15);
__device__ const Thresholds kFp4Thresholds = make_thresholds(kFp4, 14, 7);

// Eight codes in the making, a nibble each.
struct Codes {
    uint32_t guesses, above;
};

// One lane's threshold and the encoder that asks its neighbours for theirs. All lanes of the warp must call put
// together.
template <bnb_format kFormat>
class Encoder {
  public:
    __device__ explicit Encoder(int lane)
        : threshold_(__ldg((kFormat == BNB_FORMAT_NF4 ? kNf4Thresholds : kFp4Thresholds).of + lane)) {}

    __device__ static Codes start() { return {-kMagicBits * 0x11111111u, 0}; }

    // Put the code of a scaled value, not NaN, at bit kAt.
    template <int kAt>
    __device__ __forceinline__ void put(float scaled, Codes& codes) const {
        const float factor = fmaf(fabsf(scaled), -kCurve, kSlope);
        const uint32_t guess = __float_as_uint(__fmaf_ru(scaled, factor, kMagic + kZero));
        codes.guesses += guess << kAt;
        if (scaled > __shfl_sync(~0u, threshold_, guess)) codes.above += 1u << kAt;
    }

    __device__ static uint32_t finish(const Codes& codes) {
        if constexpr (kFormat == BNB_FORMAT_NF4) {
            return codes.guesses + codes.above;
        } else {
            return fp4_codes(codes);
        }
    }

  private:
    static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: a sum's low bits are the rounded integer
    static constexpr uint32_t kMagicBits = 0x4b400000u;

    // Nibble by nibble: rank 0..15 to FP4's code, which is a sign and the index of a magnitude. Ranks 7 and 8 are the
    // zeros, of values that are not above zero and of those that are; the latter's code has the sign bit.
    __device__ static uint32_t fp4_codes(const Codes& codes) {
        static_assert(
            kFp4.codes[7] == 0 && kFp4.codes[8] == 8 && kFp4.codes[9] == 1 && kFp4.codes[10] == 6 &&
            kFp4.codes[11] == 7 && kFp4.codes[12] == 4 && kFp4.codes[14] == 2 && kFp4.codes[15] == 3);
        const uint32_t positive = (codes.guesses + 0x11111111u) & 0x88888888u;
        const uint32_t rank = codes.guesses + codes.above + (positive >> 3);
        const uint32_t mirror = 0x77777777u - positive + (positive >> 3);  // 7 for ranks below 8
        const uint32_t magnitude = (rank ^ mirror) & 0x77777777u;
        const uint32_t sign = (positive ^ (magnitude + 0x77777777u)) & 0x88888888u;
        return (magnitude ^ ((magnitude & 0x22222222u) << 1)) | sign;
    }

    float threshold_;
};

// The whole blocks of a tensor; `whole` is a multiple of kBlock.
template <class T, bnb_format kFormat, int kBlock>
__global__ void __launch_bounds__(kWarpsPerCta* kLanes) quantize_4bit_kernel(
    const T* __restrict__ values, uint8_t* __restrict__ packed, float* __restrict__ absmax, int64_t whole,
    bool aligned) {
    const Encoder<kFormat> encoder(threadIdx.x % kLanes);
    const int64_t warp = int64_t(blockIdx.x) * kWarpsPerCta + threadIdx.x / kLanes;
    const int64_t start = warp * BlockShare<kBlock>::kValues;
    uint8_t* const target = packed + (start + threadIdx.x % kLanes * kChunk) / 2;
    scale_blocks<kBlock>(
        values, absmax, start, whole, aligned, kHighest, [&](int at, const float (&scaled)[kChunk], bool exists) {
            Codes codes = encoder.start();
            encoder.template put<4>(scaled[0], codes);
            encoder.template put<0>(scaled[1], codes);
            encoder.template put<12>(scaled[2], codes);
            encoder.template put<8>(scaled[3], codes);
            encoder.template put<20>(scaled[4], codes);
            encoder.template put<16>(scaled[5], codes);
            encoder.template put<28>(scaled[6], codes);
            encoder.template put<24>(scaled[7], codes);
            if (exists) __stcs(reinterpret_cast<uint32_t*>(target + at / 2), encoder.finish(codes));
        });
}

// Blocks of `count` values by a warp each, a byte at a time: the short one at the end, or whole ones whose codes are
// not aligned.
template <class T, bnb_format kFormat>
__global__ void quantize_4bit_lone_kernel(
    const T* __restrict__ values, uint8_t* __restrict__ packed, float* __restrict__ absmax, int count, bool whole) {
    const int lane = threadIdx.x;
    const int64_t first = int64_t(blockIdx.x) * count;
    const Encoder<kFormat> encoder(lane);
    const LoneBlock<T> block(values + first, count, whole, absmax + blockIdx.x);
    for (int start = 0; start < count; start += 2 * kLanes) {  // as many rounds for every lane: they encode together
        const int i = start + 2 * lane;
        Codes codes = encoder.start();
        encoder.template put<4>(block.scaled(i, kHighest), codes);
        encoder.template put<0>(block.scaled(i + 1, kHighest), codes);
        if (i < count) packed[(first + i) / 2] = static_cast<uint8_t>(encoder.finish(codes));
    }
}

template <class T, bnb_format kFormat>
void launch(const T* values, uint8_t* packed, float* absmax, int64_t n, int64_t blocksize, cudaStream_t stream) {
    const int64_t whole = n - n % blocksize;
    const bool known = visit_blocksize(blocksize, [&](auto block) {
        if (whole == 0) return;
        if (reinterpret_cast<uintptr_t>(packed) % sizeof(uint32_t) != 0) {
            quantize_4bit_lone_kernel<T, kFormat>
                <<<grid_size(whole / blocksize), kLanes, 0, stream>>>(values, packed, absmax, block(), true);
            return check_launch("quantize_4bit");
        }
        constexpr int64_t kPerCta = int64_t(kWarpsPerCta) * BlockShare<block()>::kValues;
        const int64_t ctas = (whole + kPerCta - 1) / kPerCta;
        const bool aligned = reinterpret_cast<uintptr_t>(values) % 16 == 0;
        quantize_4bit_kernel<T, kFormat, block()>
            <<<grid_size(ctas), kWarpsPerCta * kLanes, 0, stream>>>(values, packed, absmax, whole, aligned);
        check_launch("quantize_4bit");
    });
    require(known, "blocksize must be a power of two from 32 to 4096, got ", blocksize);
    if (whole < n) {
        quantize_4bit_lone_kernel<T, kFormat><<<1, kLanes, 0, stream>>>(
            values + whole, packed + whole / 2, absmax + whole / blocksize, static_cast<int>(n - whole), false);
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
