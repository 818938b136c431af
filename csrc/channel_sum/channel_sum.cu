#include "channel_sum/channel_sum.h"

#include "common/cuda.cuh"
#include "common/feature_map.h"

namespace pyzoo {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

// sums [parts, C]: each the sum over every parts-th row of pixels. Lanes are channels where these are neighbours, else pixels.
template <bool kChannelsLast, class T, class A>
__global__ void __launch_bounds__(kThreads) channel_sum_kernel(FeatureMap map, int64_t parts, A* sums) {
  __shared__ Shared<A, kWarps, kWarp> of_warp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t part = blockIdx.x % parts, group = blockIdx.x / parts;
  const int64_t c = kChannelsLast ? group * kWarp + lane : group;
  const int64_t pixels = map.images * map.pixels();
  const int64_t width = kChannelsLast ? kWarps : kThreads, first = kChannelsLast ? warp : threadIdx.x;
  A sum = 0;
  if (c < map.channels)
    for (int64_t i = part * width + first; i < pixels; i += parts * width) {
      const int32_t p = int32_t(i % map.pixels()), columns = int32_t(map.width);
      sum += to_float(map.at<const T>(i / map.pixels(), c)[p / columns * map.row_stride + p % columns * map.pixel_stride]);
    }
  if (!kChannelsLast) sum = warp_sum(sum);
  of_warp(warp, lane) = sum;
  __syncthreads();
  if (warp != 0 || c >= map.channels || (!kChannelsLast && lane != 0)) return;
  for (int w = 1; w < kWarps; ++w) sum += of_warp(w, lane);
  sums[part * map.channels + c] = sum;
}

template <class T, class A>
__global__ void __launch_bounds__(kThreads) add_parts_kernel(const A* sums, int64_t parts, int64_t channels, T* output) {
  for_each_element(channels, [&](int64_t c) {
    A sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += sums[part * channels + c];
    output[c] = from_acc<T>(sum);
  });
}

}  // namespace

void channel_sum_cuda(const Tensor& map, const Tensor& output) {
  const FeatureMap from(map, "map", kCuda);
  check_device(output, "output", kCuda);
  check_contiguous(output, "output");
  check_dtype(output, "output", from.dtype);
  PZ_CHECK(output.ndim == 1 && output.shape[0] == from.channels, "output must have shape [C], got " + output.shape_string());
  if (from.channels == 0) return;
  dispatch_floating(from.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const bool last = from.channel_stride == 1 && from.channels > 1;
    const int64_t groups = last ? ceil_div(from.channels, kWarp) : from.channels;
    // As many parts as fill a GPU, of some work each.
    const int64_t rows = ceil_div(from.images * from.pixels(), last ? kWarps : kThreads);
    const int64_t parts = std::max<int64_t>(1, std::min(rows / 8, 1024 / groups));
    const auto sums = map.scratch<A>(parts * from.channels);
    launch(last ? channel_sum_kernel<true, T, A> : channel_sum_kernel<false, T, A>, groups * parts, kThreads, map, from, parts, sums.get());
    launch(add_parts_kernel<T, A>, blocks_for(from.channels, kThreads), kThreads, map, sums.get(), parts, from.channels, output.ptr<T>());
  });
}

}  // namespace pyzoo
