// Look-ups in quantized tables: only the rows that are asked for are decoded.
//
// Memory bound and small: a thread makes eight neighbouring values of one row, a store of 16 bytes in 16-bit dtypes.
// The index of a row is the same for all its threads and comes from the cache. A bad index cannot be an error on the
// device, so its row becomes NaN and no memory outside the table is read.

#include "device.cuh"
#include "launchers.h"
#include "vector_io.cuh"

namespace bnb {

namespace {

constexpr int kThreads = 128;
constexpr int kValues = 8;  // per thread

__constant__ FourBitFormat device_nf4 = kNf4;
__constant__ FourBitFormat device_fp4 = kFp4;

struct FourBitTable {
    const uint8_t* packed;
    const float* absmax;
    int64_t blocksize;
    int block_shift;
    bool nf4;
};

struct Int8Table {
    const int8_t* values;
    const float* absmax;
};

// Values [begin, begin + count) of the flattened table, to registers.
__device__ __forceinline__ void decode(
    const FourBitTable& table, const float* codes, int64_t, int64_t begin, int count, float (&values)[kValues]) {
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
        const int64_t i = begin + j;
        if (j >= count) break;
        const int byte = __ldg(table.packed + i / 2);
        const float scale = __ldg(table.absmax + block_of(i, table.blocksize, table.block_shift));
        values[j] = __fmul_rn(codes[i % 2 ? byte & 15 : byte >> 4], scale);
    }
}

__device__ __forceinline__ void decode(
    const Int8Table& table, const float*, int64_t row, int64_t begin, int count, float (&values)[kValues]) {
    const float scale = __fmul_rn(__ldg(table.absmax + row), 1.0f / 127.0f);
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
        if (j < count) values[j] = __fmul_rn(float(__ldg(table.values + begin + j)), scale);
    }
}

__device__ __forceinline__ void load_codes(const FourBitTable& table, float* codes) {
    if (threadIdx.x < 16)
        codes[threadIdx.x] = table.nf4 ? device_nf4.values[threadIdx.x] : device_fp4.values[threadIdx.x];
    __syncthreads();
}

__device__ __forceinline__ void load_codes(const Int8Table&, float*) {}

template <class Table, class T>
__global__ void __launch_bounds__(kThreads) embedding_kernel(
    const int64_t* __restrict__ indices, const Table table, T* __restrict__ out, int64_t count, int64_t rows,
    int64_t columns, int64_t chunks, bool aligned) {
    __shared__ float codes[16];
    load_codes(table, codes);
    const int64_t position = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t i = position / chunks, column = (position - i * chunks) * kValues;
    if (i >= count) return;

    const int64_t row = __ldg(indices + i);
    const int left = columns - column < kValues ? int(columns - column) : kValues;
    float values[kValues];
    if (row >= 0 && row < rows) {
        decode(table, codes, row, row * columns + column, left, values);
    } else {
#pragma unroll
        for (int j = 0; j < kValues; ++j) values[j] = __int_as_float(0x7fc00000);
    }
    T* const to = out + i * columns + column;
    constexpr int kStore = 16 / sizeof(T);
    if (aligned) {
#pragma unroll
        for (int j = 0; j < kValues; j += kStore) {
            Pack<T, kStore> pack;
#pragma unroll
            for (int k = 0; k < kStore; ++k) pack.values[k] = round_to<T>(values[j + k]);
            store_pack(to + j, pack);
        }
    } else {
#pragma unroll
        for (int j = 0; j < kValues; ++j) {
            if (j < left) to[j] = round_to<T>(values[j]);
        }
    }
}

template <class Table>
void launch(
    const int64_t* indices, const Table& table, void* out, bnb_dtype dtype, int64_t count, int64_t rows,
    int64_t columns, cudaStream_t stream) {
    if (count == 0 || columns == 0) return;
    const int64_t chunks = (columns + kValues - 1) / kValues;
    visit(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        T* const values = static_cast<T*>(out);
        const bool aligned = columns % kValues == 0 && is_aligned<T, 16 / sizeof(T)>(values);
        embedding_kernel<Table, T><<<grid_size((count * chunks + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
            indices, table, values, count, rows, columns, chunks, aligned);
        check_launch("embedding_kernel");
    });
}

}  // namespace

void embedding_4bit(
    const int64_t* indices, const uint8_t* packed, const float* absmax, bnb_format format, void* out, bnb_dtype dtype,
    int64_t count, int64_t rows, int64_t columns, int64_t blocksize, cudaStream_t stream) {
    const FourBitTable table = {packed, absmax, blocksize, shift_of(blocksize), format == BNB_FORMAT_NF4};
    launch(indices, table, out, dtype, count, rows, columns, stream);
}

void embedding_8bit(
    const int64_t* indices, const int8_t* table, const float* absmax, void* out, bnb_dtype dtype, int64_t count,
    int64_t rows, int64_t columns, cudaStream_t stream) {
    launch(indices, Int8Table{table, absmax}, out, dtype, count, rows, columns, stream);
}

}  // namespace bnb
