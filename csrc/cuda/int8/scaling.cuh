// From int32 sums to values, in the order in which every backend computes them.
#pragma once

#include <type_traits>

#include "../vector_io.cuh"

namespace bnb {

constexpr double kInt8Unit = 1.0 / 127.0;
constexpr float kInt8Scale = static_cast<float>(kInt8Unit);
constexpr float kInt8ProductScale = static_cast<float>(kInt8Unit * kInt8Unit);

// The bias of one output column, of any dtype.
__device__ __forceinline__ float bias_value(const void* bias, bnb_dtype dtype, int64_t n) {
    if (dtype == BNB_DTYPE_FLOAT32) return static_cast<const float*>(bias)[n];
    const uint16_t bits = static_cast<const uint16_t*>(bias)[n];
    return dtype == BNB_DTYPE_FLOAT16 ? widened(Half{bits}) : widened(BFloat16{bits});
}

// A row's part of the scale; the column's is its statistic.
__device__ __forceinline__ float row_scale(float row_stat) { return __fmul_rn(row_stat, kInt8ProductScale); }

__device__ __forceinline__ float scaled(int sum, float row_scale, float col_stat) {
    return __fmul_rn(__fmul_rn(__int2float_rn(sum), row_scale), col_stat);
}

// What quantization left of a value: all of an outlier, whose code is zero.
__device__ __forceinline__ float left_of(float value, int8_t code, float row_stat) {
    return __fsub_rn(value, __fmul_rn(float(code), __fmul_rn(row_stat, kInt8Scale)));
}

}  // namespace bnb
