// A small persistent thread pool, because linking OpenMP would bring a second runtime into the process.
//
// A caller posts one ticket per helper it would like, works itself, then takes back the tickets nobody took. It
// waits only for helpers that are running, so callers never block each other and nested calls cannot deadlock.
// Threads do not survive fork(): the pool remembers its process and a child starts its own.

#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#endif
#if defined(_WIN32)
#include <process.h>
#else
#include <unistd.h>
#endif

namespace bnb {

namespace {

constexpr int32_t kMaxThreads = 256;
constexpr size_t kCacheLine = 64;

int process_id() {
#if defined(_WIN32)
    return _getpid();
#else
    return static_cast<int>(getpid());
#endif
}

// Whether denormals are kept is a setting of each thread; helpers take the caller's, so that results are the same.
#if defined(__x86_64__) || defined(_M_X64)
unsigned float_control() { return _mm_getcsr(); }
void set_float_control(unsigned control) { _mm_setcsr(control); }
#else
unsigned float_control() { return 0; }
void set_float_control(unsigned) {}
#endif

struct Job {
    int64_t count;
    void (*task)(void*, int64_t);
    void* context;
    unsigned control = float_control();
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr failure{};
    int helpers_running = 0;  // guarded by the pool's mutex

    void work() {
        for (int64_t index; (index = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
            try {
                task(context, index);
            } catch (...) {
                if (!failed.exchange(true)) failure = std::current_exception();
                next.store(count, std::memory_order_relaxed);
            }
        }
    }
};

class Pool {
  public:
    explicit Pool(int process) : process(process) {}

    void run(Job& job, int32_t helpers) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            grow(helpers);
            tickets_.insert(tickets_.end(), static_cast<size_t>(helpers), &job);
        }
        for (int32_t i = 0; i < helpers; ++i) posted_.notify_one();
        job.work();
        std::unique_lock<std::mutex> lock(mutex_);
        tickets_.erase(std::remove(tickets_.begin(), tickets_.end(), &job), tickets_.end());
        finished_.wait(lock, [&] { return job.helpers_running == 0; });
    }

    const int process;

  private:
    // Called with the mutex held. A machine that refuses threads gets fewer; the caller works anyway.
    void grow(int32_t helpers) {
        try {
            for (; workers_ < helpers; ++workers_) std::thread([this] { serve(); }).detach();
        } catch (const std::system_error&) {
        }
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            posted_.wait(lock, [&] { return !tickets_.empty(); });
            Job& job = *tickets_.front();
            tickets_.pop_front();
            ++job.helpers_running;
            lock.unlock();
            set_float_control(job.control);
            job.work();
            lock.lock();
            if (--job.helpers_running == 0) finished_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable posted_;
    std::condition_variable finished_;
    std::deque<Job*> tickets_;
    int32_t workers_ = 0;
};

// Never freed: its detached threads may outlive every static destructor.
Pool& pool() {
    static std::atomic<Pool*> current{nullptr};
    Pool* found = current.load(std::memory_order_acquire);
    const int process = process_id();
    if (found && found->process == process) return *found;
    Pool* fresh = new Pool(process);
    if (current.compare_exchange_strong(found, fresh, std::memory_order_acq_rel)) return *fresh;
    delete fresh;
    return *found;
}

}  // namespace

void run_tasks(int64_t count, int32_t threads, void (*task)(void*, int64_t), void* context) {
    const int64_t wanted = threads > 0 ? threads : std::thread::hardware_concurrency();
    const int64_t helpers = std::min<int64_t>({count, wanted, kMaxThreads}) - 1;
    if (helpers <= 0) {
        for (int64_t index = 0; index < count; ++index) task(context, index);
        return;
    }
    Job job{count, task, context};
    pool().run(job, static_cast<int32_t>(helpers));
    if (job.failure) std::rethrow_exception(job.failure);
}

// Aligned by hand, the address of the whole before it: malloc keeps small blocks for the next call, aligned ones it
// cuts and joins again each time.
Scratch::Scratch(size_t bytes) {
    void* const whole = ::operator new(bytes + kCacheLine);
    const auto after = reinterpret_cast<uintptr_t>(whole) + kCacheLine;
    void** const aligned = reinterpret_cast<void**>(after - after % kCacheLine);
    aligned[-1] = whole;
    memory_ = aligned;
}

Scratch::~Scratch() { ::operator delete(static_cast<void**>(memory_)[-1]); }

}  // namespace bnb
