// Launching the tensor-core kernel for few tokens in the shape that the plan chose.

#include <algorithm>

#include "../launchers.h"
#include "launch.cuh"
#include "mma.cuh"
#include "plan.h"

namespace bnb {

namespace {

template <class T, bool kNested, int kTuning>
void launch(const Gemm4bit& problem, const Device& device, cudaStream_t stream) {
    constexpr MmaTuning t = kMmaTunings[kTuning];
    static std::atomic<uint64_t> allowed{0};
    const int tiles = (problem.N + kMmaRows - 1) / kMmaRows;
    const int ctas = std::min(tiles, device.multiprocessors);
    MmaSplit split;
    split.tiles_each = tiles / ctas;
    split.more = tiles % ctas;
    const int most_tiles = split.tiles_each + (split.more > 0);
    const int chunks = (most_tiles + t.row_tiles - 1) / t.row_tiles;
    split.chunk_tiles = (most_tiles + chunks - 1) / chunks;
    split.groups = (problem.K + kMmaK - 1) / kMmaK;
    split.passes = (split.groups + t.warps - 1) / t.warps;
    const Launch how = {"gemm_4bit_mma_kernel", dim3(ctas), t.warps * 32, MmaShared(t, kNested).bytes(), allowed};
    launch_early(gemm_4bit_mma_kernel<T, kNested, kTuning>, how, device, stream, problem, split);
}

}  // namespace

void gemm_4bit_mma(const Gemm4bit& problem, bnb_dtype dtype, int tuning, cudaStream_t stream) {
    const Device device = current_device();
    require(tuning >= 0 && tuning < kMmaTuningCount, "no such tuning: ", tuning);
    const int tokens = 8 * kMmaTunings[tuning].token_tiles;
    visit_kernel<kMmaTuningCount>(problem, dtype, tuning, [&](auto value, auto nested, auto number) {
        using T = decltype(value);
        Gemm4bit part = problem;
        for (int first = 0; first < problem.M; first += tokens) {
            part.A = static_cast<const T*>(problem.A) + int64_t(first) * problem.K;
            part.out = static_cast<T*>(problem.out) + int64_t(first) * problem.N;
            part.M = std::min(tokens, problem.M - first);
            launch<T, decltype(nested)::value, decltype(number)::value>(part, device, stream);
        }
    });
}

}  // namespace bnb
