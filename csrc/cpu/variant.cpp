// Every CPU kernel for one instruction set. CMake compiles this file once per set, with that set's flags and
// BNB_VARIANT naming the namespace. Nothing here may call an inline function of the standard library that the
// linker could merge with another unit's (see common/platform.h).

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "parallel.h"
#include "simd/vector.h"

#include "blockwise.inl"
#include "embedding.inl"
#include "fourbit.inl"
#include "gemm_4bit.inl"
#include "optimizer.inl"
#include "optimizer_4bit.inl"
#include "optimizer_8bit.inl"
#include "optimizer_many.inl"
#include "rounding.inl"

#define BNB_STRING_(name) #name
#define BNB_STRING(name) BNB_STRING_(name)

BNB_NAMESPACE_BEGIN

template <class T>
constexpr TypedKernels<T> typed_kernels() {
    return {
        quantize_4bit<T>,         dequantize_4bit<T>,       gemm_4bit<T>,
        gemm_4bit_transposed<T>,  quantize_blockwise<T>,    dequantize_blockwise<T>,
        embedding_4bit<T>,        embedding_8bit<T>,        optimizer_update_32bit<T>,
        optimizer_update_8bit<T>, optimizer_update_4bit<T>, optimizer_update_many<T>,
    };
}

extern const Kernels variant_kernels;
constexpr Kernels kVariantKernels = {
    BNB_STRING(BNB_VARIANT),   typed_kernels<float>(), typed_kernels<Half>(),
    typed_kernels<BFloat16>(), round_to_bfloat16,
};
const Kernels variant_kernels = kVariantKernels;

BNB_NAMESPACE_END
