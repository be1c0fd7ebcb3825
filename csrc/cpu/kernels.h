// The table of function pointers that every instruction set fills (variant.cpp) and dispatch.cpp chooses from.
//
// Kernels trust their arguments: abi/cpu.cpp has checked them. They own nothing; results do not depend on the
// number of threads.
#pragma once

#include <cstdint>

#include "../common/codebooks.h"
#include "../common/dtype.h"

namespace bnb {

constexpr int64_t kNestedBlocksize = 256;  // blocks whose quantized scales share one absmax

// The scale of block b: absmax[b]; or, if absmax_8bit is not null, code[absmax_8bit[b]] * absmax[b / 256] + *offset.
struct BlockScales {
    const float* absmax;
    const uint8_t* absmax_8bit;
    const float* code;
    const float* offset;
};

// out [M, N] = A [M, K] times the transpose of a packed weight [N, K], plus an optional bias [N].
template <class T>
struct GemmProblem {
    const T* A;
    const uint8_t* packed;
    BlockScales scales;
    const float* code;
    const T* bias;
    T* out;
    int64_t M, N, K, blocksize;
};

// One optimizer step on n elements. Which states there are follows from the rule; unorm may be null.
template <class T>
struct Update32bit {
    const T* g;
    T* p;
    float* state1;
    float* state2;
    float* unorm;
    int64_t n;
    bnb_rule rule;
    const bnb_optimizer_config* config;
};

template <class T>
struct Update8bit {
    const T* g;
    const float* qmap1;
    const float* qmap2;
    T* p;
    uint8_t* state1;
    uint8_t* state2;
    float* absmax1;
    float* absmax2;
    int64_t n;
    bnb_rule rule;
    const bnb_optimizer_config* config;
};

template <class T>
struct Update4bit {
    const T* g;
    const float* qmap1;
    const float* qmap2;
    T* p;
    uint8_t* state1;
    uint8_t* state2;
    float* absmax1;
    float* absmax2;
    int64_t n;
    bnb_rule rule;
    const bnb_optimizer_config* config;
    int64_t key;
};

// One step on `count` tensors of one kind, whose g, p and n are of type T: 8-bit state with maps, 32-bit without.
template <class T>
struct UpdateMany {
    const bnb_optimizer_tensor* tensors;
    const bnb_optimizer_config* configs;
    const float* qmap1;
    const float* qmap2;
    int64_t count;
    bnb_rule rule;
};

// Kernels that exist once per element type.
template <class T>
struct TypedKernels {
    void (*quantize_4bit)(
        const T* values, const FourBitFormat& format, uint8_t* packed, float* absmax, int64_t n, int64_t blocksize,
        int32_t threads);
    void (*dequantize_4bit)(
        const uint8_t* packed, const float* absmax, const FourBitFormat& format, T* values, int64_t n,
        int64_t blocksize, int32_t threads);
    void (*gemm_4bit)(const GemmProblem<T>& problem, int32_t threads);
    void (*gemm_4bit_transposed)(const GemmProblem<T>& problem, int32_t threads);  // A [M, N] times the weight
    void (*quantize_blockwise)(
        const float* code, const T* values, uint8_t* codes, float* absmax, int64_t n, int64_t blocksize,
        int32_t threads);
    void (*dequantize_blockwise)(
        const float* code, const uint8_t* codes, const float* absmax, T* values, int64_t n, int64_t blocksize,
        int32_t threads);
    void (*embedding_4bit)(
        const int64_t* indices, const uint8_t* packed, const float* absmax, const FourBitFormat& format, T* out,
        int64_t count, int64_t columns, int64_t blocksize, int32_t threads);
    void (*embedding_8bit)(
        const int64_t* indices, const int8_t* table, const float* absmax, T* out, int64_t count, int64_t columns,
        int32_t threads);
    void (*optimizer_update_32bit)(const Update32bit<T>& problem, int32_t threads);
    void (*optimizer_update_8bit)(const Update8bit<T>& problem, int32_t threads);
    void (*optimizer_update_4bit)(const Update4bit<T>& problem, int32_t threads);
    void (*optimizer_update_many)(const UpdateMany<T>& problem, int32_t threads);
};

struct Kernels {
    const char* name;
    TypedKernels<float> float32;
    TypedKernels<Half> float16;
    TypedKernels<BFloat16> bfloat16;
    void (*round_to_bfloat16)(
        const float* values, BFloat16* rounded, int64_t n, int64_t key, int64_t offset, int32_t threads);

    const TypedKernels<float>& of(TypeTag<float>) const { return float32; }
    const TypedKernels<Half>& of(TypeTag<Half>) const { return float16; }
    const TypedKernels<BFloat16>& of(TypeTag<BFloat16>) const { return bfloat16; }
};

// What AMX changes of the kernels of avx512bf16.
template <class T>
struct TypedTiledProducts {
    void (*gemm_4bit)(const GemmProblem<T>& problem, int32_t threads);
    void (*gemm_4bit_transposed)(const GemmProblem<T>& problem, int32_t threads);
};

struct TiledProducts {
    TypedTiledProducts<float> float32;
    TypedTiledProducts<Half> float16;
    TypedTiledProducts<BFloat16> bfloat16;
};

// The chosen kernels: the best this machine runs, or those BNB_CPU_ISA names. Decided at the first call.
const Kernels& kernels();                // throws if BNB_CPU_ISA cannot be honoured
const Kernels* find_kernels() noexcept;  // null then
const char* available_variants() noexcept;

}  // namespace bnb
