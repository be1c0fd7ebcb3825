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
constexpr int kRows = kThreads / kOutliersAtOnce;  // of A, or of B, of a CTA: a thread has a column of each batch
constexpr int kTogether = 4;                       // batches whose loads are in flight

template <class T>
__global__ void __launch_bounds__(kThreads) int8_gather_outliers_kernel(
    const Int8Product p, int* __restrict__ outlier_count, T* __restrict__ gathered_values,
    T* __restrict__ gathered_weights, int64_t of_values) {
    __shared__ OutlierList<kThreads, kGatheredOutliers> list;
    wait_for_predecessor();
    let_successor_start();  // it relies on quantization having ended
    const int all = list.collect(p.outlier_cols, p.K, threadIdx.x, 0);
    if (blockIdx.x == 0 && threadIdx.x == 0) *outlier_count = all;
    const bool weights = blockIdx.x >= of_values;
    const int64_t row = (blockIdx.x - (weights ? of_values : 0)) * kRows + threadIdx.x / kOutliersAtOnce;
    if (row >= (weights ? p.N : p.M)) return;
    const int gathered = min(all, kGatheredOutliers), column = threadIdx.x % kOutliersAtOnce;
    const float row_stat = weights || gathered == 0 ? 0.0f : __ldg(p.row_stats + row);
    T* const to = (weights ? gathered_weights : gathered_values) + row * kGatheredOutliers;
#pragma unroll 1
    for (int first = 0; first < gathered; first += kTogether * kOutliersAtOnce) {
        float values[kTogether];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
            const int i = first + j * kOutliersAtOnce + column;
            values[j] = 0.0f;
            if (i >= gathered) continue;
            const int64_t at = row * p.K + list.columns[i];
            values[j] =
                weights ? float(p.B[at]) : left_of(widened(static_cast<const T*>(p.values)[at]), p.A[at], row_stat);
        }
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
            const int batch = first + j * kOutliersAtOnce;
            if (batch < gathered) to[OutlierBatch<T>::place_in_row(batch + column)] = round_to<T>(values[j]);
        }
    }
}

template <class T>
void launch(const Int8Product& p, const Int8Workspace& room, cudaStream_t stream) {
    static std::atomic<uint64_t> allowed{0};
    const int64_t of_values = (p.M + kRows - 1) / kRows, of_weights = (p.N + kRows - 1) / kRows;
    const Launch how = {"int8_gather_outliers_kernel", dim3(grid_size(of_values + of_weights)), kThreads, 0, allowed};
    launch_early(
        int8_gather_outliers_kernel<T>, how, current_device(), stream, p, room.outlier_count,
        static_cast<T*>(room.gathered_values), static_cast<T*>(room.gathered_weights), of_values);
}

}  // namespace

void int8_gather_outliers(Int8Product& p, const Int8Workspace& room, cudaStream_t stream) {
    if (room.gathered_values == nullptr) return;
    if (p.dtype == BNB_DTYPE_BFLOAT16) {
        launch<BFloat16>(p, room, stream);
    } else {
        launch<Half>(p, room, stream);
    }
    p.outlier_count = room.outlier_count;
    p.gathered_values = room.gathered_values;
    p.gathered_weights = room.gathered_weights;
}

}  // namespace bnb
