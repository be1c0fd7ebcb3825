// bnb_cpu_*: check the arguments, turn enums into types, call the variant's kernel.

#include <vector>

#include "../bnb.h"
#include "../common/codebooks.h"
#include "../common/dtype.h"
#include "../common/optimizer_rules.h"
#include "../common/optimizer_scalars.h"
#include "../cpu/kernels.h"
#include "../cpu/tiled_layout.h"
#include "arguments.h"
#include "guard.h"

namespace bnb {

namespace {

const FourBitFormat& format_of(bnb_format format) {
    const FourBitFormat* found = find_format(format);
    require(found != nullptr, "unknown 4-bit format ", int(format));
    return *found;
}

// Sizes of data in blocks; the pointers may be null only if there is nothing to point to.
void check_blocks(int64_t n, int64_t blocksize, bool pointers) {
    require(n >= 0, "n must not be negative, got ", n);
    require(blocksize > 0, "blocksize must be positive, got ", blocksize);
    require(n == 0 || pointers, "null pointer for ", n, " values");
}

// Packed blocks must start at a byte.
void check_4bit_blocks(int64_t n, int64_t blocksize, bool pointers) {
    check_blocks(n, blocksize, pointers);
    require(blocksize % 2 == 0, "blocksize must be even, got ", blocksize);
}

void check_gemm_4bit(int64_t M, int64_t N, int64_t K, int64_t blocksize, bool pointers, const BlockScales& scales) {
    require(M >= 0 && N >= 0 && K >= 0, "M, N, K must not be negative, got ", M, ", ", N, ", ", K);
    check_4bit_blocks(N * K, blocksize, pointers && scales.absmax);
    require(!scales.absmax_8bit || (scales.code && scales.offset), "absmax_8bit needs absmax_code and absmax_offset");
}

// The states a rule keeps, apart from state1.
void check_optimizer(bnb_dtype g_dtype, bnb_dtype p_dtype, int64_t n, bnb_rule rule, bool pointers, bool state2) {
    require(g_dtype == p_dtype, "g and p must have one dtype, got ", int(g_dtype), " and ", int(p_dtype));
    require(n >= 0, "n must not be negative, got ", n);
    require(n == 0 || pointers, "null pointer for ", n, " elements");
    const bool known = visit_rule(rule, [&](auto found) {
        using Rule = decltype(found);
        require(n == 0 || state2 == (Rule::kStates > Rule::kFirst), "state2 does not fit rule ", int(rule));
    });
    require(known, "unknown optimizer rule ", int(rule));
}

void check_embedding(const int64_t* indices, int64_t count, int64_t rows, int64_t columns, bool pointers) {
    require(
        count >= 0 && rows >= 0 && columns >= 0, "count, rows, columns must not be negative, got ", count, ", ", rows,
        ", ", columns);
    require(count == 0 || indices, "null pointer for ", count, " indices");
    require(count * columns == 0 || pointers, "null pointer for the table or out");
    for (int64_t i = 0; i < count; ++i) {
        require(
            indices[i] >= 0 && indices[i] < rows, "index ", indices[i], " is out of range for a table of ", rows,
            " rows");
    }
}

// Give every tensor its gradient, count its step and derive its scalars, which equal steps share.
std::vector<bnb_optimizer_config> begin_step(
    const int64_t* gradients, const bnb_optimizer_hyper& hyper, bnb_rule rule, bnb_optimizer_tensor* tensors,
    int64_t count) {
    std::vector<bnb_optimizer_config> configs;
    configs.reserve(static_cast<size_t>(count));
    const double lr = hyper.lr_address ? double(*hyper.lr_address) : hyper.lr;
    visit_rule(rule, [&](auto found) {
        for (int64_t i = 0; i < count; ++i) {
            tensors[i].g = reinterpret_cast<const void*>(gradients[i]);
            const int64_t step = ++*tensors[i].step;
            const bool as_before = i > 0 && *tensors[i - 1].step == step;
            configs.push_back(as_before ? configs.back() : step_config<decltype(found)>(hyper, lr, step));
        }
    });
    return configs;
}

}  // namespace

}  // namespace bnb

using namespace bnb;

