// What the 4-bit products are compiled for.
#pragma once

#include <type_traits>

#include "../../common/dtype.h"
#include "../launch.cuh"
#include "problem.h"

namespace bnb {

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
