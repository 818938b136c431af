#include "reversible/reversible.h"

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "common/memory.h"
#include "common/vec.h"

namespace pyzoo {

namespace {

struct Operand {
  void* data;
  int64_t step;              // between the elements of a row
  int64_t stride[kMaxDims];  // between rows, by outer dimension
};

// out = base +- update as rows of `columns` elements: dimensions that lie behind one another in all three tensors are merged.
struct Coupling {
  Operand base, update, out;
  DType half, update_type;
  bool minus;
  int outer = 0;  // dimensions over the rows
  int64_t shape[kMaxDims], columns = 1, numel;

  Coupling(const Tensor& b, const Tensor& u, const Tensor& o, bool minus)
      : base{b.data}, update{u.data}, out{o.data}, half(b.dtype), update_type(u.dtype), minus(minus), numel(o.numel()) {
    int order[kMaxDims], n = 0;  // dimensions by falling stride of out
    for (int d = 0; d < o.ndim; ++d) {
      if (o.shape[d] == 1) continue;
      int i = n++;
      for (; i > 0 && o.stride[order[i - 1]] < o.stride[d]; --i) order[i] = order[i - 1];
      order[i] = d;
    }
    const Tensor* tensors[] = {&b, &u, &o};
    Operand* operands[] = {&base, &update, &out};
    for (int i = 0; i < n; ++i) {  // from the outermost: each dimension is merged into the one before it or follows it
      const int d = order[i];
      const bool merge = i > 0 && std::all_of(tensors, tensors + 3,
                                              [&](const Tensor* t) { return t->stride[order[i - 1]] == t->shape[d] * t->stride[d]; });
      if (!merge) ++outer;
      shape[outer - 1] = merge ? shape[outer - 1] * o.shape[d] : o.shape[d];
      for (int t = 0; t < 3; ++t) operands[t]->stride[outer - 1] = tensors[t]->stride[d];
    }
    if (outer > 0) columns = shape[--outer];
    for (Operand* operand : operands) operand->step = n > 0 ? operand->stride[outer] : 1;
  }
};

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

Coupling checked(const Tensor& base, const char* base_name, const Tensor& update, const char* update_name, const Tensor& out,
                 const char* out_name, bool minus) {
  check(base.dtype == DType::f32 || base.dtype == DType::f64,
        std::string(base_name) + " must be float32 or float64, got " + dtype_name(base.dtype));
  check(update.dtype == base.dtype || (base.dtype == DType::f32 && is_floating(update.dtype) && update.dtype != DType::f64),
        std::string(update_name) + " must be " + dtype_name(base.dtype) + (base.dtype == DType::f32 ? " or narrower" : "") + ", got " +
            dtype_name(update.dtype));
  check_dtype(out, out_name, base.dtype);
  const auto check_shape = [&](const Tensor& t, const char* name) {
    check_cpu(t, name);
    check(t.ndim == base.ndim && std::equal(t.shape, t.shape + t.ndim, base.shape),
          std::string(name) + " must have shape " + base.shape_string() + ", got " + t.shape_string());
  };
  check_shape(base, base_name), check_shape(update, update_name), check_shape(out, out_name);
  for (int d = 0; d < out.ndim; ++d) check(out.shape[d] < 2 || out.stride[d] != 0, std::string(out_name) + " must not be expanded");
  if (out.data != base.data) prefer_huge_pages(out.data, out.numel() * dtype_size(out.dtype));
  return Coupling(base, update, out, minus);
}

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
  parallel_for_equal((numel + kTask - 1) / kTask, kFetch * double(numel) * double(couplings.size()), [&](int64_t task) {
    const int64_t begin = task * kTask, end = std::min(numel, begin + kTask);
    for (const Coupling& c : couplings) c.minus ? couple_range<true>(c, begin, end) : couple_range<false>(c, begin, end);
  });
}

}  // namespace

void reversible_fwd_cpu(const Tensor& x, const Tensor& update, const Tensor& y) { run({checked(x, "x", update, "update", y, "y", false)}); }

void reversible_inv_cpu(const Tensor& y, const Tensor& update, const Tensor& x) { run({checked(y, "y", update, "update", x, "x", true)}); }

void reversible_bwd_cpu(const Tensor& y, const Tensor& update, const Tensor& x, const Tensor& grad_y, const Tensor& grad_update,
                        const Tensor& grad_x) {
  check(y.numel() == grad_y.numel(), "grad_y must have shape " + y.shape_string() + ", got " + grad_y.shape_string());
  run({checked(y, "y", update, "update", x, "x", true), checked(grad_y, "grad_y", grad_update, "grad_update", grad_x, "grad_x", false)});
}

}  // namespace pyzoo
