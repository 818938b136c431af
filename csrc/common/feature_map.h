// A batch of feature maps [N, C, H, W] of any strides, and the list of boxes that are pooled from it. Shared by the RoI ops.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "memory.h"
#include "tensor.h"

namespace pyzoo {

// Some exporters put any stride on an axis of one element. Afterwards pixel p = y * width + x lies at p * pixel_stride whenever that
// is so for the pixels there are.
inline void settle_strides(int64_t height, int64_t width, int64_t& row_stride, int64_t& pixel_stride) {
  if (width == 1) pixel_stride = height == 1 ? 1 : row_stride;
  if (height == 1) row_stride = width * pixel_stride;
}

struct FeatureMap {
  void* data;
  DType dtype;
  int64_t images, channels, height, width;
  int64_t image_stride, channel_stride, row_stride, pixel_stride;  // in elements

  FeatureMap() = default;
  FeatureMap(const Tensor& t, const char* name, DeviceType device = DeviceType::cpu) {
    check_tensor(t, name, 4);
    check_device(t, name, device);
    check_floating(t, name);
    data = t.data;
    dtype = t.dtype;
    images = t.shape[0], channels = t.shape[1], height = t.shape[2], width = t.shape[3];
    image_stride = t.stride[0], channel_stride = t.stride[1], row_stride = t.stride[2], pixel_stride = t.stride[3];
    settle_strides(height, width, row_stride, pixel_stride);
    PZ_CHECK(height * width <= INT32_MAX, std::string(name) + ": height x width must be below 2^31, got shape " + t.shape_string());
  }
  PZ_HD int64_t pixels() const { return height * width; }
  PZ_HD bool channels_last() const { return channel_stride == 1 || channels == 1; }
  void check_written(const char* name) const {
    PZ_CHECK(pixels() == 0 || (row_stride == width * pixel_stride && (pixel_stride == 1 || channels_last())),
             std::string(name) + " must be contiguous or channels_last");
  }
  // The address of an image from channel c on.
  template <class T>
  PZ_HD T* at(int64_t image, int64_t c) const {
    return static_cast<T*>(data) + image * image_stride + c * channel_stride;
  }
};

// Channels [begin, begin + count): what is worked on at a time, so that the data stays in the second-level cache.
struct ChannelBlock {
  static constexpr int64_t kMost = 64;
  int64_t begin, count;
};

// Blocks of kMost channels. When the last one would be narrower than a vector it starts earlier, over channels done before.
inline std::vector<ChannelBlock> channel_blocks(int64_t channels, int64_t vector) {
  std::vector<ChannelBlock> blocks;
  for (int64_t c = 0; c < channels; c += ChannelBlock::kMost) {
    const int64_t rest = channels - c, count = rest < vector && channels >= vector ? vector : std::min(rest, ChannelBlock::kMost);
    blocks.push_back({c + std::min(rest, ChannelBlock::kMost) - count, count});
  }
  return blocks;
}

// A pooled tensor [K, C, PH, PW], either layout; the backward passes also take a gradient of any strides.
struct Pooled {
  void* data;
  DType dtype;
  int64_t rois, channels, height, width;
  int64_t roi_stride, channel_stride, row_stride, bin_stride;

  Pooled(const Tensor& t, const char* name, DeviceType device = DeviceType::cpu) {
    check_tensor(t, name, 4);
    check_device(t, name, device);
    data = t.data;
    dtype = t.dtype;
    rois = t.shape[0], channels = t.shape[1], height = t.shape[2], width = t.shape[3];
    roi_stride = t.stride[0], channel_stride = t.stride[1], row_stride = t.stride[2], bin_stride = t.stride[3];
    settle_strides(height, width, row_stride, bin_stride);
  }
  PZ_HD int64_t bins() const { return height * width; }
  // Bins of one channel lie next to each other (NCHW), or channels of one bin do.
  bool planar() const { return bin_stride == 1 && row_stride == width; }
  PZ_HD bool channels_last() const { return (channel_stride == 1 || channels == 1) && row_stride == width * bin_stride; }
  // Every bin's channels fill whole cache lines, so that each can be written past the caches.
  bool whole_lines() const {
    const int64_t line = 64 / dtype_size(dtype);
    return channels % line == 0 && bin_stride % line == 0 && roi_stride % line == 0 && reinterpret_cast<uintptr_t>(data) % 64 == 0;
  }
  void check_written(const char* name) const {
    PZ_CHECK(planar() || channels_last(), std::string(name) + " must be contiguous or channels_last");
  }
};

// Pixels of an axis.
struct PixelRange {
  int32_t begin, end;
};

// Boxes [K, 5]: image index, x1, y1, x2, y2.
struct Rois {
  const void* data;
  DType dtype;
  int64_t boxes, box_stride, column_stride;

