#include "roi_align/roi_align.h"

#include "common/roi.cuh"

namespace pyzoo {

namespace {

struct Level {
  FeatureMap map;
  double scale;
};
using Levels = Shares<Level>;

// The boxes of all levels.
struct Boxes {
  Rois rois;
  RoiSampling sampling;
  LevelMap level_map;
  int levels, first_level;  // all; the first that a launch works on
};

// A pixel of an axis, as an offset, and its weight in a bin.
template <class A>
struct alignas(16) Tap {
  int64_t offset;
  A weight;
};
struct TapRange {
  int32_t begin, end;
};

// RoIAlign is separable: a bin has taps on each axis, where samples that share a pixel are merged. They are made once, for all channels
// and tiles.
template <class A>
struct TapTable {
  Tap<A>* taps;      // [K][room of y, room of x]
  TapRange* ranges;  // [K][bins of y, bins of x], in the taps of the box
  int32_t* places;   // [2][K]: level, -1 for one of another launch, and image, -1 for none
  int64_t boxes, room_y, room;
  int bins_y, bins_x;

  __device__ const Tap<A>* taps_of(int64_t k) const { return taps + k * room; }
  // That of bin b: those along x follow those along y.
  __device__ TapRange range(int64_t k, int b) const { return ranges[k * (bins_y + bins_x) + b]; }
};

// The room for the taps of an axis: two for each sample of a bin; if their number is not known, one for each pixel, as bins lie side by
// side, and some where they meet. As many as that, because the points of boxes far away are rounded to some pixels.
struct TapRoom {
  int of_bin;
  bool of_pixels;

