#include "spatial_pyramid_pool2d/spatial_pyramid_pool2d.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "common/cuda.cuh"
#include "common/feature_map.h"
#include "spatial_pyramid_pool2d/spatial_pyramid_pool2d_geometry.h"

namespace pyzoo {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlocks = 264;  // that keep a GPU busy

struct Span {
  int64_t begin, end;
  __device__ int64_t size() const { return end - begin; }
};

// Bin i of an axis. Divisions of 64 bits take several times as long as those of 32.
__device__ Span bin_of(int64_t i, int64_t bins, int64_t size, bool wide) {
  if (wide) return {bin_begin(i, bins, size), bin_end(i, bins, size)};
  return {bin_begin(unsigned(i), unsigned(bins), unsigned(size)), bin_end(unsigned(i), unsigned(bins), unsigned(size))};
}

bool is_wide(int64_t bins, int64_t size) { return (bins + 1) * (size + 1) > INT32_MAX; }

// ------------------------------------------------------------------------------------------------------------- forward
// A block pools some channels of an image: levels from the map, whose results stay in shared memory, and from these coarser ones.

constexpr int kLevels = 16;
constexpr int kEntries = 3072;  // of shared memory: bins times channels

enum class Mode { average, max, argmax };

// What is known of a bin: the sum so far, or the maximum, or the maximum and its pixel. As in torch the first of equal maxima wins, and NaN
// over everything: its last one.
template <Mode mode, class A>
struct Pool {
  A value = mode == Mode::average ? A(0) : -std::numeric_limits<A>::infinity();
  int pixel = std::numeric_limits<int>::max();

  // In row-major order.
  __device__ void take(A v, int at) {
    if (mode == Mode::average) {
      value += v;
    } else if (v > value || v != v) {
      value = v, pixel = at;
    }
  }
  // In any order.
  __device__ void merge(A v, int at) {
    const bool later = mode != Mode::argmax || value == value || at > pixel;
    if (mode == Mode::average) value += v;
    else if (v > value || (mode == Mode::argmax && v == value && at < pixel) || (v != v && later)) value = v, pixel = at;
  }
};

// A level, or some of its bins, or what is not wanted but helps: the bins of a level cut into parts.
struct Level {
  int64_t height, width;
  int parts = 1;               // rows of a bin, cut into so many
  int64_t first = 0;           // which of its bins these are
  int count;                   // and how many, in all parts
  int entry;                   // where their results are
  int finer = -1;              // the level that they are made of, or -1: the map
  int64_t before = -1;         // bins of the levels before it, or -1: not wanted
  int lanes = 1, lanes_x = 1;  // that share a bin; columns among them
};

struct Pooling {
  FeatureMap map;
  bool wide, last;
  int64_t bins;  // of all levels
  int levels = 0, entries = 0;
  Level level[kLevels];
  int channels, lanes;  // of a block; lanes side by side for the channels of NHWC
};

template <Mode mode, int V, class T>
__device__ void pool_map(const Pooling& p, const Level& level, const T* map, int channels, Shared<acc_t<T>, kEntries>& values,
                         Shared<int, kEntries>& pixels) {
  using A = acc_t<T>;
  const int team = p.lanes * level.lanes, lane = threadIdx.x % team;
  const unsigned mask = (team == kWarp ? kAllLanes : (1u << team) - 1) << (threadIdx.x % kWarp / team * team);
  const int lane_c = lane % p.lanes * V, lane_x = lane / p.lanes % level.lanes_x, lane_y = lane / p.lanes / level.lanes_x;
  const int lanes_y = level.lanes / level.lanes_x, width = int(p.map.width), pitch = p.entries | 1;
  const int64_t row_step = lanes_y * p.map.row_stride;
  // Teams take bins side by side, and if there are more teams than bins, channels.
  const int teams = int(blockDim.x) / team, mine = threadIdx.x / team;
  const int side = teams < level.count ? teams : level.count, step_c = teams / side * p.lanes * V;
  if (mine / side * p.lanes * V >= step_c) return;
  for (int b = mine % side; b < level.count; b += side) {
    const unsigned row = unsigned(level.first + b) / unsigned(level.width), part = row % unsigned(level.parts);
    const Span x = bin_of(unsigned(level.first + b) % unsigned(level.width), level.width, p.map.width, p.wide);
    const Span whole = bin_of(row / unsigned(level.parts), level.height, p.map.height, p.wide);
    const int rows = int(whole.size());
    const int begin = int(whole.begin) + (level.parts == 1 ? 0 : rows * int(part) / level.parts);
    const int end = int(whole.begin) + (level.parts == 1 ? rows : rows * int(part + 1) / level.parts);
    for (int first_c = mine / side * p.lanes * V; first_c < channels; first_c += step_c) {
      const int c = first_c + lane_c;
      Pool<mode, A> total[V];
      const int y0 = begin + lane_y;
      if (c < channels && y0 < end)
        for (int column = int(x.begin) + lane_x; column < x.end; column += level.lanes_x) {
          Pool<mode, A> pool[V];
          int at = y0 * width + column;
          for (int v = 0; v < V; ++v) pool[v].pixel = at;
          const T* from = map + c * p.map.channel_stride + y0 * p.map.row_stride + column * p.map.pixel_stride;
#pragma unroll 4
          for (int y = y0; y < end; y += lanes_y, from += row_step, at += lanes_y * width) {
            const Pack<T, V> pack = load_pack<V>(from);
#pragma unroll
            for (int v = 0; v < V; ++v) pool[v].take(to_float(pack.at[v]), at);
          }
#pragma unroll
          for (int v = 0; v < V; ++v) total[v].merge(pool[v].value, pool[v].pixel);
        }
      for (int bits = p.lanes; bits < team; bits *= 2)
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const A value = __shfl_xor_sync(mask, total[v].value, bits);
          total[v].merge(value, mode == Mode::argmax ? __shfl_xor_sync(mask, total[v].pixel, bits) : 0);
        }
      if (c >= channels || lane >= p.lanes) continue;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        values((c + v) * pitch + level.entry + b) = total[v].value;
        if (mode == Mode::argmax) pixels((c + v) * pitch + level.entry + b) = total[v].pixel;
      }
    }
  }
}

