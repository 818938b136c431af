#include "winograd/winograd.h"

#include <algorithm>
#include <vector>

#include "common/feature_map.h"
#include "common/vec.h"

namespace pyzoo {

namespace {

constexpr int kOut = 4, kIn = 6, kPoints = kIn * kIn;  // of a tile: outputs and inputs along a side, products
constexpr int64_t kPanel = 32;                         // columns of a transformed weight that lie together

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A row of channels: whole panels, and a cache line more, so that no power of two maps all rows to one cache set.
int64_t row_of(int64_t channels) { return round_up(channels, kPanel) + 16; }

// The 4x4 tiles of the outputs, [height, width] each, image after image.
struct TileGrid {
  int64_t images, height, width, rows, columns, padding;
  TileGrid(int64_t images, int64_t height, int64_t width, int64_t padding)
      : images(images),
        height(height),
        width(width),
        rows((height + kOut - 1) / kOut),
        columns((width + kOut - 1) / kOut),
        padding(padding) {}
  int64_t count() const { return images * rows * columns; }
  // Tiles that are worked on at a time, so that what is between the steps stays in the cache.
  int64_t chunk(int64_t channels) const {
    constexpr int64_t kNumbers = 3 << 20;
    const int64_t most = std::max<int64_t>(kNumbers / (kPoints * channels), 96), chunks = (count() + most - 1) / most;
    return round_up((count() + chunks - 1) / chunks, 8);
  }
};

struct Weight {
  const float* data;
  int64_t outputs, inputs, output_stride, pixel_stride, row_stride;
};

}  // namespace

#define PZ_KERNEL "winograd/winograd_cpu.inc"
#include "common/foreach_isa.h"

namespace {

FeatureMap check_map(const Tensor& t, const char* name) {
  const FeatureMap map(t, name);
  check_dtype(t, name, DType::f32);
  PZ_CHECK(map.channels_last(), std::string(name) + " must be channels_last");
  return map;
}

Weight check_weight(const Tensor& t, const char* name) {
  check_tensor(t, name, 4);
  check_cpu(t, name);
  check_dtype(t, name, DType::f32);
  PZ_CHECK(t.shape[2] == 3 && t.shape[3] == 3 && (t.stride[1] == 1 || t.shape[1] == 1),
           std::string(name) + " must be 3x3 and channels_last");
  return {t.ptr<float>(), t.shape[0], t.shape[1], t.stride[0], t.stride[3], t.stride[2]};
}

void check_sizes(const FeatureMap& input, const FeatureMap& output, int64_t padding) {
  PZ_CHECK(padding >= 0 && input.images == output.images && output.height == input.height + 2 * padding - 2 &&
               output.width == input.width + 2 * padding - 2,
           "input and output must differ in size by 2 - 2 padding");
}

}  // namespace

int64_t winograd_weight_size(int64_t outputs, int64_t inputs) { return kPoints * round_up(outputs, kPanel) * inputs; }

void winograd_weight_cpu(const Tensor& weight, const Tensor& transformed, bool turned) {
  const Weight from = check_weight(weight, "weight");
  const int64_t outputs = turned ? from.inputs : from.outputs, inputs = turned ? from.outputs : from.inputs;
  check_contiguous(transformed, "transformed");
  check_cpu(transformed, "transformed");
  check_dtype(transformed, "transformed", DType::f32);
  PZ_CHECK(transformed.numel() == winograd_weight_size(outputs, inputs), "transformed has the wrong size");
  PZ_FOR_ISA(transform_weight)(from, turned, transformed.ptr<float>());
}

void winograd_conv_cpu(const Tensor& input, const Tensor& weight, const Tensor& bias, const Tensor& output, int64_t padding, bool turned,
                       bool relu) {
  const FeatureMap from = check_map(input, "input"), to = check_map(output, "output");
  check_sizes(from, to, padding);
  check_contiguous(bias, "bias");
  check_cpu(bias, "bias");
  check_dtype(bias, "bias", DType::f32);
  PZ_CHECK(bias.numel() == 0 || bias.numel() == to.channels, "bias must have shape [K]");
  const int64_t size = winograd_weight_size(to.channels, from.channels);
  static thread_local Scratch<float> scratch;
  float* transformed = weight.ptr<float>();
  if (weight.ndim == 4) {
    const Weight raw = check_weight(weight, "weight");
    PZ_CHECK(raw.outputs == (turned ? from.channels : to.channels) && raw.inputs == (turned ? to.channels : from.channels),
             "weight does not fit input and output");
    transformed = room(scratch, size);
    PZ_FOR_ISA(transform_weight)(raw, turned, transformed);
  } else {
    check_contiguous(weight, "weight");
    check_cpu(weight, "weight");
    check_dtype(weight, "weight", DType::f32);
    PZ_CHECK(weight.numel() == size, "weight has the wrong size");
  }
  prefer_huge_pages(output.data, output.numel() * int64_t(sizeof(float)));
  PZ_FOR_ISA(winograd_conv)(from, transformed, bias.numel() ? bias.ptr<float>() : nullptr, to, padding, relu);
}

void winograd_conv_bwd_weight_cpu(const Tensor& grad_output, const Tensor& input, const Tensor& grad_weight, int64_t padding) {
  const FeatureMap grad = check_map(grad_output, "grad_output"), from = check_map(input, "input");
  check_sizes(from, grad, padding);
  const Weight to = check_weight(grad_weight, "grad_weight");
  PZ_CHECK(to.outputs == grad.channels && to.inputs == from.channels, "grad_weight does not fit");
  PZ_FOR_ISA(winograd_conv_bwd_weight)(grad, from, to, padding);
}

}  // namespace pyzoo