extern "C" {

bnb_status bnb_cpu_quantize_4bit(
    const void* values, bnb_dtype dtype, bnb_format format, uint8_t* packed, float* absmax, int64_t n,
    int64_t blocksize, int32_t threads) {
    return guarded("bnb_cpu_quantize_4bit", [&] {
        check_4bit_blocks(n, blocksize, values && packed && absmax);
        visit_or_refuse(dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            kernels().of(tag).quantize_4bit(
                static_cast<const T*>(values), format_of(format), packed, absmax, n, blocksize, threads);
        });
    });
}

bnb_status bnb_cpu_dequantize_4bit(
    const uint8_t* packed, const float* absmax, bnb_format format, void* values, bnb_dtype dtype, int64_t n,
    int64_t blocksize, int32_t threads) {
    return guarded("bnb_cpu_dequantize_4bit", [&] {
        check_4bit_blocks(n, blocksize, values && packed && absmax);
        visit_or_refuse(dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            kernels().of(tag).dequantize_4bit(
                packed, absmax, format_of(format), static_cast<T*>(values), n, blocksize, threads);
        });
    });
}

bnb_status bnb_cpu_embedding_4bit(
    const int64_t* indices, const uint8_t* packed, const float* absmax, bnb_format format, void* out, bnb_dtype dtype,
    int64_t count, int64_t rows, int64_t columns, int64_t blocksize, int32_t threads) {
    return guarded("bnb_cpu_embedding_4bit", [&] {
        check_embedding(indices, count, rows, columns, packed && absmax && out);
        check_4bit_blocks(rows * columns, blocksize, packed && absmax);
        visit_or_refuse(dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            kernels().of(tag).embedding_4bit(
                indices, packed, absmax, format_of(format), static_cast<T*>(out), count, columns, blocksize, threads);
        });
    });
}

bnb_status bnb_cpu_embedding_8bit(
    const int64_t* indices, const int8_t* table, const float* absmax, void* out, bnb_dtype dtype, int64_t count,
    int64_t rows, int64_t columns, int32_t threads) {
    return guarded("bnb_cpu_embedding_8bit", [&] {
        check_embedding(indices, count, rows, columns, table && absmax && out);
        visit_or_refuse(dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            kernels().of(tag).embedding_8bit(indices, table, absmax, static_cast<T*>(out), count, columns, threads);
        });
    });
}

bnb_status bnb_cpu_gemm_4bit(
    const void* A, bnb_dtype dtype, const uint8_t* packed, const float* absmax, const uint8_t* absmax_8bit,
    const float* absmax_code, const float* absmax_offset, const float* code, const void* bias, void* out, int64_t M,
    int64_t N, int64_t K, int64_t blocksize, int32_t threads) {
    return guarded("bnb_cpu_gemm_4bit", [&] {
        const BlockScales scales{absmax, absmax_8bit, absmax_code, absmax_offset};
        check_gemm_4bit(M, N, K, blocksize, packed && code, scales);
        require(M * N == 0 || (out && (K == 0 || A)), "null pointer for A or out");
        visit_or_refuse(dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            kernels().of(tag).gemm_4bit(
                {static_cast<const T*>(A), packed, scales, code, static_cast<const T*>(bias), static_cast<T*>(out), M,
                 N, K, blocksize},
                threads);
        });
    });
}

bnb_status bnb_cpu_gemm_4bit_with(const bnb_gemm_4bit_arguments* a) {
    if (!a) return guarded("bnb_cpu_gemm_4bit_with", [] { require(false, "null pointer for the arguments"); });
    return bnb_cpu_gemm_4bit(
        a->A, a->dtype, a->packed, a->absmax, a->absmax_8bit, a->absmax_code, a->absmax_offset, a->code, a->bias,
        a->out, a->M, a->N, a->K, a->blocksize, a->threads);
}

