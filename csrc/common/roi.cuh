// What the CUDA kernels of the RoI ops share. In all of them lanes are channels, which therefore lie side by side: maps of other
// layouts are copied first, pooled values and gradients leave through shared memory.
#pragma once

#include <vector>

#include "common/cuda.cuh"
#include "common/feature_map.h"

namespace pyzoo {

constexpr int kRoiThreads = 256, kRoiWarps = kRoiThreads / kWarp;

// Up to kMost things, each worked on by blocks of its own in one launch.
template <class Item>
struct Shares {
  static constexpr int kMost = 8;
  Item items[kMost];
  int64_t first[kMost + 1] = {};  // block
  int count = 0;

  void add(const Item& item, int64_t blocks) {
    items[count] = item;
    first[count + 1] = first[count] + blocks;
    ++count;
  }
  int64_t blocks() const { return first[count]; }
  // Whose this block is; `block` becomes its number among theirs.
  __device__ int find(unsigned& block) const {
    int i = 0;
    while (block >= first[i + 1]) ++i;
    block -= unsigned(first[i]);
    return i;
  }
};

// Whether n neighbouring channels can be read or written at once, given what else an address is made of.
inline bool channels_pack(const void* data, DType dtype, int n, int64_t channels, int64_t channel_stride,
                          std::initializer_list<int64_t> strides) {
  bool all = channel_stride == 1 && channels % n == 0 && reinterpret_cast<uintptr_t>(data) % uintptr_t(n * dtype_size(dtype)) == 0;
  for (const int64_t stride : strides) all &= stride % n == 0;
  return all;
}
inline bool channels_pack(const FeatureMap& m, int n) {
  return channels_pack(m.data, m.dtype, n, m.channels, m.channel_stride, {m.image_stride, m.row_stride, m.pixel_stride});
}
inline bool channels_pack(const Pooled& p, int n) {
  return channels_pack(p.data, p.dtype, n, p.channels, p.channel_stride, {p.roi_stride, p.row_stride, p.bin_stride});
}

// ------------------------------------------------------------------------------------------------------ channels together

struct MapCopy {
  FeatureMap from, to;
};

// to [N, H, W, C].
template <class T>
__global__ void __launch_bounds__(kRoiThreads) copy_maps_kernel(Shares<MapCopy> copies) {
  __shared__ Shared<T, kWarp, kWarp + 1> tile;  // [channel][pixel]
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  unsigned block = blockIdx.x;
  const MapCopy& copy = copies.items[copies.find(block)];
  const FeatureMap &from = copy.from, &to = copy.to;
  const unsigned pixels = unsigned(from.pixels()), pixel_tiles = (pixels + kWarp - 1) / kWarp;
  const unsigned channel_tiles = unsigned(ceil_div(from.channels, kWarp));
  const int64_t c0 = int64_t(block % channel_tiles) * kWarp, image = block / channel_tiles / pixel_tiles;
  const unsigned p0 = block / channel_tiles % pixel_tiles * kWarp, width = unsigned(from.width);
  const unsigned p = std::min(p0 + lane, pixels - 1);
  const T* pixel = from.at<const T>(image, c0) + p / width * from.row_stride + p % width * from.pixel_stride;
#pragma unroll
  for (int row = 0; row < kWarp; row += kRoiWarps)
    tile(warp + row, lane) = c0 + warp + row < from.channels ? pixel[(warp + row) * from.channel_stride] : T{};
  __syncthreads();
  if (c0 + lane >= from.channels) return;
#pragma unroll
  for (int row = 0; row < kWarp; row += kRoiWarps)
    if (p0 + warp + row < pixels) to.at<T>(image, c0 + lane)[(p0 + warp + row) * to.pixel_stride] = tile(lane, warp + row);
}

// Replaces maps whose channels do not lie side by side by copies, in the memory that is returned, where they do.
template <class T>
std::shared_ptr<T> join_channels(const Tensor& like, std::vector<FeatureMap>& maps) {
  int64_t size = 0;
  for (const FeatureMap& map : maps)
    if (!map.channels_last()) size += map.images * map.pixels() * map.channels;
  if (size == 0) return nullptr;
  const auto memory = like.scratch<T>(size);
  T* next = memory.get();
  Shares<MapCopy> copies;
  const auto launch_all = [&] {
    launch(copy_maps_kernel<T>, copies.blocks(), kRoiThreads, like, copies);
    copies.count = 0;
  };
  for (FeatureMap& map : maps) {
    if (map.channels_last()) continue;
    FeatureMap to = map;
    to.data = next, to.pixel_stride = map.channels, to.channel_stride = 1;
    to.row_stride = to.width * to.pixel_stride, to.image_stride = to.height * to.row_stride;
    next += map.images * to.image_stride;
    copies.add({map, to}, map.images * ceil_div(map.pixels(), kWarp) * ceil_div(map.channels, kWarp));
    map = to;
    if (copies.count == Shares<MapCopy>::kMost) launch_all();
  }
  launch_all();
  return memory;
}

// Whether boxes that read some 16 pixels for a bin, each in another cache line, cost more than a copy.
inline bool worth_joining(const std::vector<FeatureMap>& maps, const Pooled& pooled) {
  int64_t pixels = 0;
  for (const FeatureMap& map : maps) pixels += map.images * map.pixels();
  return 32 * pooled.rois * pooled.bins() >= pixels;
}

// ------------------------------------------------------------------------------------------------------ the pooled tensor

// What a block pools: some bins of one box for some channels, n in each lane.
template <int n>
struct PooledPart {
  static constexpr int kBins = 49, kChannels = kWarp * n;
  int64_t k, c;  // the box; the first channel
  int first, bins;

