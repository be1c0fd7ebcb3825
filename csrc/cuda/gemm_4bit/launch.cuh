// What launches of the tensor-core kernels have in common.
#pragma once

#include <atomic>
#include <type_traits>

#include "../../common/dtype.h"
#include "../device.cuh"
#include "problem.h"

namespace bnb {

// More shared memory than 48 KB must be asked for, once for each kernel and device.
inline void allow_shared_memory(const void* kernel, int bytes, int device, std::atomic<uint64_t>& done) {
    const uint64_t bit = uint64_t(1) << (device % 64);
    if (device < 64 && (done.load(std::memory_order_relaxed) & bit)) return;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
    done.fetch_or(bit, std::memory_order_relaxed);
}

// Start before the predecessor has ended; the kernel waits itself.
inline cudaLaunchAttribute programmatic_launch() {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    return attribute;
}

// Call body with a number below kCount as a constant.
template <int kCount, int kFrom = 0, class Body>
void visit_number(int number, Body&& body) {
    if constexpr (kFrom < kCount) {
        if (number == kFrom) return body(std::integral_constant<int, kFrom>{});
        visit_number<kCount, kFrom + 1>(number, body);
    }
}

// Call body with what a kernel is compiled for: a value of the 16-bit dtype, whether scales are nested, the tuning.
template <int kCount, class Body>
void visit_kernel(const Gemm4bit& problem, bnb_dtype dtype, int tuning, Body&& body) {
    visit_number<kCount>(tuning, [&](auto number) {
        const auto typed = [&](auto value) {
            if (problem.scales.codes != nullptr) {
                body(value, std::true_type{}, number);
            } else {
                body(value, std::false_type{}, number);
            }
        };
        if (dtype == BNB_DTYPE_BFLOAT16) {
            typed(BFloat16{});
        } else {
            typed(Half{});
        }
    });
}

}  // namespace bnb
