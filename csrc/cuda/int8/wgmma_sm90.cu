// Launching the warpgroup kernel: the tensor maps, and how the work is divided.

#include <cudaTypedefs.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "../launch.cuh"
#include "wgmma.cuh"

namespace bnb {

namespace {

constexpr int kCapability = 90;

// The driver's function, asked for once, so that the library need not be linked with it.
PFN_cuTensorMapEncodeTiled_v12000 map_encoder() {
    static const PFN_cuTensorMapEncodeTiled_v12000 encoder = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
        check(
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
            "cuTensorMapEncodeTiled");
#else
        check(
            cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found),
            "cuTensorMapEncodeTiled");
#endif
        require(found == cudaDriverEntryPointSuccess && function, "the driver has no cuTensorMapEncodeTiled");
        return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
    }();
    return encoder;
}

// Boxes of so many rows and one stage's depth.
CUtensorMap map_of(const int8_t* matrix, int64_t rows, int64_t columns, int box_rows) {
    CUtensorMap map;
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[1] = {static_cast<cuuint64_t>(columns)};
    const cuuint32_t box[2] = {kInt8Depth, static_cast<cuuint32_t>(box_rows)}, every[2] = {1, 1};
    const CUresult status = map_encoder()(
        &map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<int8_t*>(matrix), sizes, strides, box, every,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    require(status == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error ", int(status));
    return map;
}

struct Division {
    int rows, tokens;  // of a tile
    int parts;         // of k
};

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The division with the least clocks, by a model that was fitted to 51 products of 6 layers on an H200, where its
// choice is within 2 % of the best on average. A stage is copied, by all multiprocessors or by one at most at a rate,
// or multiplied; rounds of tiles follow each other; a tile has a cost of its own, which adding up parts increases.
Division divide(const Int8Product& p, int multiprocessors) {
    Division best{};
    double least = 0.0;
    for (const int tokens : {16, 32, 64, 128, 256}) {
        for (const int rows : {64, 128}) {
            if (rows == 64 ? tokens > 64 : tokens < 64) continue;
            for (const int parts : {1, 2, 3, 4}) {
                if (parts > 1 && tokens > 128) continue;
                const double together = rows == 64 ? 2.0 : 1.0;  // CTAs of a multiprocessor
                // Not all multiprocessors can be in a cluster of more than two.
                const double places = multiprocessors * together * (parts > 2 ? 0.95 : 1.0);
                const auto ctas = double(divided_up(p.N, rows) * divided_up(p.M, tokens) * parts);
                const double rounds = std::ceil(ctas / places), active = ctas / rounds;
                const double on_each = std::max(1.0, active / multiprocessors);
                const double stage = rows * double(kInt8Depth);
                const double copied = std::max(
                    stage * active / 3430.0 * (132.0 / multiprocessors), (rows + tokens) * kInt8Depth * on_each / 42.0);
                const double multiplied = stage * tokens / 4096.0 * 1.37 * on_each;
                const auto stages = double(divided_up(divided_up(p.K, kInt8Depth), parts));
                const double fixed = 1040.0 + 10.5 * tokens + (parts > 1 ? 880.0 + 10.3 * tokens : 0.0);
                const double clocks = rounds * (stages * std::max(copied, multiplied) + fixed);
                if (best.tokens == 0 || clocks < least) best = {rows, tokens, parts}, least = clocks;
            }
        }
    }
    return best;
}

template <class T, int kRows, int kTokens>
void launch(const Int8Product& p, int parts, const Device& device, cudaStream_t stream) {
    using Shape = Int8Shape<kRows, kTokens>;
    static std::atomic<uint64_t> allowed{0};
    Int8Work work;
    work.row_tiles = static_cast<int>(divided_up(p.N, kRows));
    work.token_tiles = static_cast<int>(divided_up(p.M, kTokens));
    work.parts = parts;
    work.together = 2048 / kRows;
    const int64_t tiles = int64_t(work.row_tiles) * work.token_tiles;
    require(tiles < int64_t(1) << 28, "the product is too large for one launch");
    const int64_t ctas = parts > 1 ? tiles * parts : std::min<int64_t>(tiles, device.multiprocessors * Shape::kCtas);
    const Launch how = {
        "int8_matmul_wgmma_kernel", dim3(grid_size(ctas)), Shape::kThreads, Shape::kBytes, allowed, parts};
    launch_early(
        int8_matmul_wgmma_kernel<T, kRows, kTokens>, how, device, stream, p, map_of(p.B, p.N, p.K, kRows),
        map_of(p.A, p.M, p.K, kTokens), work);
}

template <class T>
void launch_of(const Int8Product& p, const Division& division, const Device& device, cudaStream_t stream) {
    const auto is = [&](int rows, int tokens) { return division.rows == rows && division.tokens == tokens; };
    if (is(64, 16)) return launch<T, 64, 16>(p, division.parts, device, stream);
    if (is(64, 32)) return launch<T, 64, 32>(p, division.parts, device, stream);
    if (is(64, 64)) return launch<T, 64, 64>(p, division.parts, device, stream);
    if (is(128, 64)) return launch<T, 128, 64>(p, division.parts, device, stream);
    if (is(128, 128)) return launch<T, 128, 128>(p, division.parts, device, stream);
    launch<T, 128, 256>(p, division.parts, device, stream);
}

}  // namespace

bool can_multiply_int8_with_wgmma(const Int8Product& p, int capability) {
    const auto aligned = [](const int8_t* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
    return capability == kCapability && p.K > 0 && p.K % 16 == 0 && aligned(p.A) && aligned(p.B) &&
           p.M < int64_t(1) << 30 && p.N < int64_t(1) << 30 && p.K < int64_t(1) << 30;
}

void int8_matmul_wgmma(const Int8Product& p, cudaStream_t stream) {
    const Device device = current_device();
    const Division division = divide(p, device.multiprocessors);
    if (p.row_stats == nullptr) return launch_of<int>(p, division, device, stream);
    visit(p.dtype, [&](auto tag) { launch_of<typename decltype(tag)::type>(p, division, device, stream); });
}

}  // namespace bnb
