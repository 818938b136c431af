// The convolution, and its gradient in the input.

#include "depthwise_conv2d/depthwise_conv2d_window.cuh"

namespace pyzoo {

namespace {

struct Gathering {
  FeatureMap from, to;
  const void *weight, *bias;  // or null
  int64_t kernel_height, kernel_width;
  Activation activation;
  Line y, x;
  Tiling tiling{};
  bool packs_in = false, packs_out = false;
};

// Adds all K x K taps to the sums of a thread.
template <class How, int K, bool kLast, class A>
__device__ void add_taps(Window<kLast, A>& window, int at, int pitch, const A (&weight)[K][K], A (&sum)[How::kRows][How::kColumns]) {
#pragma unroll
  for (int row = 0; row < How::reach(How::kRows, K); ++row) {
    A x[How::reach(How::kColumns, K)];
    load_row<kLast, How::kPack>(window, at + row * pitch, x);
#pragma unroll
    for (int ky = 0; ky < K; ++ky)
#pragma unroll
      for (int r = 0; r < How::kRows; ++r) {
        if (How::source(r, ky, K) != row) continue;
#pragma unroll
        for (int kx = 0; kx < K; ++kx)
#pragma unroll
          for (int c = 0; c < How::kColumns; ++c)
            if (How::source(c, kx, K) >= 0) sum[r][c] = std::fma(x[How::source(c, kx, K)], weight[ky][kx], sum[r][c]);
      }
  }
}

// Adds the first height x width of them, for kernels that do not come out even.
template <class How, int K, bool kLast, class A, class Weight>
__device__ void add_some_taps(Window<kLast, A>& window, int at, int pitch, int height, int width, const Weight& weight,
                              A (&sum)[How::kRows][How::kColumns]) {
  for (int ky = 0; ky < height; ++ky)
    for (int kx = 0; kx < width; ++kx) {
      const A w = weight(ky, kx);
#pragma unroll
      for (int r = 0; r < How::kRows; ++r)
#pragma unroll
        for (int c = 0; c < How::kColumns; ++c) {
          const int y = How::source(r, ky, K), x = How::source(c, kx, K);
          if (y < 0 || x < 0) continue;
          sum[r][c] = std::fma(A(window(at + y * pitch + x * (kLast ? kWarp : 1))), w, sum[r][c]);
        }
    }
}

// Of a kernel larger than K x K, a block adds K x K taps after another.
template <class How, int K, bool kLast, class A>
__global__ void __launch_bounds__(kThreads, K == 3 ? 3 : 2) gather_kernel(Gathering p) {
  constexpr int R = How::kRows, C = How::kColumns;
  __shared__ Window<kLast, A> window;
  __shared__ Shared<A, kPlanes, K * K> weights;
  __shared__ Shared<int64_t, kPlanes> from_at, to_at;
  const Tiling& t = p.tiling;
  const Line &line_y = p.y, &line_x = p.x;
  const Place place = Place::of<How>(blockIdx.x, line_y, line_x, t);
  const Side &y = place.y, &x = place.x;
  const unsigned channels = unsigned(p.from.channels), groups = kLast ? (channels + kWarp - 1) / kWarp : 1;
  const unsigned first = kLast ? place.group % groups * kWarp : place.group * unsigned(t.planes);  // channel, or plane
  const auto min_of = [](int64_t a, int64_t b) { return int(a < b ? a : b); };
  const int planes = kLast ? 1 : min_of(t.planes, p.from.images * p.from.channels - first);
  const int here = kLast ? min_of(kWarp, channels - first) : planes;  // channels, or planes
  if (int(threadIdx.x) < planes) {
    const unsigned image = kLast ? place.group / groups : (first + threadIdx.x) / channels;
    const unsigned channel = kLast ? first : (first + threadIdx.x) % channels;
    from_at(threadIdx.x) = image * p.from.image_stride + channel * p.from.channel_stride;
    to_at(threadIdx.x) = image * p.to.image_stride + channel * p.to.channel_stride;
  }

  const Worker me = Worker::of<How, kLast>(t);
  const int own = kLast ? me.channel : me.plane, at = me.window<How, kLast>(t, line_y, line_x);
  const bool works = own < here && me.plane < planes;
  A sum[R][C] = {};
  __syncthreads();
  for (int ky0 = 0; ky0 < line_y.taps; ky0 += K)
    for (int kx0 = 0; kx0 < line_x.taps; kx0 += K) {
      const int height = min_of(K, line_y.taps - ky0), width = min_of(K, line_x.taps - kx0);
      fill_window<kLast, A>(
          window, t, p.from, p.packs_in, [&](int plane) { return int64_t(from_at(plane)); }, planes, here, y, x,
          y.base + How::first(place.first_y, line_y.stride) + ky0, x.base + How::first(place.first_x, line_x.stride) + kx0);
      for (int i = threadIdx.x; i < here * K * K; i += blockDim.x) {
        const int which = i / (K * K), ky = i / K % K, kx = i % K;
        if (ky >= height || kx >= width) continue;
        const int64_t channel = kLast ? first + which : (first + which) % channels;
        const int64_t row = channel * p.kernel_height + line_y.kernel_first + (ky0 + ky) * line_y.kernel_step;
        const int64_t column = line_x.kernel_first + (kx0 + kx) * line_x.kernel_step;
        weights(which, ky * K + kx) = load_as<A>(p.weight, p.from.dtype, row * p.kernel_width + column);
      }
      __syncthreads();
      if (works && height == K && width == K) {
        A weight[K][K];
#pragma unroll
        for (int k = 0; k < K * K; ++k) weight[k / K][k % K] = weights(own, k);
        add_taps<How, K, kLast>(window, at, t.pitch, weight, sum);
      } else if (works) {
        const auto weight = [&](int ky, int kx) { return A(weights(own, ky * K + kx)); };
        add_some_taps<How, K, kLast>(window, at, t.pitch, height, width, weight, sum);
      }
      __syncthreads();
    }

  if (works) {
    const A bias = p.bias ? load_as<A>(p.bias, p.from.dtype, kLast ? first + own : (first + own) % channels) : A(0);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) {  // NaN stays NaN
        sum[r][c] += bias;
        if (p.activation != Activation::none && sum[r][c] < 0) sum[r][c] = 0;
        if (p.activation == Activation::relu6 && sum[r][c] > 6) sum[r][c] = 6;
      }
  }
  // Output i of an axis as a row or column of the map, or -1.
  const auto place_in = [](const Side& side, int64_t i) {
    const int64_t at = side.first_output + i * side.output_step;
    return i < side.outputs ? at : -1;
  };
  with_storage<A>(p.to.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* const map = static_cast<T*>(p.to.data);
    if (kLast || p.packs_out) {
      if (!works) return;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int64_t row = place_in(y, place.first_y + me.row + r), column = place_in(x, place.first_x + me.column);
        T* const to = map + int64_t(to_at(me.plane)) + row * p.to.row_stride + me.channel;
        if (row < 0) continue;
        if constexpr (kLast) {
#pragma unroll
          for (int c = 0; c < C; ++c) {
            const int64_t i = place_in(x, place.first_x + me.column + c);
            if (i >= 0) to[i * p.to.pixel_stride] = from_acc<T>(sum[r][c]);
          }
        } else if (column >= 0) {
          Pack<T, C> pack;
#pragma unroll
          for (int c = 0; c < C; ++c) pack.at[c] = from_acc<T>(sum[r][c]);
          store_pack(to + column, pack);
        }
      }
      return;
    }
    // Through shared memory, so that neighbours are written together.
    const int height = t.rows * R, width = t.columns * C;
    for (int r = 0; works && r < R; ++r) {
      Pack<A, C> pack;
      for (int c = 0; c < C; ++c) pack.at[c] = sum[r][c];
      window.template put<C>(((me.plane * height) + me.row + r) * width + me.column, pack);
    }
    __syncthreads();
    for_each_row(planes, height, lanes_for(width), [&](int plane, int r, int lane, int lanes) {
      const int64_t row = place_in(y, place.first_y + r);
      if (row < 0) return;
      T* const to = map + int64_t(to_at(plane)) + row * p.to.row_stride;
#pragma unroll 4
      for (int c = lane; c < width; c += lanes) {
        const int64_t column = place_in(x, place.first_x + c);
        if (column >= 0) to[column] = from_acc<T>(A(window((plane * height + r) * width + c)));
      }
    });
  });
}

