#include "masked_conv2d/masked_conv2d.h"

#include "channel_sum/channel_sum.h"
#include "common/gemm.cuh"
#include "masked_conv2d/masked_conv2d_taps.h"

namespace pyzoo {

namespace {

constexpr int kThreads = 256;

// One group of the product: `lanes` channels of the result, each a sum over the live taps and, at each of them, `depth` channels of
// the source. Forward, the result are the output channels; for the gradient of the input it is the other way round, and the taps are
// mirrored. The columns are: the taps one after the other, up to whole steps; then, where an order of colors counts at the centre,
// its channels color after color, each up to whole steps, for not all lanes get something from all colors.
struct Product {
  MaskedTaps taps;
  bool forward;
  int64_t lanes, depth;
  int64_t dense, dense_columns;  // taps at which all lanes get something from all channels
  int64_t block, block_columns;  // channels of a color
  int64_t columns;

  Product(const MaskedTaps& taps, bool forward, int64_t step) : taps(taps), forward(forward) {
    lanes = (forward ? taps.out_channels : taps.in_channels) / taps.groups;
    depth = (forward ? taps.in_channels : taps.out_channels) / taps.groups;
    const bool ordered = taps.taps() > 0 && taps.ordered(taps.last - 1);
    dense = taps.taps() - ordered;
    dense_columns = ceil_div(dense * depth, step) * step;
    block = std::max<int64_t>(1, forward ? taps.in_channels / taps.colors : taps.out_channels / taps.gates / taps.colors);
    block_columns = ceil_div(block, step) * step;
    const int64_t blocks = depth % block == 0 ? depth / block : depth / block + 2;  // that a group has part in
    columns = dense_columns + (ordered ? blocks * block_columns : 0);
  }
  __device__ int64_t first_block(int64_t group) const { return group * depth / block; }
  // Whether the centre gives a lane something of a channel of the source. Both count through all groups.
  __device__ bool joins(int64_t lane, int64_t channel) const { return forward ? channel < taps.limit(lane) : lane < taps.limit(channel); }
};

// The columns, in the source.
struct TapColumns {
  Product product;
  int64_t height, width, row_stride, pixel_stride, channel_stride;  // of the source
  int64_t group = 0;
  int64_t k = 0, channel = 0;
  int tap = 0, y = 0, x = 0;
  bool there = false;

  __device__ void start(int64_t first) {
    k = first;
    const int64_t in_blocks = k - product.dense_columns;
    if (in_blocks < 0) {
      tap = int(k / product.depth), channel = k % product.depth;
      there = tap < product.dense;
    } else {
      const int64_t at = in_blocks % product.block_columns;
      tap = int(product.dense);
      channel = (product.first_block(group) + in_blocks / product.block_columns) * product.block + at - group * product.depth;
      there = at < product.block && channel >= 0 && channel < product.depth;
    }
    const int64_t of_kernel = product.taps.first + tap;
    y = int(of_kernel / product.taps.width), x = int(of_kernel % product.taps.width);
  }
  __device__ void advance(int n) {
    k += n;
    if (k >= product.dense_columns) return start(k);
    for (channel += n; channel >= product.depth;) {
      channel -= product.depth, ++tap;
      if (++x == product.taps.width) x = 0, ++y;
    }
    there = tap < product.dense;
  }
  __device__ Place place() const {
    const int64_t sign = product.forward ? 1 : -1;
    const int64_t dy = sign * (y - product.taps.height / 2) * product.taps.dilation_y;
    const int64_t dx = sign * (x - product.taps.width / 2) * product.taps.dilation_x;
    if (!there || dy <= -height || dy >= height || dx <= -width || dx >= width) return {0, kOutside, 0};
    return {dy * row_stride + dx * pixel_stride + channel * channel_stride, int(dy), int(dx)};
  }
};

// The weights as [group][column][lane], with zeros where there are none and where the centre gives nothing.
template <class T>
__global__ void __launch_bounds__(kThreads) masked_conv2d_pack_kernel(const T* weight, TapColumns columns, int64_t stride, T* packed) {
  const Product& product = columns.product;
  const MaskedTaps& taps = product.taps;
  for_each_element(taps.groups * product.columns * stride, [&](int64_t at) {
    const int64_t lane = at % stride;
    columns.group = at / stride / product.columns;
    columns.start(at / stride % product.columns);
    const int64_t result = columns.group * product.lanes + lane, source = columns.group * product.depth + columns.channel;
    const int64_t tap = taps.first + columns.tap;
    T x{};
    if (columns.there && lane < product.lanes && (!taps.ordered(tap) || product.joins(result, source)))
      x = product.forward ? weight[(result * product.depth + columns.channel) * taps.kernel() + tap]
                          : weight[(source * product.lanes + lane) * taps.kernel() + tap];
    packed[at] = x;
  });
}

// At the centre, lanes get something from the colors that come before theirs.
struct TakesColors {
  const Product& product;
  Shared<int, kTile>& color;  // of a lane
  int64_t step_columns, group;

