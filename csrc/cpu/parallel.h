// What kernels may ask of the host: threads and scratch memory.
//
// Work is cut into tasks whose borders do not depend on the number of threads, so results do not either. The
// implementation (parallel.cpp) is compiled for the baseline; only the thin template below is per variant.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/platform.h"

namespace bnb {

// Run task(context, 0) ... task(context, count - 1) on at most `threads` threads, the caller's included, and wait.
// `threads` <= 0 means all of the machine.
// The first exception of a task is thrown again here. Safe from several threads at once and after fork().
void run_tasks(int64_t count, int32_t threads, void (*task)(void* context, int64_t index), void* context);

// Scratch memory aligned to a cache line, owned by the caller's scope; throws std::bad_alloc.
class Scratch {
  public:
    explicit Scratch(size_t bytes);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    template <class T>
    T* as() const {
        return static_cast<T*>(memory_);
    }

  private:
    void* memory_;
};

}  // namespace bnb

BNB_NAMESPACE_BEGIN

// Call body(begin, end) over [0, n) in pieces of `grain`.
template <class Body>
void parallel_for(int64_t n, int64_t grain, int32_t threads, const Body& body) {
    struct Context {
        const Body& body;
        int64_t n, grain;
    } context{body, n, grain};
    run_tasks(
        (n + grain - 1) / grain, threads,
        [](void* opaque, int64_t index) {
            const Context& c = *static_cast<const Context*>(opaque);
            const int64_t begin = index * c.grain;
            c.body(begin, begin + c.grain < c.n ? begin + c.grain : c.n);
        },
        &context);
}

BNB_NAMESPACE_END
