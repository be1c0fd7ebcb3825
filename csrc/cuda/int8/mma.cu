// The int8 product for any problem on any GPU, made for few tokens: weights pass once for each 16 of them.
//
// A CTA computes 16 weight rows; its warps take turns along k and add up at the end, exactly, as sums are integers. The
// order of k does not matter to a sum either, so a lane loads 16 consecutive bytes of a row, of weights and of tokens
// alike, and hands its first four of each to one instruction, the next four to the next: nothing passes through shared
// memory. Rows that are not whole vectors of 16 bytes, or not aligned to them, are loaded byte by byte.

#include "../device.cuh"
#include "problem.h"
#include "scaling.cuh"

namespace bnb {
namespace {

constexpr int kRows = 16, kTokens = 16;  // of a CTA; an instruction takes 8 tokens
constexpr int kWarps = 8;
constexpr int kBytes = 16;          // of a lane's load
constexpr int kDepth = 4 * kBytes;  // of k, that a warp's load covers
constexpr int kAhead = 4;           // loads of each row in flight

struct Vector {
    uint32_t words[kBytes / 4];
};

template <bool kVectors>
__device__ __forceinline__ Vector load_row(const int8_t* row, int64_t k, int64_t K, bool exists) {
    Vector v = {};
    if (!exists || k >= K) return v;
    if constexpr (kVectors) {
        const uint4 four = __ldg(reinterpret_cast<const uint4*>(row + k));
        v = {{four.x, four.y, four.z, four.w}};
    } else {
#pragma unroll
        for (int i = 0; i < kBytes; ++i) {
            if (k + i < K) v.words[i / 4] |= uint32_t(uint8_t(__ldg(row + k + i))) << 8 * (i % 4);
        }
    }
    return v;
}

// d (16 rows x 8 tokens) is increased by the product of 16 x 32 values and 32 x 8. Lane (g, t) has, of rows g and g + 8
// and of token g, the values 4 t to 4 t + 3 of both halves.
__device__ __forceinline__ void multiply_add(
    int (&d)[4], uint32_t upper0, uint32_t lower0, uint32_t upper1, uint32_t lower1, uint32_t token0, uint32_t token1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(upper0), "r"(lower0), "r"(upper1), "r"(lower1), "r"(token0), "r"(token1));
#else
    const auto multiply_8_rows = [](int& d0, int& d1, uint32_t a, uint32_t b) {
        asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1},{%2},{%3},{%0,%1};"
            : "+r"(d0), "+r"(d1)
            : "r"(a), "r"(b));
    };
    multiply_8_rows(d[0], d[1], upper0, token0);
    multiply_8_rows(d[0], d[1], upper1, token1);
    multiply_8_rows(d[2], d[3], lower0, token0);
    multiply_8_rows(d[2], d[3], lower1, token1);
#endif
}

template <bool kVectors, int kGroups>
__device__ __forceinline__ void multiply(const Int8Product& p, int64_t row, int64_t token, int (&sums)[kGroups][4]) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int8_t* const upper = p.B + (row + g) * p.K;
    const int8_t* const lower = upper + 8 * p.K;
    const int8_t* const tokens = p.A + (token + g) * p.K;
    constexpr int kStep = kWarps * kAhead * kDepth;
    for (int64_t start = int64_t(threadIdx.x / 32) * kAhead * kDepth; start < p.K; start += kStep) {
        Vector a[kAhead][2], b[kAhead][kGroups];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int64_t k = start + i * kDepth + t * kBytes;
            a[i][0] = load_row<kVectors>(upper, k, p.K, row + g < p.N);
            a[i][1] = load_row<kVectors>(lower, k, p.K, row + g + 8 < p.N);
#pragma unroll
            for (int j = 0; j < kGroups; ++j) {
                b[i][j] = load_row<kVectors>(tokens + 8 * j * p.K, k, p.K, token + g + 8 * j < p.M);
            }
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
#pragma unroll
            for (int w = 0; w < kBytes / 4; w += 2) {
#pragma unroll
                for (int j = 0; j < kGroups; ++j) {
                    multiply_add(
                        sums[j], a[i][0].words[w], a[i][1].words[w], a[i][0].words[w + 1], a[i][1].words[w + 1],
                        b[i][j].words[w], b[i][j].words[w + 1]);
                }
            }
        }
    }
}

__device__ __forceinline__ void store(const Int8Product& p, int64_t row, int64_t token, int sum) {
    const int64_t i = token * p.N + row;
    if (p.row_stats == nullptr) {
        static_cast<int*>(p.out)[i] = sum;
        return;
    }
    float value = scaled(sum, row_scale(__ldg(p.row_stats + token)), __ldg(p.col_stats + row));
    if (p.bias) value = __fadd_rn(value, bias_value(p.bias, p.bias_dtype, row));
    if (p.dtype == BNB_DTYPE_FLOAT32) {
        static_cast<float*>(p.out)[i] = value;
    } else if (p.dtype == BNB_DTYPE_FLOAT16) {
        static_cast<Half*>(p.out)[i] = round_to<Half>(value);
    } else {
        static_cast<BFloat16*>(p.out)[i] = round_to<BFloat16>(value);
    }
}

template <bool kVectors, int kGroups>
__global__ void __launch_bounds__(kWarps * 32) int8_matmul_mma_kernel(const Int8Product p, int64_t row_tiles) {
    const int64_t row = blockIdx.x % row_tiles * kRows, token = blockIdx.x / row_tiles * (8 * kGroups);
    int sums[kGroups][4] = {};
    multiply<kVectors, kGroups>(p, row, token, sums);

    __shared__ int parts[kWarps][kGroups * 4][32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kGroups * 4; ++i) parts[warp][i][lane] = sums[i / 4][i % 4];
    __syncthreads();
    if (warp >= kGroups * 4) return;
    int sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += parts[w][warp][lane];
    // Register i of lane (g, t): row g, or g + 8 from register 2 on, and token 2 t or 2 t + 1 of the group.
    const int64_t n = row + lane / 4 + warp % 4 / 2 * 8, m = token + warp / 4 * 8 + lane % 4 * 2 + warp % 2;
    if (n < p.N && m < p.M) store(p, n, m, sum);
}

template <bool kVectors, int kGroups>
void launch(const Int8Product& p, cudaStream_t stream) {
    static_assert(kGroups * 4 <= kWarps, "a warp for each register");
    const int64_t row_tiles = (p.N + kRows - 1) / kRows, token_tiles = (p.M + 8 * kGroups - 1) / (8 * kGroups);
    int8_matmul_mma_kernel<kVectors, kGroups>
        <<<grid_size(row_tiles * token_tiles), kWarps * 32, 0, stream>>>(p, row_tiles);
    check_launch("int8_matmul_mma_kernel");
}

}  // namespace

void int8_matmul_mma(const Int8Product& p, cudaStream_t stream) {
    const auto aligned = [](const int8_t* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kBytes == 0; };
    const bool vectors = p.K % kBytes == 0 && aligned(p.A) && aligned(p.B);
    if (vectors && p.M <= 8) return launch<true, 1>(p, stream);
    if (vectors) return launch<true, kTokens / 8>(p, stream);
    launch<false, kTokens / 8>(p, stream);
}

}  // namespace bnb
