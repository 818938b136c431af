// What is drawn, and whether the tensors of a network fit. Shared by all devices.
#pragma once

#include <string>
#include <vector>

#include "common/tensor.h"
#include "pixelcnn_sample/pixelcnn_sample.h"

namespace pyzoo {

// What is drawn: int64 [B, C, H, W], with one uniform a value and, if wanted, the logits [B, C, K, H, W]; all contiguous.
struct SampledImages {
  int64_t images, colors, levels, height, width;
  double temperature;
  int64_t* values;
  const double* uniforms;
  void* logits;

  PZ_HD int64_t at(int64_t image, int64_t c, int64_t y, int64_t x) const { return ((image * colors + c) * height + y) * width + x; }
  PZ_HD int64_t& value(int64_t image, int64_t c, int64_t y, int64_t x) const { return values[at(image, c, y, x)]; }
  PZ_HD double uniform(int64_t image, int64_t c, int64_t y, int64_t x) const { return uniforms[at(image, c, y, x)]; }
  template <class A>
  PZ_HD A& logit(int64_t image, int64_t c, int64_t k, int64_t y, int64_t x) const {
    return static_cast<A*>(logits)[(((image * colors + c) * levels + k) * height + y) * width + x];
  }
};

inline void check_dense(const Tensor& t, const std::string& name, DType dtype, const std::vector<int64_t>& shape, DeviceType device) {
  check_tensor(t, name.c_str(), int(shape.size()));
  check_device(t, name.c_str(), device);
  check_dtype(t, name.c_str(), dtype);
  for (int i = 0; i < t.ndim; ++i)
    PZ_CHECK(t.shape[i] == shape[size_t(i)], name + ": axis " + std::to_string(i) + " must have " + std::to_string(shape[size_t(i)]) +
                                                 " elements, got shape " + t.shape_string());
  check_contiguous(t, name.c_str());
}

inline void check_layer(const PixelCNNLayer& layer, DType dtype, int64_t colors, int64_t inputs, const SampledImages& io,
                        DeviceType device) {
  check_tensor(layer.vertical_weight, "vertical_weight", 4);
  check_tensor(layer.output_weight, "output_weight", 4);
  const int64_t p = layer.width(), rows = layer.vertical_weight.shape[2], kernel = layer.vertical_weight.shape[3];
  PZ_CHECK(rows > 0 && kernel % 2 == 1,
           "vertical_weight must have an odd number of columns, got shape " + layer.vertical_weight.shape_string());
  PZ_CHECK(p > 0 && p % colors == 0,
           "output_weight must have whole thirds for three colors, got shape " + layer.output_weight.shape_string());
  PZ_CHECK(!layer.residual || inputs == p, "a residual needs as many inputs as outputs");
  check_dense(layer.vertical_weight, "vertical_weight", dtype, {2 * p, inputs, rows, kernel}, device);
  check_dense(layer.horizontal_weight, "horizontal_weight", dtype, {2 * p, inputs, 1, kernel / 2 + 1}, device);
  check_dense(layer.link_weight, "link_weight", dtype, {2 * p, 2 * p, 1, 1}, device);
  check_dense(layer.output_weight, "output_weight", dtype, {p, p, 1, 1}, device);
  for (const Tensor* bias : {&layer.vertical_bias, &layer.horizontal_bias, &layer.link_bias})
    check_dense(*bias, "bias", dtype, {2 * p}, device);
  check_dense(layer.output_bias, "bias", dtype, {p}, device);
  for (const std::optional<Tensor>* condition : {&layer.vertical_condition, &layer.horizontal_condition})
    if (const std::optional<Tensor>& t = *condition) {
      check_tensor(*t, "condition", 4);
      check_device(*t, "condition", device);
      check_dtype(*t, "condition", dtype);
      PZ_CHECK(t->shape[0] == io.images && t->shape[1] == io.height && t->shape[2] == io.width && t->shape[3] == 2 * p &&
                   (t->stride[3] == 1 || 2 * p == 1),
               "condition must have shape [B, H, W, 2p], the last axis contiguous, got " + t->shape_string());
    }
}

inline SampledImages sampled_images(const std::vector<PixelCNNLayer>& layers, const PixelCNNHead& head, const Tensor& uniforms,
                                    const Tensor& samples, const Tensor* logits, double temperature, DeviceType device) {
  check_tensor(samples, "samples", 4);
  PZ_CHECK(!layers.empty() && !head.empty(), "a network needs at least one layer and one layer of the head");
  const std::vector<int64_t> shape(samples.shape, samples.shape + 4);
  const int64_t colors = shape[1];
  PZ_CHECK(colors > 0, "samples must have shape [B, C, H, W] with C > 0, got " + samples.shape_string());
  check_dense(samples, "samples", DType::i64, shape, device);
  check_dense(uniforms, "uniforms", DType::f64, shape, device);
  SampledImages io{shape[0], colors, 0, shape[2], shape[3], temperature, samples.ptr<int64_t>(), uniforms.ptr<const double>(), nullptr};

  const DType dtype = layers[0].vertical_weight.dtype;
  PZ_CHECK(dtype == DType::f32 || dtype == DType::f64, std::string("weights must be float32 or float64, got ") + dtype_name(dtype));
  int64_t inputs = colors;
  for (const PixelCNNLayer& layer : layers) {
    check_layer(layer, dtype, colors, inputs, io, device);
    inputs = layer.width();
  }
  PZ_CHECK(!layers[0].residual, "the first layer must have no residual");
  for (const auto& [weight, bias] : head) {
    check_tensor(weight, "head", 4);
    const int64_t outputs = weight.shape[0];
    PZ_CHECK(outputs > 0 && outputs % colors == 0, "head must have whole thirds for three colors, got shape " + weight.shape_string());
    check_dense(weight, "head", dtype, {outputs, inputs, 1, 1}, device);
    check_dense(bias, "head", dtype, {outputs}, device);
    inputs = outputs;
  }
  io.levels = inputs / colors;
  PZ_CHECK(io.levels >= 2, "head must give at least 2 levels, got " + std::to_string(io.levels));
  if (logits) {
    check_dense(*logits, "logits", dtype, {shape[0], colors, io.levels, shape[2], shape[3]}, device);
    io.logits = logits->data;
  }
  return io;
}

}  // namespace pyzoo
