/* The C ABI of bitsandbytes: the single source of truth for every binding.
 *
 * Plain C99 in a small subset (fixed-width integers, float, double, bool, pointers, enums with explicit values, flat
 * structs), because the Python package parses this file when it loads the library and refuses what it does not
 * know. One declaration ends with one semicolon; no macros inside declarations.
 *
 * Arguments come as inputs, outputs, sizes, options, and last the stream (CUDA) or the number of threads (CPU).
 * A pointer to untyped data is followed at once by its bnb_dtype. Sizes are counted in elements. A pointer may be
 * null only where its comment says so. threads <= 0 means all of the machine. CUDA functions enqueue and return: they
 * neither synchronise nor allocate (but for bnb_cuda_managed_*). A failing function returns a status; bnb_last_error()
 * has the text. Enum values are frozen once released.
 */
/* clang-format off: arguments stand in groups. */
#ifndef BNB_H
#define BNB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define BNB_API __declspec(dllexport)
#else
#define BNB_API __attribute__((visibility("default")))
#endif

#define BNB_ABI_VERSION 1

/* Plans for a 4-bit matmul: decode the weight, then multiply densely; the kernel that takes any problem; or whichever
 * kernel is fastest on the current device for memory as it lies, without decoding. */
#define BNB_GEMM_DEQUANTIZE -1
#define BNB_GEMM_SIMT -2
#define BNB_GEMM_FUSED -3

/* Rows of A beyond which the plan is always to decode the weight. */
#define BNB_GEMM_MOST_FUSED_ROWS 1024

