// The current device, asked once: what launchers size their grids by.
#pragma once

#include <atomic>

#include "check.cuh"

namespace bnb {

struct Device {
    int ordinal;
    int capability;  // 90 for sm_90
    int multiprocessors;
};

inline Device current_device() {
    constexpr int kKnown = 64;
    static std::atomic<uint32_t> known[kKnown];  // capability and multiprocessors, 16 bits each; zero is unknown
    int ordinal = 0;
    check(cudaGetDevice(&ordinal), "cudaGetDevice");
    uint32_t packed = ordinal < kKnown ? known[ordinal].load(std::memory_order_relaxed) : 0;
    if (packed == 0) {
        int major = 0, minor = 0, multiprocessors = 0;
        check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal), "compute capability");
        check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal), "compute capability");
        check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, ordinal), "multiprocessors");
        packed = uint32_t(10 * major + minor) << 16 | uint32_t(multiprocessors);
        if (ordinal < kKnown) known[ordinal].store(packed, std::memory_order_relaxed);
    }
    return {ordinal, static_cast<int>(packed >> 16), static_cast<int>(packed & 0xffffu)};
}

// As many of the wanted CTAs as a multiprocessor holds, of the architecture being compiled for: for launch bounds.
constexpr int resident_ctas(int wanted, int threads) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000
    constexpr int kMost = 2048;
#elif __CUDA_ARCH__ == 750
    constexpr int kMost = 1024;
#else
    constexpr int kMost = 1536;
#endif
    return wanted * threads <= kMost ? wanted : kMost / threads;
}

inline unsigned grid_size(int64_t ctas) {
    require(ctas < int64_t(1) << 31, "the tensor is too large for one launch: ", ctas, " blocks of threads");
    return static_cast<unsigned>(ctas);
}

}  // namespace bnb
