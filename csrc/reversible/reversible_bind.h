#pragma once

#include "common/tensor_caster.h"
#include "reversible/reversible.h"

namespace pyzoo {

inline void register_reversible(py::module_& m) {
  using namespace py::literals;
  m.def("reversible_fwd_cpu", &reversible_fwd_cpu, "x"_a, "update"_a, "y"_a, ReleaseGil());
  m.def("reversible_inv_cpu", &reversible_inv_cpu, "y"_a, "update"_a, "x"_a, ReleaseGil());
  m.def("reversible_bwd_cpu", &reversible_bwd_cpu, "y"_a, "update"_a, "x"_a, "grad_y"_a, "grad_update"_a, "grad_x"_a, ReleaseGil());
#ifdef PYZOO_CUDA_ARCHS
  m.def("reversible_fwd_cuda", &reversible_fwd_cuda, "x"_a, "update"_a, "y"_a, ReleaseGil());
  m.def("reversible_inv_cuda", &reversible_inv_cuda, "y"_a, "update"_a, "x"_a, ReleaseGil());
  m.def("reversible_bwd_cuda", &reversible_bwd_cuda, "y"_a, "update"_a, "x"_a, "grad_y"_a, "grad_update"_a, "grad_x"_a, ReleaseGil());
#endif
}

}  // namespace pyzoo
