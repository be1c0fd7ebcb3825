// What bnb_cuda_gemm_4bit and bnb_cuda_int8_linear do: part of every build, since it asks no device.

#include "../cuda/gemm_4bit/plan.h"
#include "../cuda/int8/problem.h"

extern "C" int32_t bnb_cuda_gemm_4bit_plan(
    bnb_dtype dtype, int64_t M, int64_t N, int64_t K, int64_t blocksize, int32_t capability, int32_t multiprocessors) {
    return bnb::plan_gemm_4bit({dtype, M, N, K, blocksize}, {capability, multiprocessors});
}

extern "C" int64_t bnb_cuda_gemm_4bit_workspace(
    bnb_dtype dtype, int64_t M, int64_t N, int64_t K, int64_t blocksize, int32_t tuning, int32_t multiprocessors) {
    return bnb::workspace_of_gemm_4bit({dtype, M, N, K, blocksize}, tuning, multiprocessors);
}

extern "C" int64_t bnb_cuda_int8_linear_workspace(int64_t M, int64_t N, int64_t K, float threshold) {
    return bnb::Int8Workspace(nullptr, M, N, K, threshold > 0.0f).bytes;
}