template <class How, int K, bool kLast, class A>
void gather(const Tensor& like, Gathering p) {
  const int64_t groups = kLast ? ceil_div(p.from.channels, kWarp) : 1, planes = p.from.images * (kLast ? groups : p.from.channels);
  p.tiling = tiling_of<How, K, kLast, A>(p.y, p.x, planes);
  p.packs_in = kLast && packs(p.from, true, 16 / dtype_size(p.from.dtype));
  p.packs_out = How::kColumns == 1 || (packs(p.to, false, How::kColumns) && p.x.first_output == 0 && p.x.output_step * p.x.spread == 1);
  const Tiling& t = p.tiling;
  const int64_t blocks = t.tiles_y * t.tiles_x * p.y.spread * p.x.spread * ceil_div(planes, t.planes);
  launch(gather_kernel<How, K, kLast, A>, blocks, int(ceil_div(t.threads(kLast), kWarp)) * kWarp, like, p);
}

template <class How, int K>
void gather(const Tensor& like, const Gathering& p) {
  const auto run = [&](auto last) {
    constexpr bool kLast = decltype(last)::value;
    if (p.from.dtype != DType::f64) return gather<How, K, kLast, float>(like, p);
    if constexpr (K == 3 && std::is_same_v<How, Forward<0>>) gather<How, K, kLast, double>(like, p);
  };
  is_nhwc(p.from, p.to) ? run(std::true_type{}) : run(std::false_type{});
}

