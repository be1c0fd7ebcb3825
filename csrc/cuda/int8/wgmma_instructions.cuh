// What the int8 product of sm_90a is made of: tensor maps, the integer warpgroup instruction, clusters.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "../async.cuh"
#include "../warpgroup.cuh"

namespace bnb {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ---- copies of boxes of a matrix; what lies outside arrives as zeros ----

__device__ __forceinline__ void copy_box_async(
    uint32_t to, const CUtensorMap* map, int column, int row, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            to),
        "l"(map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// ---- clusters ----

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// The address of one's own shared memory in another CTA of the cluster.
__device__ __forceinline__ uint32_t address_in(uint32_t address, uint32_t rank) {
    uint32_t mapped;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
    return mapped;
}

__device__ __forceinline__ int load_of_cluster(uint32_t address) {
    int value;
    asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}

// All threads of all CTAs of the cluster come here before any leaves; writes before are seen after.
__device__ __forceinline__ void synchronize_cluster() {
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;" ::
            : "memory");
}

// ---- products ----

// A matrix in shared memory of rows of 128 bytes, swizzled over eight of them, as copy_box_async leaves it; aligned to
// 1024 bytes. Adding n >> 4 names what is n bytes further along the rows.
__device__ __forceinline__ uint64_t swizzled_matrix(uint32_t address) {
    constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
    constexpr uint64_t kEightRows = uint64_t(1024 >> 4) << 32;
    return kSwizzle128 | kEightRows | uint64_t(1) << 16 | (address & 0x3ffff) >> 4;
}

#define BNB_INTS_4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define BNB_INTS_8(i) BNB_INTS_4(i), BNB_INTS_4(i + 4)
#define BNB_INTS_16(i) BNB_INTS_8(i), BNB_INTS_8(i + 8)
#define BNB_INTS_32(i) BNB_INTS_16(i), BNB_INTS_16(i + 16)
#define BNB_INTS_64(i) BNB_INTS_32(i), BNB_INTS_32(i + 32)
#define BNB_INTS_128(i) BNB_INTS_64(i), BNB_INTS_64(i + 64)

#define BNB_IMMA(tokens, outputs, a, b)                                                  \
    asm volatile(                                                                        \
        "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"                                       \
        "wgmma.mma_async.sync.aligned.m64n" #tokens "k32.s32.s8.s8 {" BNB_LIST_##outputs \
        "}, "                                                                            \
        "%" #a ", %" #b ", p;\n}"                                                        \
        : BNB_INTS_##outputs(0)                                                          \
        : "l"(rows), "l"(columns))

// d (64 rows, kTokens columns, half of them a thread's) is increased by the product of 64 rows and kTokens tokens, 32
// deep.
template <int kTokens>
__device__ __forceinline__ void multiply_int8(int (&d)[kTokens / 2], uint64_t rows, uint64_t columns) {
    if constexpr (kTokens == 16) {
        BNB_IMMA(16, 8, 8, 9);
    } else if constexpr (kTokens == 32) {
        BNB_IMMA(32, 16, 16, 17);
    } else if constexpr (kTokens == 64) {
        BNB_IMMA(64, 32, 32, 33);
    } else if constexpr (kTokens == 128) {
        BNB_IMMA(128, 64, 64, 65);
    } else {
        static_assert(kTokens == 256, "a number of tokens that an instruction takes");
        BNB_IMMA(256, 128, 128, 129);
    }
}

#endif  // sm_90a

}  // namespace bnb
