#include "roi_pool/roi_pool.h"

#include <limits>

#include "common/roi.cuh"
#include "roi_pool/roi_pool_geometry.h"

namespace pyzoo {

namespace {

struct Boxes {
  Rois rois;
  double scale;
  int bins_y, bins_x;
  bool wide;  // geometry in double, else in float
};

// A box on its map.
struct BoxBins {
  const Boxes& boxes;
  const FeatureMap& map;
  int64_t k;

  // Those of bin p, along y or x.
  __device__ PixelRange span(bool along_y, int p) const { return boxes.wide ? span_of<double>(along_y, p) : span_of<float>(along_y, p); }

 private:
  template <class G>
  __device__ PixelRange span_of(bool along_y, int p) const {
    const int from = along_y ? 2 : 1;
    const RoiPoolAxis<G> axis(boxes.rois.at<G>(k, from), boxes.rois.at<G>(k, from + 2), G(boxes.scale),
                              along_y ? boxes.bins_y : boxes.bins_x, along_y ? map.height : map.width);
    int64_t begin, end;
    axis.pixels(p, begin, end);
    return {int32_t(begin), int32_t(end)};
  }
};

// -------------------------------------------------------------------------------------------------------------- forward

// A warp pools a bin at a time. output, index: null where they are not wanted; index gets the pixel y * width + x of each maximum, -1
// for none.
template <int n, class T>
__global__ void __launch_bounds__(kRoiThreads)
    roi_pool_fwd_kernel(FeatureMap map, Boxes boxes, Pooled output, Pooled index, bool index_packs) {
  using A = acc_t<T>;
  constexpr int kBins = PooledPart<n>::kBins, kAtOnce = 4;
  __shared__ Shared<PixelRange, 2, kBins> spans;
  __shared__ PooledTile<n, T> tile;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const PooledPart<n> part(output);
  const int image = boxes.rois.image(part.k, map.images);
  const BoxBins box{boxes, map, part.k};
  for (int i = threadIdx.x; i < 2 * kBins; i += kRoiThreads) {
    const bool along_y = i < kBins;
    const int j = i % kBins, bin = part.first + j;
    if (j < part.bins) spans(along_y ? 0 : 1, j) = box.span(along_y, along_y ? bin / boxes.bins_x : bin % boxes.bins_x);
  }
  __syncthreads();

  const T* from = map.at<const T>(image < 0 ? 0 : image, part.channel(output, lane));
  for (int j = warp; j < part.bins; j += kRoiWarps) {
    const PixelRange y = spans(0, j), x = spans(1, j);
    const bool empty = image < 0 || y.begin >= y.end || x.begin >= x.end;
    // A kernel cannot raise: an image that is not there shows.
    const A first = image < 0 ? A(NAN) : empty ? A(0) : A(-std::numeric_limits<float>::max());
    A best[n];
    int32_t at[n];
#pragma unroll
    for (int i = 0; i < n; ++i) best[i] = first, at[i] = -1;
    for (int row = y.begin; row < y.end && !empty; ++row)
      for (int column = x.begin; column < x.end; column += kAtOnce) {
        Pack<T, n> pixel[kAtOnce];
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u)
          if (column + u < x.end) pixel[u] = load_pack<n>(from + row * map.row_stride + (column + u) * map.pixel_stride);
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u)
#pragma unroll
          for (int i = 0; i < n && column + u < x.end; ++i) {
            const A value = A(to_float(pixel[u].at[i]));
            if (value > best[i]) best[i] = value, at[i] = row * int(map.width) + column + u;  // false for NaN: it never wins
          }
      }
    if (output.data) tile.put(output, part, j, lane, best);
    const int64_t c = part.c + lane * n;
    if (!index.data || c >= output.channels) continue;
    const int bin = part.first + j;
    int32_t* to = static_cast<int32_t*>(index.data) + part.k * index.roi_stride + bin / boxes.bins_x * index.row_stride +
                  bin % boxes.bins_x * index.bin_stride + c * index.channel_stride;
    if (index_packs) {
      Pack<int32_t, n> pack;
#pragma unroll
      for (int i = 0; i < n; ++i) pack.at[i] = at[i];
      store_pack(to, pack);
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) to[i * index.channel_stride] = at[i];
    }
  }
  if (output.data) tile.finish(output, part);
}

// ------------------------------------------------------------------------------------------------------------- backward

__global__ void __launch_bounds__(kRoiThreads) place_boxes_kernel(FeatureMap map, Boxes boxes, Reaches reaches) {
  for_each_element(boxes.rois.count(), [&](int64_t k) {
    const BoxBins box{boxes, map, k};
    const auto all = [&](bool along_y, int bins) { return PixelRange{box.span(along_y, 0).begin, box.span(along_y, bins - 1).end}; };
    reaches.set(k, boxes.rois.image(k, map.images), all(true, boxes.bins_y), all(false, boxes.bins_x));
  });
}