  static int64_t blocks(const Pooled& pooled) {
    return pooled.rois * ceil_div(pooled.bins(), kBins) * ceil_div(pooled.channels, kChannels);
  }
  __device__ explicit PooledPart(const Pooled& pooled) {
    const unsigned slices = unsigned(ceil_div(pooled.channels, kChannels));
    const int all = int(pooled.bins()), parts = (all + kBins - 1) / kBins, each = (all + parts - 1) / parts;
    c = int64_t(blockIdx.x % slices) * kChannels;
    k = blockIdx.x / slices / unsigned(parts);
    first = int(blockIdx.x / slices % unsigned(parts)) * each;
    bins = std::max(0, std::min(each, all - first));
  }
  // The first channel of a lane; a lane that has none works on those of the first.
  __device__ int64_t channel(const Pooled& pooled, int lane) const { return c + lane * n < pooled.channels ? c + lane * n : c; }
};

// Writes such a part to a pooled tensor, in which either the channels of a bin are neighbours or the bins of a channel.
template <int n, class T>
class PooledTile {
 public:
  using A = acc_t<T>;

  // Bin j of the part; of each lane, the channels that are its.
  __device__ void put(const Pooled& to, const PooledPart<n>& part, int j, int lane, const A (&values)[n]) {
    if (!to.channels_last()) {
#pragma unroll
      for (int i = 0; i < n; ++i) tile_(j, i * kWarp + lane) = from_acc<T>(values[i]);
    } else if (part.c + lane * n < to.channels) {
      Pack<T, n> pack;
#pragma unroll
      for (int i = 0; i < n; ++i) pack.at[i] = from_acc<T>(values[i]);
      store_pack(static_cast<T*>(to.data) + part.k * to.roi_stride + (part.first + j) * to.bin_stride + part.c + lane * n, pack);
    }
  }
  // After all bins.
  __device__ void finish(const Pooled& to, const PooledPart<n>& part) {
    if (to.channels_last()) return;
    __syncthreads();
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int channels = int(std::min(int64_t(PooledPart<n>::kChannels), to.channels - part.c));
    T* out = static_cast<T*>(to.data) + part.k * to.roi_stride + part.c * to.channel_stride + part.first;
    for (int c = warp; c < channels; c += kRoiWarps)
      for (int j = lane; j < part.bins; j += kWarp) out[c * to.channel_stride + j] = tile_(j, c % n * kWarp + c / n);
  }

 private:
  Shared<T, PooledPart<n>::kBins, PooledPart<n>::kChannels + 1> tile_;  // by bin; channel c at c % n * kWarp + c / n: no bank twice
};

// ------------------------------------------------------------------------------------------------------ tiles of a gradient

// The gradient of a map is made of tiles: a block owns one for some channels, each warp for 32 of these, and gathers what the boxes
// that reach it give, in their order. So each element is summed in one order, and by one thread.
constexpr int kTileHeight = 4, kTileWidth = 8;

inline int64_t channel_warps(int64_t channels) { return std::min<int64_t>(kRoiWarps, ceil_div(channels, kWarp)); }

struct MapTile {
  int64_t image, c;  // c: of this lane
  int y, x;

