// How kernels are launched: with their shared memory, before their predecessor's end, in clusters.
#pragma once

#include <atomic>
#include <type_traits>

#include "device.cuh"

namespace bnb {

// More shared memory than 48 KB must be asked for, once for each kernel and device.
inline void allow_shared_memory(const void* kernel, int bytes, int device, std::atomic<uint64_t>& done) {
    const uint64_t bit = uint64_t(1) << (device % 64);
    if (device < 64 && (done.load(std::memory_order_relaxed) & bit)) return;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
    done.fetch_or(bit, std::memory_order_relaxed);
}

constexpr int kProgrammaticLaunch = 90;  // the compute capability that brought it

// How a kernel is launched. `allowed` remembers, for this kernel, the devices that were asked for the shared memory.
struct Launch {
    const char* name;
    dim3 grid;
    int threads, shared_bytes;
    std::atomic<uint64_t>& allowed;
    int cluster = 1;  // CTAs that run together and see each other's shared memory
};

// Start a kernel before its predecessor has ended, where the device can: the kernel waits itself.
template <class... Parameters, class... Arguments>
void launch_early(
    void (*kernel)(Parameters...), const Launch& launch, const Device& device, cudaStream_t stream,
    const Arguments&... arguments) {
    allow_shared_memory(reinterpret_cast<const void*>(kernel), launch.shared_bytes, device.ordinal, launch.allowed);
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = launch.grid;
    config.blockDim = dim3(launch.threads);
    config.dynamicSmemBytes = launch.shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = device.capability < kProgrammaticLaunch ? 0 : launch.cluster > 1 ? 2 : 1;
    check(cudaLaunchKernelEx(&config, kernel, arguments...), launch.name);
}

// Call body with a number below kCount as a constant.
template <int kCount, int kFrom = 0, class Body>
void visit_number(int number, Body&& body) {
    if constexpr (kFrom < kCount) {
        if (number == kFrom) return body(std::integral_constant<int, kFrom>{});
        visit_number<kCount, kFrom + 1>(number, body);
    }
}

}  // namespace bnb
