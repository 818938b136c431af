#include "gram_matrix/gram_matrix.h"

#include "common/gemm.cuh"
#include "gram_matrix/gram_matrix_geometry.h"

namespace pyzoo {

namespace {

constexpr int kThreads = 256;

// A map whose pixels all lie one distance apart as one row, which saves the way of a pixel.
FeatureMap in_one_row(FeatureMap map) {
  if (map.row_stride == map.width * map.pixel_stride) map.width = map.pixels(), map.height = 1;
  return map;
}

// ------------------------------------------------------------------------------------------------------------ forward

// The tiles on and below the diagonal, row after row.
__device__ void find_tile(int64_t at, int64_t& row, int64_t& column) {
  for (row = 0; at > row; ++row) at -= row + 1;
  column = at;
}

// sums [parts, N, C, C], on and below the diagonal; or, if `gram` is given and there is one part, the result.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    gram_tile_kernel(Operand<T, Pixels> features, int64_t images, int64_t channels, int64_t image_stride, int64_t channel_stride,
                     int64_t tiles, int64_t parts, int64_t steps, acc_t<T> scale, acc_t<T>* sums, T* gram) {
  using Tile = TileOf<T>;
  __shared__ TileRoom<Tile> room;
  const int64_t part = blockIdx.x / tiles % parts, image = blockIdx.x / tiles / parts;
  int64_t row, column;
  find_tile(blockIdx.x % tiles, row, column);
  row *= kTile, column *= kTile;
  const int i = threadIdx.x % kTile;
  const int64_t channel = (threadIdx.x < kTile ? row : column) + i;
  (threadIdx.x < kTile ? room.a_rows : room.b_rows).set(i, {channel * channel_stride, channel < channels ? 0 : kOutside, 0});
  features.data += image * image_stride;

  const int64_t first_row = row + Tile::row(), first_column = column + Tile::column();
  const bool active = first_row < channels && first_column < first_row + Tile::kHigh;
  Tile tile;
  multiply(tile, features, features, room, steps * part / parts, steps * (part + 1) / parts, active, TakesAll());
  sums += (part * images + image) * channels * channels;
  each_sum(tile, room, true, [&](int r, int c, acc_t<T> sum) {
    const int64_t i = row + r, j = column + c;
    if (i >= channels || j > i) return;
    if (gram) {
      T* const to = gram + image * channels * channels;
      to[i * channels + j] = to[j * channels + i] = from_acc<T>(sum * scale);
    } else {
      sums[i * channels + j] = sum;
    }
  });
}

template <class T, class A>
__global__ void __launch_bounds__(kThreads)
    gram_finish_kernel(const A* sums, int64_t parts, int64_t images, int64_t channels, A scale, T* gram) {
  const int64_t size = channels * channels;
  for_each_element(images * size, [&](int64_t at) {
    const int64_t i = at % size / channels, j = at % channels;
    if (j <= i) gram[at] = gram[at + (j - i) * (channels - 1)] = from_acc<T>(add_parts(sums + at, parts, images * size) * scale);
  });
}

// The sum over a block, in its first thread.
__device__ double block_sum(double x) {
  __shared__ Shared<double, kThreads / kWarp> of_warp;
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) of_warp(threadIdx.x / kWarp) = x;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0)
    for (int i = 0; i < kThreads / kWarp; ++i) sum += of_warp(i);
  return sum;
}

// difference = the sums' parts added up - target; may be where the sums are. squares: of each block.
template <class A>
__global__ void __launch_bounds__(kThreads)
    gram_difference_kernel(const A* sums, int64_t parts, int64_t images, Matrices target, A scale, A* difference, double* squares) {
  const int64_t channels = target.channels, size = channels * channels;
  double square = 0;
  for_each_element(images * size, [&](int64_t at) {
    const int64_t image = at / size, i = at % size / channels, j = at % channels;
    if (j > i) return;
    const A gram = add_parts(sums + at, parts, images * size) * scale;
    const auto subtract = [&](int64_t row, int64_t column) {
      const int64_t from = image * target.image_stride + row * target.row_stride + column * target.column_stride;
      const A d = gram - load_as<A>(target.data, target.dtype, from);
      difference[image * size + row * channels + column] = d;
      return double(d) * double(d);
    };
    square += subtract(i, j);
    if (i != j) square += subtract(j, i);
  });
  square = block_sum(square);
  if (threadIdx.x == 0) squares[blockIdx.x] = square;
}

template <class A>
__global__ void __launch_bounds__(kThreads) gram_loss_kernel(const double* squares, int64_t count, double divisor, A* loss) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += squares[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *loss = A(sum / divisor);
}