  explicit TapRoom(int ratio) : of_bin(ratio > 0 ? 2 * ratio : 16), of_pixels(ratio <= 0) {}
  int64_t all(int bins, int64_t size) const { return bins * of_bin + (of_pixels ? size : 0); }
  // Where that of bin p begins.
  template <class G>
  __device__ int64_t begin(const RoiAxis<G>& axis, int p, int64_t size) const {
    const auto pixel = [&](G x) { return x > 0 ? x < G(size) ? int64_t(x) : size : 0; };
    return p * of_bin + (of_pixels ? pixel(axis.start + G(p) * axis.bin) - pixel(axis.start) : 0);
  }
};

// Also sets how far the boxes reach. in_pixels: offsets count pixels, not elements of the map.
template <class G, class A>
__global__ void __launch_bounds__(kRoiThreads)
    make_taps_kernel(Levels levels, Boxes boxes, TapTable<A> table, TapRoom room, Reaches reaches, bool in_pixels) {
  const int bins = table.bins_y + table.bins_x;
  for_each_element(table.boxes * bins, [&](int64_t i) {
    const int64_t k = i / bins;
    const bool along_y = i % bins < table.bins_y;
    const int p = int(i % bins) - (along_y ? 0 : table.bins_y);
    const auto is_here = [&](int level) { return level >= boxes.first_level && level < boxes.first_level + levels.count; };
    const auto at = [&](int column) { return boxes.rois.at<G>(k, column); };
    const RoiBox<G> box(at(1), at(2), at(3), at(4), boxes.level_map, boxes.levels, boxes.sampling,
                        [&](int level) { return is_here(level) ? levels.items[level - boxes.first_level].scale : 1.0; });
    const bool here = is_here(box.level);
    const int level = here ? box.level - boxes.first_level : 0;
    const FeatureMap& map = levels.items[level].map;
    const int image = boxes.rois.image(k, map.images);
    const bool pools = here && box.pools && image >= 0;
    if (i % bins == 0) {
      table.places[k] = here ? level : -1, table.places[table.boxes + k] = image;
      reaches.set(k, pools ? int(level * map.images) + image : -1, box.y.reach(table.bins_y, map.height),
                  box.x.reach(table.bins_x, map.width));
    }

    const RoiAxis<G> axis = along_y ? RoiAxis<G>(box.y) : RoiAxis<G>(box.x);
    const G factor = along_y ? G(1) / box.samples : G(1);
    const int64_t size = along_y ? map.height : map.width, stride = in_pixels ? 1 : along_y ? map.row_stride : map.pixel_stride;
    Tap<A>* const all = table.taps + k * table.room + (along_y ? 0 : table.room_y);
    Tap<A>* to = all + (pools ? room.begin(axis, p, size) : 0);
    Tap<A>* const begin = to;
    const Tap<A>* const end = all + (pools ? room.begin(axis, p + 1, size) : 0);
    int32_t older = -1, newer = -1;  // samples ascend: only the last two taps can be of the same pixel as the next
    A weight_of_older = 0, weight_of_newer = 0;
    const auto store = [&](int32_t pixel, A weight) {
      if (pixel >= 0 && to < end) *to++ = {pixel * stride, weight};
    };
    for_each_weight(axis, p, pools ? size : 0, 0, size - 1, [&](int32_t pixel, G weight) {
      const A w = A(weight * factor);
      if (pixel == newer) {
        weight_of_newer += w;
      } else if (pixel == older) {
        weight_of_older += w;
      } else {
        store(older, weight_of_older);
        older = newer, weight_of_older = weight_of_newer;
        newer = pixel, weight_of_newer = w;
      }
    });
    store(older, weight_of_older);
    store(newer, weight_of_newer);
    table.ranges[i] = {int32_t(begin - table.taps_of(k)), int32_t(to - table.taps_of(k))};
  });
}

// -------------------------------------------------------------------------------------------------------------- forward

// A warp pools a bin at a time.
template <int n, class T>
__global__ void __launch_bounds__(kRoiThreads, 2) roi_align_fwd_kernel(Levels levels, TapTable<acc_t<T>> table, Pooled output) {
  using A = acc_t<T>;
  constexpr int kAtOnce = 4;
  __shared__ PooledTile<n, T> tile;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const PooledPart<n> part(output);
  const int level = table.places[part.k], image = table.places[table.boxes + part.k];
  if (level < 0) return;
  const FeatureMap& map = levels.items[level].map;
  const T* from = map.at<const T>(image < 0 ? 0 : image, part.channel(output, lane));
  const Tap<A>* taps = table.taps_of(part.k);
  for (int j = warp; j < part.bins; j += kRoiWarps) {
    A sum[n];
#pragma unroll
    for (int i = 0; i < n; ++i) sum[i] = image < 0 ? A(NAN) : A(0);  // a kernel cannot raise: an image that is not there shows
    const int bin = part.first + j;
    const TapRange range_y = table.range(part.k, bin / table.bins_x), range_x = table.range(part.k, table.bins_y + bin % table.bins_x);
    for (int y = range_y.begin; y < range_y.end; ++y) {
      const T* row = from + taps[y].offset;
      const A weight_y = taps[y].weight;
      for (int x = range_x.begin; x < range_x.end; x += kAtOnce) {
        A weight[kAtOnce];
        Pack<T, n> pixel[kAtOnce];
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u)
          if (x + u < range_x.end) {
            const Tap<A> tap = taps[x + u];
            weight[u] = weight_y * tap.weight;
            pixel[u] = load_pack<n>(row + tap.offset);
          }
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u)
          if (x + u < range_x.end)
#pragma unroll
            for (int i = 0; i < n; ++i) sum[i] = std::fma(weight[u], A(to_float(pixel[u].at[i])), sum[i]);
      }
    }
    tile.put(output, part, j, lane, sum);
  }
  tile.finish(output, part);
}

// ------------------------------------------------------------------------------------------------------------- backward

