#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/feature_map.h"
#include "common/memory.h"
#include "common/vec.h"
#include "spatial_pyramid_pool2d/spatial_pyramid_pool2d.h"
#include "spatial_pyramid_pool2d/spatial_pyramid_pool2d_plan.h"

namespace pyzoo {

using namespace pyramid;

namespace {

enum class Mode { average, max, argmax };

}  // namespace

#define PZ_KERNEL "spatial_pyramid_pool2d/spatial_pyramid_pool2d_cpu.inc"
#include "common/foreach_isa.h"

void spatial_pyramid_pool2d_fwd_cpu(const Tensor& input, const std::vector<int64_t>& levels, const Tensor& output, const Tensor* argmax,
                                    bool average) {
  const FeatureMap map(input, "input");
  if (output.numel() == 0) return check_features(output, "output", map, Pyramid(levels, map.height, map.width).bins);
  const Prepared& prepared = Prepared::of(levels, map, average);
  const Pyramid& pyramid = prepared.pyramid;
  check_features(output, "output", map, pyramid.bins);
  check_dtype(output, "output", input.dtype);
  PZ_CHECK(!average || !argmax, "a mean has no argmax");
  if (argmax) {
    check_features(*argmax, "argmax", map, pyramid.bins);
    check_dtype(*argmax, "argmax", DType::i32);
  }
  PZ_CHECK(map.pixels() > 0, "input must have pixels, got shape " + input.shape_string());
  const Mode mode = average ? Mode::average : argmax ? Mode::argmax : Mode::max;
  int32_t* indices = argmax ? argmax->ptr<int32_t>() : nullptr;
  dispatch_floating(input.dtype, [&](auto zero) {
    using T = decltype(zero);
    PZ_FOR_ISA_OF(T, template pool<T>)(map, pyramid, prepared.plan, mode, output.ptr<T>(), indices);
  });
}

}  // namespace pyzoo