template <Mode mode, class A>
__device__ void pool_bins(const Pooling& p, const Level& level, int channels, Shared<A, kEntries>& values, Shared<int, kEntries>& pixels) {
  const Level& finer = p.level[level.finer];
  const int rows = int(finer.height) * finer.parts / int(level.height), columns = int(finer.width / level.width), width = int(finer.width);
  for (int i = threadIdx.x; i < channels * level.count; i += blockDim.x) {
    const int c = i / level.count, b = i % level.count, y = b / int(level.width), x = b % int(level.width);
    const int base = c * (p.entries | 1);
    Pool<mode, A> pool;
    for (int r = 0; r < rows; ++r)
      for (int k = 0; k < columns; ++k) {
        const int from = base + finer.entry + (y * rows + r) * width + x * columns + k;
        pool.merge(values(from), mode == Mode::argmax ? int(pixels(from)) : 0);
      }
    values(base + level.entry + b) = pool.value;
    if (mode == Mode::argmax) pixels(base + level.entry + b) = pool.pixel;
  }
}

template <Mode mode, int V, class T>
__global__ void __launch_bounds__(kThreads, 3) pool_kernel(Pooling p, T* output, int* argmax) {
  using A = acc_t<T>;
  __shared__ Shared<A, kEntries> values;
  __shared__ Shared<int, kEntries> pixels;
  const unsigned groups = unsigned((p.map.channels + p.channels - 1) / p.channels);
  const int64_t image = blockIdx.x / groups, c0 = int64_t(blockIdx.x % groups) * p.channels;
  const int channels = int(p.map.channels - c0 < p.channels ? p.map.channels - c0 : p.channels);
  for (int l = 0; l < p.levels; ++l) {
    const Level& level = p.level[l];
    if (level.finer >= 0) pool_bins<mode>(p, level, channels, values, pixels);
    else pool_map<mode, V>(p, level, p.map.at<const T>(image, c0), channels, values, pixels);
    __syncthreads();
    if (level.before < 0) continue;
    const int64_t bins = level.height * level.width, to = (image * p.bins + level.before) * p.map.channels + c0 * bins + level.first;
    for (int i = threadIdx.x; i < channels * level.count; i += blockDim.x) {
      const int c = i / level.count, b = i % level.count, from = c * (p.entries | 1) + level.entry + b;
      A value = values(from);
      if (mode == Mode::average) {
        const int64_t bin = level.first + b;
        const Span y = bin_of(bin / level.width, level.height, p.map.height, p.wide);
        const Span x = bin_of(bin % level.width, level.width, p.map.width, p.wide);
        value /= A(y.size() * x.size());
      }
      output[to + c * bins + b] = from_acc<T>(value);
      if (mode == Mode::argmax) argmax[to + c * bins + b] = pixels(from);
    }
  }
}

