// Which instruction set runs: candidates best first, each with its test; the first that passes is used.

#include <cstdlib>
#include <cstring>
#include <string>

#ifdef BNB_HAVE_AVX512AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../common/error.h"
#include "int8_kernels.h"
#include "kernels.h"

namespace bnb {

#define BNB_DECLARE_VARIANT(set)                   \
    namespace set {                                \
    extern const Kernels variant_kernels;          \
    extern const Int8Kernels variant_int8_kernels; \
    }
#ifdef BNB_HAVE_AVX512
BNB_DECLARE_VARIANT(avx512)
#endif
#ifdef BNB_HAVE_AVX512BF16
namespace avx512bf16 {
extern const Kernels variant_kernels;
}
#endif
#ifdef BNB_HAVE_AVX512AMX
namespace avx512amx {
extern const TiledProducts tiled_products;
extern const Int8Kernels variant_int8_kernels;
}  // namespace avx512amx
#endif
#ifdef BNB_HAVE_AVX512VNNI
namespace avx512vnni {
extern const Int8Kernels variant_int8_kernels;
}
#endif
#ifdef BNB_HAVE_AVX2
BNB_DECLARE_VARIANT(avx2)
#endif
#ifdef BNB_HAVE_NEON
BNB_DECLARE_VARIANT(neon)
#endif
BNB_DECLARE_VARIANT(scalar)
#undef BNB_DECLARE_VARIANT

namespace {

struct Candidate {
    const Kernels* kernels;
    const Int8Kernels* int8_kernels;
    bool (*runs_here)();
};

#ifdef BNB_HAVE_AVX512
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
#endif

#ifdef BNB_HAVE_AVX512BF16
bool has_avx512bf16() {  // Zen 4 and Sapphire Rapids on
    return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vnni");
}
#endif

#ifdef BNB_HAVE_AVX512AMX
// Linux saves tile registers for processes that have asked for it, once for all of their threads.
bool has_avx512amx() {
#ifdef BNB_EMULATE_AMX
    return has_avx512bf16();
#else
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    constexpr unsigned kAmx = 1u << 22 | 1u << 24 | 1u << 25;  // bfloat16, tiles, int8
    unsigned eax, ebx, ecx, edx;
    return has_avx512bf16() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kAmx) == kAmx &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
}

const Kernels kAmxKernels = [] {
    Kernels kernels = avx512bf16::variant_kernels;
    kernels.name = "avx512amx";
    const auto take = [](auto& of_dtype, const auto& products) {
        of_dtype.gemm_4bit = products.gemm_4bit;
        of_dtype.gemm_4bit_transposed = products.gemm_4bit_transposed;
    };
    take(kernels.float32, avx512amx::tiled_products.float32);
    take(kernels.float16, avx512amx::tiled_products.float16);
    take(kernels.bfloat16, avx512amx::tiled_products.bfloat16);
    return kernels;
}();
#endif

const Candidate kCandidates[] = {
#ifdef BNB_HAVE_AVX512AMX
    {&kAmxKernels, &avx512amx::variant_int8_kernels, has_avx512amx},
#endif
#ifdef BNB_HAVE_AVX512BF16
    {&avx512bf16::variant_kernels, &avx512::variant_int8_kernels, has_avx512bf16},
#endif
#ifdef BNB_HAVE_AVX512
    {&avx512::variant_kernels, &avx512::variant_int8_kernels, has_avx512},
#endif
#ifdef BNB_HAVE_AVX2
    {&avx2::variant_kernels, &avx2::variant_int8_kernels,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
#endif
#ifdef BNB_HAVE_NEON
    {&neon::variant_kernels, &neon::variant_int8_kernels, [] { return true; }},
#endif
    {&scalar::variant_kernels, &scalar::variant_int8_kernels, [] { return true; }},
};

// The int8 kernels with VNNI; null where that is not built or not here.
const Int8Kernels* vnni_kernels() {
#ifdef BNB_HAVE_AVX512VNNI
    if (__builtin_cpu_supports("avx512vnni")) return &avx512vnni::variant_int8_kernels;
#endif
    return nullptr;
}

struct Choice {
    const Kernels* kernels = nullptr;
    const Int8Kernels* int8_kernels = nullptr;
    std::string available;
    std::string forced;

    Choice() {
        const char* wanted = std::getenv("BNB_CPU_ISA");
        if (wanted) forced = wanted;
        for (const Candidate& candidate : kCandidates) {
            if (!candidate.runs_here()) continue;
            available += (available.empty() ? "" : ",") + std::string(candidate.kernels->name);
            const bool fits = forced.empty() || forced == candidate.kernels->name;
            if (kernels || !fits) continue;
            kernels = candidate.kernels;
            int8_kernels = candidate.int8_kernels;
        }
        const bool wide = kernels && std::strncmp(kernels->name, "avx512", 6) == 0 && forced != "avx512";
        const bool tiles = wide && std::strcmp(kernels->name, "avx512amx") == 0;
        if (wide && !tiles && vnni_kernels()) int8_kernels = vnni_kernels();
    }
};

const Choice& choice() {
    static const Choice chosen;
    return chosen;
}

}  // namespace

namespace {

const Choice& honoured() {
    const Choice& chosen = choice();
    if (!chosen.kernels) {
        throw Error(
            BNB_STATUS_UNSUPPORTED,
            text("BNB_CPU_ISA=", chosen.forced, " cannot run here; available: ", chosen.available));
    }
    return chosen;
}

}  // namespace

const Kernels& kernels() { return *honoured().kernels; }

const Int8Kernels& int8_kernels() { return *honoured().int8_kernels; }

const char* int8_variant() noexcept { return choice().int8_kernels ? choice().int8_kernels->name : nullptr; }

const Kernels* find_kernels() noexcept { return choice().kernels; }

const char* available_variants() noexcept { return choice().available.c_str(); }

}  // namespace bnb
