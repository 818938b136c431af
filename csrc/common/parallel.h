// The one place that starts threads. With OpenMP we run in the same pool as torch (both link libgomp.so.1), so
// torch.set_num_threads and OMP_NUM_THREADS are obeyed.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace pyzoo {

inline int max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

constexpr double kWorthAThread = 300000;  // about 50 us: waking a sleeping pool costs as much, on a busy machine far more

// Calls f(i) for i in [0, n), in any order, on several threads when the work is worth it. `work` is the rough number of element
// operations in total. Results must not depend on which thread runs which i.
//
// Each thread begins with a range of its own, the one that torch's loops over the same memory give it, so that it finds in its cache what
// they left there: where processors do not share a cache, that is worth more than an even load. Who is done helps the others.
template <class F>
void parallel_for(int64_t n, double work, F&& f) {
#ifdef _OPENMP
  if (n > 1 && work > kWorthAThread && max_threads() > 1) {
    struct alignas(64) Range {
      std::atomic<int64_t> next;
      int64_t end;
    };
    const int threads = max_threads();
    const std::unique_ptr<Range[]> ranges(new Range[size_t(threads)]);
    for (int64_t t = 0; t < threads; ++t) ranges[t].next = n * t / threads, ranges[t].end = n * (t + 1) / threads;
    std::exception_ptr error;  // must not leave the parallel region
#pragma omp parallel
    for (int t = 0; t < threads; ++t) {
      Range& range = ranges[(omp_get_thread_num() + t) % threads];
      for (int64_t i; (i = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;) {
        try {
          f(i);
        } catch (...) {
#pragma omp critical(pyzoo_parallel_for)
          error = std::current_exception();
        }
      }
    }
    if (error) std::rethrow_exception(error);
    return;
  }
#endif
  for (int64_t i = 0; i < n; ++i) f(i);
}

}  // namespace pyzoo
