// bnb_cuda_*: check the arguments, turn enums into types, call the launcher. The current device must be the one the
// pointers belong to.

#include <algorithm>

#include "../bnb.h"
#include "../common/codebooks.h"
#include "../common/dtype.h"
#include "../cuda/device.cuh"
#include "../cuda/gemm_4bit/plan.h"
#include "../cuda/gemm_4bit/tuning.h"
#include "../cuda/launchers.h"
#include "arguments.h"
#include "guard.h"

namespace bnb {

namespace {

void check_dequantize_4bit(bnb_format format, bnb_dtype dtype, int64_t blocksize) {
    check_dtype(dtype);
    require(blocksize % 16 == 0, "blocksize must be a multiple of 16, got ", blocksize);
    require(find_format(format) != nullptr, "unknown 4-bit format ", int(format));
}

void check_embedding(int64_t count, int64_t rows, int64_t columns, bool pointers) {
    require(
        count >= 0 && rows >= 0 && columns >= 0, "count, rows, columns must not be negative, got ", count, ", ", rows,
        ", ", columns);
    require(count * columns == 0 || pointers, "null pointer for the indices, the table or out");
}

int fused_tuning(const GemmProblem& problem, bool aligned) {
    const Device device = current_device();
    const int tuning =
        aligned ? plan_gemm_4bit(problem, {device.capability, device.multiprocessors}, false) : BNB_GEMM_SIMT;
    return tuning == BNB_GEMM_DEQUANTIZE ? BNB_GEMM_SIMT : tuning;
}

void check_gemm_4bit(const GemmProblem& p, int tuning) {
    check_dtype(p.dtype);
    const bool nothing = p.M == 0 || p.N == 0;
    require(p.M >= 0 && p.N >= 0 && p.K >= 0, "sizes must not be negative, got ", p.M, ", ", p.N, ", ", p.K);
    require(
        nothing || (tuning == BNB_GEMM_SIMT ? can_multiply_with_simt(p) : can_multiply_with_mma(p)),
        "no kernel of tuning ", tuning, " for M = ", p.M, ", N = ", p.N, ", K = ", p.K, ", blocksize ", p.blocksize);
}

void check_blocks(int64_t n, int64_t blocksize, bool pointers) {
    require(n >= 0, "n must not be negative, got ", n);
    require(blocksize > 0, "blocksize must be positive, got ", blocksize);
    require(n == 0 || pointers, "null pointer for ", n, " values");
}

}  // namespace

}  // namespace bnb

using namespace bnb;

extern "C" {

bnb_status bnb_cuda_quantize_4bit(
    const void* values, bnb_dtype dtype, bnb_format format, uint8_t* packed, float* absmax, int64_t n,
    int64_t blocksize, bnb_stream stream) {
    return guarded("bnb_cuda_quantize_4bit", [&] {
        check_blocks(n, blocksize, values && packed && absmax);
        check_dtype(dtype);
        require(find_format(format) != nullptr, "unknown 4-bit format ", int(format));
        quantize_4bit(values, dtype, format, packed, absmax, n, blocksize, as_stream(stream));
    });
}

bnb_status bnb_cuda_quantize_blockwise(
    const float* code, const void* values, bnb_dtype dtype, uint8_t* codes, float* absmax, int64_t n, int64_t blocksize,
    bnb_stream stream) {
    return guarded("bnb_cuda_quantize_blockwise", [&] {
        check_blocks(n, blocksize, code && values && codes && absmax);
        check_dtype(dtype);
        quantize_blockwise(values, dtype, code, codes, absmax, n, blocksize, as_stream(stream));
    });
}

bnb_status bnb_cuda_dequantize_4bit(
    const uint8_t* packed, const float* absmax, bnb_format format, void* values, bnb_dtype dtype, int64_t n,
    int64_t blocksize, bnb_stream stream) {
    return guarded("bnb_cuda_dequantize_4bit", [&] {
        check_blocks(n, blocksize, packed && absmax && values);
        check_dequantize_4bit(format, dtype, blocksize);
        dequantize_4bit(
            packed, {absmax, nullptr, nullptr, nullptr}, format, values, dtype, n, blocksize, as_stream(stream));
    });
}

bnb_status bnb_cuda_dequantize_4bit_nested(
    const uint8_t* packed, const float* absmax, const uint8_t* absmax_8bit, const float* absmax_code,
    const float* absmax_offset, bnb_format format, void* values, bnb_dtype dtype, int64_t n, int64_t blocksize,
    bnb_stream stream) {
    return guarded("bnb_cuda_dequantize_4bit_nested", [&] {
        check_blocks(n, blocksize, packed && absmax && absmax_8bit && absmax_code && absmax_offset && values);
        check_dequantize_4bit(format, dtype, blocksize);
        dequantize_4bit(
            packed, {absmax, absmax_8bit, absmax_code, absmax_offset}, format, values, dtype, n, blocksize,
            as_stream(stream));
    });
}

bnb_status bnb_cuda_embedding_4bit(
    const int64_t* indices, const uint8_t* packed, const float* absmax, bnb_format format, void* out, bnb_dtype dtype,
    int64_t count, int64_t rows, int64_t columns, int64_t blocksize, bnb_stream stream) {
    return guarded("bnb_cuda_embedding_4bit", [&] {
        check_blocks(rows * columns, blocksize, packed && absmax);
        check_embedding(count, rows, columns, indices && out);
        check_dequantize_4bit(format, dtype, blocksize);
        embedding_4bit(indices, packed, absmax, format, out, dtype, count, rows, columns, blocksize, as_stream(stream));
    });
}

bnb_status bnb_cuda_embedding_8bit(
    const int64_t* indices, const int8_t* table, const float* absmax, void* out, bnb_dtype dtype, int64_t count,
    int64_t rows, int64_t columns, bnb_stream stream) {
    return guarded("bnb_cuda_embedding_8bit", [&] {
        check_embedding(count, rows, columns, indices && table && absmax && out);
        check_dtype(dtype);
        embedding_8bit(indices, table, absmax, out, dtype, count, rows, columns, as_stream(stream));
    });
}

bnb_status bnb_cuda_dequantize_blockwise(
    const float* code, const uint8_t* codes, const float* absmax, void* values, bnb_dtype dtype, int64_t n,
    int64_t blocksize, bnb_stream stream) {
    return guarded("bnb_cuda_dequantize_blockwise", [&] {
        check_blocks(n, blocksize, code && codes && absmax && values);
        visit_or_refuse(dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            dequantize_blockwise(code, codes, absmax, static_cast<T*>(values), n, blocksize, as_stream(stream));
        });
    });
}