  __device__ bool all(int64_t step) const { return step * step_columns < product.dense_columns; }
  __device__ bool takes(int64_t step, int lane) const {
    const int64_t block = product.first_block(group) + (step * step_columns - product.dense_columns) / product.block_columns;
    const int strict = product.taps.strict, of_lane = color(lane);
    return product.forward ? block + strict <= of_lane : of_lane + strict <= block % product.taps.colors;
  }
};

// Rows are pixels, those of all images, and what the b operand has as rows are lanes.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    masked_conv2d_kernel(Operand<T, TapColumns> source, Operand<T, Line> weights, FeatureMap map, FeatureMap result, const T* bias) {
  using Tile = TileOf<T>;
  __shared__ TileRoom<Tile> room;
  __shared__ Shared<int64_t, kTile> to;
  __shared__ Shared<int, kTile> color;
  const Product& product = source.columns.product;
  const MaskedTaps& taps = product.taps;
  const int64_t lane_tiles = ceil_div(product.lanes, kTile), pixels = map.pixels(), count = map.images * pixels;
  const int64_t lane = blockIdx.x % lane_tiles * kTile, group = blockIdx.x / lane_tiles % taps.groups;
  const int64_t pixel = blockIdx.x / lane_tiles / taps.groups * kTile;
  const int i = threadIdx.x % kTile;
  if (threadIdx.x < kTile) {
    const int64_t image = (pixel + i) / pixels, p = (pixel + i) % pixels, y = p / map.width, x = p % map.width;
    room.a_rows.set(i,
                    {image * map.image_stride + y * map.row_stride + x * map.pixel_stride, pixel + i < count ? int(y) : kOutside, int(x)});
    to(i) = image * result.image_stride + p * result.pixel_stride;
  } else {
    const int64_t channel = group * product.lanes + lane + i;
    room.b_rows.set(i, {lane + i, 0, 0});
    color(i) = product.forward ? int(channel % (taps.out_channels / taps.gates) / (taps.out_channels / taps.gates / taps.colors))
                               : int(channel / (taps.in_channels / taps.colors));
  }
  source.columns.group = group;
  source.data += group * product.depth * map.channel_stride;
  weights.data += group * product.columns * weights.columns.stride;
  Tile tile;
  const bool active = pixel + Tile::row() < count && lane + Tile::column() < product.lanes;
  const TakesColors filter{product, color, Tile::kDepth, group};
  multiply(tile, source, weights, room, 0, product.columns / Tile::kDepth, active, filter);
  each_sum(tile, room, result.channels_last(), [&](int r, int c, acc_t<T> sum) {
    if (pixel + r >= count || lane + c >= product.lanes) return;
    const int64_t channel = group * product.lanes + lane + c;
    if (bias) sum += to_float(bias[channel]);
    result.at<T>(0, channel)[to(r)] = from_acc<T>(sum);
  });
}

void check_height(const FeatureMap& map) { PZ_CHECK(map.height <= 1 << 30, "a map must have at most 2^30 rows"); }

void multiply_map(const FeatureMap& source, const Tensor& weight, const Tensor* bias, const FeatureMap& result, const MaskedTaps& taps,
                  bool forward) {
  check_weights(weight, "weight", bias, "bias", source, taps, kCuda);
  check_height(source);
  const int64_t count = result.images * result.pixels();
  if (count * result.channels == 0) return;
  dispatch_floating(source.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Product product(taps, forward, TileOf<T>::kDepth);
    const int64_t stride = ceil_div(product.lanes, kTile) * kTile;
    const TapColumns columns{product, source.height, source.width, source.row_stride, source.pixel_stride, source.channel_stride};
    const auto packed = weight.scratch<T>(std::max<int64_t>(1, taps.groups * product.columns * stride));
    launch(masked_conv2d_pack_kernel<T>, blocks_for(taps.groups * product.columns * stride, kThreads), kThreads, weight, weight.ptr<T>(),
           columns, stride, packed.get());
    Operand<T, TapColumns> a{static_cast<const T*>(source.data), columns, int(source.height), int(source.width)};
    a.by_columns = source.channel_stride == 1 && source.channels > 1;
    a.wide = a.by_columns &&
             reads_packs<T>(source.data, source.channel_stride, product.depth, product.dense_columns == product.columns ? 0 : product.block,
                            source.pixel_stride, source.row_stride, source.image_stride);
    const int64_t period = std::max<int64_t>(1, product.columns);
    const Operand<T, Line> b{packed.get(), {period, period, period, stride}, 1, 1, false, true};
    launch(masked_conv2d_kernel<T>, ceil_div(count, kTile) * taps.groups * (stride / kTile), kTileThreads, weight, a, b, source, result,
           bias ? bias->ptr<T>() : nullptr);
  });
}

