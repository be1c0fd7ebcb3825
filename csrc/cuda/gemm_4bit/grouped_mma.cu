// Launching the grouped 4-bit product on tensor cores, in a shape that fits the rows of an expert on average.

#include <algorithm>
#include <atomic>

#include "../launchers.h"
#include "grouped_mma.cuh"
#include "launch.cuh"

namespace bnb {

namespace {

template <class T, bool kTransposed, int kTuning>
void launch(const GroupedGemm4bit& problem, const Device& device, cudaStream_t stream) {
    constexpr GroupedTuning t = GroupedShape<kTransposed, kTuning>::t;
    static std::atomic<uint64_t> allowed{0};
    const int64_t units = most_grouped_units(problem, t.tokens(), t.outputs(), kTransposed ? problem.K : problem.N);
    const int64_t most = int64_t(device.multiprocessors) * t.ctas;
    require(
        units < (int64_t(1) << 31) - most, "too many rows and outputs for one launch: ", units, " blocks of threads");
    const dim3 grid(static_cast<unsigned>(std::min(units, most)));
    const Launch how = {
        "gemm_4bit_grouped_mma_kernel", grid, t.threads(), GroupedShared(t, kTransposed).bytes(), allowed};
    launch_early(gemm_4bit_grouped_mma_kernel<T, kTransposed, kTuning>, how, device, stream, problem);
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
