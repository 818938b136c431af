#include <algorithm>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/vec.h"
#include "pixelcnn_sample/pixelcnn_sample.h"
#include "pixelcnn_sample/pixelcnn_sample_checks.h"

namespace pyzoo {

#define PZ_KERNEL "pixelcnn_sample/pixelcnn_sample_cpu.inc"
#include "common/foreach_isa.h"

void pixelcnn_sample_cpu(const std::vector<PixelCNNLayer>& layers, const PixelCNNHead& head, const Tensor& uniforms, const Tensor& samples,
                         const Tensor* logits, double temperature) {
  const SampledImages io = sampled_images(layers, head, uniforms, samples, logits, temperature, DeviceType::cpu);
  for (int64_t i = 0; i < samples.numel(); ++i)
    if (const int64_t value = io.values[i]; value != kUnknownSample && (value < 0 || value >= io.levels))
      throw std::invalid_argument("image must be in [0, " + std::to_string(io.levels) + ") where known, got " + std::to_string(value));
  if (samples.numel() == 0) return;

  // The split may follow the number of threads, as no number depends on it.
  constexpr int64_t kMostImages = 16;
  const int64_t threads = max_threads(), rounds = (io.images + threads * kMostImages - 1) / (threads * kMostImages);
  const int64_t chunk = (io.images + threads * rounds - 1) / (threads * rounds);
  if (layers[0].vertical_weight.dtype == DType::f64) {
    baseline::pixelcnn_sample<double>(layers, head, io, chunk);
  } else {
    PZ_FOR_ISA(template pixelcnn_sample<float>)(layers, head, io, chunk);
  }
}

}  // namespace pyzoo
