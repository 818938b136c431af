#include "pointwise/pointwise.h"

#include <algorithm>
#include <limits>

#include "common/feature_map.h"
#include "common/memory.h"
#include "common/vec.h"

namespace pyzoo {

namespace {

constexpr int64_t kPanel = 64;    // columns of the right matrix of a product that lie together
constexpr int64_t kDepth = 128;   // terms of one sum: few, for its rounding, and so many rows of a panel stay in the first-level cache
constexpr int64_t kPixels = 48;   // of one task: their part of kDepth inputs is in the first-level cache
constexpr int64_t kOutputs = 48;  // of a convolution, whose weights' gradients are one task

int64_t panels_size(int64_t depth, int64_t columns) { return ceil_div(columns, kPanel) * kPanel * depth; }

void check_numbers(const Tensor& t, int64_t count, const char* name) {
  check_cpu(t, name);
  check_contiguous(t, name);
  check_dtype(t, name, DType::f32);
  PZ_CHECK(t.ndim == 1 && t.shape[0] == count,
           std::string(name) + " must have shape [" + std::to_string(count) + "], got " + t.shape_string());
}

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

}  // namespace

#define PZ_KERNEL "pointwise/pointwise_cpu.inc"
#include "common/foreach_isa.h"

float* checked_like(const Tensor& t, const Tensor& like, const char* name) {
  float* data = checked_map(t, name);
  PZ_CHECK(std::equal(t.shape, t.shape + 4, like.shape),
           std::string(name) + " must have shape " + like.shape_string() + ", got " + t.shape_string());
  return data;
}

Pointwise checked_pointwise(const Tensor& input, const Tensor& weight, const Tensor& output) {
  const Pointwise conv{checked_map(input, "conv_input"), checked_map(weight, "conv_weight"), input.shape[1], weight.shape[0]};
  checked_map(output, "input");
  PZ_CHECK(input.shape[0] == output.shape[0] && input.shape[2] == output.shape[2] && input.shape[3] == output.shape[3],
           "conv_input must have the images and pixels of input, " + output.shape_string() + ", got " + input.shape_string());
  PZ_CHECK(conv.outputs == output.shape[1] && weight.shape[1] == conv.inputs && weight.shape[2] == 1 && weight.shape[3] == 1,
           "conv_weight must have shape [" + std::to_string(output.shape[1]) + ", " + std::to_string(conv.inputs) + ", 1, 1], got " +
               weight.shape_string());
  return conv;
}

namespace {

void fill_panels(const Pointwise& conv, bool turned, float* to) {
  const int64_t depth = turned ? conv.inputs : conv.outputs, columns = turned ? conv.outputs : conv.inputs;
  parallel_for(ceil_div(columns, kPanel), double(panels_size(depth, columns)), [&](int64_t p) {
    const int64_t first = p * kPanel, count = std::min(kPanel, columns - first);
    if (turned) PZ_FOR_ISA(pack_turned)(conv.weight + first * depth, depth, count, to + first * depth);
    else PZ_FOR_ISA(pack)(conv.weight + first, columns, depth, count, to + first * depth);
  });
}

}  // namespace

Product::Product(const Pointwise& conv, bool turned)
    : depth(turned ? conv.inputs : conv.outputs), columns(turned ? conv.outputs : conv.inputs) {
  static thread_local Scratch<float> scratch;
  float* to = room(scratch, panels_size(depth, columns));
  fill_panels(conv, turned, to);
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

int64_t pointwise_weight_size(int64_t outputs, int64_t inputs) { return panels_size(inputs, outputs); }

void pointwise_weight_cpu(const Tensor& weight, const Tensor& packed) {
  const Pointwise conv{nullptr, checked_map(weight, "weight"), weight.shape[1], weight.shape[0]};
  PZ_CHECK(weight.shape[2] == 1 && weight.shape[3] == 1, "weight must have shape [K, C, 1, 1], got " + weight.shape_string());
  check_numbers(packed, panels_size(conv.inputs, conv.outputs), "packed");
  fill_panels(conv, true, packed.ptr<float>());
}

void pointwise_conv_cpu(const Tensor& input, const Tensor& packed, const Tensor* bias, const Tensor* residual, const Tensor& output,
                        int activation) {
  const float* from = checked_map(input, "input");
  float* to = checked_map(output, "output");
  PZ_CHECK(input.shape[0] == output.shape[0] && input.shape[2] == output.shape[2] && input.shape[3] == output.shape[3],
           "output must have the images and pixels of input, " + input.shape_string() + ", got " + output.shape_string());
  const int64_t inputs = input.shape[1], outputs = output.shape[1], pixels = input.shape[0] * input.shape[2] * input.shape[3];
  check_numbers(packed, panels_size(inputs, outputs), "packed");
  if (bias) check_numbers(*bias, outputs, "bias");
  const float* add = residual ? checked_like(*residual, output, "residual") : nullptr;
  prefer_huge_pages(to, pixels * outputs * int64_t(sizeof(float)));
  parallel_for(ceil_div(pixels, kPixels), double(pixels) * double(outputs) * (1 + double(inputs) / 8), [&](int64_t task) {
    const int64_t first = task * kPixels, rows = std::min(kPixels, pixels - first);
    float* out = to + first * outputs;
    PZ_FOR_ISA(multiply)(rows, inputs, outputs, from + first * inputs, packed.ptr<float>(), out);
    PZ_FOR_ISA(finish)(rows, outputs, bias ? bias->ptr<float>() : nullptr, add ? add + first * outputs : nullptr, activation, out);
  });
}

}  // namespace pyzoo
