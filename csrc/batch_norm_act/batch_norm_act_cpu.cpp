#include "batch_norm_act/batch_norm_act.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "common/feature_map.h"
#include "common/memory.h"
#include "common/vec.h"
#include "pointwise/pointwise.h"

namespace pyzoo {

namespace {

constexpr int64_t kTask = 32768;     // elements: what a task reads first from memory is in the second-level cache when it comes back to it
constexpr int64_t kLeastBlocks = 4;  // where a convolution makes them, which is work enough to share

// Some elements of a map, in which those of one column are normalised alike. A column is a channel, or one of several copies of it.
struct Block {
  int64_t offset, rows, columns;
  int64_t first;  // channel of the first column; in a plane, whose columns are all of one channel, that channel
};

// How a map is cut into blocks, whatever the number of threads. In NHWC order a row is a pixel, or as many pixels as make a row of some
// length; a block is some rows, and pixels that are left over are a last block. In NCHW order a block is a plane or a segment of one.
struct Blocks {
  bool planar;
  int64_t channels, pixels, numel, per_channel;
  int64_t columns;        // of a row
  int64_t rows, in_task;  // NHWC: rows altogether, and of a block. NCHW: in_task blocks are one task
  int64_t segment, segments;
  int64_t count, tasks;

  // `least`: so many blocks, where there is something in them.
  explicit Blocks(const Tensor& map, bool planar, int64_t least = 1) : planar(planar) {
    channels = map.shape[1], pixels = map.shape[2] * map.shape[3], numel = map.numel(), per_channel = map.shape[0] * pixels;
    if (planar) {
      segments = std::max<int64_t>(1, (pixels + kTask - 1) / kTask);
      segment = (pixels + segments - 1) / segments;
      columns = channels, rows = 0;
      in_task = std::max<int64_t>(1, kTask / std::max<int64_t>(1, segment));
      count = map.shape[0] * channels * segments;
      tasks = (count + in_task - 1) / in_task;
    } else {
      const int64_t group = channels < 64 ? 16 : 1;  // whole vectors, whatever the number of channels
      segment = segments = 0;
      columns = group * channels;
      rows = per_channel / group;
      in_task = std::max<int64_t>(16, kTask / std::max<int64_t>(1, columns));
      in_task = std::min(in_task, std::max<int64_t>(1, ceil_div(rows, least)));
      count = tasks = (rows + in_task - 1) / in_task + (rows * group < per_channel);
    }
  }
  Block operator[](int64_t i) const {
    if (planar) {
      const int64_t plane = i / segments, begin = i % segments * segment;
      return {plane * pixels + begin, 1, std::min(segment, pixels - begin), plane % channels};
    }
    const int64_t row = i * in_task;
    if (row >= rows) return {rows * columns, 1, numel - rows * columns, 0};
    return {row * columns, std::min(in_task, rows - row), columns, 0};
  }
  template <class F>
  void each_in_task(int64_t task, const F& f) const {
    if (!planar) return f(task);
    for (int64_t i = task * in_task; i < std::min(count, (task + 1) * in_task); ++i) f(i);
  }
  // `depth`: so many products for each element besides.
  template <class F>
  void each(const F& f, int64_t depth = 0) const {
    // An element counts for more than its arithmetic: it lies in the cache of the thread that wrote it, in the function that just ran.
    constexpr double kFetch = 5;
    parallel_for(tasks, (kFetch + double(depth) / 8) * double(numel), [&](int64_t task) { each_in_task(task, f); });
  }
  int64_t first_pixel(const Block& block) const { return block.offset / channels; }
  int64_t pixels_of(const Block& block) const { return block.rows * block.columns / channels; }
  // Where block i keeps its sums: a row of columns, or one place in it.
  int64_t place(int64_t i) const {
    if (!planar) return i * columns;
    const int64_t plane = i / segments;
    return (plane / channels * segments + i % segments) * channels + plane % channels;
  }
  int64_t places() const { return planar ? count : count * columns; }
  // f(channel, place, elements): all places, those of a channel always in the same order.
  template <class F>
  void each_place(const F& f) const {
    if (planar) {
      for (int64_t i = 0; i < count; ++i) f((*this)[i].first, place(i), (*this)[i].columns);
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      const Block block = (*this)[i];
      for (int64_t from = 0; from < block.columns; from += channels)
        for (int64_t c = 0; c < channels; ++c) f(c, place(i) + from + c, block.rows);
    }
  }
};

// For each column, or in NCHW order for each channel.
template <class A>
struct Columns {
  const Blocks& blocks;
  Scratch<A> values;
  template <class F>
  Columns(const Blocks& blocks, const F& f) : blocks(blocks), values(size_t(blocks.columns)) {
    for (int64_t c = 0; c < blocks.channels; ++c) values[c] = f(c);
    for (int64_t j = blocks.channels; j < blocks.columns; ++j) values[j] = values[j - blocks.channels];
  }
  const A* of(const Block& block) const { return values.data() + block.first; }
};

// What is below `low` becomes that, what is above `high` that. No bound: NaN, which nothing is below or above; so NaN passes.
template <class A>
struct Bounds {
  A low = std::numeric_limits<A>::quiet_NaN(), high = std::numeric_limits<A>::quiet_NaN();
  explicit Bounds(int activation = 0) {
    if (activation > 0) low = 0;
    if (activation > 1) high = 6;
  }
};

template <class A>
struct Scale {
  Columns<A> mean, factor, bias;
  Scale(const Blocks& blocks, const A* mean, const A* var, const A* weight, const A* bias, double eps)
      : mean(blocks, [&](int64_t c) { return mean[c]; }),
        factor(blocks, [&](int64_t c) { return A(weight[c] / std::sqrt(double(var[c]) + eps)); }),
        bias(blocks, [&](int64_t c) { return bias[c]; }) {}
};

}  // namespace

#define PZ_KERNEL "batch_norm_act/batch_norm_act_cpu.inc"
#include "common/foreach_isa.h"

namespace {

// Checks the maps; which order they are all in.
Blocks checked(const Tensor& input, std::initializer_list<std::pair<const Tensor*, const char*>> others, const Pointwise* conv) {
  check_tensor(input, "input", 4);
  check_floating(input, "input");
  const auto dense = [](const Tensor& t, std::initializer_list<int> order) {
    int64_t stride = 1;
    for (int d : order) {
      if (t.shape[d] != 1 && t.stride[d] != stride) return false;
      stride *= t.shape[d];
    }
    return true;
  };
  bool planar = true, last = true;
  const auto see = [&](const Tensor& t, const char* name) {
    check_cpu(t, name);
    check_dtype(t, name, input.dtype);
    PZ_CHECK(t.ndim == 4 && std::equal(t.shape, t.shape + 4, input.shape),
             std::string(name) + " must have shape " + input.shape_string() + ", got " + t.shape_string());
    planar = planar && dense(t, {3, 2, 1, 0});
    last = last && dense(t, {1, 3, 2, 0});
    PZ_CHECK(planar || last || t.numel() == 0, std::string(name) + " must be contiguous or channels_last, as the other maps are");
  };
  see(input, "input");
  for (const auto& [t, name] : others)
    if (t) see(*t, name);
  if (conv) return Blocks(input, false, kLeastBlocks);
  return Blocks(input, !last);
}

void check_channels(const Tensor& input, std::initializer_list<std::pair<const Tensor*, const char*>> tensors) {
  for (const auto& [t, name] : tensors) {
    check_cpu(*t, name);
    check_contiguous(*t, name);
    check_dtype(*t, name, input.dtype == DType::f64 ? DType::f64 : DType::f32);
    PZ_CHECK(t->ndim == 1 && t->shape[0] == input.shape[1], std::string(name) + " must have shape [C], got " + t->shape_string());
  }
}

// Statistics that follow those of the batches; the variance as an estimate for more than the batch.
struct Running {
  const Tensor &mean, &var;
  double momentum;
  template <class A>
  void move(const A* batch_mean, const A* batch_var, const Blocks& blocks) const {
    const double n = double(blocks.per_channel);
    for (int64_t c = 0; c < blocks.channels; ++c) {
      A &m = mean.ptr<A>()[c], &v = var.ptr<A>()[c];
      m = A(m + momentum * (double(batch_mean[c]) - m));
      v = A(v + momentum * (double(batch_var[c]) * n / (n - 1) - v));
    }
  }
};

void forward(const Pointwise* conv, const Tensor& input, const Tensor& weight, const Tensor& bias, const Tensor* residual,
             const Tensor& output, const Tensor& mean, const Tensor& var, const Running* running, double eps, int activation) {
  const Blocks blocks = checked(input, {{residual, "residual"}, {&output, "output"}}, conv);
  check_channels(input, {{&weight, "weight"}, {&bias, "bias"}, {&mean, "mean"}, {&var, "var"}});
  prefer_huge_pages(output.data, output.numel() * dtype_size(output.dtype));
  dispatch_sums(input.dtype, [&](auto zero) {
    using A = decltype(zero);
    if (blocks.numel == 0) {
      for (const Tensor* t : {&mean, &var}) std::fill_n(t->ptr<A>(), blocks.channels, A(0));
      return;
    }
    Scratch<A> means(size_t(blocks.places())), squares(size_t(blocks.places()));
    std::optional<Product> convolution;
    if (conv) convolution.emplace(*conv, true);
    blocks.each(
        [&](int64_t i) {
          const Block block = blocks[i];
          if (conv)
            (*convolution)(blocks.pixels_of(block), conv->input + blocks.first_pixel(block) * conv->inputs,
                           input.ptr<float>() + block.offset);
          with_storage<A>(input.dtype, [&](auto zero) {
            using T = decltype(zero);
            PZ_FOR_ISA_OF(T, template moments<T>)(input.ptr<T>(), block, blocks.planar, &means[blocks.place(i)], &squares[blocks.place(i)]);
          });
        },
        conv ? conv->inputs : 0);
    // Chan, Golub and LeVeque 1983: the sum of squares around the common mean.
    const double n = double(blocks.per_channel);
    std::vector<double> sum(size_t(blocks.channels)), square(size_t(blocks.channels));
    blocks.each_place([&](int64_t c, int64_t place, int64_t elements) { sum[c] += double(elements) * means[place]; });
    for (double& s : sum) s /= n;
    blocks.each_place([&](int64_t c, int64_t place, int64_t elements) {
      const double away = means[place] - sum[c];
      square[c] += squares[place] + double(elements) * away * away;
    });
    for (int64_t c = 0; c < blocks.channels; ++c) mean.ptr<A>()[c] = A(sum[c]), var.ptr<A>()[c] = A(square[c] / n);
    if (running) running->move(mean.ptr<A>(), var.ptr<A>(), blocks);

    const Scale<A> scale(blocks, mean.ptr<A>(), var.ptr<A>(), weight.ptr<A>(), bias.ptr<A>(), eps);
    const Bounds<A> bounds(activation);
    blocks.each([&](int64_t i) {
      with_storage<A>(input.dtype, [&](auto zero) {
        using T = decltype(zero);
        PZ_FOR_ISA_OF(T, template normalise<T>)(input.ptr<T>(), residual ? residual->ptr<T>() : nullptr, output.ptr<T>(), blocks[i],
                                                blocks.planar, scale, bounds);
      });
    });
  });
}

void backward(const Pointwise* conv, float* grad_conv_input, float* grad_conv_weight, const Tensor& grad_output, const Tensor& input,
              const Tensor& weight, const Tensor& bias, const Tensor* output, const Tensor& mean, const Tensor& var,
              const Tensor& grad_input, const Tensor& grad_weight, const Tensor& grad_bias, const Tensor* grad_residual, double eps,
              int activation) {
  PZ_CHECK(!output == !grad_residual, "output and grad_residual must be given both or neither");
  const Blocks blocks = checked(
      input, {{&grad_output, "grad_output"}, {output, "output"}, {&grad_input, "grad_input"}, {grad_residual, "grad_residual"}}, conv);
  check_channels(input, {{&weight, "weight"}, {&bias, "bias"}, {&mean, "mean"}, {&var, "var"}});
  check_channels(input, {{&grad_weight, "grad_weight"}, {&grad_bias, "grad_bias"}});
  for (const Tensor* t : {&grad_input, grad_residual})
    if (t && t->data != grad_output.data) prefer_huge_pages(t->data, t->numel() * dtype_size(t->dtype));
  dispatch_sums(input.dtype, [&](auto zero) {
    using A = decltype(zero);
    if (blocks.numel == 0) {
      for (const Tensor* t : {&grad_weight, &grad_bias}) std::fill_n(t->ptr<A>(), blocks.channels, A(0));
      if (grad_conv_weight) std::fill_n(grad_conv_weight, conv->outputs * conv->inputs, 0.0f);
      return;
    }
    const Scale<A> scale(blocks, mean.ptr<A>(), var.ptr<A>(), weight.ptr<A>(), bias.ptr<A>(), eps);
    Scratch<A> sums(size_t(blocks.places())), products(size_t(blocks.places()));
    blocks.each([&](int64_t i) {
      A *sum = &sums[blocks.place(i)], *product = &products[blocks.place(i)];
      with_storage<A>(input.dtype, [&](auto zero) {
        using T = decltype(zero);
        const T *x = input.ptr<T>(), *grad = grad_output.ptr<T>();
        if (output)
          PZ_FOR_ISA_OF(T, template open_and_sum<T>)(grad, x, output->ptr<T>(), grad_residual->ptr<T>(), blocks[i], blocks.planar, scale,
                                                     Bounds<A>(activation), sum, product);
        else PZ_FOR_ISA_OF(T, template sum_open<T>)(grad, x, blocks[i], blocks.planar, scale, Bounds<A>(activation), sum, product);
      });
    });
    std::vector<double> sum(size_t(blocks.channels)), product(size_t(blocks.channels));
    blocks.each_place([&](int64_t c, int64_t place, int64_t) { sum[c] += sums[place], product[c] += products[place]; });
    const double n = double(blocks.per_channel);
    std::vector<double> rstd(size_t(blocks.channels));
    for (int64_t c = 0; c < blocks.channels; ++c) {
      rstd[c] = 1 / std::sqrt(double(var.ptr<A>()[c]) + eps);
      grad_weight.ptr<A>()[c] = A(product[c] * rstd[c]);
      grad_bias.ptr<A>()[c] = A(sum[c]);
    }
    // grad_input = factor * (grad - mean(grad) - (x - mean) * rstd^2 * mean(grad * (x - mean))), Ioffe and Szegedy 2015, section 3
    const Columns<A> shift(blocks, [&](int64_t c) { return A(weight.ptr<A>()[c] * rstd[c] * sum[c] / n); });
    const Columns<A> slope(blocks, [&](int64_t c) { return A(weight.ptr<A>()[c] * rstd[c] * rstd[c] * rstd[c] * product[c] / n); });
    const Tensor& grad = grad_residual ? *grad_residual : grad_output;
    const Bounds<A> bounds(grad_residual ? 0 : activation);
    std::optional<Product> convolution;
    if (grad_conv_input) convolution.emplace(*conv, false);
    blocks.each(
        [&](int64_t i) {
          const Block block = blocks[i];
          with_storage<A>(input.dtype, [&](auto zero) {
            using T = decltype(zero);
            PZ_FOR_ISA_OF(T, template differentiate<T>)(grad.ptr<T>(), input.ptr<T>(), grad_input.ptr<T>(), block, blocks.planar, scale,
                                                        bounds, shift, slope);
          });
          if (grad_conv_input)
            (*convolution)(blocks.pixels_of(block), grad_input.ptr<float>() + block.offset,
                           grad_conv_input + blocks.first_pixel(block) * conv->inputs);
        },
        grad_conv_input ? conv->inputs : 0);
    if (grad_conv_weight) sum_outer(*conv, grad_input.ptr<float>(), blocks.per_channel, grad_conv_weight);
  });
}

std::optional<Running> checked_running(const Tensor& input, const Tensor* mean, const Tensor* var, double momentum) {
  PZ_CHECK(!mean == !var, "running_mean and running_var must be given both or neither");
  if (!mean) return std::nullopt;
  check_channels(input, {{mean, "running_mean"}, {var, "running_var"}});
  return Running{*mean, *var, momentum};
}

}  // namespace

void batch_norm_act_fwd_cpu(const Tensor& input, const Tensor& weight, const Tensor& bias, const Tensor* residual, const Tensor& output,
                            const Tensor& mean, const Tensor& var, const Tensor* running_mean, const Tensor* running_var, double momentum,
                            double eps, int activation) {
  const auto running = checked_running(input, running_mean, running_var, momentum);
  forward(nullptr, input, weight, bias, residual, output, mean, var, running ? &*running : nullptr, eps, activation);
}

void batch_norm_act_bwd_cpu(const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Tensor& bias, const Tensor* output,
                            const Tensor& mean, const Tensor& var, const Tensor& grad_input, const Tensor& grad_weight,
                            const Tensor& grad_bias, const Tensor* grad_residual, double eps, int activation) {
  backward(nullptr, nullptr, nullptr, grad_output, input, weight, bias, output, mean, var, grad_input, grad_weight, grad_bias,
           grad_residual, eps, activation);
}

void pointwise_bn_act_fwd_cpu(const Tensor& conv_input, const Tensor& conv_weight, const Tensor& input, const Tensor& weight,
                              const Tensor& bias, const Tensor* residual, const Tensor& output, const Tensor& mean, const Tensor& var,
                              const Tensor* running_mean, const Tensor* running_var, double momentum, double eps, int activation) {
  const Pointwise conv = checked_pointwise(conv_input, conv_weight, input);
  const auto running = checked_running(input, running_mean, running_var, momentum);
  forward(&conv, input, weight, bias, residual, output, mean, var, running ? &*running : nullptr, eps, activation);
}

void pointwise_bn_act_bwd_cpu(const Tensor& conv_input, const Tensor& conv_weight, const Tensor* grad_conv_input,
                              const Tensor* grad_conv_weight, const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                              const Tensor& bias, const Tensor* output, const Tensor& mean, const Tensor& var, const Tensor& grad_input,
                              const Tensor& grad_weight, const Tensor& grad_bias, const Tensor* grad_residual, double eps, int activation) {
  const Pointwise conv = checked_pointwise(conv_input, conv_weight, input);
  backward(&conv, grad_conv_input ? checked_like(*grad_conv_input, conv_input, "grad_conv_input") : nullptr,
           grad_conv_weight ? checked_like(*grad_conv_weight, conv_weight, "grad_conv_weight") : nullptr, grad_output, input, weight, bias,
           output, mean, var, grad_input, grad_weight, grad_bias, grad_residual, eps, activation);
}

}  // namespace pyzoo
