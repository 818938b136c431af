#include "reversible/reversible.h"

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "common/vec.h"
#include "reversible/reversible_coupling.h"

namespace pyzoo {

namespace {

// Walks the rows of a coupling.
class Row {
 public:
  Row(const Coupling& c, int64_t row) : c_(c) {
    for (int d = c.outer - 1; d >= 0; row /= c.shape[d], --d) {
      index_[d] = row % c.shape[d];
      move(d, index_[d]);
    }
  }
  void next() {
    for (int d = c_.outer - 1; d >= 0; --d) {
      move(d, 1);
      if (++index_[d] < c_.shape[d]) return;
      move(d, -c_.shape[d]);
      index_[d] = 0;
    }
  }
  int64_t base = 0, update = 0, out = 0;  // where the row begins

 private:
  void move(int d, int64_t steps) {
    base += steps * c_.base.stride[d];
    update += steps * c_.update.stride[d];
    out += steps * c_.out.stride[d];
  }
  const Coupling& c_;
  int64_t index_[kMaxDims] = {};
};

}  // namespace

#define PZ_KERNEL "reversible/reversible_cpu.inc"
#include "common/foreach_isa.h"

namespace {

template <bool kMinus>
void couple_range(const Coupling& c, int64_t begin, int64_t end) {
  if (c.half == DType::f64) {
    baseline::couple_range<kMinus, double, double>(c, begin, end);
  } else if (c.update_type == DType::f16) {
    PZ_FOR_ISA(template couple_range<kMinus, float, Half>)(c, begin, end);
  } else if (c.update_type == DType::bf16) {
    PZ_FOR_ISA(template couple_range<kMinus, float, BFloat16>)(c, begin, end);
  } else {
    PZ_FOR_ISA(template couple_range<kMinus, float, float>)(c, begin, end);
  }
}

void run(std::initializer_list<Coupling> couplings) {
  constexpr int64_t kTask = 4096;  // elements
  // An element counts for more than its addition: it lies in the cache of the thread that wrote it, in the function that just ran.
  constexpr double kFetch = 5;
  const int64_t numel = couplings.begin()->numel;
  parallel_for((numel + kTask - 1) / kTask, kFetch * double(numel) * double(couplings.size()), [&](int64_t task) {
    const int64_t begin = task * kTask, end = std::min(numel, begin + kTask);
    for (const Coupling& c : couplings) c.minus ? couple_range<true>(c, begin, end) : couple_range<false>(c, begin, end);
  });
}

}  // namespace

void reversible_fwd_cpu(const Tensor& x, const Tensor& update, const Tensor& y) {
  run({coupling_of(x, "x", update, "update", y, "y", false)});
}

void reversible_inv_cpu(const Tensor& y, const Tensor& update, const Tensor& x) {
  run({coupling_of(y, "y", update, "update", x, "x", true)});
}

void reversible_bwd_cpu(const Tensor& y, const Tensor& update, const Tensor& x, const Tensor& grad_y, const Tensor& grad_update,
                        const Tensor& grad_x) {
  PZ_CHECK(y.numel() == grad_y.numel(), "grad_y must have shape " + y.shape_string() + ", got " + grad_y.shape_string());
  run({coupling_of(y, "y", update, "update", x, "x", true),
       coupling_of(grad_y, "grad_y", grad_update, "grad_update", grad_x, "grad_x", false)});
}

}  // namespace pyzoo
