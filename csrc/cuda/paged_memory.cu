// Managed memory: one address for host and device, pages migrate to whoever touches them.
//
// The caller owns what managed_alloc returns. Prefetching is a hint; where the device cannot access managed memory
// concurrently with the host there is nothing to prefetch, and that is no error.

#include "check.cuh"
#include "launchers.h"

namespace bnb {

void* managed_alloc(int64_t bytes) {
    void* memory = nullptr;
    check(cudaMallocManaged(&memory, static_cast<size_t>(bytes), cudaMemAttachGlobal), "cudaMallocManaged");
    return memory;
}

void managed_free(void* memory) { check(cudaFree(memory), "cudaFree"); }

void managed_prefetch(const void* memory, int64_t bytes, int32_t device, cudaStream_t stream) {
    int current = 0, concurrent = 0;
    check(cudaGetDevice(&current), "cudaGetDevice");
    const int asked = device >= 0 ? device : current;
    check(
        cudaDeviceGetAttribute(&concurrent, cudaDevAttrConcurrentManagedAccess, asked),
        "cudaDevAttrConcurrentManagedAccess");
    if (!concurrent) return;
#if CUDART_VERSION >= 13000
    cudaMemLocation location{};
    location.type = device >= 0 ? cudaMemLocationTypeDevice : cudaMemLocationTypeHost;
    location.id = device >= 0 ? device : 0;
    check(cudaMemPrefetchAsync(memory, static_cast<size_t>(bytes), location, 0, stream), "cudaMemPrefetchAsync");
#else
    const int target = device >= 0 ? device : cudaCpuDeviceId;
    check(cudaMemPrefetchAsync(memory, static_cast<size_t>(bytes), target, stream), "cudaMemPrefetchAsync");
#endif
}

}  // namespace bnb
