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

// Whether the tensor-core kernel for few tokens computes this problem in one of its shapes.
bool can_multiply_with_mma(const GemmProblem& problem);

// Whether the kernel that takes anything computes this problem.
bool can_multiply_with_simt(const GemmProblem& problem);

// A position in kMmaTunings, BNB_GEMM_SIMT or BNB_GEMM_DEQUANTIZE.
int plan_gemm_4bit(const GemmProblem& problem, const GemmDevice& device);

}  // namespace bnb
