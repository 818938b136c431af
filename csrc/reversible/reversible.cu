#include "common/cuda.cuh"
#include "reversible/reversible.h"
#include "reversible/reversible_coupling.h"

namespace pyzoo {

namespace {

constexpr int kThreads = 256;

struct Couplings {  // of the same size
  Coupling first, second;
  int count;
};

// `n` neighbours in memory at a time: 16 bytes of a half where everything allows it.
template <int n, class S, class U>
__device__ void couple(const Coupling& c, int64_t at) {
  int64_t row = at / c.columns, column = at % c.columns;
  int64_t base = column * c.base.step, update = column * c.update.step, out = column * c.out.step;
  for (int d = c.outer - 1; d >= 0; --d) {
    const int64_t i = row % c.shape[d];
    row /= c.shape[d];
    base += i * c.base.stride[d], update += i * c.update.stride[d], out += i * c.out.stride[d];
  }
  const auto from = load_pack<n>(static_cast<const S*>(c.base.data) + base);
  const auto delta = load_pack<n>(static_cast<const U*>(c.update.data) + update);
  Pack<S, n> to;
  for (int i = 0; i < n; ++i) to.at[i] = c.minus ? from.at[i] - S(to_float(delta.at[i])) : from.at[i] + S(to_float(delta.at[i]));
  store_pack(static_cast<S*>(c.out.data) + out, to);
}

template <int n, class S, class U>
__global__ void __launch_bounds__(kThreads) couple_kernel(Couplings c) {
  for_each_element(c.first.numel / n, [&](int64_t i) {
    couple<n, S, U>(c.first, i * n);
    if (c.count == 2) couple<n, S, U>(c.second, i * n);
  });
}

bool packs(const Coupling& c, int n) {
  const auto fits = [&](const Operand& operand, DType dtype) {
    bool all = operand.step == 1 && reinterpret_cast<uintptr_t>(operand.data) % (n * dtype_size(dtype)) == 0;
    for (int d = 0; d < c.outer; ++d) all &= operand.stride[d] % n == 0;
    return all;
  };
  return c.columns % n == 0 && fits(c.base, c.half) && fits(c.update, c.update_type) && fits(c.out, c.half);
}

void run(const Tensor& like, const Couplings& c) {
  const auto go = [&](auto half, auto update) {
    using S = decltype(half);
    using U = decltype(update);
    constexpr int n = 16 / sizeof(S);
    const int64_t numel = c.first.numel;
    if (packs(c.first, n) && (c.count == 1 || packs(c.second, n)))
      launch(couple_kernel<n, S, U>, blocks_for(numel / n, kThreads), kThreads, like, c);
    else launch(couple_kernel<1, S, U>, blocks_for(numel, kThreads), kThreads, like, c);
  };
  if (c.first.half == DType::f64) return go(double{}, double{});
  dispatch_floating(c.first.update_type, [&](auto update) {
    if constexpr (sizeof(update) < sizeof(double)) go(float{}, update);
  });
}

}  // namespace

void reversible_fwd_cuda(const Tensor& x, const Tensor& update, const Tensor& y) {
  const Coupling c = coupling_of(x, "x", update, "update", y, "y", false, kCuda);
  run(y, {c, c, 1});
}

void reversible_inv_cuda(const Tensor& y, const Tensor& update, const Tensor& x) {
  const Coupling c = coupling_of(y, "y", update, "update", x, "x", true, kCuda);
  run(x, {c, c, 1});
}

void reversible_bwd_cuda(const Tensor& y, const Tensor& update, const Tensor& x, const Tensor& grad_y, const Tensor& grad_update,
                         const Tensor& grad_x) {
  PZ_CHECK(y.numel() == grad_y.numel() && update.dtype == grad_update.dtype && y.dtype == grad_y.dtype,
           "grad_y and grad_update must be like y and update");
  run(x, {coupling_of(y, "y", update, "update", x, "x", true, kCuda),
          coupling_of(grad_y, "grad_y", grad_update, "grad_update", grad_x, "grad_x", false, kCuda), 2});
}

}  // namespace pyzoo
