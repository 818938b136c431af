#include "pointwise/pointwise.h"

#include <algorithm>

#include "common/feature_map.h"
#include "common/memory.h"
#include "common/vec.h"

namespace pyzoo {

namespace {

constexpr int64_t kPanel = 64;    // columns of the right matrix of a product that lie together
constexpr int64_t kDepth = 128;   // terms of one sum: few, for its rounding, and so many rows of a panel stay in the first-level cache
constexpr int64_t kOutputs = 48;  // of a convolution, whose weights' gradients are one task

}  // namespace

#define PZ_KERNEL "pointwise/pointwise_cpu.inc"
#include "common/foreach_isa.h"

float* checked_map(const Tensor& t, const char* name) {
  check_tensor(t, name, 4);
  check_cpu(t, name);
  check_dtype(t, name, DType::f32);
  int64_t stride = 1;
  for (int d : {1, 3, 2, 0}) {
    PZ_CHECK(t.shape[d] == 1 || t.stride[d] == stride || t.numel() == 0, std::string(name) + " must be channels_last");
    stride *= t.shape[d];
  }
  return t.ptr<float>();
}

float* checked_like(const Tensor& t, const Tensor& like, const char* name) {
  float* data = checked_map(t, name);
  PZ_CHECK(std::equal(t.shape, t.shape + 4, like.shape),
           std::string(name) + " must have shape " + like.shape_string() + ", got " + t.shape_string());
  return data;
}

Pointwise::Pointwise(const Tensor& input, const Tensor& weight, const Tensor& output)
    : input(checked_map(input, "conv_input")),
      weight(checked_map(weight, "conv_weight")),
      inputs(input.shape[1]),
      outputs(weight.shape[0]) {
  checked_map(output, "input");
  PZ_CHECK(input.shape[0] == output.shape[0] && input.shape[2] == output.shape[2] && input.shape[3] == output.shape[3],
           "conv_input must have the images and pixels of input, " + output.shape_string() + ", got " + input.shape_string());
  PZ_CHECK(outputs == output.shape[1] && weight.shape[1] == inputs && weight.shape[2] == 1 && weight.shape[3] == 1,
           "conv_weight must have shape [" + std::to_string(output.shape[1]) + ", " + std::to_string(inputs) + ", 1, 1], got " +
               weight.shape_string());
}

Product::Product(const Pointwise& conv, bool turned)
    : depth(turned ? conv.inputs : conv.outputs), columns(turned ? conv.outputs : conv.inputs) {
  const int64_t count_panels = ceil_div(columns, kPanel);
  static thread_local Scratch<float> scratch;
  float* to = room(scratch, count_panels * depth * kPanel);
  parallel_for_equal(count_panels, double(count_panels) * double(depth) * kPanel, [&](int64_t p) {
    const int64_t first = p * kPanel, count = std::min(kPanel, columns - first);
    if (turned) PZ_FOR_ISA(pack_turned)(conv.weight + first * depth, depth, count, to + first * depth);
    else PZ_FOR_ISA(pack)(conv.weight + first, columns, depth, count, to + first * depth);
  });
  panels = to;
}

void Product::operator()(int64_t rows, const float* from, float* to) const { PZ_FOR_ISA(multiply)(rows, depth, columns, from, panels, to); }

// Where there are few weights, parts of the sum are tasks, too.
void sum_outer(const Pointwise& conv, const float* grad, int64_t pixels, float* grad_weight) {
  const int64_t groups = ceil_div(conv.outputs, kOutputs), tiles = groups * ceil_div(conv.inputs, kPanel);
  const int64_t parts = std::max<int64_t>(1, std::min(ceil_div(8, tiles), pixels / kDepth));
  const int64_t part = ceil_div(ceil_div(pixels, parts), kDepth) * kDepth, size = conv.outputs * conv.inputs;
  static thread_local Scratch<float> scratch;
  float* sums = parts == 1 ? nullptr : room(scratch, parts * size);
  parallel_for(parts * groups, double(pixels) * double(size) / 8, [&](int64_t task) {
    const int64_t p = task / groups, first = task % groups * kOutputs;
    PZ_FOR_ISA(multiply_turned)(std::min(pixels, p * part), std::min(pixels, (p + 1) * part), grad, conv.outputs, first,
                                std::min(kOutputs, conv.outputs - first), conv.input, conv.inputs,
                                parts == 1 ? grad_weight : sums + p * size);
  });
  if (parts == 1) return;
  for (int64_t i = 0; i < size; ++i) {
    float sum = sums[i];
    for (int64_t p = 1; p < parts; ++p) sum += sums[p * size + i];
    grad_weight[i] = sum;
  }
}

}  // namespace pyzoo
