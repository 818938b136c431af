#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/feature_map.h"
#include "common/memory.h"
#include "common/vec.h"
#include "spatial_pyramid_pool2d/spatial_pyramid_pool2d.h"
#include "spatial_pyramid_pool2d/spatial_pyramid_pool2d_plan.h"

namespace pyzoo {

using namespace pyramid;

#define PZ_KERNEL "spatial_pyramid_pool2d/spatial_pyramid_pool2d_bwd_cpu.inc"
#include "common/foreach_isa.h"

void spatial_pyramid_pool2d_bwd_cpu(const Tensor& grad_output, const Tensor* argmax, const std::vector<int64_t>& levels,
                                    const Tensor& grad_input) {
  const FeatureMap map(grad_input, "grad_input");
  map.check_written("grad_input");
  if (grad_input.numel() == 0) return check_features(grad_output, "grad_output", map, Pyramid(levels, map.height, map.width).bins);
  const Prepared& prepared = Prepared::of(levels, map, !argmax);
  check_features(grad_output, "grad_output", map, prepared.pyramid.bins);
  check_dtype(grad_output, "grad_output", grad_input.dtype);
  if (argmax) {
    check_features(*argmax, "argmax", map, prepared.pyramid.bins);
    check_dtype(*argmax, "argmax", DType::i32);
  }
  prefer_huge_pages(grad_input.data, grad_input.numel() * dtype_size(grad_input.dtype));
  dispatch_floating(grad_input.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int32_t* indices = argmax ? argmax->ptr<const int32_t>() : nullptr;
    PZ_FOR_ISA_OF(T, template unpool<T>)(map, prepared, grad_output.ptr<const T>(), indices);
  });
}

}  // namespace pyzoo
