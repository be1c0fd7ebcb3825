// Launching the tensor-core kernel for few tokens in the shape that the plan chose.

#include <algorithm>
#include <atomic>

#include "../device.cuh"
#include "../launchers.h"
#include "mma.cuh"
#include "plan.h"

namespace bnb {

namespace {

constexpr int kClusters = 90;  // compute capability from which on clusters and programmatic launch exist

// More shared memory than 48 KB must be asked for, once for each kernel and device.
void allow_shared_memory(const void* kernel, int bytes, int device, std::atomic<uint64_t>& done) {
    const uint64_t bit = uint64_t(1) << (device % 64);
    if (device < 64 && (done.load(std::memory_order_relaxed) & bit)) return;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
    done.fetch_or(bit, std::memory_order_relaxed);
}

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
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
        if (t.cluster > 1) {
            attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
            attributes[config.numAttrs].val.clusterDim.x = t.cluster;
            attributes[config.numAttrs].val.clusterDim.y = 1;
            attributes[config.numAttrs++].val.clusterDim.z = 1;
        }
    }
    check(cudaLaunchKernelEx(&config, kernel, problem), "gemm_4bit_mma_kernel");
}

template <class T, bool kNested, int kTuning = 0>
void launch_tuning(int tuning, const Gemm4bit& problem, const Device& device, cudaStream_t stream) {
    if constexpr (kTuning < kMmaTuningCount) {
        if (tuning == kTuning) return launch<T, kNested, kTuning>(problem, device, stream);
        return launch_tuning<T, kNested, kTuning + 1>(tuning, problem, device, stream);
    }
}

template <class T>
void launch_typed(int tuning, const Gemm4bit& problem, const Device& device, cudaStream_t stream) {
    if (problem.scales.codes != nullptr) {
        launch_tuning<T, true>(tuning, problem, device, stream);
    } else {
        launch_tuning<T, false>(tuning, problem, device, stream);
    }
}

}  // namespace

void gemm_4bit_mma(const Gemm4bit& problem, bnb_dtype dtype, int tuning, cudaStream_t stream) {
    const Device device = current_device();
    require(tuning >= 0 && tuning < kMmaTuningCount, "no such tuning: ", tuning);
    const MmaTuning& t = kMmaTunings[tuning];
    require(
        problem.M <= 8 * t.token_tiles, "tuning ", tuning, " takes ", 8 * t.token_tiles, " tokens, got ", problem.M);
    require(t.cluster == 1 || device.capability >= kClusters, "tuning ", tuning, " needs clusters");
    if (dtype == BNB_DTYPE_BFLOAT16) {
        launch_typed<BFloat16>(tuning, problem, device, stream);
    } else {
        launch_typed<Half>(tuning, problem, device, stream);
    }
}

}  // namespace bnb
