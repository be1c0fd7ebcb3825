// Launching the tensor-core kernel for few tokens in the shape that the plan chose.

#include <algorithm>

#include "../launchers.h"
#include "launch.cuh"
#include "mma.cuh"
#include "plan.h"

namespace bnb {

namespace {

constexpr int kClusters = 90;  // compute capability from which on clusters and programmatic launch exist

template <class T, bool kNested, int kTuning>
void launch(const Gemm4bit& problem, const Device& device, cudaStream_t stream) {
    constexpr MmaTuning t = kMmaTunings[kTuning];
    static std::atomic<uint64_t> allowed{0};
    const auto kernel = gemm_4bit_mma_kernel<T, kNested, kTuning>;
    constexpr int kBytes = MmaShared(t, kNested).bytes();
    allow_shared_memory(reinterpret_cast<const void*>(kernel), kBytes, device.ordinal, allowed);

    const int tiles = (problem.N + kMmaRows - 1) / kMmaRows;
    const int clusters = std::min(tiles, std::max(1, device.multiprocessors / t.cluster));
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(clusters * t.cluster);
    config.blockDim = dim3(t.warps * 32);
    config.dynamicSmemBytes = kBytes;
    config.stream = stream;
    config.attrs = attributes;
    if (device.capability >= kClusters) {
        attributes[config.numAttrs++] = programmatic_launch();
        if (t.cluster > 1) attributes[config.numAttrs++] = cluster_of(t.cluster);
    }
    check(cudaLaunchKernelEx(&config, kernel, problem), "gemm_4bit_mma_kernel");
}

}  // namespace

void gemm_4bit_mma(const Gemm4bit& problem, bnb_dtype dtype, int tuning, cudaStream_t stream) {
    const Device device = current_device();
    require(tuning >= 0 && tuning < kMmaTuningCount, "no such tuning: ", tuning);
    const MmaTuning& t = kMmaTunings[tuning];
    require(
        problem.M <= 8 * t.token_tiles, "tuning ", tuning, " takes ", 8 * t.token_tiles, " tokens, got ", problem.M);
    require(t.cluster == 1 || device.capability >= kClusters, "tuning ", tuning, " needs clusters");
    visit_kernel<kMmaTuningCount>(problem, dtype, tuning, [&](auto value, auto nested, auto number) {
        launch<decltype(value), decltype(nested)::value, decltype(number)::value>(problem, device, stream);
    });
}

}  // namespace bnb
