// Launching the warpgroup kernel in the shape that the plan chose, after the kernel that arranges its tokens.

#include <algorithm>
#include <atomic>

#include "../launchers.h"
#include "launch.cuh"
#include "wgmma.cuh"

namespace bnb {

namespace {

constexpr int kCapability = 90;

// The kernels before and after the product ask for shared memory that they do not need: or their CTAs would crowd on
// the few multiprocessors that are idle when they start, instead of waiting for all, and would make a multiprocessor
// change how it divides its memory. So many of them fit one:
constexpr int kForThree = 64 * 1024, kForEight = 24 * 1024;

template <int kTuning>
void arrange_tokens(
    const Gemm4bit& problem, const WgmmaWorkspace& room, const WgmmaSplit& split, const Device& device,
    cudaStream_t stream) {
    constexpr int kTokens = kWgmmaTunings[kTuning].tokens;
    static std::atomic<uint64_t> allowed{0};
    const int64_t units = room.of_tile * kMmaBlocks;
    const int64_t ctas = std::max((units * 2 * kTokens + kArrangeThreads - 1) / kArrangeThreads, room.ctas);
    const dim3 grid(grid_size(ctas), static_cast<unsigned>(room.token_tiles));
    const Launch how = {"arrange_tokens_kernel", grid, kArrangeThreads, kForThree, allowed};
    launch_early(arrange_tokens_kernel<kTuning>, how, device, stream, problem, split, units);
}

template <class T, int kTuning>
void finish(
    const Gemm4bit& problem, const WgmmaWorkspace& room, const WgmmaSplit& split, const Device& device,
    cudaStream_t stream) {
    constexpr WgmmaTuning t = kWgmmaTunings[kTuning];
    static std::atomic<uint64_t> allowed{0};
    constexpr int kWarps = t.rows() / 16 * (t.tokens / 8 / kFinishQuads), kCtas = kWarps * 32 / kFinishThreads;
    static_assert(kCtas * kFinishThreads == kWarps * 32 && t.tokens / 8 % kFinishQuads == 0, "warps fill CTAs");
    const auto tiles = static_cast<unsigned>(std::min(room.stages / room.of_tile, room.ctas - 1));
    const Launch how = {"gemm_4bit_wgmma_finish_kernel", dim3(kCtas, tiles), kFinishThreads, kForEight, allowed};
    launch_early(gemm_4bit_wgmma_finish_kernel<T, kTuning>, how, device, stream, problem, split);
}

template <class T, bool kNested, int kTuning>
void launch(const Gemm4bit& problem, const Device& device, cudaStream_t stream) {
    constexpr WgmmaTuning t = kWgmmaTunings[kTuning];
    static std::atomic<uint64_t> allowed{0};
    const WgmmaWorkspace room(t, problem.M, problem.N, problem.K, device.multiprocessors);
    WgmmaSplit split;
    split.each = static_cast<int>(room.each);
    split.all = static_cast<int>(room.stages);
    split.parts = static_cast<char*>(problem.workspace) + room.arranged;
    arrange_tokens<kTuning>(problem, room, split, device, stream);
    const Launch how = {
        "gemm_4bit_wgmma_kernel", dim3(grid_size(room.ctas)), t.threads(), WgmmaShared(t, kNested).bytes(), allowed};
    launch_early(gemm_4bit_wgmma_kernel<T, kNested, kTuning>, how, device, stream, problem, split);
    if (room.shares_tiles()) finish<T, kTuning>(problem, room, split, device, stream);
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