#ifdef __cplusplus
extern "C" {
#endif

typedef enum bnb_status {
    BNB_STATUS_OK = 0,
    BNB_STATUS_INVALID_ARGUMENT = 1,
    BNB_STATUS_UNSUPPORTED = 2,
    BNB_STATUS_OUT_OF_MEMORY = 3,
    BNB_STATUS_DEVICE_ERROR = 4,
    BNB_STATUS_INTERNAL_ERROR = 5
} bnb_status;

typedef enum bnb_dtype {
    BNB_DTYPE_FLOAT32 = 0,
    BNB_DTYPE_FLOAT16 = 1,
    BNB_DTYPE_BFLOAT16 = 2
} bnb_dtype;

typedef enum bnb_format {
    BNB_FORMAT_FP4 = 1,
    BNB_FORMAT_NF4 = 2
} bnb_format;

/* The arithmetic of an optimizer. LAMB is ADAM and LARS is MOMENTUM, each with a limit. */
typedef enum bnb_rule {
    BNB_RULE_ADAM = 0,
    BNB_RULE_ADEMAMIX = 1,
    BNB_RULE_MOMENTUM = 2,
    BNB_RULE_LION = 3,
    BNB_RULE_RMSPROP = 4,
    BNB_RULE_ADAGRAD = 5
} bnb_rule;

/* What one optimizer step multiplies with. A rule turns gradient and state into a direction u; the step is
 * p = p * shrink - step_size * u, on the gradient g * gnorm_scale + p * decay. */
typedef struct bnb_optimizer_config {
    float beta1;
    float beta2;
    float beta3;
    float rest1;        /* 1 - beta1, which float32 could not tell from beta1 */
    float rest2;
    float rest3;
    float correction1;  /* 1 - beta1^step */
    float correction2;  /* sqrt(1 - beta2^step) */
    float alpha;
    float eps;
    float decay;
    float shrink;
    float step_size;
    float gnorm_scale;
    float limit;        /* the largest norm of u; 0 is none */
    bool first_step;
    bool skip_zeros;    /* leave elements and their state alone where g is 0 */
} bnb_optimizer_config;

/* What users set for the tensors of one group; the scalars of a step derive from it and the step's number, on the
 * device where a CUDA graph may replay the step. */
typedef struct bnb_optimizer_hyper {
    const float* lr_address;  /* a learning rate in device memory, or null: then it is lr */
    double lr;
    double beta1;
    double beta2;
    double beta3;
    double alpha;
    double eps;
    double weight_decay;
    double gnorm_scale;
    double t_alpha;           /* steps over which alpha, and beta3, reach their values; 0 is no schedule */
    double t_beta3;
    double max_unorm;         /* the update's norm may be this times the parameter's; 0 is no limit */
    int64_t seed;             /* of the dice that bfloat16 parameters are rounded by */
    bool skip_zeros;
    bool rounds;              /* bfloat16 parameters at random, right on average; else to nearest */
} bnb_optimizer_hyper;

/* One tensor of a step on many, in device memory: addresses on the device (state may be managed memory), n elements,
 * the number of the first of its blocks of 256 through all tensors. Null where the rule or the state has no use. */
typedef struct bnb_optimizer_tensor {
    const void* g;
    void* p;
    void* state1;
    void* state2;
    float* absmax1;
    float* absmax2;
    float* unorm;
    int64_t* step;
    int64_t n;
    int64_t first_block;
    int64_t place;   /* in its group */
    int64_t offset;  /* of its first element in the whole parameter, of which it may be a shard */
    int64_t key;     /* of this step's dice, which bnb_cuda_optimizer_begin writes; negative: round to nearest */
} bnb_optimizer_tensor;

/* What bnb_cpu_gemm_4bit and bnb_cpu_int8_linear take, as one argument: ctypes needs a microsecond more for a dozen. */
typedef struct bnb_gemm_4bit_arguments {
    const void* A;
    bnb_dtype dtype;
    const uint8_t* packed;
    const float* absmax;
    const uint8_t* absmax_8bit;
    const float* absmax_code;
    const float* absmax_offset;
    const float* code;
    const void* bias;
    void* out;
    int64_t M;
    int64_t N;
    int64_t K;
    int64_t blocksize;
    int32_t threads;
} bnb_gemm_4bit_arguments;

typedef struct bnb_int8_linear_arguments {
    const void* A;
    bnb_dtype dtype;
    const int8_t* B;
    const float* col_stats;
    const void* bias;
    bnb_dtype bias_dtype;
    void* out;
    uint8_t* outlier_cols;
    int64_t M;
    int64_t N;
    int64_t K;
    float threshold;
    int32_t threads;
} bnb_int8_linear_arguments;

/* A CUDA stream; null is the default stream. */
typedef void* bnb_stream;

/* ---- the library itself ---- */

BNB_API int32_t bnb_abi_version(void);

/* Status and text of the calling thread's last call; the text stays valid until that thread's next call. */
BNB_API int32_t bnb_last_status(void);
BNB_API const char* bnb_last_error(void);

/* Whether this library contains the bnb_cuda_* functions. */
BNB_API bool bnb_has_cuda(void);

/* The sixteen values of a 4-bit format in code order, and the fifteen ascending decision thresholds between its
 * values: an encoder counts the thresholds below a value. */
BNB_API bnb_status bnb_codebook(bnb_format format, float* values, float* thresholds);

/* Instruction set whose kernels run ("scalar", "avx2", "avx512", "avx512bf16", "avx512amx", "neon"); null if BNB_CPU_ISA
 * names one that this machine or build does not have. */
BNB_API const char* bnb_cpu_isa(void);

/* Comma-separated instruction sets that can run here, best first. */
BNB_API const char* bnb_cpu_isa_available(void);

/* ---- CPU: 4-bit ---- */

/* Scale each block by its largest magnitude and pack two codes per byte, the first in the high nibble. Writes
 * (n + 1) / 2 bytes and one absmax per block; blocksize is even. */
BNB_API bnb_status bnb_cpu_quantize_4bit(
    const void* values, bnb_dtype dtype, bnb_format format,
    uint8_t* packed, float* absmax,
    int64_t n, int64_t blocksize, int32_t threads);

/* Rebuild n values from packed codes; block i is scaled by absmax[i]. */
BNB_API bnb_status bnb_cpu_dequantize_4bit(
    const uint8_t* packed, const float* absmax, bnb_format format,
    void* values, bnb_dtype dtype,
    int64_t n, int64_t blocksize, int32_t threads);

/* y = A @ W.T + bias, accumulated in float32. A is [M, K], out is [M, N], bias is [N] or null, all of one dtype. W is
 * [N, K], packed without padding of rows; its blocks run over the flattened weight. absmax_8bit is null; or it has one
 * code per block, whose scale is then absmax_code[absmax_8bit[b]] * absmax[b / 256] + *absmax_offset, with 256 entries in
 * absmax_code. code has the sixteen values. bfloat16 activations may be multiplied with those values in bfloat16. */
BNB_API bnb_status bnb_cpu_gemm_4bit(
    const void* A, bnb_dtype dtype, const uint8_t* packed, const float* absmax, const uint8_t* absmax_8bit,
    const float* absmax_code, const float* absmax_offset, const float* code, const void* bias,
    void* out,
    int64_t M, int64_t N, int64_t K, int64_t blocksize, int32_t threads);

BNB_API bnb_status bnb_cpu_gemm_4bit_with(const bnb_gemm_4bit_arguments* arguments);

/* y = A @ W of the same weight: A is [M, N], out is [M, K]. The gradient of the activations. */
BNB_API bnb_status bnb_cpu_gemm_4bit_transposed(
    const void* A, bnb_dtype dtype, const uint8_t* packed, const float* absmax, const uint8_t* absmax_8bit,
    const float* absmax_code, const float* absmax_offset, const float* code,
    void* out,
    int64_t M, int64_t N, int64_t K, int64_t blocksize, int32_t threads);

/* Row indices[i] of a packed table [rows, columns], decoded, is row i of out [count, columns]. An index that is none is an
 * error before anything is written. */
BNB_API bnb_status bnb_cpu_embedding_4bit(
    const int64_t* indices, const uint8_t* packed, const float* absmax, bnb_format format,
    void* out, bnb_dtype dtype,
    int64_t count, int64_t rows, int64_t columns, int64_t blocksize, int32_t threads);

/* The same of a table of int8 rows, each scaled by its absmax / 127. */
BNB_API bnb_status bnb_cpu_embedding_8bit(
    const int64_t* indices, const int8_t* table, const float* absmax,
    void* out, bnb_dtype dtype,
    int64_t count, int64_t rows, int64_t columns, int32_t threads);

/* ---- CPU: 8-bit block-wise ---- */

/* Scale each block by its largest magnitude and take the nearest of the 256 ascending values of code; a tie takes the
 * lower index. One code per value, one absmax per block. */
BNB_API bnb_status bnb_cpu_quantize_blockwise(
    const float* code, const void* values, bnb_dtype dtype,
    uint8_t* codes, float* absmax,
    int64_t n, int64_t blocksize, int32_t threads);

/* values[i] = code[codes[i]] * absmax[i / blocksize]. */
BNB_API bnb_status bnb_cpu_dequantize_blockwise(
    const float* code, const uint8_t* codes, const float* absmax,
    void* values, bnb_dtype dtype,
    int64_t n, int64_t blocksize, int32_t threads);

/* ---- CPU: int8 ---- */

/* Round each row of A [rows, cols] to 127 / (its largest magnitude). With threshold > 0, elements of at least that
 * magnitude do not count in row_stats, and every column that holds one is zero in the result and set to 1 in
 * outlier_cols [cols] (null if threshold is 0, else zero on entry). */
BNB_API bnb_status bnb_cpu_int8_vectorwise_quant(
    const void* A, bnb_dtype dtype,
    int8_t* quantized, float* row_stats, uint8_t* outlier_cols,
    int64_t rows, int64_t cols, float threshold, int32_t threads);

/* The same, and each column rounded to 127 / (its largest magnitude) as well; outliers are zero in by_column and do not
 * count in col_stats [cols]. */
BNB_API bnb_status bnb_cpu_int8_double_quant(
    const void* A, bnb_dtype dtype,
    int8_t* by_row, int8_t* by_column, float* row_stats, float* col_stats, uint8_t* outlier_cols,
    int64_t rows, int64_t cols, float threshold, int32_t threads);

/* values [rows, cols] = codes * row_stats [rows] / 127. */
BNB_API bnb_status bnb_cpu_int8_vectorwise_dequant(
    const int8_t* codes, const float* row_stats,
    float* values,
    int64_t rows, int64_t cols, int32_t threads);

/* out [M, N] = A [M, K] times the transpose of B [N, K], exact; sums wrap at 2^31. */
BNB_API bnb_status bnb_cpu_int8_linear_matmul(
    const int8_t* A, const int8_t* B,
    int32_t* out,
    int64_t M, int64_t N, int64_t K, int32_t threads);

/* out [M, N] = that product * row_stats [M] * col_stats [N] / 127^2 + bias [N], in float32, rounded once. bias may be
 * null. */
BNB_API bnb_status bnb_cpu_int8_scaled_mm(
    const int8_t* A, const int8_t* B, const float* row_stats, const float* col_stats,
    const void* bias, bnb_dtype bias_dtype,
    void* out, bnb_dtype dtype,
    int64_t M, int64_t N, int64_t K, int32_t threads);

/* The second half of that: A [M, N] is the product. */
BNB_API bnb_status bnb_cpu_int8_mm_dequant(
    const int32_t* A, const float* row_stats, const float* col_stats,
    const void* bias, bnb_dtype bias_dtype,
    void* out, bnb_dtype dtype,
    int64_t M, int64_t N, int32_t threads);

/* bnb_cpu_int8_vectorwise_quant of A [M, K] followed by bnb_cpu_int8_scaled_mm, in A's dtype; what the outlier columns
 * contribute is added in float32. bias may be null; outlier_cols [K] is as for bnb_cpu_int8_vectorwise_quant. */
BNB_API bnb_status bnb_cpu_int8_linear(
    const void* A, bnb_dtype dtype,
    const int8_t* B, const float* col_stats,
    const void* bias, bnb_dtype bias_dtype,
    void* out, uint8_t* outlier_cols,
    int64_t M, int64_t N, int64_t K, float threshold, int32_t threads);

BNB_API bnb_status bnb_cpu_int8_linear_with(const bnb_int8_linear_arguments* arguments);

/* Instruction set of the int8 kernels: that of the others, or "avx512vnni". */
BNB_API const char* bnb_cpu_int8_isa(void);

/* ---- CPU: optimizers ---- */

/* One step on p [n] with gradient g [n], of one dtype. state1 is [n], for ADEMAMIX [2, n]; state2 [n] is for ADAM and
 * ADEMAMIX, else null. unorm [1] receives the norm of u and makes config->limit count; null is neither. */
BNB_API bnb_status bnb_cpu_optimizer_update_32bit(
    const void* g, bnb_dtype g_dtype,
    void* p, bnb_dtype p_dtype, float* state1, float* state2, float* unorm,
    int64_t n, bnb_rule rule, const bnb_optimizer_config* config, int32_t threads);

/* The same with states of one byte, codes of an ascending map of 256 values, and one absmax for 256 elements: absmax1
 * is [blocks], for ADEMAMIX [2, blocks]. state2, qmap2, absmax2 are for ADAM and ADEMAMIX, else null. No limit. */
BNB_API bnb_status bnb_cpu_optimizer_update_8bit_blockwise(
    const void* g, bnb_dtype g_dtype, const float* qmap1, const float* qmap2,
    void* p, bnb_dtype p_dtype, uint8_t* state1, uint8_t* state2, float* absmax1, float* absmax2,
    int64_t n, bnb_rule rule, const bnb_optimizer_config* config, int32_t threads);

/* The same with states of half a byte, two codes a byte, the first in the high nibble, of ascending maps of 16 levels,
 * and one absmax for 128 elements; not for ADEMAMIX. Codes of state2 are rounded at random: dice from (key, element). */
BNB_API bnb_status bnb_cpu_optimizer_update_4bit_blockwise(
    const void* g, bnb_dtype g_dtype, const float* qmap1, const float* qmap2,
    void* p, bnb_dtype p_dtype, uint8_t* state1, uint8_t* state2, float* absmax1, float* absmax2,
    int64_t n, bnb_rule rule, const bnb_optimizer_config* config, int64_t key, int32_t threads);

/* One step on many tensors of one kind: with the maps, 8-bit state; without, 32-bit. As bnb_cuda_optimizer_begin and
 * bnb_cuda_optimizer_update_many do it, with everything in host memory; gradients are of p's dtype, max_unorm and rounds
 * must be unset. first_block counts through the tensors, from any number on. */
BNB_API bnb_status bnb_cpu_optimizer_update_many(
    const int64_t* gradients, const bnb_optimizer_hyper* hyper, bnb_optimizer_tensor* tensors, bnb_dtype dtype,
    const float* qmap1, const float* qmap2, int64_t count, bnb_rule rule, int32_t threads);

/* Round n values to bfloat16 up or down at random, right on average; element i takes its dice from (key, offset + i). */
BNB_API bnb_status bnb_cpu_round_to_bfloat16(
    const float* values, void* rounded, int64_t n, int64_t key, int64_t offset, int32_t threads);

/* ---- CPU: the machine, and a layout of earlier releases ---- */

BNB_API bool bnb_cpu_has_avx512f(void);
BNB_API bool bnb_cpu_has_avx512bf16(void);
BNB_API bool bnb_cpu_is_intel(void);

/* out = x @ W.T in bfloat16, W in tiles of 32 rows: the codes of rows r and columns k, k + 1 in the order 2 * r + k % 2,
 * code i of the first 32 in the low and code 32 + i in the high nibble of byte i. absmax is bfloat16 [K / blocksize, N].
 * Strides are in elements. N is a multiple of 32, K of blocksize. */
BNB_API bnb_status bnb_cpu_gemm_4bit_tiled(
    const void* x, const uint8_t* tiles, const void* absmax, bnb_format format, void* out,
    int64_t M, int64_t N, int64_t K, int64_t blocksize, int64_t x_stride, int64_t out_stride, int32_t threads);

/* ---- CUDA ---- */

/* Scale each block by its largest magnitude and pack two codes per byte, the first in the high nibble. Writes
 * (n + 1) / 2 bytes and one absmax per block; blocksize is a power of two from 32 to 4096. */
BNB_API bnb_status bnb_cuda_quantize_4bit(
    const void* values, bnb_dtype dtype, bnb_format format,
    uint8_t* packed, float* absmax,
    int64_t n, int64_t blocksize, bnb_stream stream);

/* Scale each block by its largest magnitude and take the nearest of the 256 ascending values of code; a tie takes the
 * lower index. One code per value, one absmax per block; blocksize is a power of two from 32 to 4096. */
BNB_API bnb_status bnb_cuda_quantize_blockwise(
    const float* code, const void* values, bnb_dtype dtype,
    uint8_t* codes, float* absmax,
    int64_t n, int64_t blocksize, bnb_stream stream);

/* Rebuild n values from packed codes; block i is scaled by absmax[i]. blocksize is a multiple of 16. */
BNB_API bnb_status bnb_cuda_dequantize_4bit(
    const uint8_t* packed, const float* absmax, bnb_format format,
    void* values, bnb_dtype dtype,
    int64_t n, int64_t blocksize, bnb_stream stream);

/* The same with nested statistics: block b is scaled by absmax_code[absmax_8bit[b]] * absmax[b / 256] + *absmax_offset,
 * with 256 entries in absmax_code. */
BNB_API bnb_status bnb_cuda_dequantize_4bit_nested(
    const uint8_t* packed, const float* absmax, const uint8_t* absmax_8bit, const float* absmax_code,
    const float* absmax_offset, bnb_format format,
    void* values, bnb_dtype dtype,
    int64_t n, int64_t blocksize, bnb_stream stream);

/* values[i] = code[codes[i]] * absmax[i / blocksize], with 256 entries in code. */
BNB_API bnb_status bnb_cuda_dequantize_blockwise(
    const float* code, const uint8_t* codes, const float* absmax,
    void* values, bnb_dtype dtype,
    int64_t n, int64_t blocksize, bnb_stream stream);

/* Row indices[i] of a packed table [rows, columns], decoded, is row i of out [count, columns]; NaN if the index is none.
 * blocksize is a multiple of 16. */
BNB_API bnb_status bnb_cuda_embedding_4bit(
    const int64_t* indices, const uint8_t* packed, const float* absmax, bnb_format format,
    void* out, bnb_dtype dtype,
    int64_t count, int64_t rows, int64_t columns, int64_t blocksize, bnb_stream stream);

/* The same of a table of int8 rows, each scaled by its absmax / 127. */
BNB_API bnb_status bnb_cuda_embedding_8bit(
    const int64_t* indices, const int8_t* table, const float* absmax,
    void* out, bnb_dtype dtype,
    int64_t count, int64_t rows, int64_t columns, bnb_stream stream);

/* y = A @ W.T + bias, accumulated in float32 and rounded once. A is [M, K], out is [M, N], bias is [N] or null, all of
 * one dtype. W is [N, K], packed without padding of rows; its blocks run over the flattened weight and hold a power of
 * two. absmax_8bit is null; or it has one code per block, whose scale is then
 * absmax_code[absmax_8bit[b]] * absmax[b / 256] + *absmax_offset, with 256 entries in absmax_code. code has the sixteen
 * values, or is null: then they are those of format. tuning is what bnb_cuda_gemm_4bit_plan chose, or
 * BNB_GEMM_FUSED; a tuning >= 0 needs A and packed aligned to 16 bytes. workspace has
 * bnb_cuda_gemm_4bit_workspace bytes, aligned likewise, or is null if there are none; so it is with BNB_GEMM_FUSED. */
BNB_API bnb_status bnb_cuda_gemm_4bit(
    const void* A, bnb_dtype dtype, const uint8_t* packed, const float* absmax, const uint8_t* absmax_8bit,
    const float* absmax_code, const float* absmax_offset, const float* code, bnb_format format, const void* bias,
    void* out,
    int64_t M, int64_t N, int64_t K, int64_t blocksize, int32_t tuning, void* workspace, bnb_stream stream);

/* Bytes of workspace that a tuning needs for a problem on a GPU of so many multiprocessors. A pure function, and part of
 * every build. */
BNB_API int64_t bnb_cuda_gemm_4bit_workspace(
    bnb_dtype dtype, int64_t M, int64_t N, int64_t K, int64_t blocksize, int32_t tuning, int32_t multiprocessors);

/* The tuning with which bnb_cuda_gemm_4bit computes a problem fastest on a GPU of this compute capability (90 for
 * sm_90), or BNB_GEMM_DEQUANTIZE where decoding the weight for a dense matmul is faster. A pure function, and part of
 * every build. */
BNB_API int32_t bnb_cuda_gemm_4bit_plan(
    bnb_dtype dtype, int64_t M, int64_t N, int64_t K, int64_t blocksize, int32_t capability, int32_t multiprocessors);

/* y = A @ W[e].T + bias[e] for the rows of each expert e: A is [R, K], out [R, N], bias [E, N] or null, all of one dtype. W
 * is the stack [E, N, K], packed without padding; an expert is a whole number of blocks, which hold a power of two from 32
 * on. Scales as above. Rows are sorted by expert, and offsets [E], on the device, says where those of each end; rows at or
 * past the last are zero. What an offset says beyond the rows there are, or less than the one before, does not count. */
BNB_API bnb_status bnb_cuda_gemm_4bit_grouped(
    const void* A, bnb_dtype dtype, const uint8_t* packed, const float* absmax, const uint8_t* absmax_8bit,
    const float* absmax_code, const float* absmax_offset, bnb_format format, const int32_t* offsets, const void* bias,
    void* out,
    int64_t E, int64_t R, int64_t N, int64_t K, int64_t blocksize, bnb_stream stream);

/* y = A @ W[e] of the same stack: A is [R, N], out is [R, K]. The gradient of the activations. */
BNB_API bnb_status bnb_cuda_gemm_4bit_grouped_transposed(
    const void* A, bnb_dtype dtype, const uint8_t* packed, const float* absmax, const uint8_t* absmax_8bit,
    const float* absmax_code, const float* absmax_offset, bnb_format format, const int32_t* offsets,
    void* out,
    int64_t E, int64_t R, int64_t N, int64_t K, int64_t blocksize, bnb_stream stream);

/* ---- CUDA: int8 ---- */

/* Round each row of A [rows, cols] to 127 / (its largest magnitude). With threshold > 0, elements of at least that
 * magnitude do not count in row_stats, are zero in the result, and their columns are 1 in outlier_cols [cols] (null if
 * threshold is 0), all others 0; what else is in these columns stays. */
BNB_API bnb_status bnb_cuda_int8_vectorwise_quant(
    const void* A, bnb_dtype dtype,
    int8_t* quantized, float* row_stats, uint8_t* outlier_cols,
    int64_t rows, int64_t cols, float threshold, bnb_stream stream);

/* As bnb_cpu_int8_linear_matmul, bnb_cpu_int8_scaled_mm and bnb_cpu_int8_mm_dequant. */
BNB_API bnb_status bnb_cuda_int8_linear_matmul(
    const int8_t* A, const int8_t* B,
    int32_t* out,
    int64_t M, int64_t N, int64_t K, bnb_stream stream);
BNB_API bnb_status bnb_cuda_int8_scaled_mm(
    const int8_t* A, const int8_t* B, const float* row_stats, const float* col_stats,
    const void* bias, bnb_dtype bias_dtype,
    void* out, bnb_dtype dtype,
    int64_t M, int64_t N, int64_t K, bnb_stream stream);
BNB_API bnb_status bnb_cuda_int8_mm_dequant(
    const int32_t* A, const float* row_stats, const float* col_stats,
    const void* bias, bnb_dtype bias_dtype,
    void* out, bnb_dtype dtype,
    int64_t M, int64_t N, bnb_stream stream);

/* Add to out [M, N] what the columns k with outlier_cols[k] lack: what quantization left of A[m, k], times
 * B[n, k] * col_stats[n] / 127. quantized and row_stats are bnb_cuda_int8_vectorwise_quant's of A. */
BNB_API bnb_status bnb_cuda_int8_add_outliers(
    const void* A, bnb_dtype dtype, const int8_t* quantized, const float* row_stats, const int8_t* B,
    const float* col_stats, const uint8_t* outlier_cols,
    void* out,
    int64_t M, int64_t N, int64_t K, bnb_stream stream);

/* All of them: A [M, K] is quantized, its product with B is scaled to A's dtype, and with a threshold outlier columns count
 * as if they had not been quantized. outlier_cols [K] is null if threshold is 0. workspace has
 * bnb_cuda_int8_linear_workspace bytes, aligned to 16. */
BNB_API bnb_status bnb_cuda_int8_linear(
    const void* A, bnb_dtype dtype, const int8_t* B, const float* col_stats,
    const void* bias, bnb_dtype bias_dtype,
    void* out, uint8_t* outlier_cols,
    int64_t M, int64_t N, int64_t K, float threshold, void* workspace, bnb_stream stream);

/* A pure function, and part of every build. */
BNB_API int64_t bnb_cuda_int8_linear_workspace(int64_t M, int64_t N, int64_t K, float threshold);

/* ---- CUDA: optimizers ---- */

/* As bnb_cpu_optimizer_update_32bit. With unorm, scratch has bnb_cuda_optimizer_scratch(1) bytes; else it is null. g is of
 * p's dtype, or float32. */
BNB_API bnb_status bnb_cuda_optimizer_update_32bit(
    const void* g, bnb_dtype g_dtype,
    void* p, bnb_dtype p_dtype, float* state1, float* state2, float* unorm, void* scratch,
    int64_t n, bnb_rule rule, const bnb_optimizer_config* config, bnb_stream stream);

/* As bnb_cpu_optimizer_update_8bit_blockwise. */
BNB_API bnb_status bnb_cuda_optimizer_update_8bit_blockwise(
    const void* g, bnb_dtype g_dtype, const float* qmap1, const float* qmap2,
    void* p, bnb_dtype p_dtype, uint8_t* state1, uint8_t* state2, float* absmax1, float* absmax2,
    int64_t n, bnb_rule rule, const bnb_optimizer_config* config, bnb_stream stream);

/* Begin a step on many tensors: gradients [count] and hyper are host memory, read before this returns; tensors [count]
 * and configs [count] are on the device. Writes each gradient's address to its tensor, counts its step, and derives its
 * config. */
BNB_API bnb_status bnb_cuda_optimizer_begin(
    const int64_t* gradients, const bnb_optimizer_hyper* hyper,
    bnb_optimizer_tensor* tensors, bnb_optimizer_config* configs,
    int64_t count, bnb_rule rule, bnb_stream stream);

/* Step on many tensors of one kind that have begun: with the maps, 8-bit state; without, 32-bit. scratch makes the
 * limits of the configs count, relative to the parameters' norms, and has bnb_cuda_optimizer_scratch(count) bytes; null
 * is no limit. blocks of 256 elements is the sum over all tensors. */
BNB_API bnb_status bnb_cuda_optimizer_update_many(
    const bnb_optimizer_tensor* tensors, const bnb_optimizer_config* configs, bnb_dtype g_dtype, bnb_dtype p_dtype,
    const float* qmap1, const float* qmap2, void* scratch,
    int64_t count, int64_t blocks, bnb_rule rule, bnb_stream stream);

BNB_API int64_t bnb_cuda_optimizer_scratch(int64_t count);

/* Memory that host and device share; pages migrate to whoever touches them. Freeing waits for the device. */
BNB_API bnb_status bnb_cuda_managed_alloc(void** memory, int64_t bytes);
BNB_API bnb_status bnb_cuda_managed_free(void* memory);

/* Start moving managed pages to a device, or to the host if device is -1. */
BNB_API bnb_status bnb_cuda_managed_prefetch(const void* memory, int64_t bytes, int32_t device, bnb_stream stream);

#ifdef __cplusplus
}
#endif

#endif
