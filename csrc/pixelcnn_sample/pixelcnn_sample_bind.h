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
  m.def(
      "pixelcnn_sample_cpu",
      [](const std::vector<Layer>& layers, const PixelCNNHead& head, const Tensor& uniforms, const Tensor& samples,
         const std::optional<Tensor>& logits, double temperature) {
        py::gil_scoped_release release;
        std::vector<PixelCNNLayer> network;
        for (const Layer& layer : layers)
          network.push_back(std::apply([](const auto&... field) { return PixelCNNLayer{field...}; }, layer));
        pixelcnn_sample_cpu(network, head, uniforms, samples, logits ? &*logits : nullptr, temperature);
      },
      "layers"_a, "head"_a, "uniforms"_a, "samples"_a, "logits"_a, "temperature"_a);
}

}  // namespace pyzoo
