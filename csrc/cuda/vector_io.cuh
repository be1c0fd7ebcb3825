// Full-width loads and stores, and conversions the device has instructions for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/dtype.h"

namespace bnb {

// kCount values that move in pieces of up to 16 bytes.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
    T values[kCount];
};

template <class T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load_pack(const T* source) {
    return *reinterpret_cast<const Pack<T, kCount>*>(source);
}

template <class T, int kCount>
__device__ __forceinline__ void store_pack(T* target, const Pack<T, kCount>& pack) {
    *reinterpret_cast<Pack<T, kCount>*>(target) = pack;
}

template <class T, int kCount>
bool is_aligned(const T* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % alignof(Pack<T, kCount>) == 0;
}

// As to_float of common/dtype.h.
__device__ __forceinline__ float widened(float value) { return value; }
__device__ __forceinline__ float widened(Half value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ __forceinline__ float widened(BFloat16 value) { return to_float(value); }

// Round to nearest even, as common/dtype.h does.
template <class T>
__device__ __forceinline__ T round_to(float value);

template <>
__device__ __forceinline__ float round_to<float>(float value) {
    return value;
}

template <>
__device__ __forceinline__ Half round_to<Half>(float value) {
    return {__half_as_ushort(__float2half_rn(value))};
}

template <>
__device__ __forceinline__ BFloat16 round_to<BFloat16>(float value) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}

}  // namespace bnb
