// The one place that starts threads. With OpenMP we run in the same pool as torch (both link libgomp.so.1), so
// torch.set_num_threads and OMP_NUM_THREADS are obeyed.
#pragma once

#include <cstdint>
#include <exception>

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

template <bool kEqual, class F>
void run_parallel(int64_t n, double work, F&& f) {
#ifdef _OPENMP
  if (n > 1 && work > kWorthAThread && max_threads() > 1) {
    std::exception_ptr error;  // must not leave the parallel region
    const auto call = [&](int64_t i) {
      try {
        f(i);
      } catch (...) {
#pragma omp critical(pyzoo_parallel_for)
        error = std::current_exception();
      }
    };
    if constexpr (kEqual) {
#pragma omp parallel for schedule(static)
      for (int64_t i = 0; i < n; ++i) call(i);
    } else {
#pragma omp parallel for schedule(dynamic, 1)
      for (int64_t i = 0; i < n; ++i) call(i);
    }
    if (error) std::rethrow_exception(error);
    return;
  }
#endif
  for (int64_t i = 0; i < n; ++i) f(i);
}

// Calls f(i) for i in [0, n), in any order, on several threads when the work is worth it. `work` is the rough number of element
// operations in total. Results must not depend on which thread runs which i.
template <class F>
void parallel_for(int64_t n, double work, F&& f) {
  run_parallel<false>(n, work, f);
}

// The same for equal pieces of work: neighbours go to one thread, the one that torch's own loops over the same memory use, so that it
// finds in its cache what they left there.
template <class F>
void parallel_for_equal(int64_t n, double work, F&& f) {
  run_parallel<true>(n, work, f);
}

}  // namespace pyzoo
