#include <algorithm>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "common/feature_map.h"
#include "common/memory.h"
#include "common/vec.h"
#include "spatial_pyramid_pool2d/spatial_pyramid_pool2d.h"
#include "spatial_pyramid_pool2d/spatial_pyramid_pool2d_geometry.h"

namespace pyzoo {

namespace {

struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

struct Bin {
  Span y, x;
};

// One level of the pyramid on a map of a given size.
struct Level {
  int64_t height, width;  // in bins
  int64_t first;          // bins of the levels before it
  std::vector<Span> y, x;
  int64_t bins() const { return height * width; }
  Bin bin(int64_t b) const { return {y[b / width], x[b % width]}; }
};

struct Pyramid {
  std::vector<Level> levels;
  int64_t bins = 0;  // of a channel

  Pyramid(const std::vector<int64_t>& sizes, int64_t height, int64_t width) {
    check(!sizes.empty() && sizes.size() % 2 == 0, "levels must be pairs of height and width");
    const auto cut = [](int64_t bins, int64_t size) {
      std::vector<Span> spans(static_cast<size_t>(bins));
      for (int64_t i = 0; i < bins; ++i) spans[i] = {bin_begin(i, bins, size), bin_end(i, bins, size)};
      return spans;
    };
    for (size_t i = 0; i < sizes.size(); i += 2) {
      const int64_t h = sizes[i], w = sizes[i + 1];
      check(h >= 1 && w >= 1 && h <= INT32_MAX && w <= INT32_MAX, "levels must be positive and below 2^31");
      levels.push_back({h, w, bins, cut(h, height), cut(w, width)});
      bins += h * w;
    }
  }
};

// Where a level is pooled from: the map, or a finer level whose bins make up its own.
struct Step {
  const Level* level;
  const Level* finer;  // null: the map
};

// A bin is the union of bins of any level that divides it evenly, as floor(i * H / h) = floor(i * k * H / (h * k)). The maximum does not
// mind that these may overlap by a pixel; the mean does.
std::vector<Step> plan_steps(const Pyramid& pyramid, int64_t height, int64_t width, bool average) {
  std::vector<Step> steps;
  for (const Level& level : pyramid.levels) steps.push_back({&level, nullptr});
  std::stable_sort(steps.begin(), steps.end(), [](const Step& a, const Step& b) { return a.level->bins() > b.level->bins(); });
  for (size_t i = 1; i < steps.size(); ++i)
    for (size_t j = 0; j < i; ++j) {
      const Level &level = *steps[i].level, &finer = *steps[j].level;
      if (average && (height % finer.height != 0 || width % finer.width != 0)) continue;
      if (finer.height % level.height == 0 && finer.width % level.width == 0) steps[i].finer = &finer;  // the coarsest one is kept
    }
  return steps;
}

enum class Mode { average, max, argmax };

}  // namespace

#define PZ_KERNEL "spatial_pyramid_pool2d/spatial_pyramid_pool2d_cpu.inc"
#include "common/foreach_isa.h"

namespace {

// output, grad_output and argmax: [N, C * bins], contiguous.
void check_features(const Tensor& t, const char* name, const FeatureMap& map, const Pyramid& pyramid) {
  check_tensor(t, name, 2);
  check_cpu(t, name);
  const int64_t features = map.channels * pyramid.bins;
  check(t.shape[0] == map.images && t.shape[1] == features,
        std::string(name) + " must have shape [N, C * bins], got " + t.shape_string());
  const bool rows = (t.stride[1] == 1 || features == 1) && (t.stride[0] == features || map.images == 1);
  check(rows || t.numel() == 0, std::string(name) + " must be contiguous");
}

}  // namespace

void spatial_pyramid_pool2d_fwd_cpu(const Tensor& input, const std::vector<int64_t>& levels, const Tensor& output, const Tensor* argmax,
                                    bool average) {
  const FeatureMap map(input, "input");
  const Pyramid pyramid(levels, map.height, map.width);
  check_features(output, "output", map, pyramid);
  check_dtype(output, "output", input.dtype);
  check(!average || !argmax, "a mean has no argmax");
  if (argmax) {
    check_features(*argmax, "argmax", map, pyramid);
    check_dtype(*argmax, "argmax", DType::i32);
  }
  if (output.numel() == 0) return;
  check(map.pixels() > 0, "input must have pixels, got shape " + input.shape_string());
  const std::vector<Step> steps = plan_steps(pyramid, map.height, map.width, average);
  int32_t* indices = argmax ? argmax->ptr<int32_t>() : nullptr;
  dispatch_floating(input.dtype, [&](auto zero) {
    using T = decltype(zero);
    PZ_FOR_ISA(template pool<T>)(map, pyramid, steps, average ? Mode::average : argmax ? Mode::argmax : Mode::max, output.ptr<T>(), indices);
  });
}

void spatial_pyramid_pool2d_bwd_cpu(const Tensor& grad_output, const Tensor* argmax, const std::vector<int64_t>& levels,
                                    const Tensor& grad_input) {
  const FeatureMap map(grad_input, "grad_input");
  map.check_written("grad_input");
  const Pyramid pyramid(levels, map.height, map.width);
  check_features(grad_output, "grad_output", map, pyramid);
  check_dtype(grad_output, "grad_output", grad_input.dtype);
  if (argmax) {
    check_features(*argmax, "argmax", map, pyramid);
    check_dtype(*argmax, "argmax", DType::i32);
  }
  if (grad_input.numel() == 0) return;
  prefer_huge_pages(grad_input.data, grad_input.numel() * dtype_size(grad_input.dtype));
  dispatch_floating(grad_input.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (argmax) {
      PZ_FOR_ISA(template scatter<T>)(map, pyramid, grad_output.ptr<const T>(), argmax->ptr<const int32_t>());
    } else {
      PZ_FOR_ISA(template spread<T>)(map, pyramid, grad_output.ptr<const T>());
    }
  });
}

}  // namespace pyzoo
