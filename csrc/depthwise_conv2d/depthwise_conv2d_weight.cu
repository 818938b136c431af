// The gradient in the weight, and in the bias: a block adds up some tiles for K x K taps of a plane or of 32 channels, a second kernel adds
// up what the blocks have, always in the same order.

#include "depthwise_conv2d/depthwise_conv2d_window.cuh"

namespace pyzoo {

namespace {

struct Correlation {
  FeatureMap from, grad;
  Line y, x;
  Tiling tiling;
  bool packs_from, packs_grad;
  int parts;       // blocks that share the tiles
  unsigned tiles;  // of a plane of all images
  int sums;        // of a channel
  bool bias;       // one of them, the last
};

// Adds the products of a thread's rows x columns gradients with what they saw.
template <class How, int K, bool kLast, class A>
__device__ void add_products(Window<kLast, A>& window, int at, int pitch, const A (&grad)[How::kRows][How::kColumns], int rows, int columns,
                             A (&sum)[K][K]) {
#pragma unroll
  for (int row = 0; row < How::reach(How::kRows, K); ++row) {
    A x[How::reach(How::kColumns, K)];
    load_row<kLast, How::kPack>(window, at + row * pitch, x);
#pragma unroll
    for (int r = 0; r < How::kRows; ++r) {
      if (r >= rows) continue;
#pragma unroll
      for (int ky = 0; ky < K; ++ky) {
        if (How::source(r, ky, K) != row) continue;
#pragma unroll
        for (int c = 0; c < How::kColumns; ++c) {
          if (c >= columns) continue;  // where nothing is, infinity times the zero gradient must not be added
#pragma unroll
          for (int kx = 0; kx < K; ++kx) sum[ky][kx] = std::fma(x[How::source(c, kx, K)], grad[r][c], sum[ky][kx]);
        }
      }
    }
  }
}

// Sums over the threads of a block that have the same channel: the results i < n of each channel go to write(i, channel, result).
template <bool kLast, int n, class A, class Write>
__device__ void add_up_threads(Window<kLast, A>& window, const A (&mine)[n], const Write& write) {
  const int threads = blockDim.x, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i) window(i * threads + threadIdx.x) = mine[i];
  __syncthreads();
  for (int i = warp; i < n; i += threads / kWarp) {
    A sum = 0;
    for (int w = lane; w < threads; w += kWarp) sum += window(i * threads + w);
    if (!kLast) sum = warp_sum(sum);
    if (kLast || lane == 0) write(i, kLast ? lane : 0, sum);
  }
}

template <class How, int K, bool kLast, class A>
__global__ void __launch_bounds__(kThreads, 2) correlate_kernel(Correlation p, A* sums) {
  constexpr int R = How::kRows, C = How::kColumns;
  __shared__ Window<kLast, A> window;
  const Tiling& t = p.tiling;
  const Line &line_y = p.y, &line_x = p.x;
  unsigned i = blockIdx.x;
  const int part = int(i % unsigned(p.parts));
  i /= unsigned(p.parts);
  const unsigned columns_of_taps = unsigned(line_x.taps + K - 1) / K, rows_of_taps = unsigned(line_y.taps + K - 1) / K;
  const int kx0 = int(i % columns_of_taps) * K, ky0 = int(i / columns_of_taps % rows_of_taps) * K;
  const int first = int(i / columns_of_taps / rows_of_taps) * (kLast ? kWarp : 1);  // channel
  const int here = kLast ? int(p.from.channels - first < kWarp ? p.from.channels - first : kWarp) : 1;
  const Worker me = Worker::of<How, kLast>(t);
  const int at = me.window<How, kLast>(t, line_y, line_x);

  A sum[K][K] = {}, bias = 0;
  for (unsigned tile = part; tile < p.tiles; tile += unsigned(p.parts)) {
    const Place place = Place::of<How>(tile, line_y, line_x, t);
    const Side &y = place.y, &x = place.x;
    const int64_t image = int64_t(place.group) * t.planes, left = p.from.images - image;
    const int planes = int(left < t.planes ? left : t.planes);
    __syncthreads();
    fill_window<kLast, A>(
        window, t, p.from, p.packs_from, [&](int plane) { return (image + plane) * p.from.image_stride + first * p.from.channel_stride; },
        planes, here, y, x, y.base + How::first(place.first_y, line_y.stride) + ky0,
        x.base + How::first(place.first_x, line_x.stride) + kx0);

    const auto count = [](int64_t n, int most) { return int(n < 0 ? 0 : n < most ? n : most); };
    const bool works = me.plane < planes && me.channel < here;
    const int rows = works ? count(y.outputs - place.first_y - me.row, R) : 0;
    const int columns = works ? count(x.outputs - place.first_x - me.column, C) : 0;
    A grad[R][C] = {};
    with_storage<A>(p.grad.dtype, [&](auto zero) {
      using T = decltype(zero);
      const int64_t row = y.first_output + (place.first_y + me.row) * y.output_step;
      const int64_t column = x.first_output + (place.first_x + me.column) * x.output_step;
      const T* const map =
          p.grad.at<const T>(image + me.plane, first + me.channel) + row * p.grad.row_stride + column * p.grad.pixel_stride;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (r >= rows || columns == 0) continue;
        const T* const from = map + r * y.output_step * p.grad.row_stride;
        if (p.packs_grad) {
          const Pack<T, C> pack = load_pack<C>(from);
#pragma unroll
          for (int c = 0; c < C; ++c) grad[r][c] = to_float(pack.at[c]);
        } else {
#pragma unroll
          for (int c = 0; c < C; ++c)
            if (c < columns) grad[r][c] = to_float(from[c * x.output_step * p.grad.pixel_stride]);
        }
      }
    });
    __syncthreads();
    if (rows > 0 && columns > 0) add_products<How, K, kLast>(window, at, t.pitch, grad, rows, columns, sum);
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int c = 0; c < C; ++c) bias += grad[r][c];
  }

  const auto write = [&](int k, int channel, A result) {
    if (channel < here) sums[((first + channel) * int64_t(p.sums) + k) * p.parts + part] = result;
  };
