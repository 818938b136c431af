// What the CUDA kernels of depthwise convolution and of the gradient in its weight share: tiles of outputs, and windows of sources.
//
// A block has a tile of outputs: some rows and columns of 32 channels of an image (NHWC), or of one plane or several small ones (NCHW). It
// brings what the tile sees into shared memory, in the type of the sums, with zeros where there is no source. A thread has some rows and
// columns of one channel. It passes the window row by row and uses what it loads for all of them. Neighbouring threads are channels in
// NHWC, columns in NCHW.
#pragma once

#include <numeric>
#include <type_traits>

#include "common/cuda.cuh"
#include "depthwise_conv2d/depthwise_conv2d_geometry.h"

namespace pyzoo {

namespace {

constexpr int kThreads = 256;  // of a block, at most
constexpr int kPlanes = 32;    // of a block: planes (NCHW) or channels (NHWC)

// Blocks that keep a GPU busy: no tile is so large that there are fewer.
constexpr int64_t kBlocks = 264;

template <bool kLast, class A>
constexpr int kWindow = (kLast ? 9856 : 6144) * int(sizeof(float)) / int(sizeof(A));
template <bool kLast, class A>
using Window = Shared<A, kWindow<kLast, A>>;

// --------------------------------------------------------------------------------------------------- what outputs see
// The outputs of a thread and the positions of its window that they see through K taps, along one axis; -1: none. `first`: where the window
// of output i, the first of a thread, begins.

// A convolution. Stride 0 is one that is known at run time: a thread has a single output then.
template <int kStride>
struct Forward {
  static constexpr int kRows = kStride == 1 ? 4 : kStride == 2 ? 2 : 1, kColumns = kStride ? 4 : 1;
  static constexpr int kPack = kColumns;  // windows of threads begin at multiples of it
  static constexpr PZ_HD int source(int output, int tap, int) { return output * kStride + tap; }
  static constexpr PZ_HD int reach(int outputs, int taps) { return (outputs - 1) * kStride + taps; }
  static constexpr PZ_HD int64_t first(int64_t i, int stride) { return i * (kStride ? kStride : stride); }
};

// The gradient of a convolution of stride 2 in its input, where every other tap counts. A kernel of K x K only, K odd.
struct Transposed {
  static constexpr int kRows = 4, kColumns = 4, kPack = 2;
  static constexpr PZ_HD int source(int output, int tap, int taps) { return (output - tap) % 2 ? -1 : (output - tap + taps - 1) / 2; }
  static constexpr PZ_HD int reach(int outputs, int taps) { return (outputs + taps - 1) / 2; }
  static constexpr PZ_HD int64_t first(int64_t i, int) { return i / 2; }
};

// How the outputs of a phase see their sources along an axis: output i, at first_output + i * output_step, has tap t at
// base + i * advance + t * step. Of these, every spread-th sees the sources that leave the same remainder when divided by the step, like
// outputs of an ordinary convolution, of the stride.
struct Line {
  int64_t outputs, first_output, output_step;
  int64_t sources, base, advance, step;
  int64_t kernel_first, kernel_step;
  int taps, spread, stride;

  Line(const Axis& axis, int64_t phase) {
    const Phase& p = axis.phases[size_t(phase)];
    outputs = p.count, first_output = phase, output_step = axis.outputs();
    sources = axis.sources, base = axis.low + p.first, advance = axis.advance, step = p.step;
    kernel_first = p.kernel_first, kernel_step = p.kernel_step;
    const int64_t shared = std::gcd(advance, step);
    taps = int(p.taps), spread = int(step / shared), stride = int(advance / shared);
  }
  // For Transposed, from the convolution: outputs are counted from an even position of the padded input on.
  Line(int64_t input, int64_t output, int kernel, int64_t padding) {
    const int64_t odd = padding % 2;
    outputs = input + odd, first_output = -odd, output_step = 1;
    sources = output, base = padding / 2 - (kernel - 1) / 2, advance = step = 1;
    kernel_first = 0, kernel_step = 1;
    taps = kernel, spread = stride = 1;
  }
};

// Of a line, the outputs b, b + spread, ..., and the sources that they see.
struct Side {
  int64_t outputs, first_output, output_step;
  int64_t sources, first_source, source_step;
  int64_t base;  // the source of the first tap of the first output

