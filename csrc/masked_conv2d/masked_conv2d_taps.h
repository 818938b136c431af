// Which weights of a masked convolution count.
#pragma once

#include <algorithm>
#include <cstdlib>

#include "common/feature_map.h"
#include "masked_conv2d/masked_conv2d.h"

namespace pyzoo {

// The live taps of a kernel of height x width are those at [first, last) in row-major order: every mask is such an interval. Where
// colors > 1 and the centre is the last live tap, it sees only the channels that come before in the order of colors.
struct MaskedTaps {
  int64_t out_channels, in_channels, groups;  // of all groups together
  int64_t height, width, dilation_y, dilation_x;
  int64_t first, last;
  int64_t colors, gates;
  bool strict;

  MaskedTaps(const Tensor& weight, const char* name, const ConvMask& mask)
      : groups(mask.groups), dilation_y(mask.dilation_y), dilation_x(mask.dilation_x), colors(mask.colors), gates(mask.gates) {
    check_tensor(weight, name, 4);
    out_channels = weight.shape[0], in_channels = weight.shape[1] * groups;
    height = weight.shape[2], width = weight.shape[3];
    PZ_CHECK(height % 2 == 1 && width % 2 == 1, std::string(name) + " must have odd height and width, got shape " + weight.shape_string());
    PZ_CHECK(groups > 0 && out_channels % groups == 0, "groups must divide the output channels");
    PZ_CHECK(dilation_y > 0 && dilation_x > 0, "dilation must be positive");
    PZ_CHECK(colors > 0 && gates > 0 && in_channels % colors == 0 && out_channels % (colors * gates) == 0,
             "colors must divide the input channels, colors x gates the output channels");
    const bool vertical = mask.name.rfind("vertical", 0) == 0, horizontal = mask.name.rfind("horizontal", 0) == 0;
    const char kind = vertical || horizontal ? mask.name.back() : mask.name == "A" ? 'a' : mask.name == "B" ? 'b' : '?';
    PZ_CHECK(kind == 'a' || kind == 'b', "mask is unknown: " + mask.name);
    PZ_CHECK(!vertical || colors == 1, "a vertical mask has no order of colors");
    strict = kind == 'a';
    const int64_t row = height / 2 * width;  // of the centre
    first = horizontal ? row : 0;
    last = vertical ? row + (strict ? 0 : width) : row + width / 2 + (strict && colors == 1 ? 0 : 1);
  }

  PZ_HD int64_t taps() const { return last - first; }
  PZ_HD int64_t kernel() const { return height * width; }
  PZ_HD int64_t dy(int64_t tap) const { return (tap / width - height / 2) * dilation_y; }
  PZ_HD int64_t dx(int64_t tap) const { return (tap % width - width / 2) * dilation_x; }
  PZ_HD bool ordered(int64_t tap) const { return colors > 1 && tap == kernel() / 2; }
  // At the centre tap output channel o sees the input channels below this one. Channels count through all groups; those of a gate
  // lie together, and have the colors one after the other.
  PZ_HD int64_t limit(int64_t o) const {
    const int64_t color = o % (out_channels / gates) / (out_channels / gates / colors);
    return (color + (strict ? 0 : 1)) * (in_channels / colors);
  }
};

// How far the live taps reach around a pixel, in rows and columns of a map. Taps that never meet the map do not count.
struct Reach {
  int64_t top = 0, bottom = 0, left = 0, right = 0;

  Reach(const MaskedTaps& taps, int64_t sign, int64_t height, int64_t width) {
    for (int64_t tap = taps.first; tap < taps.last; ++tap) {
      const int64_t dy = sign * taps.dy(tap), dx = sign * taps.dx(tap);
      if (std::abs(dy) >= height || std::abs(dx) >= width) continue;
      top = std::max(top, -dy), bottom = std::max(bottom, dy), left = std::max(left, -dx), right = std::max(right, dx);
    }
  }
};

inline void check_maps(const FeatureMap& input, const FeatureMap& output, const MaskedTaps& taps) {
  PZ_CHECK(input.images == output.images && input.height == output.height && input.width == output.width &&
               input.channels == taps.in_channels && output.channels == taps.out_channels,
           "the shapes of input, weight and output do not fit");
  PZ_CHECK(input.dtype == output.dtype, "input and output must have one dtype");
}

inline void check_weights(const Tensor& weight, const char* name, const Tensor* bias, const char* bias_name, const FeatureMap& map,
                          const MaskedTaps& taps, DeviceType device) {
  check_contiguous(weight, name);
  check_device(weight, name, device);
  check_dtype(weight, name, map.dtype);
  if (!bias) return;
  check_contiguous(*bias, bias_name);
  check_device(*bias, bias_name, device);
  check_dtype(*bias, bias_name, map.dtype);
  PZ_CHECK(bias->ndim == 1 && bias->shape[0] == taps.out_channels,
           std::string(bias_name) + " must have shape [OC], got " + bias->shape_string());
}

}  // namespace pyzoo
