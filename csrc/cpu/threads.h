// Threads: one parallel region per call on the OpenMP runtime that torch has already loaded, and a
// barrier for the steps inside it. Not a scheduler: how work is split stands in plan.h.
//
// libgomp's entry point is called directly instead of through `#pragma omp`, so that every compiler
// uses the runtime that torch uses (Clang's own would be a second one in the process).
#pragma once

#include <sched.h>

#include <cstdint>

#include "vec.h"

extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);
int omp_get_num_threads(void);
int omp_get_thread_num(void);
int omp_in_parallel(void);
int omp_get_num_procs(void);
}

namespace fusedrnn {
namespace {

// f(thread, threads) on each of at most num_threads threads; serially inside another region.
template <class F>
void parallel(int num_threads, const F& f) {
  if (num_threads <= 1 || omp_in_parallel()) {
    f(0, 1);
    return;
  }
  const auto body = [](void* data) {
    (*static_cast<const F*>(data))(omp_get_thread_num(), omp_get_num_threads());
  };
  GOMP_parallel(body, const_cast<F*>(&f), unsigned(num_threads), 0);
}

// At most as many threads as there are cores for this process: threads that meet at barriers stand
// still while one of them has none.
inline int64_t available_threads(int64_t wanted) {
  if (wanted <= 1) return 1;
  const int64_t cores = omp_get_num_procs();
  return cores < wanted ? cores : wanted;
}

FUSEDRNN_INLINE void cpu_relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A counter on a cache line of its own, zero before first use.
struct alignas(64) BarrierCounter {
  uint32_t arrived;
};

// One thread's view of a barrier among `threads` threads, over a shared counter that only ever
// grows.
class Barrier {
 public:
  Barrier(BarrierCounter* counter, int threads) : counter_(counter), threads_(unsigned(threads)) {}

  void wait() {
    if (threads_ == 1) return;
    target_ += threads_;
    __atomic_fetch_add(&counter_->arrived, 1u, __ATOMIC_ACQ_REL);
    // Spin for tens of microseconds, longer than threads with equal work wait; then give the core away,
    // so that a machine with more runnable threads than cores slows down instead of standing still.
    for (int spins = 0; !reached(); ++spins) {
      if (spins < 1000) {
        cpu_relax();
      } else {
        sched_yield();
      }
    }
  }

 private:
  bool reached() const {
    return int32_t(__atomic_load_n(&counter_->arrived, __ATOMIC_ACQUIRE) - target_) >= 0;
  }

  BarrierCounter* counter_;
  unsigned threads_;
  unsigned target_ = 0;
};

}  // namespace
}  // namespace fusedrnn
