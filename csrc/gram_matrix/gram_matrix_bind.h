#pragma once

#include "common/tensor_caster.h"
#include "gram_matrix/gram_matrix.h"

namespace pyzoo {

inline void register_gram_matrix(py::module_& m) {
  using namespace py::literals;
  m.def("gram_matrix_fwd_cpu", &gram_matrix_fwd_cpu, "features"_a, "gram"_a, "normalize"_a, ReleaseGil());
  m.def("gram_matrix_bwd_cpu", &gram_matrix_bwd_cpu, "grad_gram"_a, "features"_a, "grad_features"_a, "normalize"_a, ReleaseGil());
  m.def("gram_loss_fwd_cpu", &gram_loss_fwd_cpu, "features"_a, "target"_a, "difference"_a, "loss"_a, "normalize"_a, ReleaseGil());
#ifdef PYZOO_CUDA_ARCHS
  m.def("gram_matrix_fwd_cuda", &gram_matrix_fwd_cuda, "features"_a, "gram"_a, "normalize"_a, ReleaseGil());
  m.def("gram_matrix_bwd_cuda", &gram_matrix_bwd_cuda, "grad_gram"_a, "features"_a, "grad_features"_a, "normalize"_a, ReleaseGil());
  m.def("gram_loss_fwd_cuda", &gram_loss_fwd_cuda, "features"_a, "target"_a, "difference"_a, "loss"_a, "normalize"_a, ReleaseGil());
#endif
}

}  // namespace pyzoo
