// What products of a warpgroup on sm_90a have in common, whatever they multiply.
#pragma once

namespace bnb {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The registers that a product reads and adds to have been written.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// A warpgroup changes how many registers its threads have.
template <int kRegisters>
__device__ __forceinline__ void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void acquire_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Lists of so many registers, for instructions that take them.
#define BNB_LIST_4 "%0, %1, %2, %3"
#define BNB_LIST_8 \
    BNB_LIST_4     \
    ", %4, %5, %6, %7"
#define BNB_LIST_16 \
    BNB_LIST_8      \
    ", %8, %9, %10, %11, %12, %13, %14, %15"
#define BNB_LIST_32 \
    BNB_LIST_16     \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define BNB_LIST_64                                                                    \
    BNB_LIST_32                                                                        \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define BNB_LIST_128                                                                               \
    BNB_LIST_64                                                                                    \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"             \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#endif  // sm_90a

}  // namespace bnb