// ------------------------------------------------------------------------------------------------ gradient of the weight

// sums [parts, OC, live taps x IC / groups]: each the products of the gradient and the input that the tap moves, over some pixels.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    masked_conv2d_weight_kernel(Operand<T, Pixels> grad, Operand<T, Pixels> input, MaskedTaps taps, int64_t grad_stride,
                                int64_t input_stride, int64_t parts, int64_t steps, acc_t<T>* sums) {
  using Tile = TileOf<T>;
  __shared__ TileRoom<Tile> room;
  const int64_t outs = taps.out_channels / taps.groups, ins = taps.in_channels / taps.groups, terms = taps.taps() * ins;
  const int64_t row_tiles = ceil_div(outs, kTile), column_tiles = ceil_div(terms, kTile);
  const int64_t column = blockIdx.x % column_tiles * kTile, row = blockIdx.x / column_tiles % row_tiles * kTile;
  const int64_t group = blockIdx.x / column_tiles / row_tiles % taps.groups, part = blockIdx.x / column_tiles / row_tiles / taps.groups;
  const int i = threadIdx.x % kTile;
  if (threadIdx.x < kTile) {
    room.a_rows.set(i, {(group * outs + row + i) * grad_stride, row + i < outs ? 0 : kOutside, 0});
  } else {
    const int64_t term = column + i, tap = taps.first + term / ins, dy = taps.dy(tap), dx = taps.dx(tap);
    const bool there = term < terms && dy > -input.height && dy < input.height && dx > -input.width && dx < input.width;
    const int64_t offset = dy * input.columns.row_stride + dx * input.columns.pixel_stride + (group * ins + term % ins) * input_stride;
    room.b_rows.set(i, there ? Place{offset, int(dy), int(dx)} : Place{0, kOutside, 0});
  }
  Tile tile;
  const bool active = row + Tile::row() < outs && column + Tile::column() < terms;
  multiply(tile, grad, input, room, steps * part / parts, steps * (part + 1) / parts, active, TakesAll());
  sums += (part * taps.out_channels + group * outs) * terms;
  each_sum(tile, room, true, [&](int r, int c, acc_t<T> sum) {
    if (row + r < outs && column + c < terms) sums[(row + r) * terms + column + c] = sum;
  });
}

