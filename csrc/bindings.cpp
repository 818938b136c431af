#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/isa.h"

#define PZ_STRING_(x) #x
#define PZ_STRING(x) PZ_STRING_(x)

namespace pyzoo {
// One line an op: each lives in csrc/<op>/<op>_bind.cpp.
void register_roi_align(pybind11::module_& m);
void register_roi_pool(pybind11::module_& m);
void register_nms(pybind11::module_& m);
void register_channel_sum(pybind11::module_& m);
void register_masked_conv2d(pybind11::module_& m);
void register_pixelcnn_sampler(pybind11::module_& m);
void register_gram_matrix(pybind11::module_& m);
void register_spatial_pyramid_pool2d(pybind11::module_& m);
void register_depthwise_conv2d(pybind11::module_& m);
void register_reversible(pybind11::module_& m);
}  // namespace pyzoo

PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  namespace py = pybind11;
  using namespace py::literals;
  m.doc() = "pyzoo's compiled kernels. Private: use pyzoo.ops, pyzoo.nn or pyzoo.numpy.";

  pyzoo::register_roi_align(m);
  pyzoo::register_roi_pool(m);
  pyzoo::register_nms(m);
  pyzoo::register_channel_sum(m);
  pyzoo::register_masked_conv2d(m);
  pyzoo::register_pixelcnn_sampler(m);
  pyzoo::register_gram_matrix(m);
  pyzoo::register_spatial_pyramid_pool2d(m);
  pyzoo::register_depthwise_conv2d(m);
  pyzoo::register_reversible(m);

  m.def("set_isa", &pyzoo::set_isa, "name"_a, "Force an instruction set by name; '' returns to the best. For tests.");
  m.def(
      "build_info",
      [] {
        py::dict info("version"_a = PZ_STRING(PYZOO_VERSION), "compiler"_a = __VERSION__);
        info["isa"] = pyzoo::isa_name(pyzoo::isa());
        info["isas"] = pyzoo::available_isas();
#ifdef _OPENMP
        info["openmp"] = true;
#else
        info["openmp"] = false;
#endif
#ifdef PYZOO_CUDA_ARCHS
        info["cuda_archs"] = PYZOO_CUDA_ARCHS;
#else
        info["cuda_archs"] = "";
#endif
        return info;
      },
      "What this binary was built with and what it runs on.");
}
