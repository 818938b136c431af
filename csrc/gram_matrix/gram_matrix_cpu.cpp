#include <algorithm>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "common/feature_map.h"
#include "common/memory.h"
#include "common/vec.h"
#include "gram_matrix/gram_matrix.h"

namespace pyzoo {

namespace {

// [N, C, M] as [N, C, 1, M].
Tensor with_rows(const Tensor& t) {
  if (t.ndim != 3) return t;
  Tensor out = t;
  out.ndim = 4;
  out.shape[3] = t.shape[2], out.shape[2] = 1;
  out.stride[3] = t.stride[2], out.stride[2] = t.shape[2] * t.stride[2];
  return out;
}

// Square matrices [N, C, C], or one for all images, of any dtype and strides.
struct Matrices {
  void* data;
  DType dtype;
  int64_t channels, image_stride, row_stride, column_stride;

  Matrices(const Tensor& t, const char* name, const FeatureMap& map, bool broadcast) {
    check_cpu(t, name);
    check_floating(t, name);
    check(t.ndim == 3 || (broadcast && t.ndim == 2), std::string(name) + " must have shape [N, C, C], got " + t.shape_string());
    const int at = t.ndim - 2;
    const bool shared = at == 0 || (broadcast && t.shape[0] == 1);
    check(t.shape[at] == map.channels && t.shape[at + 1] == map.channels && (shared || t.shape[0] == map.images),
          std::string(name) + " must have a row and a column for each channel of features, got shape " + t.shape_string());
    data = t.data, dtype = t.dtype;
    channels = map.channels, row_stride = t.stride[at], column_stride = t.stride[at + 1];
    image_stride = shared ? 0 : t.stride[0];
  }
  template <class T>
  T* at(int64_t image) const {
    return static_cast<T*>(data) + image * image_stride;
  }
};

// The positions are summed up in chunks, each on its own, then the sums of the chunks: so the bits depend on the shape alone. Chunks of
// at least as many positions as channels, so that their sums take less memory than the features.
int64_t chunk_length(int64_t channels, int64_t positions) {
  constexpr int64_t kLeast = 512, kMostChunks = 64;
  return std::max({kLeast, channels, (positions + kMostChunks - 1) / kMostChunks});
}

double gram_scale(const FeatureMap& map, bool normalize) {
  return normalize ? 1 / std::max(1.0, double(map.channels) * double(map.pixels())) : 1;
}

void check_matrices(const Tensor& t, const char* name, const FeatureMap& map) {
  check_tensor(t, name, 3);
  check_cpu(t, name);
  const int64_t c = map.channels;
  check(t.shape[0] == map.images && t.shape[1] == c && t.shape[2] == c,
        std::string(name) + " must have shape [N, C, C], got " + t.shape_string());
  check(t.numel() == 0 || ((c == 1 || (t.stride[2] == 1 && t.stride[1] == c)) && (map.images == 1 || t.stride[0] == c * c)),
        std::string(name) + " must be contiguous");
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
  const FeatureMap map(with_rows(features), "features"), grad(with_rows(grad_features), "grad_features");
  const Matrices matrices(grad_gram, "grad_gram", map, false);
  grad.check_written("grad_features");
  check((grad_gram.dtype == DType::f64) == (features.dtype == DType::f64), "grad_gram must be float64 where features are, and only there");
  check_dtype(grad_features, "grad_features", features.dtype);
  check(features.ndim == grad_features.ndim && std::equal(features.shape, features.shape + features.ndim, grad_features.shape),
        "grad_features must have the shape of features, got " + grad_features.shape_string());
  if (features.numel() == 0) return;
  prefer_huge_pages(grad.data, grad_features.numel() * dtype_size(grad.dtype));
  dispatch_floating(features.dtype, [&](auto zero) {
    PZ_FOR_ISA_OF(decltype(zero), template gram_matrix_bwd<decltype(zero)>)(matrices, map, grad, gram_scale(map, normalize));
  });
}

void gram_loss_fwd_cpu(const Tensor& features, const Tensor& target, const Tensor& difference, const Tensor& loss, bool normalize) {
  const FeatureMap map(with_rows(features), "features");
  const Matrices targets(target, "target", map, true);
  check_matrices(difference, "difference", map);
  const DType sums = features.dtype == DType::f64 ? DType::f64 : DType::f32;
  check_dtype(difference, "difference", sums);
  check_dtype(loss, "loss", sums);
  check_cpu(loss, "loss");
  check(loss.numel() == 1, "loss must be one number, got shape " + loss.shape_string());
  dispatch_floating(features.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    double total = 0;
    if (difference.numel() > 0) {
      PZ_FOR_ISA_OF(T, template gram_matrix_fwd<T>)(map, difference.ptr<A>(), gram_scale(map, normalize));
      total = PZ_FOR_ISA(subtract_target)(targets, difference.ptr<A>(), map.images);
    }
    *loss.ptr<A>() = A(total / std::max(1.0, double(difference.numel())));
  });
}

}  // namespace pyzoo
