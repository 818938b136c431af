#pragma once

#include <optional>
#include <tuple>

#include "common/tensor_caster.h"
#include "pixelcnn_sample/pixelcnn_sample.h"

namespace pyzoo {

inline void register_pixelcnn_sample(py::module_& m) {
  using namespace py::literals;
  using Condition = std::optional<Tensor>;
  using Layer = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Condition, Condition, bool>;
  const auto bind = [&m](const char* name, auto* sample) {
    m.def(
        name,
        [sample](const std::vector<Layer>& layers, const PixelCNNHead& head, const Tensor& uniforms, const Tensor& samples,
                 const std::optional<Tensor>& logits, double temperature) {
          py::gil_scoped_release release;
          std::vector<PixelCNNLayer> network;
          for (const Layer& layer : layers)
            network.push_back(std::apply([](const auto&... field) { return PixelCNNLayer{field...}; }, layer));
          sample(network, head, uniforms, samples, logits ? &*logits : nullptr, temperature);
        },
        "layers"_a, "head"_a, "uniforms"_a, "samples"_a, "logits"_a, "temperature"_a);
  };
  bind("pixelcnn_sample_cpu", &pixelcnn_sample_cpu);
#ifdef PYZOO_CUDA_ARCHS
  bind("pixelcnn_sample_cuda", &pixelcnn_sample_cuda);
#endif
}

}  // namespace pyzoo