  __device__ Side(const Line& line, int64_t b) {
    outputs = line.outputs, first_output = line.first_output, output_step = line.output_step;
    sources = line.sources, first_source = 0, source_step = 1, base = line.base;
    if (line.step == 1) return;
    outputs = (outputs - b + line.spread - 1) / line.spread;
    first_output += b * output_step, output_step *= line.spread;
    const int64_t at = base + line.advance * b;
    source_step = line.step, first_source = at % line.step;
    if (first_source < 0) first_source += line.step;
    base = (at - first_source) / line.step;
    sources = (sources - first_source + line.step - 1) / line.step;
  }
};

// --------------------------------------------------------------------------------------------------------------- tiles

struct Tiling {
  int rows = 1, columns = 1, planes = 1;  // of threads
  int height, width, pitch;               // of the window; from row to row
  int64_t tiles_y, tiles_x;

  int threads(bool last) const { return rows * columns * (last ? kWarp : planes); }
};

template <class How, int K, bool kLast, class A>
Tiling tiling_of(const Line& y, const Line& x, int64_t planes) {
  const int64_t most_y = std::max<int64_t>(1, ceil_div(ceil_div(y.outputs, y.spread), How::kRows));
  const int64_t most_x = std::max<int64_t>(1, ceil_div(ceil_div(x.outputs, x.spread), How::kColumns));
  const int64_t threads = kLast ? kThreads / kWarp : kThreads;
  Tiling t;
  const auto words = [&] {
    t.height = int(How::first((t.rows - 1) * How::kRows, y.stride)) + How::reach(How::kRows, K);
    t.width = int(How::first((t.columns - 1) * How::kColumns, x.stride)) + How::reach(How::kColumns, K);
    t.pitch = kLast ? t.width * kWarp : (t.width + 3) / 4 * 4;
    return t.height * t.pitch;
  };
  // In NHWC about as wide as high, for a small margin; in NCHW wide, for long runs of memory.
  t.columns = int(std::min<int64_t>(most_x, kLast ? std::max<int64_t>(2, threads / most_y) : 32));
  t.rows = int(std::min(most_y, threads / t.columns));
  while (words() > kWindow<kLast, A>) --(t.rows > 1 && (!kLast || t.rows >= t.columns) ? t.rows : t.columns);
  t.tiles_y = ceil_div(most_y, t.rows), t.rows = int(ceil_div(most_y, t.tiles_y));
  t.tiles_x = ceil_div(most_x, t.columns), t.columns = int(ceil_div(most_x, t.tiles_x));
  const int64_t room = std::min<int64_t>({threads / (t.rows * t.columns), kWindow<kLast, A> / words(), kPlanes});
  if (!kLast) t.planes = int(std::min(room, std::max<int64_t>(1, planes * t.tiles_y * t.tiles_x / kBlocks)));
  return t;
}

// Tile i of all: where it lies, and of which group of planes it is.
struct Place {
  unsigned group;
  Side y, x;
  int64_t first_y, first_x;  // outputs

  template <class How>
  static __device__ Place of(unsigned i, const Line& y, const Line& x, const Tiling& t) {
    const auto next = [&](int64_t n) {
      const unsigned at = n == 1 ? 0 : i % unsigned(n);
      i = n == 1 ? i : i / unsigned(n);
      return at;
    };
    const int64_t tile_x = next(t.tiles_x), tile_y = next(t.tiles_y);
    const Side side_x(x, next(x.spread)), side_y(y, next(y.spread));
    return {i, side_y, side_x, tile_y * t.rows * How::kRows, tile_x * t.columns * How::kColumns};
  }
};

// Which outputs of a tile a thread has. Some threads have none: they only help to move data.
struct Worker {
  int channel, plane, row, column;