#pragma unroll
  for (int ky = 0; ky < K; ++ky)
    add_up_threads<kLast>(window, sum[ky], [&](int kx, int channel, A result) {
      if (ky0 + ky < line_y.taps && kx0 + kx < line_x.taps) write((ky0 + ky) * line_x.taps + kx0 + kx, channel, result);
    });
  if (!p.bias || ky0 > 0 || kx0 > 0) return;
  const A mine[1] = {bias};
  add_up_threads<kLast>(window, mine, [&](int, int channel, A result) { write(p.sums - 1, channel, result); });
}

// A warp for each sum: its parts lie together.
template <class A>
__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(const A* sums, int parts, int64_t channels, int sums_of_channel, DType dtype, void* grad_weight, void* grad_bias) {
  const int lane = threadIdx.x % kWarp, taps = sums_of_channel - (grad_bias != nullptr);
  const int64_t step = int64_t(gridDim.x) * blockDim.x / kWarp;
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp; i < channels * sums_of_channel; i += step) {
    A sum = 0;
    for (int part = lane; part < parts; part += kWarp) sum += sums[i * parts + part];
    sum = warp_sum(sum);
    if (lane != 0) continue;
    const int64_t channel = i / sums_of_channel, k = i % sums_of_channel;
    with_storage<A>(dtype, [&](auto zero) {
      using T = decltype(zero);
      if (k < taps) static_cast<T*>(grad_weight)[channel * taps + k] = from_acc<T>(sum);
      else static_cast<T*>(grad_bias)[channel] = from_acc<T>(sum);
    });
  }
}