// For kernels of up to 3 x 3, 5 x 5 and more.
template <class How>
void gather_usual(const Tensor& like, const Gathering& p) {
  const int taps = std::max(p.y.taps, p.x.taps);
  taps <= 3 ? gather<How, 3>(like, p) : taps <= 5 ? gather<How, 5>(like, p) : gather<How, 7>(like, p);
}

// The outputs of one phase.
void gather_phase(const Tensor& like, const Gathering& p) {
  if (p.y.outputs <= 0 || p.x.outputs <= 0) return;
  if (p.from.dtype == DType::f64) return gather<Forward<0>, 3>(like, p);
  if (p.y.stride == 1 && p.x.stride == 1) return gather_usual<Forward<1>>(like, p);
  if (p.y.stride == 2 && p.x.stride == 2) return gather_usual<Forward<2>>(like, p);
  gather<Forward<0>, 7>(like, p);
}

}  // namespace

void depthwise_conv2d_fwd_cuda(const Tensor& input, const Tensor& weight, const Tensor* bias, const Tensor& output, const Sliding& s,
                               Activation activation) {
  const FeatureMap from(input, "input", kCuda), to(output, "output", kCuda);
  check_sliding(from, to, weight, "weight", s, kCuda);
  to.check_written("output");
  check_dtype(weight, "weight", from.dtype);
  check_dtype(output, "output", from.dtype);
  if (bias) check_bias(*bias, "bias", from, kCuda);
  if (output.numel() == 0) return;
  PZ_CHECK(from.images * from.channels <= INT32_MAX, "input must have fewer than 2^31 planes");
  const Gather how = forward_gather(from, to, weight, s);
  gather_phase(output, {from, to, weight.data, bias ? bias->data : nullptr, how.kernel_height, how.kernel_width, activation, Line(how.y, 0),
                        Line(how.x, 0)});
}

void depthwise_conv2d_bwd_input_cuda(const Tensor& grad_output, const Tensor& weight, const Tensor& grad_input, const Sliding& s) {
  const FeatureMap from(grad_output, "grad_output", kCuda), to(grad_input, "grad_input", kCuda);
  check_sliding(to, from, weight, "weight", s, kCuda);
  to.check_written("grad_input");
  check_dtype(weight, "weight", from.dtype);
  check_dtype(grad_input, "grad_input", from.dtype);
  if (grad_input.numel() == 0) return;
  PZ_CHECK(to.images * to.channels <= INT32_MAX, "grad_input must have fewer than 2^31 planes");
  const Gather how = gradient_gather(from, to, weight, s);
  const int kernel = int(how.kernel_height);
  const auto of = [&](const Line& y, const Line& x) {
    return Gathering{from, to, weight.data, nullptr, how.kernel_height, how.kernel_width, Activation::none, y, x};
  };
  if (s.stride[0] == 2 && s.stride[1] == 2 && s.dilation[0] == 1 && s.dilation[1] == 1 && how.kernel_width == kernel &&
      from.dtype != DType::f64 && (kernel == 3 || kernel == 5 || kernel == 7)) {
    return gather_usual<Transposed>(
        grad_input, of(Line(to.height, from.height, kernel, s.padding[0]), Line(to.width, from.width, kernel, s.padding[1])));
  }
  for (int64_t a = 0; a < how.y.outputs(); ++a)
    for (int64_t b = 0; b < how.x.outputs(); ++b) gather_phase(grad_input, of(Line(how.y, a), Line(how.x, b)));
}

}  // namespace pyzoo
