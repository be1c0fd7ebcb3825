// The first outlier columns of a product side by side: for each such column k, what quantization left of A[m, k], and
// the weights B[n, k], as values of A's dtype. So the tiles of a large product need not pick them from memory again and
// again, each value out of a sector of its own.
//
// The columns are known on the device only, as flags: every CTA collects them anew, which costs a read of K bytes from
// L2; without any, that is all that happens.

#include "async.cuh"
#include "int8/outliers.cuh"
#include "int8/scaling.cuh"
#include "launch.cuh"
#include "launchers.h"

namespace bnb {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 64;  // of A, or of B, of a CTA

template <class T>
__global__ void __launch_bounds__(kThreads) int8_gather_outliers_kernel(
    const Int8Product p, T* __restrict__ gathered_values, T* __restrict__ gathered_weights, int64_t of_values) {
    __shared__ OutlierChunk<kThreads> chunk;
    __shared__ int columns[kGatheredOutliers];
    wait_for_predecessor();
    let_successor_start();
    int all = 0;
    for (int64_t start = 0; start < p.K; start += chunk.kColumns) {
        const int found = chunk.collect(p.outlier_cols, start, p.K, threadIdx.x, 0);
        for (int i = threadIdx.x; i < found && all + i < kGatheredOutliers; i += kThreads) {
            columns[all + i] = static_cast<int>(start) + chunk.columns[i];
        }
        all += found;
    }
    if (all == 0) return;
    __syncthreads();

    const int gathered = min(all, kGatheredOutliers);
    const int padded = (gathered + kOutliersAtOnce - 1) / kOutliersAtOnce * kOutliersAtOnce;
    const bool weights = blockIdx.x >= of_values;
    const int64_t first = (blockIdx.x - (weights ? of_values : 0)) * kRows, rows = weights ? p.N : p.M;
    for (int i = threadIdx.x; i < kRows * padded; i += kThreads) {
        const int column = i % padded;
        const int64_t row = first + i / padded;
        if (row >= rows) break;
        float value = 0.0f;
        if (column < gathered) {
            const int64_t at = row * p.K + columns[column];
            value = weights ? float(p.B[at])
                            : left_of(widened(static_cast<const T*>(p.values)[at]), p.A[at], __ldg(p.row_stats + row));
        }
        (weights ? gathered_weights
                 : gathered_values)[row * kGatheredOutliers + OutlierBatch<T>::place_in_row(column)] =
            round_to<T>(value);
    }
}

template <class T>
void launch(const Int8Product& p, const Int8Workspace& room, cudaStream_t stream) {
    static std::atomic<uint64_t> allowed{0};
    const int64_t of_values = (p.M + kRows - 1) / kRows, of_weights = (p.N + kRows - 1) / kRows;
    const Launch how = {"int8_gather_outliers_kernel", dim3(grid_size(of_values + of_weights)), kThreads, 0, allowed};
    launch_early(
        int8_gather_outliers_kernel<T>, how, current_device(), stream, p, static_cast<T*>(room.gathered_values),
        static_cast<T*>(room.gathered_weights), of_values);
}

}  // namespace

void int8_gather_outliers(Int8Product& p, const Int8Workspace& room, cudaStream_t stream) {
    if (room.gathered_values == nullptr) return;
    if (p.dtype == BNB_DTYPE_BFLOAT16) {
        launch<BFloat16>(p, room, stream);
    } else {
        launch<Half>(p, room, stream);
    }
    p.gathered_values = room.gathered_values;
    p.gathered_weights = room.gathered_weights;
}

}  // namespace bnb
