#include "channel_sum/channel_sum.h"

#include <vector>

#include "common/feature_map.h"
#include "common/vec.h"

namespace pyzoo {

#define PZ_KERNEL "channel_sum/channel_sum_cpu.inc"
#include "common/foreach_isa.h"

void channel_sum_cpu(const Tensor& map, const Tensor& output) {
  const FeatureMap from(map, "map");
  check_contiguous(output, "output");
  check_cpu(output, "output");
  check_dtype(output, "output", from.dtype);
  PZ_CHECK(output.ndim == 1 && output.shape[0] == from.channels, "output must have shape [C], got " + output.shape_string());
  dispatch_floating(from.dtype, [&](auto zero) {
    using T = decltype(zero);
    PZ_FOR_ISA_OF(T, template channel_sum<T>)(from, output.ptr<T>());
  });
}

}  // namespace pyzoo
