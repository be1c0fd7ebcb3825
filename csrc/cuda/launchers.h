// The launchers that abi/cuda*.cu call, one per operation: raw pointers and a stream; they throw on failure. They
// enqueue and return, allocate nothing, and may be captured into a graph. Arguments have been checked.
#pragma once

#include <cstdint>

#include "../common/codebooks.h"
#include "../common/dtype.h"
#include "gemm_4bit/grouped.h"
#include "gemm_4bit/problem.h"
#include "int8/problem.h"

typedef struct CUstream_st* cudaStream_t;

namespace bnb {

// blocksize is a power of two from 32 to 4096; so for quantize_blockwise.
void quantize_4bit(
    const void* values, bnb_dtype dtype, bnb_format format, uint8_t* packed, float* absmax, int64_t n,
    int64_t blocksize, cudaStream_t stream);

void quantize_blockwise(
    const void* values, bnb_dtype dtype, const float* map, uint8_t* codes, float* absmax, int64_t n, int64_t blocksize,
    cudaStream_t stream);

// blocksize is a multiple of 16.
void dequantize_4bit(
    const uint8_t* packed, const BlockScales& scales, bnb_format format, void* values, bnb_dtype dtype, int64_t n,
    int64_t blocksize, cudaStream_t stream);

// Row i of out [count, columns] is row indices[i] of the table [rows, columns], NaN if there is none; blocksize as
// above.
void embedding_4bit(
    const int64_t* indices, const uint8_t* packed, const float* absmax, bnb_format format, void* out, bnb_dtype dtype,
    int64_t count, int64_t rows, int64_t columns, int64_t blocksize, cudaStream_t stream);
void embedding_8bit(
    const int64_t* indices, const int8_t* table, const float* absmax, void* out, bnb_dtype dtype, int64_t count,
    int64_t rows, int64_t columns, cudaStream_t stream);

template <class T>
void dequantize_blockwise(
    const float* code, const uint8_t* codes, const float* absmax, T* values, int64_t n, int64_t blocksize,
    cudaStream_t stream);

// float16 or bfloat16, in one of the shapes of gemm_4bit/tuning.h, which has so many tokens for each launch.
void gemm_4bit_mma(const Gemm4bit& problem, bnb_dtype dtype, int tuning, cudaStream_t stream);

// The same on compute capability 9.0, for any number of tokens; problem.workspace has room for them.
void gemm_4bit_wgmma(const Gemm4bit& problem, bnb_dtype dtype, int tuning, cudaStream_t stream);

// Any problem, for few tokens.
void gemm_4bit_simt(const Gemm4bit& problem, bnb_dtype dtype, cudaStream_t stream);

// Any grouped problem; and float16 or bfloat16 of lengths that vectors divide, as abi/cuda_grouped.cu asks.
void gemm_4bit_grouped_simt(const GroupedGemm4bit& problem, bnb_dtype dtype, bool transposed, cudaStream_t stream);
void gemm_4bit_grouped_mma(const GroupedGemm4bit& problem, bnb_dtype dtype, bool transposed, cudaStream_t stream);

// With a threshold, outlier_cols [cols] is zero before.
void int8_vectorwise_quant(
    const void* A, bnb_dtype dtype, int8_t* quantized, float* row_stats, uint8_t* outlier_cols, int64_t rows,
    int64_t cols, float threshold, cudaStream_t stream);

void int8_mm_dequant(
    const int* sums, const float* row_stats, const float* col_stats, const void* bias, bnb_dtype bias_dtype, void* out,
    bnb_dtype dtype, int64_t M, int64_t N, cudaStream_t stream);

// quantized and row_stats are A's, as int8_vectorwise_quant leaves them.
void int8_add_outliers(
    const void* A, const int8_t* quantized, const float* row_stats, const int8_t* B, const float* col_stats,
    const uint8_t* outlier_cols, void* out, bnb_dtype dtype, int64_t M, int64_t N, int64_t K, cudaStream_t stream);

void* managed_alloc(int64_t bytes);
void managed_free(void* memory);
void managed_prefetch(const void* memory, int64_t bytes, int32_t device, cudaStream_t stream);

}  // namespace bnb