// A bin gives to the pixel that its maximum came from, if that is in the tile. grad and index [K, PH, PW, C].
template <class T>
__global__ void __launch_bounds__(kRoiThreads)
    roi_pool_bwd_kernel(FeatureMap map, Boxes boxes, Reaches reaches, FeatureMap grad, const int32_t* index) {
  using A = acc_t<T>;
  constexpr int kBatch = 32, kBins = kWarp / 2, kAtOnce = 8;
  constexpr int kWarps = kRoiWarps * sizeof(float) / sizeof(A);
  __shared__ BoxList list;
  __shared__ Shared<unsigned, kBatch> bins_of;  // that have pixels of the tile: along y in the lower bits, along x in the upper
  __shared__ Shared<A, kWarps, kTileHeight * kTileWidth, kWarp> sums;  // each touched by one thread: registers have no index
  __shared__ TileRows<T, kWarps> rows;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const MapTile tile(map, blockIdx.x);
  const unsigned columns = unsigned(std::min(int64_t(kTileWidth), map.width - tile.x));
  unsigned first_of_row[kTileHeight];  // pixel; of rows below the map none that there is, nor -1
#pragma unroll
  for (int row = 0; row < kTileHeight; ++row)
    first_of_row[row] = tile.y + row < map.height ? unsigned((tile.y + row) * map.width + tile.x) : 1u << 31;
  const bool has_channel = tile.c < map.channels;
  const int64_t c = has_channel ? tile.c : 0;
  for (int p = 0; p < kTileHeight * kTileWidth; ++p) sums(warp, p, lane) = 0;

  const auto add_box = [&](int64_t k, int u, int first_y, int first_x) {
    unsigned bins_y = bins_of(u) & 0xffff;
    const unsigned bins_x = bins_of(u) >> kBins;
    const int x_begin = first_x + __ffs(bins_x) - 1, x_end = first_x + kWarp - __clz(bins_x);
    for (; bins_y != 0 && bins_x != 0; bins_y &= bins_y - 1) {
      const int y = first_y + __ffs(bins_y) - 1;
      const int32_t* index_of = index + ((k * boxes.bins_y + y) * boxes.bins_x) * map.channels + c;
      const T* grad_of = grad.at<const T>(k, c) + y * grad.row_stride;
      for (int x0 = x_begin; x0 < x_end; x0 += kAtOnce) {
        int32_t pixel[kAtOnce];
        T value[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int x = std::min(x0 + i, x_end - 1);
          pixel[i] = x0 + i < x_end ? index_of[x * map.channels] : -1;
          value[i] = grad_of[x * grad.pixel_stride];
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          int p = -1;
#pragma unroll
          for (int row = 0; row < kTileHeight; ++row)
            if (const unsigned column = unsigned(pixel[i]) - first_of_row[row]; column < columns) p = row * kTileWidth + int(column);
          if (p >= 0) sums(warp, p, lane) += A(to_float(value[i]));
        }
      }
    }
  };

  list.for_each(reaches, int(tile.image), tile, [&](int count) {
    for (int i0 = 0; i0 < count; i0 += kBatch)
      for (int first_y = 0; first_y < boxes.bins_y; first_y += kBins)
        for (int first_x = 0; first_x < boxes.bins_x; first_x += kBins) {
          const int batch = std::min(kBatch, count - i0);
          for (int u = warp; u < batch; u += warps) {
            const bool along_y = lane < kBins;
            const int bin = (along_y ? first_y : first_x) + lane % kBins;
            const int first = along_y ? tile.y : tile.x, size = along_y ? kTileHeight : kTileWidth;
            const PixelRange span = BoxBins{boxes, map, list(i0 + u)}.span(along_y, bin);
            const bool any = bin < (along_y ? boxes.bins_y : boxes.bins_x) && span.begin < first + size && span.end > first;
            const unsigned those = __ballot_sync(kAllLanes, any);
            if (lane == 0) bins_of(u) = those;
          }
          __syncthreads();
          for (int u = 0; u < batch; ++u) add_box(list(i0 + u), u, first_y, first_x);
          __syncthreads();
        }
  });
  for (int y = 0; y < kTileHeight; ++y) {
    A row[kTileWidth];
#pragma unroll
    for (int x = 0; x < kTileWidth; ++x) row[x] = sums(warp, y * kTileWidth + x, lane);
    rows.write(map, tile, tile.y + y, row);
  }
}

// ---------------------------------------------------------------------------------------------------------------- launch

// [K, PH * PW, C] as a pooled tensor.
Pooled index_of(int32_t* data, const Pooled& pooled) {
  Pooled out = pooled;
  out.data = data, out.dtype = DType::i32;
  out.channel_stride = 1, out.bin_stride = pooled.channels;
  out.row_stride = pooled.width * out.bin_stride, out.roi_stride = pooled.height * out.row_stride;
  return out;
}

