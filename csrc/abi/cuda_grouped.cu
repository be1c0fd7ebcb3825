// bnb_cuda_gemm_4bit_grouped*: check the arguments, choose the kernel, call the launcher. The current device must be
// the one the pointers belong to.

#include <algorithm>

#include "../bnb.h"
#include "../common/codebooks.h"
#include "../cuda/device.cuh"
#include "../cuda/launchers.h"
#include "arguments.h"
#include "guard.h"

namespace bnb {

namespace {

constexpr int64_t kMaxSize = int64_t(1) << 30;  // of a dimension, which then fits an int with room to spare
constexpr int kTensorCores = 80;                // compute capability whose instructions the fast kernel needs

struct Sizes {
    int64_t E, R, N, K, blocksize;
};

// Vectors of codes and of A lie whole in a row and in a block; forward, so do the 64 products that share a scale.
bool fits_tensor_cores(const GroupedGemm4bit& p, bnb_dtype dtype, bool transposed, int64_t blocksize) {
    const bool shape = transposed ? p.K % 32 == 0 && p.N % 8 == 0 : p.K % 64 == 0 && blocksize >= 64;
    return dtype != BNB_DTYPE_FLOAT32 && shape && p.N > 0 && p.K > 0 && is_aligned_16(p.A) && is_aligned_16(p.packed) &&
           current_device().capability >= kTensorCores;
}

void check_sizes(const Sizes& s, bnb_dtype dtype, bnb_format format) {
    check_dtype(dtype);
    require(find_format(format) != nullptr, "unknown 4-bit format ", int(format));
    require(
        std::min({s.E, s.R, s.N, s.K}) >= 0 && std::max({s.E, s.R, s.N, s.K}) < kMaxSize,
        "sizes must be from 0 to 2^30 - 1, got E = ", s.E, ", R = ", s.R, ", N = ", s.N, ", K = ", s.K);
    require(
        s.blocksize >= 32 && (s.blocksize & (s.blocksize - 1)) == 0,
        "blocksize must be a power of two from 32 on, got ", s.blocksize);
    require(s.N * s.K % s.blocksize == 0, "an expert must be a whole number of blocks of ", s.blocksize);
}

// `problem` has all but the sizes and what follows from them.
void multiply(
    GroupedGemm4bit problem, const Sizes& sizes, bnb_dtype dtype, bnb_format format, bool transposed,
    bnb_stream stream) {
    check_sizes(sizes, dtype, format);
    if (sizes.R == 0 || (transposed ? sizes.K : sizes.N) == 0) return;
    require(problem.out, "null pointer");
    const BlockScales& scales = problem.scales;
    require(!scales.codes || (scales.code && scales.offset), "nested statistics need their code and offset");
    require(sizes.E == 0 || problem.offsets, "null pointer for the offsets");
    require(
        sizes.E * sizes.N * sizes.K == 0 || (problem.A && problem.packed && scales.absmax),
        "null pointer for A, the weights or their scales");
    const FourBitFormat* values = find_format(format);
    std::copy(values->values, values->values + 16, problem.values);
    problem.E = static_cast<int>(sizes.E);
    problem.R = static_cast<int>(sizes.R);
    problem.N = static_cast<int>(sizes.N);
    problem.K = static_cast<int>(sizes.K);
    problem.block_shift = shift_of(sizes.blocksize);
    if (problem.E > 0 && fits_tensor_cores(problem, dtype, transposed, sizes.blocksize)) {
        gemm_4bit_grouped_mma(problem, dtype, transposed, static_cast<cudaStream_t>(stream));
    } else {
        gemm_4bit_grouped_simt(problem, dtype, transposed, static_cast<cudaStream_t>(stream));
    }
}

}  // namespace

}  // namespace bnb

using namespace bnb;

extern "C" {

bnb_status bnb_cuda_gemm_4bit_grouped(
    const void* A, bnb_dtype dtype, const uint8_t* packed, const float* absmax, const uint8_t* absmax_8bit,
    const float* absmax_code, const float* absmax_offset, bnb_format format, const int32_t* offsets, const void* bias,
    void* out, int64_t E, int64_t R, int64_t N, int64_t K, int64_t blocksize, bnb_stream stream) {
    return guarded("bnb_cuda_gemm_4bit_grouped", [&] {
        GroupedGemm4bit problem{A, packed, {absmax, absmax_8bit, absmax_code, absmax_offset}};
        problem.offsets = offsets;
        problem.bias = bias;
        problem.out = out;
        multiply(problem, {E, R, N, K, blocksize}, dtype, format, false, stream);
    });
}

bnb_status bnb_cuda_gemm_4bit_grouped_transposed(
    const void* A, bnb_dtype dtype, const uint8_t* packed, const float* absmax, const uint8_t* absmax_8bit,
    const float* absmax_code, const float* absmax_offset, bnb_format format, const int32_t* offsets, void* out,
    int64_t E, int64_t R, int64_t N, int64_t K, int64_t blocksize, bnb_stream stream) {
    return guarded("bnb_cuda_gemm_4bit_grouped_transposed", [&] {
        GroupedGemm4bit problem{A, packed, {absmax, absmax_8bit, absmax_code, absmax_offset}};
        problem.offsets = offsets;
        problem.out = out;
        multiply(problem, {E, R, N, K, blocksize}, dtype, format, true, stream);
    });
}

}  // extern "C"