template <class T, class A>
__global__ void __launch_bounds__(kThreads) masked_conv2d_sum_kernel(const A* sums, int64_t parts, MaskedTaps taps, T* grad_weight) {
  const int64_t ins = taps.in_channels / taps.groups, outs = taps.out_channels / taps.groups, kernel = taps.kernel();
  const int64_t terms = taps.taps() * ins;
  for_each_element(taps.out_channels * ins * kernel, [&](int64_t at) {
    const int64_t tap = at % kernel, in = at / kernel % ins, out = at / kernel / ins;
    const bool live = tap >= taps.first && tap < taps.last && (!taps.ordered(tap) || out / outs * ins + in < taps.limit(out));
    const A* from = sums + out * terms + (tap - taps.first) * ins + in;
    grad_weight[at] = live ? from_acc<T>(add_parts(from, parts, taps.out_channels * terms)) : T{};
  });
}

template <class T>
Operand<T, Pixels> pixels_of(const FeatureMap& map, int64_t channels, bool moved) {
  Operand<T, Pixels> operand{static_cast<const T*>(map.data)};
  const bool one_row = !moved && map.row_stride == map.width * map.pixel_stride;
  operand.height = one_row ? 1 : std::max(1, int(map.height));
  operand.width = std::max(1, int(one_row ? map.pixels() : map.width));
  operand.columns = {map.pixels() > 0 ? map.images : 0, map.image_stride, map.row_stride, map.pixel_stride, operand.height, operand.width};
  operand.by_columns = map.channel_stride != 1 || map.channels == 1;
  operand.wide = operand.by_columns
                     ? one_row && reads_packs<T>(map.data, map.pixel_stride, map.pixels(), map.channel_stride, map.image_stride)
                     : reads_packs<T>(map.data, map.channel_stride, channels, map.pixel_stride, map.row_stride, map.image_stride);
  return operand;
}

}  // namespace

void masked_conv2d_fwd_cuda(const Tensor& input, const Tensor& weight, const Tensor* bias, const Tensor& output, const ConvMask& mask) {
  const FeatureMap in(input, "input", kCuda), out(output, "output", kCuda);
  const MaskedTaps taps(weight, "weight", mask);
  out.check_written("output");
  check_maps(in, out, taps);
  multiply_map(in, weight, bias, out, taps, true);
}

void masked_conv2d_bwd_input_cuda(const Tensor& grad_output, const Tensor& weight, const Tensor& grad_input, const ConvMask& mask) {
  const FeatureMap grad(grad_output, "grad_output", kCuda), in(grad_input, "grad_input", kCuda);
  const MaskedTaps taps(weight, "weight", mask);
  in.check_written("grad_input");
  check_maps(in, grad, taps);
  multiply_map(grad, weight, nullptr, in, taps, false);
}

void masked_conv2d_bwd_weight_cuda(const Tensor& grad_output, const Tensor& input, const Tensor& grad_weight, const Tensor* grad_bias,
                                   const ConvMask& mask) {
  const FeatureMap grad(grad_output, "grad_output", kCuda), in(input, "input", kCuda);
  const MaskedTaps taps(grad_weight, "grad_weight", mask);
  check_maps(in, grad, taps);
  check_weights(grad_weight, "grad_weight", grad_bias, "grad_bias", in, taps, kCuda);
  check_height(in);
  if (grad_bias) channel_sum_cuda(grad_output, *grad_bias);
  if (grad_weight.numel() == 0) return;
  dispatch_floating(in.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const int64_t outs = taps.out_channels / taps.groups, ins = taps.in_channels / taps.groups, terms = taps.taps() * ins;
    const int64_t tiles = taps.groups * ceil_div(outs, kTile) * ceil_div(terms, kTile);
    const int64_t steps = ceil_div(in.images * in.pixels(), TileOf<T>::kDepth), parts = parts_of(tiles, steps);
    const auto sums = input.scratch<A>(std::max<int64_t>(1, parts * taps.out_channels * terms));
    launch(masked_conv2d_weight_kernel<T>, tiles * parts, kTileThreads, input, pixels_of<T>(grad, outs, false), pixels_of<T>(in, ins, true),
           taps, grad.channel_stride, in.channel_stride, parts, steps, sums.get());
    launch(masked_conv2d_sum_kernel<T, A>, blocks_for(grad_weight.numel(), kThreads), kThreads, input, sums.get(), parts, taps,
           grad_weight.ptr<T>());
  });
}

}  // namespace pyzoo
