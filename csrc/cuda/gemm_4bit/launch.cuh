// What launches of the tensor-core kernels have in common.
#pragma once

#include <atomic>

#include "../device.cuh"

namespace bnb {

// More shared memory than 48 KB must be asked for, once for each kernel and device.
inline void allow_shared_memory(const void* kernel, int bytes, int device, std::atomic<uint64_t>& done) {
    const uint64_t bit = uint64_t(1) << (device % 64);
    if (device < 64 && (done.load(std::memory_order_relaxed) & bit)) return;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
    done.fetch_or(bit, std::memory_order_relaxed);
}

// Start before the predecessor has ended; the kernel waits itself.
inline cudaLaunchAttribute programmatic_launch() {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    return attribute;
}

inline cudaLaunchAttribute cluster_of(int ctas) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = ctas;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    return attribute;
}

}  // namespace bnb