// The smallest power of two that is not below n.
int64_t power_of_two(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

bool packs(const FeatureMap& map, int64_t n) {
  return map.channels % n == 0 && map.image_stride % n == 0 && map.row_stride % n == 0 && map.pixel_stride % n == 0 &&
         reinterpret_cast<uintptr_t>(map.data) % (n * dtype_size(map.dtype)) == 0;
}

template <class T>
void pool(const Tensor& like, Pooling p, T* output, int* argmax, bool average) {
  const FeatureMap& map = p.map;
  const auto blocks = [&](int64_t channels) { return map.images * ceil_div(map.channels, channels); };
  const auto fits = [&](int64_t channels) { return (p.entries | 1) * channels <= kEntries; };
  constexpr int kVector = 16 / sizeof(T);
  int vector = p.last && packs(map, kVector) && fits(kVector) ? kVector : 1;
  if (p.last) {
    // 128 bytes of a pixel, or less where there are few channels to share out.
    p.lanes = int(std::min(power_of_two(ceil_div(map.channels, vector)), std::min<int64_t>(kWarp, 128 / int64_t(sizeof(T)) / vector)));
    const auto bytes = [&] { return p.lanes * vector * int64_t(sizeof(T)); };
    while (p.lanes > 1 && (!fits(p.lanes * vector) || (bytes() > 32 && blocks(p.lanes * vector) < kBlocks))) p.lanes /= 2;
    p.channels = p.lanes * vector;
  }
  int64_t work = 1;
  for (Level* level = p.level; level < p.level + p.levels; ++level) {
    if (level->finer >= 0) continue;
    const int64_t lanes = kWarp / p.lanes, columns = power_of_two(ceil_div(map.width, level->width));
    level->lanes_x = int(std::min(lanes, columns)), level->lanes = p.last ? int(lanes) : level->lanes_x;
    work = std::max(work, level->count * int64_t(level->lanes));
  }
  if (!p.last) {
    const int64_t channels =
        std::min({map.channels, ceil_div(4 * kThreads, work), map.images * map.channels / kBlocks, kEntries / (p.entries | 1L)});
    p.channels = int(std::max<int64_t>(1, channels));
  }
  const auto run = [&](auto kernel) { launch(kernel, blocks(p.channels), kThreads, like, p, output, argmax); };
  const auto with_vector = [&](auto v) {
    constexpr int V = decltype(v)::value;
    average ? run(pool_kernel<Mode::average, V, T>) : argmax ? run(pool_kernel<Mode::argmax, V, T>) : run(pool_kernel<Mode::max, V, T>);
  };
  if (vector == 1) with_vector(std::integral_constant<int, 1>{});
  else with_vector(std::integral_constant<int, kVector>{});
}

}  // namespace

void spatial_pyramid_pool2d_fwd_cuda(const Tensor& input, const std::vector<int64_t>& levels, const Tensor& output, const Tensor* argmax,
                                     bool average) {
  const FeatureMap map(input, "input", kCuda);
  check_levels(levels);
  std::vector<Level> sorted;
  Pooling p{map};
  p.last = map.channel_stride == 1 && map.channels > 1;
  p.wide = false, p.bins = 0, p.channels = p.lanes = 1;
  for (size_t i = 0; i < levels.size(); i += 2) {
    Level level;
    level.height = levels[i], level.width = levels[i + 1], level.before = p.bins;
    p.bins += level.height * level.width;
    p.wide |= is_wide(level.height, map.height) || is_wide(level.width, map.width);
    sorted.push_back(level);
  }
  PZ_CHECK(p.bins <= INT32_MAX, "on a GPU there may be at most 2^31 - 1 bins");
  check_features(output, "output", map, p.bins, kCuda);
  check_dtype(output, "output", input.dtype);
  PZ_CHECK(!average || !argmax, "a mean has no argmax");
  if (argmax) {
    check_features(*argmax, "argmax", map, p.bins, kCuda);
    check_dtype(*argmax, "argmax", DType::i32);
  }
  if (output.numel() == 0) return;
  PZ_CHECK(map.pixels() > 0, "input must have pixels, got shape " + input.shape_string());

  const auto flush = [&] {
    if (p.levels == 0) return;
    dispatch_floating(input.dtype, [&](auto zero) {
      using T = decltype(zero);
      pool(output, p, output.ptr<T>(), argmax ? argmax->ptr<int>() : nullptr, average);
    });
    p.levels = p.entries = 0;
  };
  const auto add = [&](Level level, int64_t count) {
    level.entry = p.entries, level.count = int(count);
    p.entries += level.count;
    p.level[p.levels++] = level;
  };
  // From the finest on; each is made of the coarsest that it can be made of. What shared memory does not hold has a launch of its own.
  std::stable_sort(sorted.begin(), sorted.end(), [](const Level& a, const Level& b) { return a.height * a.width > b.height * b.width; });
  for (Level& level : sorted) {
    const int64_t bins = level.height * level.width;
    // Few large bins would leave most of a block idle.
    const int64_t parts = std::max<int64_t>(1, std::min(8 / bins, map.height / level.height / 4));
    if (p.levels + 2 > kLevels || p.entries + (parts + 1) * bins > kEntries) flush();
    for (int i = 0; i < p.levels; ++i)
      if (p.level[i].parts == 1 && is_union(level.height, level.width, p.level[i].height, p.level[i].width, map, average)) level.finer = i;
    if (level.finer < 0 && parts > 1) {
      Level cut = level;
      cut.parts = int(parts), cut.before = -1;
      add(cut, parts * bins);
      level.finer = p.levels - 1;
    }
    for (level.first = 0; bins - level.first > kEntries; level.first += kEntries) {
      add(level, kEntries);
      flush();
    }
    add(level, bins - level.first);
    if (level.first > 0) flush();
  }
  flush();
}