bnb_status bnb_cuda_gemm_4bit(
    const void* A, bnb_dtype dtype, const uint8_t* packed, const float* absmax, const uint8_t* absmax_8bit,
    const float* absmax_code, const float* absmax_offset, const float* code, bnb_format format, const void* bias,
    void* out, int64_t M, int64_t N, int64_t K, int64_t blocksize, int32_t tuning, void* workspace, bnb_stream stream) {
    return guarded("bnb_cuda_gemm_4bit", [&] {
        const GemmProblem sizes{dtype, M, N, K, blocksize};
        if (tuning == BNB_GEMM_FUSED) tuning = fused_tuning(sizes, is_aligned_16(A) && is_aligned_16(packed));
        check_gemm_4bit(sizes, tuning);
        if (M == 0 || N == 0) return;
        require(A && packed && absmax && out, "null pointer");
        require(!absmax_8bit || (absmax_code && absmax_offset), "nested statistics need their code and offset");
        const FourBitFormat* values = find_format(format);
        require(code || values, "unknown 4-bit format ", int(format));
        Gemm4bit problem{};
        problem.A = A;
        problem.packed = packed;
        problem.scales = {absmax, absmax_8bit, absmax_code, absmax_offset};
        problem.code = code;
        if (values) std::copy(values->values, values->values + 16, problem.values);
        problem.bias = bias;
        problem.out = out;
        problem.M = static_cast<int>(M);
        problem.N = static_cast<int>(N);
        problem.K = static_cast<int>(K);
        while (int64_t(1) << problem.block_shift < blocksize) ++problem.block_shift;
        if (tuning == BNB_GEMM_SIMT) return gemm_4bit_simt(problem, dtype, as_stream(stream));
        require(is_aligned_16(A) && is_aligned_16(packed), "A and packed must be aligned to 16 bytes");
        if (tuning < kMmaTuningCount) return gemm_4bit_mma(problem, dtype, tuning, as_stream(stream));
        require(workspace && is_aligned_16(workspace), "tuning ", tuning, " needs a workspace aligned to 16 bytes");
        problem.workspace = workspace;
        gemm_4bit_wgmma(problem, dtype, tuning - kMmaTuningCount, as_stream(stream));
    });
}

bnb_status bnb_cuda_managed_alloc(void** memory, int64_t bytes) {
    return guarded("bnb_cuda_managed_alloc", [&] {
        require(memory != nullptr, "memory must not be null");
        require(bytes > 0, "bytes must be positive, got ", bytes);
        *memory = managed_alloc(bytes);
    });
}

bnb_status bnb_cuda_managed_free(void* memory) {
    return guarded("bnb_cuda_managed_free", [&] { managed_free(memory); });
}

bnb_status bnb_cuda_managed_prefetch(const void* memory, int64_t bytes, int32_t device, bnb_stream stream) {
    return guarded("bnb_cuda_managed_prefetch", [&] {
        require(memory != nullptr, "memory must not be null");
        require(bytes >= 0, "bytes must not be negative, got ", bytes);
        if (bytes > 0) managed_prefetch(memory, bytes, device, as_stream(stream));
    });
}

}  // extern "C"
