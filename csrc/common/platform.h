// The few places where compilers differ, and the namespace that keeps instruction sets apart.
//
// Inline functions of a header are merged by the linker across translation units. If one of those units was
// compiled for AVX-512, its copy could end up running on a machine without it. Every unit with flags of its own
// therefore defines BNB_VARIANT, and all inline functions live in an inline namespace of that name. Plain structs
// that cross the border between units stay in namespace bnb itself.
#pragma once

#if defined(__CUDACC__) || defined(__HIPCC__)
#define BNB_HOST_DEVICE __host__ __device__
#else
#define BNB_HOST_DEVICE
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#define BNB_INLINE __forceinline
#define BNB_INLINE_BODY
#define BNB_HIDE(pointer) ((void)0)
#define BNB_OPAQUE(value) ((void)0)
#define BNB_PREFETCH(address) ((void)0)
#define BNB_PREFETCH_FAR(address) ((void)0)
#else
#define BNB_INLINE inline __attribute__((always_inline))
#define BNB_INLINE_BODY __attribute__((always_inline))      // of a lambda, after its parameters
#define BNB_HIDE(pointer) asm volatile("" : "+r"(pointer))  // what it points at is loaded anew
#define BNB_OPAQUE(value) asm("" : "+r"(value))             // what is computed from it is not computed otherwise
#define BNB_PREFETCH(address) __builtin_prefetch(address)
#define BNB_PREFETCH_FAR(address) __builtin_prefetch(address, 0, 2)  // as far as the second-level cache
#endif

#ifndef BNB_VARIANT
#define BNB_VARIANT baseline
#endif
#define BNB_NAMESPACE_BEGIN \
    namespace bnb {         \
    inline namespace BNB_VARIANT {
#define BNB_NAMESPACE_END \
    }                     \
    }