  explicit Rois(const Tensor& t, DeviceType device = DeviceType::cpu) {
    PZ_CHECK(t.ndim == 2 && t.shape[1] == 5, "boxes must have shape [K, 5], got " + t.shape_string());
    check_device(t, "boxes", device);
    check_floating(t, "boxes");
    data = t.data, dtype = t.dtype;
    boxes = t.shape[0], box_stride = t.stride[0], column_stride = t.stride[1];
  }
  PZ_HD int64_t count() const { return boxes; }
  template <class G>
  PZ_HD G at(int64_t k, int64_t column) const {
    return load_as<G>(data, dtype, k * box_stride + column * column_stride);
  }
  // The image index of a box, truncated towards zero like torchvision's; -1 when there is no such image.
  PZ_HD int32_t image(int64_t k, int64_t count_images) const {
    const double index = at<double>(k, 0);
    return index > -1 && index < double(count_images) ? int32_t(index) : -1;
  }
  // That of every box; raises when there is no such image.
  std::vector<int32_t> images(int64_t count_images) const {
    std::vector<int32_t> all(count());
    for (int64_t k = 0; k < count(); ++k) {
      all[k] = image(k, count_images);
      PZ_CHECK(all[k] >= 0, "boxes: batch index must be in [0, " + std::to_string(count_images) + "), got " +
                                std::to_string(at<double>(k, 0)) + " in row " + std::to_string(k));
    }
    return all;
  }
};

// The order in which boxes are worked on: group by group (a group is an image of a level), and within a group along the
// map, so that neighbours find their pixels in the cache. The order of sums in the backward pass, too: it depends on the boxes alone.
struct BoxOrder {
  std::vector<int64_t> members;  // of group g: [first[g], first[g + 1])
  std::vector<int64_t> first;

  // corner(k) -> {first row, first column}
  template <class Corner>
  BoxOrder(const std::vector<int32_t>& group, int64_t groups, const Corner& corner) : first(groups + 1) {
    constexpr int64_t kRows = 16;  // boxes whose first rows fall into the same strip go from left to right
    struct Key {
      int64_t strip, column, k;
    };
    std::vector<Key> keys;
    for (size_t k = 0; k < group.size(); ++k) {
      const auto [row, column] = corner(int64_t(k));
      keys.push_back({int64_t(group[k]) << 32 | int64_t(uint32_t(row) / kRows), column, int64_t(k)});
      ++first[group[k] + 1];
    }
    std::sort(keys.begin(), keys.end(), [](const Key& a, const Key& b) {
      return a.strip != b.strip ? a.strip < b.strip : a.column != b.column ? a.column < b.column : a.k < b.k;
    });
    for (int64_t g = 0; g < groups; ++g) first[g + 1] += first[g];
    for (const Key& key : keys) members.push_back(key.k);
  }
};

// Which blocks of 16 pixels of the maps, a cache line of floats, the boxes touch: only those are copied into channels_last order.
struct TouchedPixels {
  static constexpr int64_t kBlock = 16;
  int64_t blocks_per_image;
  std::vector<uint8_t> touched;

  explicit TouchedPixels(const FeatureMap& map)
      : blocks_per_image((map.pixels() + kBlock - 1) / kBlock), touched(size_t(map.images * blocks_per_image)) {}

  // Rows and columns are inclusive.
  void mark(const FeatureMap& map, int64_t image, int64_t y0, int64_t y1, int64_t x0, int64_t x1) {
    uint8_t* blocks = touched.data() + image * blocks_per_image;
    for (int64_t y = y0; y <= y1; ++y)
      for (int64_t b = (y * map.width + x0) / kBlock; b <= (y * map.width + x1) / kBlock; ++b) blocks[b] = 1;
  }
};

}  // namespace pyzoo
