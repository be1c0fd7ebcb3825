// CUDA status -> bnb::Error.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/error.h"

namespace bnb {

inline void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // an error we report must not be found again by the caller's next check
    throw Error(
        status == cudaErrorMemoryAllocation ? BNB_STATUS_OUT_OF_MEMORY : BNB_STATUS_DEVICE_ERROR,
        text(what, ": ", cudaGetErrorString(status)));
}

// Call right after <<<>>>.
inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

}  // namespace bnb