// Launches the tiles; where their sums are in parts, or no result is wanted, `finish` gets those.
template <class T, class F>
void gram(const Tensor& features, FeatureMap map, double scale, T* result, F&& finish) {
  using A = acc_t<T>;
  map = in_one_row(map);
  const int64_t rows = ceil_div(map.channels, kTile), tiles = rows * (rows + 1) / 2, pixels = map.pixels();
  const int64_t steps = ceil_div(pixels, TileOf<T>::kDepth), parts = parts_of(tiles * map.images, steps);
  Operand<T, Pixels> operand{static_cast<const T*>(map.data)};
  operand.columns = {pixels > 0, 0, map.row_stride, map.pixel_stride, std::max(1, int(map.height)), std::max(1, int(map.width))};
  operand.height = operand.columns.height, operand.width = operand.columns.width;
  operand.by_columns = map.channel_stride != 1 || map.channels == 1;
  operand.wide = operand.by_columns
                     ? map.height == 1 && reads_packs<T>(map.data, map.pixel_stride, pixels, map.channel_stride, map.image_stride)
                     : reads_packs<T>(map.data, map.channel_stride, map.channels, map.pixel_stride, map.row_stride, map.image_stride);
  const auto run = [&](A* sums, T* direct) {
    launch(gram_tile_kernel<T>, map.images * tiles * parts, kTileThreads, features, operand, map.images, map.channels, map.image_stride,
           map.channel_stride, tiles, parts, steps, A(scale), sums, direct);
  };
  if (parts == 1 && result) return run(nullptr, result);
  const auto sums = features.scratch<A>(parts * map.images * map.channels * map.channels);
  run(sums.get(), nullptr);
  finish(sums.get(), parts);
}

// ----------------------------------------------------------------------------------------------------------- backward

// A row of scale * (S + S^T) for each warp, as [N, C, depth]: the numbers themselves and zeros up to a `period`; of 16-bit types, what
// rounding took off them, up to another. Those are divided by a power of two, the largest number's, which goes to `exponents`.
template <class T>
__global__ void __launch_bounds__(kThreads)
    gram_symmetric_kernel(Matrices s, int64_t images, acc_t<T> scale, int64_t period, T* out, float* exponents) {
  using A = acc_t<T>;
  constexpr bool kSplit = sizeof(T) == 2;
  const int lane = threadIdx.x % kWarp;
  const int64_t row = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp, channels = s.channels;
  if (row >= images * channels) return;
  const int64_t image = row / channels, i = row % channels;
  const auto number = [&](int64_t j) {
    const int64_t at = image * s.image_stride;
    const A above = load_as<A>(s.data, s.dtype, at + i * s.row_stride + j * s.column_stride);
    return scale * (above + load_as<A>(s.data, s.dtype, at + j * s.row_stride + i * s.column_stride));
  };
  if constexpr (!kSplit) {
    for (int64_t j = lane; j < period; j += kWarp) out[row * period + j] = j < channels ? number(j) : A(0);
  } else {
    float largest = 0;
#pragma unroll 1
    for (int64_t j = lane; j < channels; j += kWarp) {
      const float x = fabsf(number(j));
      if (x > largest && x <= 3.4028235e38f) largest = x;
    }
    for (int bits = kWarp / 2; bits > 0; bits /= 2) {
      const float other = __shfl_xor_sync(kAllLanes, largest, bits);
      if (other > largest) largest = other;
    }
    const int exponent = largest > 1e-30f ? ilogbf(largest) : 0;
    if (lane == 0) exponents[row] = ldexpf(1, exponent);
#pragma unroll 1
    for (int64_t j = lane; j < period; j += kWarp) {
      const float x = j < channels ? ldexpf(number(j), -exponent) : 0, high = to_float(from_float<T>(x)), low = x - high;
      out[row * 2 * period + j] = from_float<T>(x);
      out[row * 2 * period + period + j] = from_float<T>(low == low ? low : 0);  // of infinity, nothing is left
    }
  }
}

