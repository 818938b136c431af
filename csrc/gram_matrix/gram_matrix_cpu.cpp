#include <algorithm>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "common/feature_map.h"
#include "common/memory.h"
#include "common/vec.h"
#include "gram_matrix/gram_matrix.h"
#include "gram_matrix/gram_matrix_geometry.h"

namespace pyzoo {

namespace {

// The positions are summed up in chunks, each on its own, then the sums of the chunks: so the bits depend on the shape alone. Chunks of
// at least as many positions as channels, so that their sums take less memory than the features.
int64_t chunk_length(int64_t channels, int64_t positions) {
  constexpr int64_t kLeast = 512, kMostChunks = 64;
  return std::max({kLeast, channels, (positions + kMostChunks - 1) / kMostChunks});
}

}  // namespace

#define PZ_KERNEL "gram_matrix/gram_matrix_cpu.inc"
#include "common/foreach_isa.h"

void gram_matrix_fwd_cpu(const Tensor& features, const Tensor& gram, bool normalize) {
  const FeatureMap map(with_rows(features), "features");
  check_matrices(gram, "gram", map);
  check_dtype(gram, "gram", features.dtype);
  if (gram.numel() == 0) return;
  dispatch_floating(features.dtype, [&](auto zero) {
    using T = decltype(zero);
    PZ_FOR_ISA_OF(T, template gram_matrix_fwd<T>)(map, gram.ptr<T>(), gram_scale(map, normalize));
  });
}

void gram_matrix_bwd_cpu(const Tensor& grad_gram, const Tensor& features, const Tensor& grad_features, bool normalize) {
  const GramBackward args(grad_gram, features, grad_features, DeviceType::cpu);
  if (features.numel() == 0) return;
  prefer_huge_pages(grad_features.data, grad_features.numel() * dtype_size(features.dtype));
  dispatch_floating(features.dtype, [&](auto zero) {
    PZ_FOR_ISA_OF(decltype(zero), template gram_matrix_bwd<decltype(zero)>)(args.matrices, args.map, args.grad,
                                                                            gram_scale(args.map, normalize));
  });
}

void gram_loss_fwd_cpu(const Tensor& features, const Tensor& target, const Tensor& difference, const Tensor& loss, bool normalize) {
  const GramLoss args(features, target, difference, loss, DeviceType::cpu);
  dispatch_floating(features.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    double total = 0;
    if (difference.numel() > 0) {
      PZ_FOR_ISA_OF(T, template gram_matrix_fwd<T>)(args.map, difference.ptr<A>(), gram_scale(args.map, normalize));
      total = PZ_FOR_ISA(subtract_target)(args.targets, difference.ptr<A>(), args.map.images);
    }
    *loss.ptr<A>() = A(total / std::max(1.0, double(difference.numel())));
  });
}

}  // namespace pyzoo
