#pragma once

#include "common/tensor_caster.h"
#include "winograd/winograd.h"

namespace pyzoo {

inline void register_winograd(py::module_& m) {
  using namespace py::literals;
  m.def("winograd_weight_size", &winograd_weight_size, "outputs"_a, "inputs"_a);
  m.def("winograd_weight_cpu", &winograd_weight_cpu, "weight"_a, "transformed"_a, "turned"_a, ReleaseGil());
  m.def("winograd_conv_cpu", &winograd_conv_cpu, "input"_a, "weight"_a, "bias"_a, "output"_a, "padding"_a, "turned"_a, "relu"_a,
        ReleaseGil());
  m.def("winograd_conv_bwd_weight_cpu", &winograd_conv_bwd_weight_cpu, "grad_output"_a, "input"_a, "grad_weight"_a, "padding"_a,
        ReleaseGil());
}

}  // namespace pyzoo