// A box gives to each channel of a tile Wy^T G Wx, where W has the weights of its bins on the rows or columns of the tile.
template <class T>
__global__ void __launch_bounds__(kRoiThreads, sizeof(acc_t<T>) == 8 ? 1 : 2)
    roi_align_bwd_kernel(Levels levels, TapTable<acc_t<T>> table, Reaches reaches, FeatureMap grad) {
  using A = acc_t<T>;
  using Quad = Pack<A, 4>;
  constexpr int kBatch = 16, kBins = kWarp / 2;  // boxes at a time, and their bins along an axis
  __shared__ BoxList list;
  __shared__ Shared<Quad, kBatch, kBins> weights_y;
  __shared__ Shared<Quad, kBatch, kBins, 2> weights_x;
  __shared__ Shared<unsigned, kBatch> bins_of;  // that have a weight: along y in the lower bits, along x in the upper
  __shared__ TileRows<T> rows;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  unsigned block = blockIdx.x;
  const int level = levels.find(block);
  const FeatureMap& map = levels.items[level].map;
  const MapTile tile(map, block);

  A sum[kTileHeight][kTileWidth] = {};

  // The weights of one box of the list, made by a warp: half of it for y, half for x.
  const auto make_weights = [&](int64_t k, int u, int first_y, int first_x) {
    const bool along_y = lane < kBins;
    const int bin = (along_y ? first_y : first_x) + lane % kBins, first = along_y ? tile.y : tile.x;
    Pack<A, kTileWidth> weights{};
    bool any = false;
    if (bin < (along_y ? table.bins_y : table.bins_x)) {
      const TapRange range = table.range(k, bin + (along_y ? 0 : table.bins_y));
      const Tap<A>* taps = table.taps_of(k);
      for (int t = range.begin; t < range.end; ++t) {
        const Tap<A> tap = taps[t];
        const int64_t at = tap.offset - first;
        any |= at >= 0 && at < (along_y ? kTileHeight : kTileWidth) && tap.weight != 0;
#pragma unroll
        for (int i = 0; i < kTileWidth; ++i)
          if (at == i) weights.at[i] += tap.weight;  // of an inverted box, more than one
      }
    }
    const unsigned those = __ballot_sync(kAllLanes, any);
    if (lane == 0) bins_of(u) = those;
    const Quad low{{weights.at[0], weights.at[1], weights.at[2], weights.at[3]}};
    const Quad high{{weights.at[4], weights.at[5], weights.at[6], weights.at[7]}};
    if (along_y) weights_y(u, lane) = low;
    else weights_x(u, lane - kBins, 0) = low, weights_x(u, lane - kBins, 1) = high;
  };

  // Adds what these bins of a box give to the channel of this lane.
  const auto add_box = [&](int64_t k, int u, int first_y, int first_x) {
    const unsigned those = bins_of(u), bins_x = those >> kBins;
    unsigned bins_y = those & ((1u << kBins) - 1);
    if (bins_x == 0) return;
    const int x_begin = __ffs(bins_x) - 1, x_end = kWarp - __clz(bins_x);
    const T* from = grad.at<const T>(k, tile.c < map.channels ? tile.c : 0) + first_y * grad.row_stride + first_x * grad.pixel_stride;
    for (; bins_y != 0; bins_y &= bins_y - 1) {
      const int y = __ffs(bins_y) - 1;
      A line[kTileWidth] = {};  // the bins of this row on the columns of the tile
      for (int x0 = x_begin; x0 < x_end; x0 += kTileWidth) {
        A bins[kTileWidth];
        bool finite = true;
#pragma unroll
        for (int i = 0; i < kTileWidth; ++i) {
          bins[i] = x0 + i < x_end ? A(to_float(from[y * grad.row_stride + (x0 + i) * grad.pixel_stride])) : A(0);
          finite &= std::isfinite(bins[i]);
        }
        const auto add = [&](auto guarded) {
#pragma unroll
          for (int i = 0; i < kTileWidth; ++i) {
            if (x0 + i >= x_end) break;
            const Quad low = weights_x(u, x0 + i, 0), high = weights_x(u, x0 + i, 1);
#pragma unroll
            for (int x = 0; x < kTileWidth; ++x) {
              const A weight = x < 4 ? low.at[x % 4] : high.at[x % 4];
              if (!guarded || weight != 0) line[x] = std::fma(weight, bins[i], line[x]);
            }
          }
        };
        if (finite) add(std::false_type{});
        else add(std::true_type{});  // inf * 0 is not 0
      }
      const Quad weights = weights_y(u, y);
#pragma unroll
      for (int i = 0; i < kTileHeight; ++i) {
        if (weights.at[i] == 0) continue;
#pragma unroll
        for (int x = 0; x < kTileWidth; ++x) sum[i][x] = std::fma(weights.at[i], line[x], sum[i][x]);
      }
    }
  };

  list.for_each(reaches, int(level * map.images + tile.image), tile, [&](int count) {
    for (int i0 = 0; i0 < count; i0 += kBatch)
      for (int first_y = 0; first_y < table.bins_y; first_y += kBins)
        for (int first_x = 0; first_x < table.bins_x; first_x += kBins) {
          const int batch = std::min(kBatch, count - i0);
          for (int u = warp; u < batch; u += warps) make_weights(list(i0 + u), u, first_y, first_x);
          __syncthreads();
          for (int u = 0; u < batch; ++u) add_box(list(i0 + u), u, first_y, first_x);
          __syncthreads();
        }
  });
#pragma unroll
  for (int y = 0; y < kTileHeight; ++y) rows.write(map, tile, tile.y + y, sum[y]);
}

