// Grouped 4-bit products in float32, for what the tensor cores do not take: float32 activations, short blocks, odd
// lengths, memory that is not aligned, GPUs before sm_80.
//
// Bound by arithmetic. A CTA decodes tiles of an expert's weight and of its rows into shared memory; a thread sums four
// outputs of two rows.

#include <algorithm>

#include "../device.cuh"
#include "../launchers.h"
#include "../vector_io.cuh"
#include "grouped_units.cuh"

namespace bnb {

namespace {

struct GroupedSimtTuning {
    static constexpr int kTokens = 32, kOutputs = 64, kDepth = 32;
    static constexpr int kThreads = 256, kCtas = 4;
};

using Tuning = GroupedSimtTuning;

// Tiles in shared memory, what is summed over first; padded so that a column's writes meet in few banks.
struct Tiles {
    float weights[Tuning::kDepth][Tuning::kOutputs + 4];
    float tokens[Tuning::kDepth][Tuning::kTokens + 2];
    float table[16];
};

template <bool kNested>
__device__ __forceinline__ float weight_at(const GroupedGemm4bit& p, const float* table, int expert, int n, int k) {
    const int64_t i = (int64_t(expert) * p.N + n) * p.K + k;
    const uint32_t byte = __ldg(p.packed + i / 2);
    return __fmul_rn(table[i % 2 ? byte & 15 : byte >> 4], scale_of<kNested>(p.scales, i >> p.block_shift));
}

template <class T, bool kNested, bool kTransposed>
__device__ __forceinline__ void load_tiles(const GroupedGemm4bit& p, const GroupedUnit& unit, int depth, Tiles& tiles) {
    const int outputs = kTransposed ? p.K : p.N, depths = kTransposed ? p.N : p.K;
    for (int i = threadIdx.x; i < Tuning::kDepth * Tuning::kOutputs; i += Tuning::kThreads) {
        const int d = kTransposed ? i / Tuning::kOutputs : i % Tuning::kDepth;  // neighbours are neighbours in memory
        const int o = kTransposed ? i % Tuning::kOutputs : i / Tuning::kDepth;
        const int output = unit.first_output + o, at = depth + d;
        float value = 0.0f;
        if (output < outputs && at < depths) {
            value =
                weight_at<kNested>(p, tiles.table, unit.expert, kTransposed ? at : output, kTransposed ? output : at);
        }
        tiles.weights[d][o] = value;
    }
    for (int i = threadIdx.x; i < Tuning::kDepth * Tuning::kTokens; i += Tuning::kThreads) {
        const int d = i % Tuning::kDepth, row = i / Tuning::kDepth;
        const bool there = row < unit.rows && depth + d < depths;
        const T* from = static_cast<const T*>(p.A) + int64_t(unit.first_row + row) * depths + depth + d;
        tiles.tokens[d][row] = there ? to_float(*from) : 0.0f;
    }
}

template <class T, bool kNested, bool kTransposed>
__global__ void __launch_bounds__(Tuning::kThreads)
    gemm_4bit_grouped_simt_kernel(const __grid_constant__ GroupedGemm4bit p) {
    __shared__ Tiles tiles;
    const int outputs = kTransposed ? p.K : p.N, depths = kTransposed ? p.N : p.K;
    if (threadIdx.x < 16) tiles.table[threadIdx.x] = p.values[threadIdx.x];
    zero_rows_of_none<T>(p, outputs);
    const int first = threadIdx.x % 16 * 4, row = threadIdx.x / 16 * 2;  // of this thread's outputs and rows
    GroupedUnits<Tuning::kTokens, Tuning::kOutputs> units(p, outputs);
    for (GroupedUnit unit = units.next(); unit.rows > 0; unit = units.next()) {
        float sums[2][4] = {};
        for (int depth = 0; depth < depths; depth += Tuning::kDepth) {
            __syncthreads();
            load_tiles<T, kNested, kTransposed>(p, unit, depth, tiles);
            __syncthreads();
            if (row >= unit.rows) continue;
#pragma unroll 8
            for (int d = 0; d < Tuning::kDepth; ++d) {
                const float4 w = *reinterpret_cast<const float4*>(&tiles.weights[d][first]);
                const float2 a = *reinterpret_cast<const float2*>(&tiles.tokens[d][row]);
                const float weights[4] = {w.x, w.y, w.z, w.w}, tokens[2] = {a.x, a.y};
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    sums[j / 4][j % 4] = fmaf(weights[j % 4], tokens[j / 4], sums[j / 4][j % 4]);
            }
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const int output = unit.first_output + first + j % 4;
            if (row + j / 4 >= unit.rows || output >= outputs) continue;
            float sum = sums[j / 4][j % 4];
            if (p.bias != nullptr) {
                sum += to_float(static_cast<const T*>(p.bias)[int64_t(unit.expert) * outputs + output]);
            }
            static_cast<T*>(p.out)[int64_t(unit.first_row + row + j / 4) * outputs + output] = round_to<T>(sum);
        }
    }
}

}  // namespace

void gemm_4bit_grouped_simt(const GroupedGemm4bit& p, bnb_dtype dtype, bool transposed, cudaStream_t stream) {
    const int64_t units = most_grouped_units(p, Tuning::kTokens, Tuning::kOutputs, transposed ? p.K : p.N);
    const int64_t most = int64_t(current_device().multiprocessors) * Tuning::kCtas;
    require(
        units < (int64_t(1) << 31) - most, "too many rows and outputs for one launch: ", units, " blocks of threads");
    const unsigned grid = static_cast<unsigned>(std::max<int64_t>(1, std::min(units, most)));
    visit(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const bool nested = p.scales.codes != nullptr;
        const auto kernel = transposed ? (nested ? gemm_4bit_grouped_simt_kernel<T, true, true>
                                                 : gemm_4bit_grouped_simt_kernel<T, false, true>)
                                       : (nested ? gemm_4bit_grouped_simt_kernel<T, true, false>
                                                 : gemm_4bit_grouped_simt_kernel<T, false, false>);
        kernel<<<grid, Tuning::kThreads, 0, stream>>>(p);
        check_launch("gemm_4bit_grouped_simt_kernel");
    });
}

}  // namespace bnb
