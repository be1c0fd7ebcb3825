// The LLM.int8() kernels for one instruction set, as variant.cpp is for the others; compiled for VNNI
// and for AMX besides.

#include <cstdint>
#include <cstring>

#include "int8_kernels.h"
#include "parallel.h"
#include "simd/int8.h"

#include "int8.inl"
#include "int8_matmul.inl"

#define BNB_STRING_(name) #name
#define BNB_STRING(name) BNB_STRING_(name)

BNB_NAMESPACE_BEGIN

template <class T>
constexpr TypedInt8Kernels<T> typed_int8_kernels() {
    return {int8_quantize<T>, int8_linear<T>, int8_scaled_mm<T>, int8_mm_dequant<T>};
}

extern const Int8Kernels variant_int8_kernels;
constexpr Int8Kernels kVariantInt8Kernels = {
    BNB_STRING(BNB_VARIANT),        typed_int8_kernels<float>(), typed_int8_kernels<Half>(),
    typed_int8_kernels<BFloat16>(), int8_linear_matmul,          int8_vectorwise_dequant,
};
const Int8Kernels variant_int8_kernels = kVariantInt8Kernels;

BNB_NAMESPACE_END
