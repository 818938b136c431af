#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/isa.h"

// One unit for all: most of its time goes into reading pybind11.
#include "batch_norm_act/batch_norm_act_bind.h"
#include "channel_sum/channel_sum_bind.h"
#include "depthwise_conv2d/depthwise_conv2d_bind.h"
#include "gram_matrix/gram_matrix_bind.h"
#include "masked_conv2d/masked_conv2d_bind.h"
#include "nms/nms_bind.h"
#include "pixelcnn_sample/pixelcnn_sample_bind.h"
#include "pointwise/pointwise_bind.h"
#include "reversible/reversible_bind.h"
#include "roi_align/roi_align_bind.h"
#include "roi_pool/roi_pool_bind.h"
#include "spatial_pyramid_pool2d/spatial_pyramid_pool2d_bind.h"
#include "winograd/winograd_bind.h"

#define PZ_STRING_(x) #x
#define PZ_STRING(x) PZ_STRING_(x)

PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  namespace py = pybind11;
  using namespace py::literals;
  m.doc() = "pyzoo's compiled kernels. Private: use pyzoo.ops, pyzoo.nn or pyzoo.numpy.";

  pyzoo::register_roi_align(m);
  pyzoo::register_roi_pool(m);
  pyzoo::register_nms(m);
  pyzoo::register_channel_sum(m);
  pyzoo::register_masked_conv2d(m);
  pyzoo::register_pixelcnn_sample(m);
  pyzoo::register_gram_matrix(m);
  pyzoo::register_spatial_pyramid_pool2d(m);
  pyzoo::register_depthwise_conv2d(m);
  pyzoo::register_reversible(m);
  pyzoo::register_winograd(m);
  pyzoo::register_pointwise(m);
  pyzoo::register_batch_norm_act(m);

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