// ---------------------------------------------------------------------------------------------------------------- launch

std::vector<FeatureMap> feature_maps(const std::vector<Tensor>& tensors, const char* name, DType dtype, int64_t channels,
                                     const std::vector<double>& scales) {
  PZ_CHECK(!tensors.empty(), std::string(name) + ": at least one feature map is needed");
  PZ_CHECK(scales.size() == tensors.size(), "one spatial scale is needed for each feature map");
  std::vector<FeatureMap> maps;
  for (const Tensor& t : tensors) {
    maps.emplace_back(t, name, kCuda);
    PZ_CHECK(maps.back().dtype == dtype, std::string(name) + ": all feature maps and the pooled tensor must share a dtype");
    PZ_CHECK(maps.back().images == maps.front().images && maps.back().channels == channels,
             std::string(name) + ": all feature maps must have the same batch size and channels");
  }
  return maps;
}

// Calls f(levels, table, reaches) for all levels, as many at a time as a launch takes, when their taps are made.
template <class A, class BlocksOf, class F>
void for_levels(const Tensor& like, const std::vector<FeatureMap>& maps, const std::vector<double>& scales, const Rois& rois,
                const RoiSampling& sampling, const std::optional<LevelMap>& level_map, bool in_pixels, BlocksOf&& blocks_of, F&& f) {
  Boxes boxes{rois, sampling, level_map.value_or(LevelMap{}), level_map ? int(maps.size()) : 1, 0};
  int64_t height = 0, width = 0;
  for (const FeatureMap& map : maps) height = std::max(height, map.height), width = std::max(width, map.width);
  const TapRoom room(sampling.ratio);
  const int64_t count = rois.count(), bins = sampling.bins_y + sampling.bins_x, room_y = room.all(sampling.bins_y, height);
  TapTable<A> table{nullptr, nullptr, nullptr, count, room_y, room_y + room.all(sampling.bins_x, width), sampling.bins_y, sampling.bins_x};
  PZ_CHECK(table.room <= INT32_MAX, "roi_align: too many bins or pixels");
  const auto taps = like.scratch<Tap<A>>(count * table.room);
  const auto ranges = like.scratch<TapRange>(count * bins);
  const auto numbers = like.scratch<int32_t>(count * (2 + Reaches::kRows));
  table.taps = taps.get(), table.ranges = ranges.get(), table.places = numbers.get();
  const Reaches reaches{numbers.get() + 2 * count, count};
  for (size_t first = 0; first < maps.size(); first += Levels::kMost) {
    Levels levels;
    for (size_t i = first; i < std::min(maps.size(), first + Levels::kMost); ++i) levels.add({maps[i], scales[i]}, blocks_of(maps[i]));
    boxes.first_level = int(first);
    const auto make_taps = [&](auto g) {
      launch(make_taps_kernel<decltype(g), A>, blocks_for(count * bins, kRoiThreads), kRoiThreads, like, levels, boxes, table, room,
             reaches, in_pixels);
    };
    if (sizeof(A) == 8 || rois.dtype == DType::f64) make_taps(double{});
    else if constexpr (sizeof(A) == 4) make_taps(float{});
    f(levels, table, reaches);
  }
}

}  // namespace

