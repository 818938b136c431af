// How outputs see sources, for the convolution and its two gradients.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "common/feature_map.h"
#include "depthwise_conv2d/depthwise_conv2d.h"

namespace pyzoo {

// Both the convolution and its input gradient gather: each output is a sum over taps of sources. With stride s, the outputs of a
// gradient fall into s phases by their position modulo s: each phase sees the sources like a convolution of stride 1 that has
// only every s-th tap. A convolution has one phase.
struct Phase {
  int64_t count;                      // outputs of this phase
  int64_t first, step, taps;          // window positions of the taps of the phase's first output: first, first + step, ...
  int64_t kernel_first, kernel_step;  // the place of these taps in the kernel
};

struct Axis {
  int64_t sources;
  int64_t low;                // the source at window position 0; sources outside [0, sources) are zero
  int64_t advance;            // window positions from one output of a phase to the next
  int64_t reach;              // window positions that the first output of every phase needs together
  std::vector<Phase> phases;  // output o belongs to phase o % phases.size()

  int64_t count() const { return phases[0].count; }
  int64_t outputs() const { return int64_t(phases.size()); }  // from one output of a phase to the next
};

inline Axis forward_axis(int64_t input, int64_t output, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return {input, -padding, stride, (kernel - 1) * dilation + 1, {{output, 0, dilation, kernel, 0, 1}}};
}

inline Axis gradient_axis(int64_t output, int64_t input, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  Axis axis{output, std::numeric_limits<int64_t>::max(), 1, 1, {}};
  const int64_t skip = stride / std::gcd(stride, dilation), step = dilation / std::gcd(stride, dilation);
  for (int64_t o = 0; o < stride; ++o) {
    Phase phase{ceil_div(input - o, stride), 0, step, 0, 0, -skip};
    for (int64_t k = 0; k < kernel; ++k) {  // input o takes from output (o + padding - k * dilation) / stride
      if ((o + padding - k * dilation) % stride != 0) continue;
      phase.taps += 1, phase.kernel_first = k, phase.first = (o + padding - k * dilation) / stride;
    }
    if (phase.taps) axis.low = std::min(axis.low, phase.first);
    axis.phases.push_back(phase);
  }
  for (Phase& phase : axis.phases) {
    phase.first = phase.taps ? phase.first - axis.low : 0;
    axis.reach = std::max(axis.reach, phase.first + (phase.taps - 1) * step + 1);
  }
  return axis;
}

struct Gather {
  Axis y, x;
  int64_t kernel_height, kernel_width;
  Activation activation;
  int64_t taps() const { return kernel_height * kernel_width; }
};

inline Gather forward_gather(const FeatureMap& input, const FeatureMap& output, const Tensor& weight, const Sliding& s,
                             Activation activation = Activation::none) {
  const int64_t kh = weight.shape[2], kw = weight.shape[3];
  return {forward_axis(input.height, output.height, kh, s.stride[0], s.padding[0], s.dilation[0]),
          forward_axis(input.width, output.width, kw, s.stride[1], s.padding[1], s.dilation[1]), kh, kw, activation};
}

inline Gather gradient_gather(const FeatureMap& output, const FeatureMap& input, const Tensor& weight, const Sliding& s) {
  const int64_t kh = weight.shape[2], kw = weight.shape[3];
  return {gradient_axis(output.height, input.height, kh, s.stride[0], s.padding[0], s.dilation[0]),
          gradient_axis(output.width, input.width, kw, s.stride[1], s.padding[1], s.dilation[1]), kh, kw, Activation::none};
}

struct Span {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

// Rows and columns of one image, as the pointer to its first channel and two strides.
template <class T>
struct Plane {
  T* data;
  int64_t row, pixel;
  T* at(int64_t y, int64_t x) const { return data + y * row + x * pixel; }
};

template <class T>
Plane<T> plane(const FeatureMap& map, int64_t image, int64_t channel) {
  return {map.at<T>(image, channel), map.row_stride, map.pixel_stride};
}

// The part of an axis's n outputs that band b of `bands` has: multiples of `unit`, but for the last.
inline Span band_of(int64_t n, int64_t unit, int64_t bands, int64_t b) {
  const int64_t units = ceil_div(n, unit);
  return {std::min(n, units * b / bands * unit), std::min(n, units * (b + 1) / bands * unit)};
}

// Of taps at first, first + step, ... those that lie in [0, sources) for some `first` in [low, high].
inline Span valid_taps(int64_t low, int64_t high, int64_t step, int64_t taps, int64_t sources) {
  const int64_t begin = high >= 0 ? 0 : std::min(taps, ceil_div(-high, step));
  const int64_t end = low + (taps - 1) * step < sources ? taps : low >= sources ? begin : ceil_div(sources - low, step);
  return {begin, std::max(begin, end)};
}

// Whether the neighbours in memory are channels; of two maps that check_sliding accepts.
inline bool is_nhwc(const FeatureMap& a, const FeatureMap& b) {
  return a.channels_last() && b.channels_last() && (a.channels > 1 || a.pixel_stride != 1 || b.pixel_stride != 1);
}

inline void check_sliding(const FeatureMap& input, const FeatureMap& output, const Tensor& weight, const char* weight_name,
                          const Sliding& s, DeviceType device = DeviceType::cpu) {
  check_tensor(weight, weight_name, 4);
  check_device(weight, weight_name, device);
  check_contiguous(weight, weight_name);
  PZ_CHECK(weight.shape[0] == input.channels && output.channels == input.channels && output.images == input.images,
           "input, weight and output must have the same channels and images");
  PZ_CHECK(weight.numel() > 0 || weight.shape[0] == 0, std::string(weight_name) + " must have taps, got shape " + weight.shape_string());
  PZ_CHECK(weight.shape[1] == 1, std::string(weight_name) + " must have shape [C, 1, KH, KW], got " + weight.shape_string());
  for (int axis = 0; axis < 2; ++axis)
    PZ_CHECK(s.stride[axis] > 0 && s.dilation[axis] > 0 && s.padding[axis] >= 0, "stride, dilation and padding are out of range");
  const auto planar = [](const FeatureMap& map) { return map.pixel_stride == 1; };
  const bool none = input.images == 0 || input.channels == 0;  // then strides mean nothing
  PZ_CHECK(none || (input.channels_last() && output.channels_last()) || (planar(input) && planar(output)),
           "input and output must both have neighbouring channels, or both neighbouring columns");
}

inline void check_bias(const Tensor& bias, const char* name, const FeatureMap& map, DeviceType device = DeviceType::cpu) {
  check_device(bias, name, device);
  check_dtype(bias, name, map.dtype);
  PZ_CHECK(bias.ndim == 1 && bias.shape[0] == map.channels, std::string(name) + " must have shape [C], got " + bias.shape_string());
  check_contiguous(bias, name);
}

}  // namespace pyzoo
