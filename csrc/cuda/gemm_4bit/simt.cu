// 4-bit weights times a few tokens, one at a time in float32: for what the tensor cores do not take.
//
// That is float32 activations, blocks of 32, rows of odd length, memory that is not aligned, and GPUs before sm_80. A
// warp owns a row of the weight and up to four tokens; a lane takes eight neighbouring k. Memory bound for one token
// of an aligned weight, bound by arithmetic beyond that.

#include "../device.cuh"
#include "../launchers.h"
#include "../vector_io.cuh"

namespace bnb {

namespace {

struct GemmSimtTuning {
    static constexpr int kWarps = 8;   // of a CTA, a row each
    static constexpr int kTokens = 4;  // of a warp
    static constexpr int kValues = 8;  // of a lane at once
};

// Codes e .. e + 7 of the flattened weight, the first in the lowest four bits; those past `count` are zero.
template <bool kAligned>
__device__ __forceinline__ uint32_t load_codes(const uint8_t* packed, int64_t e, int count) {
    if constexpr (kAligned) {
        const uint32_t bytes = __ldg(reinterpret_cast<const uint32_t*>(packed + e / 2));
        return (bytes & 0x0f0f0f0fu) << 4 | (bytes >> 4 & 0x0f0f0f0fu);
    } else {
        uint32_t codes = 0;
        for (int j = 0; j < count; ++j) {
            const uint32_t byte = __ldg(packed + (e + j) / 2);
            codes |= ((e + j) % 2 ? byte & 15 : byte >> 4) << (4 * j);
        }
        return codes;
    }
}

// kAligned: eight neighbours never leave a row or a block, and lie aligned.
template <class T, bool kNested, bool kAligned>
__global__ void __launch_bounds__(GemmSimtTuning::kWarps * 32) gemm_4bit_simt_kernel(const Gemm4bit p) {
    using Tuning = GemmSimtTuning;
    constexpr int kValues = Tuning::kValues;
    __shared__ float table[16];
    if (threadIdx.x < 16) table[threadIdx.x] = p.code != nullptr ? __ldg(p.code + threadIdx.x) : p.values[threadIdx.x];
    __syncthreads();

    const int row = blockIdx.x * Tuning::kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_token = blockIdx.y * Tuning::kTokens;
    if (row >= p.N) return;
    float sums[Tuning::kTokens] = {};
    for (int k = lane * kValues; k < p.K; k += 32 * kValues) {
        const int64_t e = int64_t(row) * p.K + k;
        const int count = min(kValues, p.K - k);
        const uint32_t codes = load_codes<kAligned>(p.packed, e, count);
        float weight[kValues];
        float scale = scale_of<kNested>(p.scales, e >> p.block_shift);
#pragma unroll
        for (int j = 0; j < kValues; ++j) {
            if (!kAligned && j < count) scale = scale_of<kNested>(p.scales, (e + j) >> p.block_shift);
            weight[j] = __fmul_rn(table[codes >> (4 * j) & 15], scale);
        }
#pragma unroll
        for (int m = 0; m < Tuning::kTokens; ++m) {
            if (first_token + m >= p.M) break;
            const T* tokens = static_cast<const T*>(p.A) + int64_t(first_token + m) * p.K + k;
            Pack<T, kValues> held;
            if constexpr (kAligned) {
                held = load_pack<T, kValues>(tokens);
            } else {
#pragma unroll
                for (int j = 0; j < kValues; ++j) held.values[j] = j < count ? tokens[j] : from_float<T>(0.0f);
            }
#pragma unroll
            for (int j = 0; j < kValues; ++j) {
                if (kAligned || j < count) sums[m] = fmaf(weight[j], to_float(held.values[j]), sums[m]);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < Tuning::kTokens; ++m) {
        float sum = sums[m];
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
        if (lane != 0 || first_token + m >= p.M) continue;
        if (p.bias != nullptr) sum += to_float(static_cast<const T*>(p.bias)[row]);
        static_cast<T*>(p.out)[int64_t(first_token + m) * p.N + row] = round_to<T>(sum);
    }
}

template <class T, bool kNested>
void launch(const Gemm4bit& problem, cudaStream_t stream) {
    using Tuning = GemmSimtTuning;
    const bool aligned = problem.K % Tuning::kValues == 0 && problem.block_shift >= 3 &&
                         is_aligned<uint8_t, 4>(problem.packed) &&
                         is_aligned<T, Tuning::kValues>(static_cast<const T*>(problem.A));
    const dim3 grid(
        (problem.N + Tuning::kWarps - 1) / Tuning::kWarps, (problem.M + Tuning::kTokens - 1) / Tuning::kTokens);
    require(grid.y < 65536, "too many tokens for this kernel: ", problem.M);
    const auto kernel = aligned ? gemm_4bit_simt_kernel<T, kNested, true> : gemm_4bit_simt_kernel<T, kNested, false>;
    kernel<<<grid, Tuning::kWarps * 32, 0, stream>>>(problem);
    check_launch("gemm_4bit_simt_kernel");
}

}  // namespace

void gemm_4bit_simt(const Gemm4bit& problem, bnb_dtype dtype, cudaStream_t stream) {
    visit(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if (problem.scales.codes != nullptr) {
            launch<T, true>(problem, stream);
        } else {
            launch<T, false>(problem, stream);
        }
    });
}

}  // namespace bnb
