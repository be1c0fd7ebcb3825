// Launching the warpgroup kernel in the shape that the plan chose, after the kernel that arranges its tokens.

#include <algorithm>
#include <atomic>

#include "../launchers.h"
#include "launch.cuh"
#include "wgmma.cuh"

namespace bnb {

namespace {

constexpr int kCapability = 90;
constexpr int kMostInCluster = 8;
constexpr int kKnownDevices = 64;

// How many clusters of each size the device holds at once, a byte each: processors lie in groups of uneven size.
uint64_t count_clusters(const void* kernel, cudaLaunchConfig_t config) {
    cudaLaunchAttribute attribute = cluster_of(1);
    config.attrs = &attribute;
    config.numAttrs = 1;
    uint64_t counts = 0;
    for (int size = 1; size <= kMostInCluster; ++size) {
        attribute = cluster_of(size);
        config.gridDim = dim3(size);
        int count = 0;
        check(cudaOccupancyMaxActiveClusters(&count, kernel, &config), "cudaOccupancyMaxActiveClusters");
        counts |= uint64_t(std::min(count, 255)) << 8 * (size - 1);
    }
    return counts;
}

// CTAs that share out K: those that let the last of them end soonest.
int best_cluster(uint64_t counts, int64_t tiles, int stages) {
    constexpr float kOverhead = 1.5f, kSharing = 0.7f;  // in stages: of a CTA, and of adding up
    int best = 1;
    float least = 0.0f;
    for (int size = 1; size <= std::min(kMostInCluster, stages); ++size) {
        const int64_t held = counts >> 8 * (size - 1) & 255;
        if (held == 0) continue;
        const float turns = static_cast<float>((tiles + held - 1) / held);
        const float cost = turns * (static_cast<float>((stages + size - 1) / size) + kOverhead) + (size > 1) * kSharing;
        if (size == 1 || cost < least) {
            best = size;
            least = cost;
        }
    }
    return best;
}

template <int kTokens>
void arrange_tokens(const Gemm4bit& problem, int64_t bytes, cudaStream_t stream) {
    constexpr int kThreads = 256, kBytes = 64;  // of a thread
    const int64_t count = bytes / kBytes;
    cudaLaunchAttribute attribute = programmatic_launch();
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(grid_size((count + kThreads - 1) / kThreads));
    config.blockDim = dim3(kThreads);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    const auto kernel = arrange_tokens_kernel<kTokens>;
    check(
        cudaLaunchKernelEx(
            &config, kernel, static_cast<const uint4*>(problem.A), static_cast<uint4*>(problem.arranged), problem.M,
            problem.K, count),
        "arrange_tokens_kernel");
}

template <class T, bool kNested, int kTuning>
void launch(const Gemm4bit& problem, const Device& device, cudaStream_t stream) {
    constexpr WgmmaTuning t = kWgmmaTunings[kTuning];
    static std::atomic<uint64_t> allowed{0}, clusters[kKnownDevices];
    const auto kernel = gemm_4bit_wgmma_kernel<T, kNested, kTuning>;
    const auto address = reinterpret_cast<const void*>(kernel);
    constexpr int kBytes = WgmmaShared(t, kNested).bytes();
    allow_shared_memory(address, kBytes, device.ordinal, allowed);

    cudaLaunchAttribute attributes[2] = {programmatic_launch()};
    cudaLaunchConfig_t config = {};
    config.blockDim = dim3(t.threads());
    config.dynamicSmemBytes = kBytes;
    config.stream = stream;
    uint64_t counts =
        device.ordinal < kKnownDevices ? clusters[device.ordinal].load(std::memory_order_relaxed) : uint64_t(0);
    if (counts == 0) {
        counts = count_clusters(address, config);
        if (device.ordinal < kKnownDevices) clusters[device.ordinal].store(counts, std::memory_order_relaxed);
    }
    const int64_t tiles = int64_t((problem.N + t.rows() - 1) / t.rows()) * ((problem.M + t.tokens - 1) / t.tokens);
    const int cluster = best_cluster(counts, tiles, (problem.K + kMmaK - 1) / kMmaK);
    attributes[1] = cluster_of(cluster);
    config.gridDim = dim3(grid_size(tiles * cluster));
    config.attrs = attributes;
    config.numAttrs = cluster > 1 ? 2 : 1;
    arrange_tokens<t.tokens>(problem, arranged_bytes(t, problem.M, problem.K), stream);
    check(cudaLaunchKernelEx(&config, kernel, problem), "gemm_4bit_wgmma_kernel");
}

}  // namespace

void gemm_4bit_wgmma(const Gemm4bit& problem, bnb_dtype dtype, int tuning, cudaStream_t stream) {
    const Device device = current_device();
    require(tuning >= 0 && tuning < kWgmmaTuningCount, "no such tuning: ", tuning);
    require(
        device.capability == kCapability, "warpgroups exist on compute capability 9.0, this is ", device.capability);
    visit_kernel<kWgmmaTuningCount>(problem, dtype, tuning, [&](auto value, auto nested, auto number) {
        launch<decltype(value), decltype(nested)::value, decltype(number)::value>(problem, device, stream);
    });
}

}  // namespace bnb