  template <class How, bool kLast>
  static __device__ Worker of(const Tiling& t) {
    const int i = kLast ? threadIdx.x / kWarp : threadIdx.x, channel = kLast ? threadIdx.x % kWarp : 0;
    return {channel, i / (t.rows * t.columns), i / t.columns % t.rows * How::kRows, i % t.columns * How::kColumns};
  }
  template <class How, bool kLast>
  __device__ int window(const Tiling& t, const Line& y, const Line& x) const {
    const int at_y = int(How::first(row, y.stride)), at_x = int(How::first(column, x.stride));
    return kLast ? at_y * t.pitch + at_x * kWarp + channel : (plane * t.height + at_y) * t.pitch + at_x;
  }
};

// ------------------------------------------------------------------------------------------------------------- windows

// Kernels know only the type of the sums; what a map is stored as matters where it is read or written.
template <class A, class F>
__device__ void with_storage(DType dtype, const F& f) {
  if constexpr (std::is_same_v<A, double>) f(double{});
  else if (dtype == DType::f16) f(Half{});
  else if (dtype == DType::bf16) f(BFloat16{});
  else f(float{});
}

// Calls f(plane, row, lane, lanes) so that each row of each plane is done by some lanes together.
template <class F>
__device__ void for_each_row(int planes, int rows, int lanes, const F& f) {
  const int group = threadIdx.x / lanes, groups = blockDim.x / lanes;
  int plane = 0, row = group;
  for (;; row += groups) {
    for (; row >= rows; row -= rows) ++plane;
    if (plane >= planes) return;
    f(plane, row, int(threadIdx.x % lanes), lanes);
  }
}

__device__ inline int lanes_for(int width) { return width > 16 ? 32 : width > 8 ? 16 : 8; }

// Fills the window of a tile, from the source (first_y, first_x) on. at(plane): where the plane lies in the map; `channels` of its 32
// exist.
template <bool kLast, int kVector, class A, class T, class At>
__device__ void fill_window(Window<kLast, A>& window, const Tiling& t, const T* map, const FeatureMap& from, const At& at, int planes,
                            int channels, const Side& y, const Side& x, int64_t first_y, int64_t first_x) {
  constexpr int kPacks = kLast ? kWarp / kVector : 1;  // of a pixel
  const int items = t.width * kPacks;
  const int64_t step = x.source_step * from.pixel_stride, offset = x.first_source * from.pixel_stride + first_x * step;
  const auto within = [&](int64_t i) { return int(i < 0 ? 0 : i < t.width ? i : t.width); };
  const int begin = within(-first_x), end = within(x.sources - first_x);
  for_each_row(planes, t.height, kLast ? kWarp : lanes_for(t.width), [&](int plane, int r, int lane, int lanes) {
    const int64_t row = first_y + r;
    const bool inside = row >= 0 && row < y.sources;
    const T* const source = map + (inside ? at(plane) + (y.first_source + row * y.source_step) * from.row_stride + offset : 0);
    const int to = (plane * t.height + r) * t.pitch;
#pragma unroll 4
    for (int i = lane; i < items; i += lanes) {
      const int pixel = i / kPacks, c = i % kPacks * kVector;
      Pack<T, kVector> pack{};
      if (inside && pixel >= begin && pixel < end && (!kLast || c < channels)) pack = load_pack<kVector>(source + pixel * step + c);
      constexpr int n = kVector < 4 ? kVector : 4;
#pragma unroll
      for (int k = 0; k < kVector; k += n) {
        Pack<A, n> wide;
        for (int j = 0; j < n; ++j) wide.at[j] = to_float(pack.at[k + j]);
        window.template put<n>(kLast ? to + pixel * kWarp + c + k : to + pixel, wide);
      }
    }
  });
}

// The same for what the map is stored as; `packs`: 16 bytes at a time.
template <bool kLast, class A, class At>
__device__ void fill_window(Window<kLast, A>& window, const Tiling& t, const FeatureMap& from, bool packs, const At& at, int planes,
                            int channels, const Side& y, const Side& x, int64_t first_y, int64_t first_x) {
  with_storage<A>(from.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* const map = static_cast<const T*>(from.data);
    const auto fill = [&](auto vector) {
      fill_window<kLast, decltype(vector)::value, A>(window, t, map, from, at, planes, channels, y, x, first_y, first_x);
    };
    if constexpr (kLast) {
      if (packs) return fill(std::integral_constant<int, 16 / sizeof(T)>{});
    }
    fill(std::integral_constant<int, 1>{});
  });
}

// n neighbouring positions of a row of the window, from one that is a multiple of kPack on.
template <bool kLast, int kPack, int n, class A>
__device__ void load_row(Window<kLast, A>& window, int at, A (&x)[n]) {
  if constexpr (kLast || kPack == 1) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = window(kLast ? at + i * kWarp : at + i);
  } else {
    constexpr int packs = n / kPack, pairs = (n - packs * kPack) / 2;
#pragma unroll
    for (int p = 0; p < packs; ++p) {
      const Pack<A, kPack> pack = window.template pack<kPack>(at + p * kPack);
#pragma unroll
      for (int i = 0; i < kPack; ++i) x[p * kPack + i] = pack.at[i];
    }
    if constexpr (pairs > 0) {
      const Pack<A, 2> pack = window.template pack<2>(at + packs * kPack);
      x[packs * kPack] = pack.at[0], x[packs * kPack + 1] = pack.at[1];
    }
    if constexpr (n % 2 > 0) x[n - 1] = window(at + n - 1);
  }
}

// Whether `n` neighbours of a map, channels in NHWC or columns from a multiple of n on in NCHW, can be read or written at once.
inline bool packs(const FeatureMap& map, bool last, int64_t n) {
  bool fit =
      map.image_stride % n == 0 && map.row_stride % n == 0 && reinterpret_cast<uintptr_t>(map.data) % (n * dtype_size(map.dtype)) == 0;
  if (last) return fit && map.channels % n == 0 && map.pixel_stride % n == 0;
  return fit && map.width % n == 0 && map.channel_stride % n == 0;
}

}  // namespace

}  // namespace pyzoo