void roi_align_fwd_cuda(const std::vector<Tensor>& inputs, const Tensor& rois, const Tensor& output, const std::vector<double>& scales,
                        int sampling_ratio, bool aligned, const std::optional<LevelMap>& level_map) {
  const Pooled pooled(output, "output", kCuda);
  pooled.check_written("output");
  std::vector<FeatureMap> maps = feature_maps(inputs, "input", pooled.dtype, pooled.channels, scales);
  const Rois boxes(rois, kCuda);
  PZ_CHECK(boxes.count() == pooled.rois, "boxes and the pooled tensor must have the same number of rows");
  if (output.numel() == 0) return;
  dispatch_floating(output.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int n = 16 / sizeof(T);
    const auto copies = worth_joining(maps, pooled) ? join_channels<T>(output, maps) : nullptr;
    const bool packs = (!pooled.channels_last() || channels_pack(pooled, n)) &&
                       std::all_of(maps.begin(), maps.end(), [](const FeatureMap& map) { return channels_pack(map, n); });
    const RoiSampling sampling{int(pooled.height), int(pooled.width), sampling_ratio, aligned};
    const auto no_blocks = [](const FeatureMap&) { return 0; };
    for_levels<acc_t<T>>(output, maps, scales, boxes, sampling, level_map, false, no_blocks,
                         [&](const Levels& levels, const TapTable<acc_t<T>>& table, const Reaches&) {
                           if (packs)
                             launch(roi_align_fwd_kernel<n, T>, PooledPart<n>::blocks(pooled), kRoiThreads, output, levels, table, pooled);
                           else
                             launch(roi_align_fwd_kernel<1, T>, PooledPart<1>::blocks(pooled), kRoiThreads, output, levels, table, pooled);
                         });
  });
}

void roi_align_bwd_cuda(const Tensor& grad_output, const Tensor& rois, const std::vector<Tensor>& grad_inputs,
                        const std::vector<double>& scales, int sampling_ratio, bool aligned, const std::optional<LevelMap>& level_map) {
  std::vector<FeatureMap> grad{FeatureMap(grad_output, "grad_output", kCuda)};
  const std::vector<FeatureMap> maps = feature_maps(grad_inputs, "grad_input", grad[0].dtype, grad[0].channels, scales);
  for (const FeatureMap& map : maps) map.check_written("grad_input");
  const Rois boxes(rois, kCuda);
  PZ_CHECK(boxes.count() == grad[0].images, "boxes and the pooled tensor must have the same number of rows");
  if (maps[0].channels == 0) return;
  const Tensor& like = grad_inputs[0];
  dispatch_floating(like.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t warps = channel_warps(maps[0].channels);
    const auto copy = join_channels<T>(like, grad);
    const RoiSampling sampling{int(grad[0].height), int(grad[0].width), sampling_ratio, aligned};
    const auto blocks_of = [&](const FeatureMap& map) { return MapTile::blocks(map, warps); };
    for_levels<acc_t<T>>(like, maps, scales, boxes, sampling, level_map, true, blocks_of,
                         [&](const Levels& levels, const TapTable<acc_t<T>>& table, const Reaches& reaches) {
                           launch(roi_align_bwd_kernel<T>, levels.blocks(), int(warps) * kWarp, like, levels, table, reaches, grad[0]);
                         });
  });
}

}  // namespace pyzoo