// grad [C, M] = the matrix times the features.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    gram_product_kernel(Operand<T, Line> matrix, Operand<T, Line> features, FeatureMap map, FeatureMap grad, const float* exponents) {
  using Tile = TileOf<T>;
  __shared__ TileRoom<Tile> room;
  const int64_t channels = map.channels, row_tiles = ceil_div(channels, kTile), column_tiles = ceil_div(map.pixels(), kTile);
  const int64_t row = blockIdx.x % row_tiles * kTile, column = blockIdx.x / row_tiles % column_tiles * kTile;
  const int64_t image = blockIdx.x / row_tiles / column_tiles, depth = matrix.columns.size;
  const int i = threadIdx.x % kTile;
  if (threadIdx.x < kTile) {
    room.a_rows.set(i, {(row + i) * depth, row + i < channels ? 0 : kOutside, 0});
  } else {
    const int64_t p = column + i;
    room.b_rows.set(i, {p / map.width * map.row_stride + p % map.width * map.pixel_stride, p < map.pixels() ? 0 : kOutside, 0});
  }
  matrix.data += image * channels * depth, features.data += image * map.image_stride;
  Tile tile;
  const bool active = row + Tile::row() < channels && column + Tile::column() < map.pixels();
  multiply(tile, matrix, features, room, 0, ceil_div(depth, Tile::kDepth), active, TakesAll());
  T* const to = grad.at<T>(image, 0);
  each_sum(tile, room, !grad.channels_last(), [&](int r, int c, acc_t<T> sum) {
    const int64_t channel = row + r, p = column + c;
    if (channel >= channels || p >= map.pixels()) return;
    if (sizeof(T) == 2) sum *= exponents[image * channels + channel];
    to[channel * grad.channel_stride + p * grad.pixel_stride] = from_acc<T>(sum);
  });
}

}  // namespace

void gram_matrix_fwd_cuda(const Tensor& features, const Tensor& gram_matrix, bool normalize) {
  const FeatureMap map(with_rows(features), "features", kCuda);
  check_matrices(gram_matrix, "gram", map, kCuda);
  check_dtype(gram_matrix, "gram", features.dtype);
  if (gram_matrix.numel() == 0) return;
  dispatch_floating(features.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const double scale = gram_scale(map, normalize);
    gram<T>(features, map, scale, gram_matrix.ptr<T>(), [&](const A* sums, int64_t parts) {
      launch(gram_finish_kernel<T, A>, blocks_for(gram_matrix.numel(), kThreads), kThreads, features, sums, parts, map.images, map.channels,
             A(scale), gram_matrix.ptr<T>());
    });
  });
}

void gram_loss_fwd_cuda(const Tensor& features, const Tensor& target, const Tensor& difference, const Tensor& loss, bool normalize) {
  const GramLoss args(features, target, difference, loss, kCuda);
  const int64_t count = difference.numel(), blocks = std::min<int64_t>(blocks_for(count, kThreads), 1024);
  dispatch_floating(features.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const double scale = gram_scale(args.map, normalize);
    const auto squares = features.scratch<double>(std::max<int64_t>(1, blocks));
    if (count > 0)
      gram<T>(features, args.map, scale, nullptr, [&](const A* sums, int64_t parts) {
        launch(gram_difference_kernel<A>, blocks, kThreads, features, sums, parts, args.map.images, args.targets, A(scale),
               difference.ptr<A>(), squares.get());
      });
    launch(gram_loss_kernel<A>, 1, kThreads, features, squares.get(), blocks, std::max(1.0, double(count)), loss.ptr<A>());
  });
}

void gram_matrix_bwd_cuda(const Tensor& grad_gram, const Tensor& features, const Tensor& grad_features, bool normalize) {
  const GramBackward args(grad_gram, features, grad_features, kCuda);
  if (features.numel() == 0) return;
  dispatch_floating(features.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const FeatureMap map = in_one_row(args.map);
    const int64_t channels = map.channels, period = ceil_div(channels, kPackOf<T>) * kPackOf<T>, depth = (sizeof(T) == 2 ? 2 : 1) * period;
    const auto matrices = features.scratch<T>(map.images * channels * depth);
    const auto exponents = features.scratch<float>(map.images * channels);
    launch(gram_symmetric_kernel<T>, ceil_div(map.images * channels, kThreads / kWarp), kThreads, features, args.matrices, map.images,
           A(gram_scale(map, normalize)), period, matrices.get(), exponents.get());
    const Operand<T, Line> matrix{matrices.get(), {depth, depth, depth, 1}, 1, 1, true, true};
    Operand<T, Line> operand{static_cast<const T*>(map.data), {depth, period, channels, map.channel_stride}, 1, 1};
    operand.by_columns = map.channel_stride == 1 && channels > 1;
    operand.wide = operand.by_columns
                       ? reads_packs<T>(map.data, map.channel_stride, channels, map.pixel_stride, map.row_stride, map.image_stride)
                       : map.height == 1 && reads_packs<T>(map.data, map.pixel_stride, map.pixels(), map.channel_stride, map.image_stride);
    const int64_t tiles = ceil_div(channels, kTile) * ceil_div(map.pixels(), kTile);
    launch(gram_product_kernel<T>, map.images * tiles, kTileThreads, features, matrix, operand, map, args.grad, exponents.get());
  });
}

}  // namespace pyzoo
