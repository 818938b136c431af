#pragma once

#include "channel_sum/channel_sum.h"
#include "common/tensor_caster.h"

namespace pyzoo {

inline void register_channel_sum(py::module_& m) {
  using namespace py::literals;
  m.def("channel_sum_cpu", &channel_sum_cpu, "map"_a, "output"_a, ReleaseGil());
#ifdef PYZOO_CUDA_ARCHS
  m.def("channel_sum_cuda", &channel_sum_cuda, "map"_a, "output"_a, ReleaseGil());
#endif
}

}  // namespace pyzoo