template <class How, int K, bool kLast, class A>
void correlate(const FeatureMap& from, const FeatureMap& grad, const Gather& how, const Tensor& grad_weight, const Tensor* grad_bias) {
  const Line y(how.y, 0), x(how.x, 0);
  const Tiling t = tiling_of<How, K, kLast, A>(y, x, from.images * from.channels);
  const int64_t tiles = t.tiles_y * t.tiles_x * y.spread * x.spread * ceil_div(from.images, t.planes);
  PZ_CHECK(tiles <= INT32_MAX, "grad_output is too large");
  const int64_t blocks = ceil_div(y.taps, K) * ceil_div(x.taps, K) * (kLast ? ceil_div(from.channels, kWarp) : from.channels);
  const int parts = int(std::max<int64_t>(1, std::min(tiles, 4 * kBlocks / blocks)));
  const int sums = y.taps * x.taps + (grad_bias ? 1 : 0);
  const auto partial = grad_weight.scratch<A>(from.channels * sums * parts);
  const bool packs_grad = How::kColumns > 1 && !kLast && packs(grad, false, How::kColumns) && x.spread == 1;
  const Correlation p{from,
                      grad,
                      y,
                      x,
                      t,
                      kLast && packs(from, true, 16 / dtype_size(from.dtype)),
                      packs_grad,
                      parts,
                      unsigned(tiles),
                      sums,
                      grad_bias != nullptr};
  const int threads = int(ceil_div(t.threads(kLast), kWarp)) * kWarp;
  launch(correlate_kernel<How, K, kLast, A>, blocks * parts, threads, grad_weight, p, partial.get());
  launch(add_parts_kernel<A>, blocks_for(from.channels * sums * kWarp, kThreads), kThreads, grad_weight, partial.get(), parts,
         from.channels, sums, from.dtype, grad_weight.data, grad_bias ? grad_bias->data : nullptr);
}

}  // namespace

void depthwise_conv2d_bwd_weight_cuda(const Tensor& grad_output, const Tensor& input, const Tensor& grad_weight, const Tensor* grad_bias,
                                      const Sliding& s) {
  const FeatureMap grad(grad_output, "grad_output", kCuda), from(input, "input", kCuda);
  check_sliding(from, grad, grad_weight, "grad_weight", s, kCuda);
  check_dtype(grad_output, "grad_output", from.dtype);
  check_dtype(grad_weight, "grad_weight", from.dtype);
  if (grad_bias) check_bias(*grad_bias, "grad_bias", grad, kCuda);
  if (grad_weight.numel() == 0) return;
  const Gather how = forward_gather(from, grad, grad_weight, s);
  const Line y(how.y, 0), x(how.x, 0);
  const auto run = [&](auto how_seen, auto k, auto last) {
    using How = decltype(how_seen);
    constexpr bool kLast = decltype(last)::value;
    constexpr int K = decltype(k)::value;
    if (from.dtype != DType::f64) return correlate<How, K, kLast, float>(from, grad, how, grad_weight, grad_bias);
    if constexpr (K == 3 && std::is_same_v<How, Forward<0>>) correlate<How, K, kLast, double>(from, grad, how, grad_weight, grad_bias);
  };
  const auto with_layout = [&](auto how_seen, auto k) {
    is_nhwc(from, grad) ? run(how_seen, k, std::true_type{}) : run(how_seen, k, std::false_type{});
  };
  constexpr std::integral_constant<int, 3> three{};
  constexpr std::integral_constant<int, 5> five{};
  constexpr std::integral_constant<int, 7> seven{};
  const auto with_stride = [&](auto how_seen) {
    const int taps = std::max(y.taps, x.taps);
    taps <= 3 ? with_layout(how_seen, three) : taps <= 5 ? with_layout(how_seen, five) : with_layout(how_seen, seven);
  };
  if (from.dtype == DType::f64) with_layout(Forward<0>{}, three);
  else if (y.stride == 1 && x.stride == 1) with_stride(Forward<1>{});
  else if (y.stride == 2 && x.stride == 2) with_stride(Forward<2>{});
  else with_layout(Forward<0>{}, seven);
}

}  // namespace pyzoo