bnb_status bnb_cpu_gemm_4bit_transposed(
    const void* A, bnb_dtype dtype, const uint8_t* packed, const float* absmax, const uint8_t* absmax_8bit,
    const float* absmax_code, const float* absmax_offset, const float* code, void* out, int64_t M, int64_t N, int64_t K,
    int64_t blocksize, int32_t threads) {
    return guarded("bnb_cpu_gemm_4bit_transposed", [&] {
        const BlockScales scales{absmax, absmax_8bit, absmax_code, absmax_offset};
        check_gemm_4bit(M, N, K, blocksize, packed && code, scales);
        require(M * K == 0 || (out && (N == 0 || A)), "null pointer for A or out");
        visit_or_refuse(dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            kernels().of(tag).gemm_4bit_transposed(
                {static_cast<const T*>(A), packed, scales, code, nullptr, static_cast<T*>(out), M, N, K, blocksize},
                threads);
        });
    });
}

bnb_status bnb_cpu_quantize_blockwise(
    const float* code, const void* values, bnb_dtype dtype, uint8_t* codes, float* absmax, int64_t n, int64_t blocksize,
    int32_t threads) {
    return guarded("bnb_cpu_quantize_blockwise", [&] {
        check_blocks(n, blocksize, code && values && codes && absmax);
        visit_or_refuse(dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            kernels().of(tag).quantize_blockwise(
                code, static_cast<const T*>(values), codes, absmax, n, blocksize, threads);
        });
    });
}

bnb_status bnb_cpu_dequantize_blockwise(
    const float* code, const uint8_t* codes, const float* absmax, void* values, bnb_dtype dtype, int64_t n,
    int64_t blocksize, int32_t threads) {
    return guarded("bnb_cpu_dequantize_blockwise", [&] {
        check_blocks(n, blocksize, code && values && codes && absmax);
        visit_or_refuse(dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            kernels().of(tag).dequantize_blockwise(code, codes, absmax, static_cast<T*>(values), n, blocksize, threads);
        });
    });
}

bnb_status bnb_cpu_optimizer_update_32bit(
    const void* g, bnb_dtype g_dtype, void* p, bnb_dtype p_dtype, float* state1, float* state2, float* unorm, int64_t n,
    bnb_rule rule, const bnb_optimizer_config* config, int32_t threads) {
    return guarded("bnb_cpu_optimizer_update_32bit", [&] {
        check_optimizer(g_dtype, p_dtype, n, rule, g && p && state1 && config, state2 != nullptr);
        visit_or_refuse(p_dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            kernels().of(tag).optimizer_update_32bit(
                {static_cast<const T*>(g), static_cast<T*>(p), state1, state2, unorm, n, rule, config}, threads);
        });
    });
}

bnb_status bnb_cpu_optimizer_update_4bit_blockwise(
    const void* g, bnb_dtype g_dtype, const float* qmap1, const float* qmap2, void* p, bnb_dtype p_dtype,
    uint8_t* state1, uint8_t* state2, float* absmax1, float* absmax2, int64_t n, bnb_rule rule,
    const bnb_optimizer_config* config, int64_t key, int32_t threads) {
    return guarded("bnb_cpu_optimizer_update_4bit_blockwise", [&] {
        const bool pointers = g && p && state1 && qmap1 && absmax1 && config && (!state2 || (qmap2 && absmax2));
        check_optimizer(g_dtype, p_dtype, n, rule, pointers, state2 != nullptr);
        require(rule != BNB_RULE_ADEMAMIX, "no 4-bit state for rule ", int(rule));
        visit_or_refuse(p_dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            kernels().of(tag).optimizer_update_4bit(
                {static_cast<const T*>(g), qmap1, qmap2, static_cast<T*>(p), state1, state2, absmax1, absmax2, n, rule,
                 config, key},
                threads);
        });
    });
}

bnb_status bnb_cpu_round_to_bfloat16(
    const float* values, void* rounded, int64_t n, int64_t key, int64_t offset, int32_t threads) {
    return guarded("bnb_cpu_round_to_bfloat16", [&] {
        require(n >= 0, "n must not be negative, got ", n);
        require(n == 0 || (values && rounded), "null pointer for ", n, " elements");
        kernels().round_to_bfloat16(values, static_cast<BFloat16*>(rounded), n, key, offset, threads);
    });
}