// ------------------------------------------------------------------------------------------------------------ backward
// A block owns some channels of a run of pixels, adds up what they get in shared memory and writes it.

namespace {

constexpr int kMostLevels = 256;
template <class A>
constexpr int kTile = 32768 / int(sizeof(A));

struct Unpooling {
  FeatureMap map;
  bool wide, last;
  int64_t bins;
  int levels = 0, height[kMostLevels], width[kMostLevels];
  int channels, pixels;  // of a block
};

// Each maximum to its pixel. A pixel of a channel belongs to one thread, which meets its maxima in their order.
template <class T, class A>
__device__ void add_maxima(const Unpooling& p, const T* grad, const int* argmax, int64_t c0, int channels, int64_t p0, int pixels,
                           int pitch, Shared<A, kTile<A>>& tile) {
  constexpr int kOwners = 4;  // threads of a channel
  for (int c = threadIdx.x / kOwners; c < channels; c += blockDim.x / kOwners) {
    const int owner = threadIdx.x % kOwners;
    int64_t before = 0;
    for (int l = 0; l < p.levels; ++l) {
      const int64_t bins = int64_t(p.height[l]) * p.width[l], first = before * p.map.channels + (c0 + c) * bins;
      before += bins;
#pragma unroll 4
      for (int64_t b = first; b < first + bins; ++b) {
        const unsigned at = unsigned(argmax[b]) - unsigned(p0);
        const A g = to_float(grad[b]);
        if (at < unsigned(pixels) && at % kOwners == unsigned(owner)) tile(c * pitch + at) += g;
      }
    }
  }
}

// To each pixel its share of the means.
template <class T, class A>
__device__ void add_means(const Unpooling& p, const T* grad, int64_t c0, int channels, int64_t p0, int pixels, int pitch,
                          Shared<A, kTile<A>>& tile) {
  // The bins that have pixel i of an axis.
  const auto bins_over = [&](int64_t i, int64_t bins, int64_t size) -> Span {
    if (p.wide) return {i * bins / size, ((i + 1) * bins - 1) / size + 1};
    const unsigned n = unsigned(bins), s = unsigned(size);
    return {unsigned(i) * n / s, (unsigned(i + 1) * n - 1) / s + 1};
  };
  for (int i = threadIdx.x; i < pixels; i += blockDim.x) {
    const unsigned y = unsigned(p0 + i) / unsigned(p.map.width), x = unsigned(p0 + i) % unsigned(p.map.width);
    int64_t before = 0;
    for (int l = 0; l < p.levels; ++l) {
      const int64_t bins = int64_t(p.height[l]) * p.width[l], first = before * p.map.channels + c0 * bins;
      before += bins;
      const Span rows = bins_over(y, p.height[l], p.map.height), columns = bins_over(x, p.width[l], p.map.width);
      for (int64_t by = rows.begin; by < rows.end; ++by)
        for (int64_t bx = columns.begin; bx < columns.end; ++bx) {
          const Span of_y = bin_of(by, p.height[l], p.map.height, p.wide), of_x = bin_of(bx, p.width[l], p.map.width, p.wide);
          const A share = A(1) / A(of_y.size() * of_x.size());
          const T* const from = grad + first + by * p.width[l] + bx;
#pragma unroll 4
          for (int c = 0; c < channels; ++c) tile(c * pitch + i) += to_float(from[c * bins]) * share;
        }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) unpool_kernel(Unpooling p, const T* grad, const int* argmax) {
  using A = acc_t<T>;
  __shared__ Shared<A, kTile<A>> tile;
  const unsigned runs = unsigned((p.map.pixels() + p.pixels - 1) / p.pixels),
                 groups = unsigned((p.map.channels + p.channels - 1) / p.channels);
  const int64_t p0 = int64_t(blockIdx.x % runs) * p.pixels, c0 = int64_t(blockIdx.x / runs % groups) * p.channels;
  const int64_t image = blockIdx.x / runs / groups;
  const int pixels = int(p.map.pixels() - p0 < p.pixels ? p.map.pixels() - p0 : p.pixels);
  const int channels = int(p.map.channels - c0 < p.channels ? p.map.channels - c0 : p.channels);
  const int pitch = p.pixels | 1;
  for (int i = threadIdx.x; i < channels * pitch; i += blockDim.x) tile(i) = A(0);
  __syncthreads();
  const int64_t from = image * p.map.channels * p.bins;
  if (argmax) add_maxima(p, grad + from, argmax + from, c0, channels, p0, pixels, pitch, tile);
  else add_means(p, grad + from, c0, channels, p0, pixels, pitch, tile);
  __syncthreads();
  T* const to = p.map.at<T>(image, c0) + p0 * p.map.pixel_stride;
  // Rows are what lies together in memory: the channels of a pixel, or the pixels of a channel.
  const int rows = p.last ? pixels : channels, columns = p.last ? channels : pixels;
  const int64_t row_stride = p.last ? p.map.pixel_stride : p.map.channel_stride;
  const int lanes = columns > 16 ? 32 : columns > 8 ? 16 : 8;
  for (int r = threadIdx.x / lanes; r < rows; r += blockDim.x / lanes)
#pragma unroll 4
    for (int i = threadIdx.x % lanes; i < columns; i += lanes)
      to[r * row_stride + i] = from_acc<T>(A(tile(p.last ? i * pitch + r : r * pitch + i)));
}

}  // namespace

void spatial_pyramid_pool2d_bwd_cuda(const Tensor& grad_output, const Tensor* argmax, const std::vector<int64_t>& levels,
                                     const Tensor& grad_input) {
  const FeatureMap map(grad_input, "grad_input", kCuda);
  map.check_written("grad_input");
  check_levels(levels);
  PZ_CHECK(levels.size() <= 2 * kMostLevels, "on a GPU there may be at most " + std::to_string(kMostLevels) + " levels");
  Unpooling p{map};
  p.last = map.channel_stride == 1 && map.channels > 1;
  p.wide = false, p.bins = 0;
  for (size_t i = 0; i < levels.size(); i += 2) {
    p.height[p.levels] = int(levels[i]), p.width[p.levels++] = int(levels[i + 1]);
    p.bins += levels[i] * levels[i + 1];
    p.wide |= is_wide(levels[i], map.height) || is_wide(levels[i + 1], map.width);
  }
  check_features(grad_output, "grad_output", map, p.bins, kCuda);
  check_dtype(grad_output, "grad_output", grad_input.dtype);
  if (argmax) {
    check_features(*argmax, "argmax", map, p.bins, kCuda);
    check_dtype(*argmax, "argmax", DType::i32);
  }
  if (grad_input.numel() == 0) return;
  dispatch_floating(grad_input.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int64_t size = kTile<acc_t<T>>, least = 64 / sizeof(T);  // a run of memory in NHWC
    const int64_t pixels = std::min(map.pixels(), size / least - 1);
    int64_t channels = std::min(map.channels, size / (pixels | 1));
    const auto blocks = [&] { return map.images * ceil_div(map.channels, channels) * ceil_div(map.pixels(), pixels); };
    while (channels > 4 && blocks() < kBlocks) channels = ceil_div(channels, 2);
    p.channels = int(channels), p.pixels = int(pixels);
    launch(unpool_kernel<T>, blocks(), kThreads, grad_input, p, grad_output.ptr<const T>(), argmax ? argmax->ptr<const int>() : nullptr);
  });
}

}  // namespace pyzoo