  static int64_t blocks(const FeatureMap& map, int64_t warps) {
    return map.images * ceil_div(map.height, kTileHeight) * ceil_div(map.width, kTileWidth) * ceil_div(map.channels, warps * kWarp);
  }
  __device__ MapTile(const FeatureMap& map, unsigned block) {
    const unsigned slices = unsigned(ceil_div(map.channels, blockDim.x)), columns = unsigned(ceil_div(map.width, kTileWidth));
    const unsigned rows = unsigned(ceil_div(map.height, kTileHeight));
    c = int64_t(block % slices) * blockDim.x + threadIdx.x;
    block /= slices;
    x = int(block % columns) * kTileWidth;
    y = int(block / columns % rows) * kTileHeight;
    image = block / columns / rows;
  }
};

// The pixels that each box reaches at most, [kRows][boxes]: group, begin and end of the rows and of the columns. A group is an image of
// a map, -1 stands for none.
struct Reaches {
  static constexpr int kRows = 5;
  int32_t* data;
  int64_t boxes;

  __device__ void set(int64_t k, int group, PixelRange y, PixelRange x) const {
    int32_t* at = data + k;
    at[0] = group, at[boxes] = y.begin, at[2 * boxes] = y.end, at[3 * boxes] = x.begin, at[4 * boxes] = x.end;
  }
  __device__ bool reaches(int64_t k, int group, const MapTile& tile) const {
    const int32_t* at = data + k;
    return at[0] == group && at[boxes] < tile.y + kTileHeight && at[2 * boxes] > tile.y && at[3 * boxes] < tile.x + kTileWidth &&
           at[4 * boxes] > tile.x;
  }
};

// Lists the boxes that reach a tile.
class BoxList {
 public:
  // Calls use(count) for up to as many boxes at a time as the block has threads: those are (*this)(0 .. count - 1), in their order.
  template <class Use>
  __device__ void for_each(const Reaches& reaches, int group, const MapTile& tile, Use&& use) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    for (int64_t k0 = 0; k0 < reaches.boxes; k0 += blockDim.x) {
      const int64_t k = k0 + threadIdx.x;
      const bool hit = k < reaches.boxes && reaches.reaches(k, group, tile);
      const unsigned hits = __ballot_sync(kAllLanes, hit);
      if (lane == 0) of_warp_(warp) = __popc(hits);
      __syncthreads();
      int before = 0, count = 0;
      for (int w = 0; w < warps; ++w) {
        const int here = of_warp_(w);
        if (w < warp) before += here;
        count += here;
      }
      if (hit) list_(before + __popc(hits & ((1u << lane) - 1))) = k;
      __syncthreads();
      use(count);
    }
  }
  __device__ int64_t operator()(int i) { return list_(i); }

 private:
  Shared<int64_t, kRoiThreads> list_;
  Shared<int, kRoiWarps> of_warp_;
};

// Writes rows of a tile for the 32 channels of a warp.
template <class T, int kWarps = kRoiWarps>
class TileRows {
 public:
  // row: the pixels of this lane's channel.
  template <class A>
  __device__ void write(const FeatureMap& map, const MapTile& tile, int y, const A (&row)[kTileWidth]) {
    if (y >= map.height) return;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, width = int(std::min(int64_t(kTileWidth), map.width - tile.x));
    const int64_t first = y * map.row_stride + tile.x * map.pixel_stride;
    if (map.channels_last()) {
      if (tile.c >= map.channels) return;
      T* out = map.at<T>(tile.image, tile.c) + first;
#pragma unroll
      for (int x = 0; x < kTileWidth; ++x)
        if (x < width) out[x * map.pixel_stride] = from_acc<T>(row[x]);
      return;
    }
    constexpr int kAtOnce = kWarp / kTileWidth;  // channels
#pragma unroll
    for (int x = 0; x < kTileWidth; ++x) tile_(warp, x, lane) = from_acc<T>(row[x]);
    __syncwarp();
    const int x = lane % kTileWidth;
    const int64_t c0 = tile.c - lane;
    for (int c = lane / kTileWidth; c < kWarp; c += kAtOnce)
      if (x < width && c0 + c < map.channels) map.at<T>(tile.image, c0 + c)[first + x * map.pixel_stride] = tile_(warp, x, c);
    __syncwarp();
  }

 private:
  Shared<T, kWarps, kTileWidth, kWarp + kWarp / kTileWidth> tile_;  // no bank twice, either way
};

}  // namespace pyzoo
