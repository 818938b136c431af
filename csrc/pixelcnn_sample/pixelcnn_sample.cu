// One launch draws all pixels of all images: a block draws one image, row by row, pixel by pixel, color by color, as the CPU kernel
// does: the vertical stack once for each row, over all of its columns; the horizontal stack for one column and the channels of one color.
// What the layers keep lies in global memory, a region for each image. Blocks never meet.
#include <algorithm>
#include <cmath>
#include <vector>

#include "common/cuda.cuh"
#include "pixelcnn_sample/pixelcnn_sample.h"
#include "pixelcnn_sample/pixelcnn_sample_checks.h"

namespace pyzoo {

namespace {

constexpr int kThreads = 512;
constexpr int kColumns = 64;                 // of a matrix, that the threads of a block multiply at a time,
constexpr int kParts = kThreads / kColumns;  // each in parts of its depth,
constexpr int kRows = 4;                     // with so many rows of the vertical stack

template <class A>
struct Condition {  // null: none
  const A* data;
  int64_t image, row, column;
  __device__ A at(int64_t i, int64_t y, int64_t x, int64_t n) const { return data ? data[i * image + y * row + x * column + n] : A(0); }
};

// A layer; weights [depth, columns]. `..._at`: where a cache lies in the region of an image.
template <class A>
struct Layer {
  int inputs, width, rows, side;
  bool residual;
  const A *vertical, *horizontal, *link, *output;
  const A *vertical_bias, *horizontal_bias, *link_bias, *output_bias;
  Condition<A> vertical_condition, horizontal_condition;
  int64_t above_at;  // [row, as a ring][column, with zeros on both sides][inputs]: what the vertical convolution reads
  int64_t left_at;   // [column, with zeros on the left][inputs]: what the horizontal convolution reads of this row
  int64_t link_at;   // [column][2 width]: what the vertical stack gives to the horizontal gate in this row
  int64_t gated_at;  // [width]: the gated units of this pixel
};

template <class A>
struct HeadLayer {
  int inputs, outputs;
  const A *weight, *bias;
  int64_t out_at;
};

template <class A>
struct Network {
  const Layer<A>* layers;
  const HeadLayer<A>* head;
  int count, head_count;
  int64_t region;                          // its size, for an image,
  int64_t last_at, vertical_at, gates_at;  // and in it what leaves the last layer, a row of the vertical stack, what goes into a gate
};

// -------------------------------------------------------------------------------------------------------------- products

template <class A>
__device__ A gate(A x, A y) {
  return std::tanh(x) / (A(1) + std::exp(-y));
}

// out(r, n, sum) for each of kCount rows and columns [begin, end) of a matrix [runs * depth, columns]: the sum of its products with the
// row, which is made of runs of `depth` numbers, at in(run, r). All threads of the block take part.
template <int kCount, class A, class In, class Out>
__device__ void multiply(const A* weight, int runs, int depth, int columns, int begin, int end, In in, Out out) {
  __shared__ Shared<A, kParts, kCount, kColumns> sums;
  const int column = threadIdx.x % kColumns, part = threadIdx.x / kColumns;
  for (int n0 = begin; n0 < end; n0 += kColumns) {
    const int n = n0 + column;
    A sum[kCount] = {};
    if (n < end)
      for (int run = 0; run < runs; ++run) {
        const A* row[kCount];
#pragma unroll
        for (int r = 0; r < kCount; ++r) row[r] = in(run, r);
        const A* const of_run = weight + int64_t(run) * depth * columns + n;
        for (int k = part; k < depth; k += kParts) {
          const A w = of_run[int64_t(k) * columns];
#pragma unroll
          for (int r = 0; r < kCount; ++r) sum[r] = std::fma(row[r][k], w, sum[r]);
        }
      }
#pragma unroll
    for (int r = 0; r < kCount; ++r) sums(part, r, column) = sum[r];
    __syncthreads();
    for (int r = part; r < kCount; r += kParts) {
      A total = 0;
      for (int i = 0; i < kParts; ++i) total += sums(i, r, column);
      if (n < end) out(r, n, total);
    }
    __syncthreads();
  }
}

// --------------------------------------------------------------------------------------------------------------- stacks

// All layers of row y, which depend on the rows above alone.
template <class A>
__device__ void vertical_stack(const Network<A>& net, const SampledImages& io, A* region, int64_t image, int y) {
  const int width = int(io.width);
  A* const vertical = region + net.vertical_at;
  for (int l = 0; l < net.count; ++l) {
    const Layer<A>& layer = net.layers[l];
    const int gates = 2 * layer.width, above_row = (width + 2 * layer.side) * layer.inputs;
    const int oldest = l == 0 ? y : y + 1;  // the first layer does not see its own row
    const A* const above = region + layer.above_at;
    A* const link = region + layer.link_at;
    for (int x0 = 0; x0 < width; x0 += kRows) {
      const auto column = [&](int r) { return x0 + r < width ? x0 + r : width - 1; };
      multiply<kRows>(
          layer.vertical, layer.rows, (2 * layer.side + 1) * layer.inputs, gates, 0, gates,
          [&](int run, int r) { return above + (oldest + run) % layer.rows * above_row + column(r) * layer.inputs; },
          [&](int r, int n, A sum) {
            if (x0 + r < width)
              vertical[(x0 + r) * gates + n] = sum + layer.vertical_bias[n] + layer.vertical_condition.at(image, y, x0 + r, n);
          });
      multiply<kRows>(
          layer.link, 1, gates, gates, 0, gates, [&](int, int r) { return vertical + column(r) * gates; },
          [&](int r, int n, A sum) {
            if (x0 + r < width) link[(x0 + r) * gates + n] = sum + layer.link_bias[n] + layer.horizontal_condition.at(image, y, x0 + r, n);
          });
    }
    if (l + 1 < net.count) {
      const Layer<A>& next = net.layers[l + 1];
      A* const to = region + next.above_at + (y % next.rows * (width + 2 * next.side) + next.side) * next.inputs;
      for (int i = threadIdx.x; i < width * layer.width; i += kThreads) {
        const A* const from = vertical + i / layer.width * gates + i % layer.width;
        to[i] = gate(from[0], from[layer.width]);
      }
    }
    __syncthreads();
  }
}

// The channels of color c, in all layers, of column x; the colors before it are there.
template <class A>
__device__ void horizontal_stack(const Network<A>& net, const SampledImages& io, A* region, int x, int c) {
  A* const gates = region + net.gates_at;
  for (int l = 0; l < net.count; ++l) {
    const Layer<A>& layer = net.layers[l];
    const int colors = int(io.colors), half = layer.width / colors, row = 2 * layer.width, first = c * 2 * half;
    // The first layer sees earlier colors, the others their own, too; masked weights are not read.
    const int own = (l == 0 ? c : c + 1) * (layer.inputs / colors);
    const A* const left = region + layer.left_at + int64_t(x) * layer.inputs;
    const A* const link = region + layer.link_at + int64_t(x) * row;
    multiply<1>(
        layer.horizontal, 1, layer.side * layer.inputs + own, row, first, first + 2 * half, [&](int, int) { return left; },
        [&](int, int n, A sum) { gates[n - first] = sum + layer.horizontal_bias[n] + link[n]; });
    A* const gated = region + layer.gated_at;
    for (int i = threadIdx.x; i < half; i += kThreads) gated[c * half + i] = gate(gates[i], gates[half + i]);
    __syncthreads();
    const A* const residual = layer.residual ? left + layer.side * layer.inputs : nullptr;
    const bool last = l + 1 == net.count;
    A* const out = region + (last ? net.last_at : net.layers[l + 1].left_at + int64_t(x + net.layers[l + 1].side) * layer.width);
    multiply<1>(
        layer.output, 1, (c + 1) * half, layer.width, c * half, (c + 1) * half, [&](int, int) { return gated; },
        [&](int, int n, A sum) { out[n] = sum + layer.output_bias[n] + (residual ? residual[n] : A(0)); });
  }
}

// The logits of color c.
template <class A>
__device__ const A* head(const Network<A>& net, const SampledImages& io, A* region, int c) {
  A* in = region + net.last_at;
  for (int l = 0; l < net.head_count; ++l) {
    const HeadLayer<A>& layer = net.head[l];
    const int inputs = layer.inputs / int(io.colors), outputs = layer.outputs / int(io.colors);
    for (int i = threadIdx.x; i < inputs; i += kThreads) in[c * inputs + i] = in[c * inputs + i] < A(0) ? A(0) : in[c * inputs + i];
    __syncthreads();
    A* const out = region + layer.out_at;
    multiply<1>(
        layer.weight, 1, (c + 1) * inputs, layer.outputs, c * outputs, (c + 1) * outputs, [&](int, int) { return in; },
        [&](int, int n, A sum) { out[n] = sum + layer.bias[n]; });
    in = out;
  }
  return in + c * io.levels;
}

// By one warp: min(#{k : cdf(k) < u}, K - 1) with the cdf of softmax(logits / temperature), summed in double. Where a logit is NaN: 0.
template <class A>
__device__ int64_t draw(const A* logits, int64_t levels, A scale, double u) {
  const int lane = threadIdx.x % kWarp;
  const int64_t some = (levels + kWarp - 1) / kWarp, begin = lane * some, end = begin + some < levels ? begin + some : levels;
  A most = logits[0];
  for (int64_t k = begin; k < end; ++k) most = logits[k] > most ? logits[k] : most;
  for (int bits = kWarp / 2; bits > 0; bits /= 2) {
    const A other = __shfl_xor_sync(kAllLanes, most, bits);
    most = other > most ? other : most;
  }
  const auto power = [&](int64_t k) { return double(std::exp((logits[k] - most) * scale)); };
  double sum = 0;
  for (int64_t k = begin; k < end; ++k) sum += power(k);
  double up_to = sum;  // and with this lane's
  for (int by = 1; by < kWarp; by *= 2) {
    const double before = __shfl_up_sync(kAllLanes, up_to, by);
    if (lane >= by) up_to += before;
  }
  const double total = __shfl_sync(kAllLanes, up_to, kWarp - 1), before = __shfl_up_sync(kAllLanes, up_to, 1);
  double cdf = lane > 0 ? before : 0.0;
  int below = 0;
  for (int64_t k = begin; k < end; ++k) below += (cdf += power(k)) < u * total;
  below = warp_sum(below);
  return below < levels ? below : levels - 1;
}

template <class A>
__global__ void __launch_bounds__(kThreads) pixelcnn_sample_kernel(Network<A> net, SampledImages io, A* regions) {
  __shared__ Shared<int64_t, 1> drawn;
  const int64_t image = blockIdx.x;
  A* const region = regions + image * net.region;
  for (int64_t i = threadIdx.x; i < net.region; i += kThreads) region[i] = A(0);
  __syncthreads();
  const Layer<A>& first = net.layers[0];
  const int width = int(io.width), colors = int(io.colors);
  A* const row = region + first.left_at + first.side * colors;  // what the first layer reads: the image
  for (int y = 0; y < io.height; ++y) {
    vertical_stack(net, io, region, image, y);
    for (int x = 0; x < width; ++x)
      for (int c = 0; c < colors; ++c) {
        horizontal_stack(net, io, region, x, c);
        int64_t value = io.value(image, c, y, x);
        bool wanted = io.logits;  // of this color, or of one after it, which reads what the head makes of this one
        for (int later = c; later < colors; ++later) wanted |= io.value(image, later, y, x) == kUnknownSample;
        if (wanted) {
          const A* const logits = head(net, io, region, c);
          if (io.logits)
            for (int64_t k = threadIdx.x; k < io.levels; k += kThreads) io.logit<A>(image, c, k, y, x) = logits[k];
          if (value == kUnknownSample) {
            if (threadIdx.x < kWarp) {
              const int64_t found = draw(logits, io.levels, A(1 / io.temperature), io.uniform(image, c, y, x));
              if (threadIdx.x == 0) io.value(image, c, y, x) = drawn(0) = found;
            }
            __syncthreads();
            value = drawn(0);
          }
        }
        if (threadIdx.x == 0) row[x * colors + c] = A(2) * A(value) / A(io.levels - 1) - A(1);
        __syncthreads();
      }
    A* const above = region + first.above_at + (y % first.rows * (width + 2 * first.side) + first.side) * colors;
    for (int i = threadIdx.x; i < width * colors; i += kThreads) above[i] = row[i];
    __syncthreads();
  }
}

// ----------------------------------------------------------------------------------------------------------- preparation

// The matrix [depth, columns] of a weight [columns, inputs, taps]; depth: taps, inputs.
template <class A>
__global__ void pack_kernel(const A* weight, int64_t columns, int64_t inputs, int64_t taps, A* matrix) {
  for_each_element(columns * inputs * taps, [&](int64_t i) {
    const int64_t n = i % columns, k = i / columns;
    matrix[i] = weight[(n * inputs + k % inputs) * taps + k / inputs];
  });
}

// Some of the layers, as arguments of a launch: nothing on the host has to stay as it is until the launch runs.
template <class T>
struct Some {
  static constexpr int kMost = 3000 / sizeof(T);
  T item[kMost];
};

template <class T>
__global__ void describe_kernel(Some<T> some, int count, T* to) {
  for (int i = 0; i < count; ++i) to[i] = some.item[i];
}

template <class T>
void describe(const std::vector<T>& items, const Tensor& like, T* to) {
  for (size_t begin = 0; begin < items.size(); begin += Some<T>::kMost) {
    Some<T> some{};
    const size_t count = std::min<size_t>(Some<T>::kMost, items.size() - begin);
    std::copy_n(items.begin() + begin, count, some.item);
    launch(describe_kernel<T>, 1, 1, like, some, int(count), to + begin);
  }
}

template <class A>
void run(const std::vector<PixelCNNLayer>& layers, const PixelCNNHead& given_head, const SampledImages& io, const Tensor& samples) {
  const Tensor& like = layers[0].vertical_weight;
  int64_t weights = 0, packed_so_far = 0;
  for (const PixelCNNLayer& layer : layers)
    for (const Tensor* t : {&layer.vertical_weight, &layer.horizontal_weight, &layer.link_weight, &layer.output_weight})
      weights += t->numel();
  for (const auto& [weight, bias] : given_head) weights += weight.numel();
  const auto packed = like.scratch<A>(weights);
  const auto pack = [&](const Tensor& t) -> const A* {
    A* const to = packed.get() + packed_so_far;
    packed_so_far += t.numel();
    launch(pack_kernel<A>, blocks_for(t.numel(), 256), 256, like, t.ptr<const A>(), t.shape[0], t.shape[1], t.shape[2] * t.shape[3], to);
    return to;
  };
  const auto condition = [](const std::optional<Tensor>& t) {
    return t ? Condition<A>{t->ptr<const A>(), t->stride[0], t->stride[1], t->stride[2]} : Condition<A>{};
  };

  Network<A> net{};
  const auto keep = [&](int64_t count) { return (net.region += count) - count; };
  std::vector<Layer<A>> described;
  std::vector<HeadLayer<A>> described_head;
  int64_t widest = 0;
  for (const PixelCNNLayer& layer : layers) {
    Layer<A> to{};
    to.inputs = int(layer.inputs()), to.width = int(layer.width()), to.residual = layer.residual;
    to.rows = int(layer.vertical_weight.shape[2]), to.side = int(layer.vertical_weight.shape[3] / 2);
    to.vertical = pack(layer.vertical_weight), to.vertical_bias = layer.vertical_bias.ptr<const A>();
    to.horizontal = pack(layer.horizontal_weight), to.horizontal_bias = layer.horizontal_bias.ptr<const A>();
    to.link = pack(layer.link_weight), to.link_bias = layer.link_bias.ptr<const A>();
    to.output = pack(layer.output_weight), to.output_bias = layer.output_bias.ptr<const A>();
    to.vertical_condition = condition(layer.vertical_condition), to.horizontal_condition = condition(layer.horizontal_condition);
    to.above_at = keep(to.rows * (io.width + 2 * to.side) * to.inputs);
    to.left_at = keep((io.width + to.side) * to.inputs);
    to.link_at = keep(io.width * 2 * to.width);
    to.gated_at = keep(to.width);
    widest = std::max<int64_t>(widest, to.width);
    described.push_back(to);
  }
  net.last_at = keep(layers.back().width());
  net.vertical_at = keep(io.width * 2 * widest);
  net.gates_at = keep(2 * widest);
  for (const auto& [weight, bias] : given_head)
    described_head.push_back(
        {int(weight.shape[1]), int(weight.shape[0]), pack(weight), bias.template ptr<const A>(), keep(weight.shape[0])});
  const auto on_device = like.scratch<Layer<A>>(int64_t(described.size()));
  const auto head_on_device = like.scratch<HeadLayer<A>>(int64_t(described_head.size()));
  describe(described, like, on_device.get());
  describe(described_head, like, head_on_device.get());
  net.layers = on_device.get(), net.head = head_on_device.get();
  net.count = int(described.size()), net.head_count = int(described_head.size());
  const auto regions = like.scratch<A>(io.images * net.region);
  launch(pixelcnn_sample_kernel<A>, io.images, kThreads, samples, net, io, regions.get());
}

}  // namespace

void pixelcnn_sample_cuda(const std::vector<PixelCNNLayer>& layers, const PixelCNNHead& head, const Tensor& uniforms, const Tensor& samples,
                          const Tensor* logits, double temperature) {
  const SampledImages io = sampled_images(layers, head, uniforms, samples, logits, temperature, kCuda);
  if (samples.numel() == 0) return;
  if (layers[0].vertical_weight.dtype == DType::f64) run<double>(layers, head, io, samples);
  else run<float>(layers, head, io, samples);
}

}  // namespace pyzoo
