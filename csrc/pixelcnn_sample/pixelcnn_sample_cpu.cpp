#include <algorithm>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/vec.h"
#include "pixelcnn_sample/pixelcnn_sample.h"

namespace pyzoo {

namespace {

// What is drawn: int64 [B, C, H, W], with one uniform a value and, if wanted, the logits [B, C, K, H, W]; all contiguous.
struct SampledImages {
  int64_t images, colors, levels, height, width;
  double temperature;
  int64_t* values;
  const double* uniforms;
  void* logits;

  int64_t at(int64_t image, int64_t c, int64_t y, int64_t x) const { return ((image * colors + c) * height + y) * width + x; }
  int64_t& value(int64_t image, int64_t c, int64_t y, int64_t x) const { return values[at(image, c, y, x)]; }
  double uniform(int64_t image, int64_t c, int64_t y, int64_t x) const { return uniforms[at(image, c, y, x)]; }
  template <class A>
  A& logit(int64_t image, int64_t c, int64_t k, int64_t y, int64_t x) const {
    return static_cast<A*>(logits)[(((image * colors + c) * levels + k) * height + y) * width + x];
  }
};

}  // namespace

#define PZ_KERNEL "pixelcnn_sample/pixelcnn_sample_cpu.inc"
#include "common/foreach_isa.h"

namespace {

void check_dense(const Tensor& t, const std::string& name, DType dtype, const std::vector<int64_t>& shape) {
  check_tensor(t, name.c_str(), int(shape.size()));
  check_cpu(t, name.c_str());
  check_dtype(t, name.c_str(), dtype);
  for (int i = 0; i < t.ndim; ++i)
    check(t.shape[i] == shape[size_t(i)], name + ": axis " + std::to_string(i) + " must have " + std::to_string(shape[size_t(i)]) +
                                              " elements, got shape " + t.shape_string());
  check_contiguous(t, name.c_str());
}

void check_layer(const PixelCNNLayer& layer, DType dtype, int64_t colors, int64_t inputs, const SampledImages& io) {
  check_tensor(layer.vertical_weight, "vertical_weight", 4);
  check_tensor(layer.output_weight, "output_weight", 4);
  const int64_t p = layer.width(), rows = layer.vertical_weight.shape[2], kernel = layer.vertical_weight.shape[3];
  check(rows > 0 && kernel % 2 == 1,
        "vertical_weight must have an odd number of columns, got shape " + layer.vertical_weight.shape_string());
  check(p > 0 && p % colors == 0, "output_weight must have whole thirds for three colors, got shape " + layer.output_weight.shape_string());
  check(!layer.residual || inputs == p, "a residual needs as many inputs as outputs");
  check_dense(layer.vertical_weight, "vertical_weight", dtype, {2 * p, inputs, rows, kernel});
  check_dense(layer.horizontal_weight, "horizontal_weight", dtype, {2 * p, inputs, 1, kernel / 2 + 1});
  check_dense(layer.link_weight, "link_weight", dtype, {2 * p, 2 * p, 1, 1});
  check_dense(layer.output_weight, "output_weight", dtype, {p, p, 1, 1});
  for (const Tensor* bias : {&layer.vertical_bias, &layer.horizontal_bias, &layer.link_bias}) check_dense(*bias, "bias", dtype, {2 * p});
  check_dense(layer.output_bias, "bias", dtype, {p});
  for (const std::optional<Tensor>* condition : {&layer.vertical_condition, &layer.horizontal_condition})
    if (const std::optional<Tensor>& t = *condition) {
      check_tensor(*t, "condition", 4);
      check_cpu(*t, "condition");
      check_dtype(*t, "condition", dtype);
      check(t->shape[0] == io.images && t->shape[1] == io.height && t->shape[2] == io.width && t->shape[3] == 2 * p &&
                (t->stride[3] == 1 || 2 * p == 1),
            "condition must have shape [B, H, W, 2p], the last axis contiguous, got " + t->shape_string());
    }
}

}  // namespace

void pixelcnn_sample_cpu(const std::vector<PixelCNNLayer>& layers, const PixelCNNHead& head, const Tensor& uniforms, const Tensor& samples,
                         const Tensor* logits, double temperature) {
  check_tensor(samples, "samples", 4);
  check(!layers.empty() && !head.empty(), "a network needs at least one layer and one layer of the head");
  const std::vector<int64_t> shape(samples.shape, samples.shape + 4);
  const int64_t colors = shape[1];
  check(colors > 0, "samples must have shape [B, C, H, W] with C > 0, got " + samples.shape_string());
  check_dense(samples, "samples", DType::i64, shape);
  check_dense(uniforms, "uniforms", DType::f64, shape);
  SampledImages io{shape[0], colors, 0, shape[2], shape[3], temperature, samples.ptr<int64_t>(), uniforms.ptr<const double>(), nullptr};

  const DType dtype = layers[0].vertical_weight.dtype;
  check(dtype == DType::f32 || dtype == DType::f64, std::string("weights must be float32 or float64, got ") + dtype_name(dtype));
  int64_t inputs = colors;
  for (const PixelCNNLayer& layer : layers) {
    check_layer(layer, dtype, colors, inputs, io);
    inputs = layer.width();
  }
  check(!layers[0].residual, "the first layer must have no residual");
  for (const auto& [weight, bias] : head) {
    check_tensor(weight, "head", 4);
    const int64_t outputs = weight.shape[0];
    check(outputs > 0 && outputs % colors == 0, "head must have whole thirds for three colors, got shape " + weight.shape_string());
    check_dense(weight, "head", dtype, {outputs, inputs, 1, 1});
    check_dense(bias, "head", dtype, {outputs});
    inputs = outputs;
  }
  io.levels = inputs / colors;
  check(io.levels >= 2, "head must give at least 2 levels, got " + std::to_string(io.levels));
  if (logits) {
    check_dense(*logits, "logits", dtype, {shape[0], colors, io.levels, shape[2], shape[3]});
    io.logits = logits->data;
  }
  for (int64_t i = 0; i < samples.numel(); ++i)
    if (const int64_t value = io.values[i]; value != kUnknownSample && (value < 0 || value >= io.levels))
      throw std::invalid_argument("image must be in [0, " + std::to_string(io.levels) + ") where known, got " + std::to_string(value));
  if (samples.numel() == 0) return;

  // The split may follow the number of threads, as no number depends on it.
  constexpr int64_t kMostImages = 16;
  const int64_t threads = max_threads(), rounds = (io.images + threads * kMostImages - 1) / (threads * kMostImages);
  const int64_t chunk = (io.images + threads * rounds - 1) / (threads * rounds);
  if (dtype == DType::f64) {
    baseline::pixelcnn_sample<double>(layers, head, io, chunk);
  } else {
    PZ_FOR_ISA(template pixelcnn_sample<float>)(layers, head, io, chunk);
  }
}

}  // namespace pyzoo
