// Launching the grouped 4-bit product on tensor cores, in a shape that fits the rows of an expert on average.

#include <algorithm>
#include <atomic>

#include "../launchers.h"
#include "grouped_mma.cuh"
#include "launch.cuh"

namespace bnb {

namespace {

constexpr int kProgrammaticLaunch = 90;  // compute capability from which on it exists

template <class T, bool kTransposed, int kTuning>
void launch(const GroupedGemm4bit& problem, const Device& device, cudaStream_t stream) {
    constexpr GroupedTuning t = GroupedShape<kTransposed, kTuning>::t;
    constexpr int kBytes = GroupedShared(t, kTransposed).bytes();
    static std::atomic<uint64_t> allowed{0};
    const auto kernel = gemm_4bit_grouped_mma_kernel<T, kTransposed, kTuning>;
    allow_shared_memory(reinterpret_cast<const void*>(kernel), kBytes, device.ordinal, allowed);

    const int64_t units = most_grouped_units(problem, t.tokens(), t.outputs(), kTransposed ? problem.K : problem.N);
    const int64_t most = int64_t(device.multiprocessors) * t.ctas;
    require(
        units < (int64_t(1) << 31) - most, "too many rows and outputs for one launch: ", units, " blocks of threads");
    cudaLaunchAttribute attribute = programmatic_launch();
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(std::min(units, most)));
    config.blockDim = dim3(t.threads());
    config.dynamicSmemBytes = kBytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = device.capability >= kProgrammaticLaunch ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, problem), "gemm_4bit_grouped_mma_kernel");
}

// The widest tile whose rows an expert's rows fill on average; more rows take several tiles, fewer waste some.
template <class T>
void launch_typed(const GroupedGemm4bit& problem, bool transposed, const Device& device, cudaStream_t stream) {
    const int64_t R = problem.R, E = problem.E;
    if (transposed) {
        if (R <= 12 * E) return launch<T, true, 0>(problem, device, stream);
        return launch<T, true, 1>(problem, device, stream);
    }
    if (R <= 5 * E) return launch<T, false, 0>(problem, device, stream);
    if (R <= 11 * E) return launch<T, false, 1>(problem, device, stream);
    if (R <= 24 * E) return launch<T, false, 2>(problem, device, stream);
    launch<T, false, 3>(problem, device, stream);
}

}  // namespace

void gemm_4bit_grouped_mma(const GroupedGemm4bit& problem, bnb_dtype dtype, bool transposed, cudaStream_t stream) {
    const Device device = current_device();
    if (dtype == BNB_DTYPE_BFLOAT16) {
        launch_typed<BFloat16>(problem, transposed, device, stream);
    } else {
        launch_typed<Half>(problem, transposed, device, stream);
    }
}

}  // namespace bnb
