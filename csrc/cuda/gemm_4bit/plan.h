// Which kernel multiplies by a 4-bit weight: a pure function of the problem and the device.
#pragma once

#include <cstdint>

#include "../../bnb.h"

namespace bnb {

struct GemmProblem {
    bnb_dtype dtype;
    int64_t M, N, K, blocksize;
};

struct GemmDevice {
    int capability;  // 90 for sm_90
    int multiprocessors;
};

// Whether the tensor-core kernels compute this problem in one of their shapes.
bool can_multiply_with_mma(const GemmProblem& problem);

// Whether the kernel that takes anything computes this problem.
bool can_multiply_with_simt(const GemmProblem& problem);

// A position in kMmaTunings, or after those in kWgmmaTunings if there may be a workspace; BNB_GEMM_SIMT or
// BNB_GEMM_DEQUANTIZE.
int plan_gemm_4bit(const GemmProblem& problem, const GemmDevice& device, bool workspace = true);

// Bytes of workspace with which a tuning computes a problem.
int64_t workspace_of_gemm_4bit(const GemmProblem& problem, int tuning, int multiprocessors);

}  // namespace bnb