bnb_status bnb_cpu_optimizer_update_8bit_blockwise(
    const void* g, bnb_dtype g_dtype, const float* qmap1, const float* qmap2, void* p, bnb_dtype p_dtype,
    uint8_t* state1, uint8_t* state2, float* absmax1, float* absmax2, int64_t n, bnb_rule rule,
    const bnb_optimizer_config* config, int32_t threads) {
    return guarded("bnb_cpu_optimizer_update_8bit_blockwise", [&] {
        const bool pointers = g && p && state1 && qmap1 && absmax1 && config && (!state2 || (qmap2 && absmax2));
        check_optimizer(g_dtype, p_dtype, n, rule, pointers, state2 != nullptr);
        visit_or_refuse(p_dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            kernels().of(tag).optimizer_update_8bit(
                {static_cast<const T*>(g), qmap1, qmap2, static_cast<T*>(p), state1, state2, absmax1, absmax2, n, rule,
                 config},
                threads);
        });
    });
}

bnb_status bnb_cpu_optimizer_update_many(
    const int64_t* gradients, const bnb_optimizer_hyper* hyper, bnb_optimizer_tensor* tensors, bnb_dtype dtype,
    const float* qmap1, const float* qmap2, int64_t count, bnb_rule rule, int32_t threads) {
    return guarded("bnb_cpu_optimizer_update_many", [&] {
        require(count >= 0, "count must not be negative, got ", count);
        if (count == 0) return;
        require(gradients && hyper && tensors, "null pointer for ", count, " tensors");
        require(hyper->max_unorm == 0.0 && !hyper->rounds, "no limit and no dice in a step on many tensors");
        for (int64_t i = 0; i < count; ++i) {
            const bnb_optimizer_tensor& t = tensors[i];
            const bool pointers =
                gradients[i] && t.p && t.state1 && (!qmap1 || (t.absmax1 && (!t.state2 || t.absmax2)));
            check_optimizer(dtype, dtype, t.n, rule, pointers, t.state2 != nullptr);
            require(!qmap1 || !t.state2 || qmap2, "rule ", int(rule), " needs qmap2");
        }
        visit_or_refuse(dtype, [&](auto tag) {
            const auto configs = begin_step(gradients, *hyper, rule, tensors, count);
            kernels().of(tag).optimizer_update_many({tensors, configs.data(), qmap1, qmap2, count, rule}, threads);
        });
    });
}

bool bnb_cpu_has_avx512f(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    return __builtin_cpu_supports("avx512f");
#else
    return false;
#endif
}

bool bnb_cpu_has_avx512bf16(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    return __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

bool bnb_cpu_is_intel(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    return __builtin_cpu_is("intel");
#else
    return false;
#endif
}

bnb_status bnb_cpu_gemm_4bit_tiled(
    const void* x, const uint8_t* tiles, const void* absmax, bnb_format format, void* out, int64_t M, int64_t N,
    int64_t K, int64_t blocksize, int64_t x_stride, int64_t out_stride, int32_t threads) {
    return guarded("bnb_cpu_gemm_4bit_tiled", [&] {
        require(M >= 0 && N >= 0 && K >= 0, "M, N, K must not be negative, got ", M, ", ", N, ", ", K);
        check_4bit_blocks(N * K, blocksize, tiles && absmax);
        require(N % 32 == 0, "N must be a multiple of 32, got ", N);
        require(K % blocksize == 0, "K must be a multiple of blocksize ", blocksize, ", got ", K);
        require(M * N == 0 || (x && out), "null pointer for x or out");
        const FourBitFormat& table = format_of(format);
        std::vector<uint8_t> packed(static_cast<size_t>(N * K / 2));
        std::vector<float> scales(static_cast<size_t>(N * K / blocksize));
        untile_4bit(tiles, static_cast<const BFloat16*>(absmax), packed.data(), scales.data(), N, K, K / blocksize);
        for (int64_t m = 0; m < M; ++m) {
            const BFloat16* row = static_cast<const BFloat16*>(x) + m * x_stride;
            BFloat16* target = static_cast<BFloat16*>(out) + m * out_stride;
            kernels().bfloat16.gemm_4bit(
                {row,
                 packed.data(),
                 {scales.data(), nullptr, nullptr, nullptr},
                 table.values,
                 nullptr,
                 target,
                 1,
                 N,
                 K,
                 blocksize},
                threads);
        }
    });
}

}  // extern "C"