void check_positions(const Tensor& t, const Pooled& pooled) {
  check_tensor(t, "positions", 3);
  check_device(t, "positions", kCuda);
  check_dtype(t, "positions", DType::i32);
  check_contiguous(t, "positions");
  PZ_CHECK(t.shape[0] == pooled.rois && t.shape[1] == pooled.bins() && t.shape[2] == pooled.channels,
           "positions must have shape [K, PH * PW, C], got " + t.shape_string());
}

Boxes all_boxes(const Tensor& rois, const FeatureMap& map, double scale, const Pooled& pooled) {
  const Rois boxes(rois, kCuda);
  PZ_CHECK(pooled.rois == boxes.count() && pooled.channels == map.channels && pooled.dtype == map.dtype,
           "the pooled tensor must have shape [K, C, PH, PW] and the dtype of the features");
  return {boxes, scale, int(pooled.height), int(pooled.width), boxes.dtype == DType::f64 || map.dtype == DType::f64};
}

template <class T>
void pool(const Tensor& like, const FeatureMap& input, const Boxes& boxes, const Pooled& output, const Pooled& index) {
  constexpr int n = 16 / sizeof(T);
  std::vector<FeatureMap> map{input};
  const auto copy = worth_joining(map, output) ? join_channels<T>(like, map) : nullptr;
  if (channels_pack(map[0], n) && (!output.data || !output.channels_last() || channels_pack(output, n)))
    launch(roi_pool_fwd_kernel<n, T>, PooledPart<n>::blocks(output), kRoiThreads, like, map[0], boxes, output, index,
           channels_pack(index, n));
  else launch(roi_pool_fwd_kernel<1, T>, PooledPart<1>::blocks(output), kRoiThreads, like, map[0], boxes, output, index, false);
}

}  // namespace

bool roi_pool_fwd_cuda(const Tensor& input, const Tensor& rois, const Tensor& output, const Tensor* argmax, const Tensor* positions,
                       double spatial_scale) {
  const FeatureMap map(input, "input", kCuda);
  const Pooled pooled(output, "output", kCuda);
  pooled.check_written("output");
  const Boxes boxes = all_boxes(rois, map, spatial_scale, pooled);
  PZ_CHECK(!argmax || !positions, "argmax and positions exclude each other");
  Pooled index = pooled;
  index.data = nullptr;
  if (argmax) {
    check_dtype(*argmax, "argmax", DType::i32);
    index = Pooled(*argmax, "argmax", kCuda);
    PZ_CHECK(std::equal(output.shape, output.shape + 4, argmax->shape), "argmax must have the shape of output");
  }
  if (positions) check_positions(*positions, pooled), index = index_of(positions->ptr<int32_t>(), pooled);
  if (output.numel() == 0) return true;
  dispatch_floating(map.dtype, [&](auto zero) { pool<decltype(zero)>(output, map, boxes, pooled, index); });
  return true;
}

void roi_pool_bwd_cuda(const Tensor& grad_output, const Tensor* input, const Tensor& rois, const Tensor& grad_input,
                       const Tensor* positions, double spatial_scale) {
  PZ_CHECK(input || positions, "input or positions must be given");
  const FeatureMap map(grad_input, "grad_input", kCuda);
  std::vector<FeatureMap> grad{FeatureMap(grad_output, "grad_output", kCuda)};
  map.check_written("grad_input");
  Pooled pooled(grad_output, "grad_output", kCuda);
  const Boxes boxes = all_boxes(rois, map, spatial_scale, pooled);
  pooled.data = nullptr;
  if (positions) check_positions(*positions, pooled);
  PZ_CHECK(!input || (input->dtype == grad_input.dtype && std::equal(input->shape, input->shape + 4, grad_input.shape)),
           "grad_input must have the shape and dtype of input, got " + grad_input.shape_string());
  if (grad_input.numel() == 0) return;
  dispatch_floating(map.dtype, [&](auto zero) {
    using T = decltype(zero);
    std::shared_ptr<int32_t> found;
    int32_t* index = positions ? positions->ptr<int32_t>() : nullptr;
    if (!positions) {
      found = grad_input.scratch<int32_t>(pooled.rois * pooled.bins() * pooled.channels);
      index = found.get();
      pool<T>(grad_input, FeatureMap(*input, "input", kCuda), boxes, pooled, index_of(index, pooled));
    }
    const auto copy = join_channels<T>(grad_input, grad);
    const auto memory = grad_input.scratch<int32_t>(Reaches::kRows * boxes.rois.count());
    const Reaches reaches{memory.get(), boxes.rois.count()};
    const int64_t most = kRoiWarps * int64_t(sizeof(float)) / int64_t(sizeof(acc_t<T>));
    const int64_t warps = std::min(most, channel_warps(map.channels));
    launch(place_boxes_kernel, blocks_for(boxes.rois.count(), kRoiThreads), kRoiThreads, grad_input, map, boxes, reaches);
    launch(roi_pool_bwd_kernel<T>, MapTile::blocks(map, warps), int(warps) * kWarp, grad_input, map, boxes, reaches, grad[0], index);
  });
}

}  // namespace pyzoo
