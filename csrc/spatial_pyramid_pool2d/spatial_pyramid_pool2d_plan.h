// In what order the bins of a pyramid are made on the CPU: some of them of others, or of cells that several share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "common/feature_map.h"
#include "common/parallel.h"
#include "spatial_pyramid_pool2d/spatial_pyramid_pool2d_geometry.h"

namespace pyzoo::pyramid {

struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

struct Bin {
  Span y, x;
};

// How many members all pairs of a span of rows and one of columns have together.
inline int64_t covered_by(const std::vector<Span>& y, const std::vector<Span>& x) {
  const auto add_size = [](int64_t sum, const Span& span) { return sum + span.size(); };
  return std::accumulate(y.begin(), y.end(), int64_t(0), add_size) * std::accumulate(x.begin(), x.end(), int64_t(0), add_size);
}

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
    check_levels(sizes);
    const auto cut = [](int64_t bins, int64_t size) {
      std::vector<Span> spans(static_cast<size_t>(bins));
      for (int64_t i = 0; i < bins; ++i) spans[i] = {bin_begin(i, bins, size), bin_end(i, bins, size)};
      return spans;
    };
    levels.reserve(sizes.size() / 2);
    for (size_t i = 0; i < sizes.size(); i += 2) {
      const int64_t h = sizes[i], w = sizes[i + 1];
      levels.push_back({h, w, bins, cut(h, height), cut(w, width)});
      bins += h * w;
    }
  }
};

// A level, and where it is pooled from: the pixels of the map, or the bins of a finer level. Its rows of bins are made of the rows y of
// that, its columns of the columns x.
struct Step {
  const Level* level;
  const Level* finer;  // null: the map
  std::vector<Span> y, x;
  std::vector<double> shares{};  // of the mean: of what a bin is made of, in the value of the bin
};

// The runs of pixels that no border of a bin divides.
inline std::vector<Span> cut_between(const std::vector<const std::vector<Span>*>& axes) {
  std::vector<char> border(size_t(axes[0]->back().end) + 1);
  for (const std::vector<Span>* axis : axes)
    for (const Span& bin : *axis) border[size_t(bin.begin)] = border[size_t(bin.end)] = 1;
  std::vector<Span> spans;
  for (int64_t i = 1, begin = 0; i < int64_t(border.size()); ++i)
    if (border[size_t(i)]) spans.push_back({begin, i}), begin = i;
  return spans;
}

inline Level cut_cells(const std::vector<const Level*>& levels, int64_t first) {
  std::vector<const std::vector<Span>*> y, x;
  for (const Level* level : levels) y.push_back(&level->y), x.push_back(&level->x);
  Level cells{0, 0, first, cut_between(y), cut_between(x)};
  cells.height = int64_t(cells.y.size()), cells.width = int64_t(cells.x.size());
  return cells;
}

// The finer spans that make up each span: both are in ascending order, and the finer ones have a border wherever these have one.
inline std::vector<Span> in_terms_of(const std::vector<Span>& spans, const std::vector<Span>& finer) {
  std::vector<Span> out;
  for (const Span& span : spans) {
    const auto begins = [](const Span& a, int64_t at) { return a.begin < at; };
    const auto first = std::lower_bound(finer.begin(), finer.end(), span.begin, begins);
    out.push_back({first - finer.begin(), std::lower_bound(first, finer.end(), span.end, begins) - finer.begin()});
  }
  return out;
}

struct Plan {
  Level cells{};  // the pieces into which the bins of several levels cut the map
  std::vector<Step> steps;
  int64_t bins;                  // in the levels and cells together
  int64_t passes = 0, rows = 0;  // over the map: how often it is read, and into how many rows of bins

  Plan(const Pyramid& pyramid, const FeatureMap& map, bool average) : bins(pyramid.bins) {
    std::vector<const Level*> levels;
    for (const Level& level : pyramid.levels) levels.push_back(&level);
    std::stable_sort(levels.begin(), levels.end(), [](const Level* a, const Level* b) { return a->bins() > b->bins(); });
    steps.reserve(levels.size() + 1);
    for (const Level* level : levels) {
      const Level* finer = nullptr;
      for (const Step& step : steps) {  // the coarsest one is kept
        if (is_union(level->height, level->width, step.level->height, step.level->width, map, average)) finer = step.level;
      }
      if (finer) steps.push_back({level, finer, groups(finer->height, level->height), groups(finer->width, level->width)});
      else steps.push_back({level, nullptr, level->y, level->x});
    }
    share_cells(pyramid);
    for (Step& step : steps) {
      if (!step.finer) ++passes, rows += step.level->height;
      for (int64_t b = 0; average && b < step.level->bins(); ++b) step.shares.push_back(share(step, b));
    }
  }
  Plan(const Plan&) = delete;  // steps point to cells

  // Whether a level is made of the bins of another.
  bool is_nested(const Step& step) const { return step.finer && step.finer != &cells; }

 private:
  // Cells are sums; bins are means, of pixels or of the bins of a finer level.
  double share(const Step& step, int64_t b) const {
    if (step.level == &cells) return 1;
    const Level& level = *step.level;
    const Span &y = is_nested(step) ? step.y[b / level.width] : level.bin(b).y,
               &x = is_nested(step) ? step.x[b % level.width] : level.bin(b).x;
    return 1.0 / double(y.size() * x.size());
  }

  static std::vector<Span> groups(int64_t bins, int64_t count) {
    std::vector<Span> spans;
    for (int64_t i = 0; i < count; ++i) spans.push_back({i * (bins / count), (i + 1) * (bins / count)});
    return spans;
  }

  // Levels that do not divide each other: the coarser of them are made of cells, if that is less work, and only these are read from the
  // map.
  void share_cells(const Pyramid& pyramid) {
    constexpr int64_t kBin = 4;  // what starting and storing one costs, in additions
    int64_t gain = 0, passed = 0;
    std::vector<Step*> sharing;
    std::vector<const Level*> levels;
    size_t count = 0;                          // of steps that share, in the end
    for (size_t i = steps.size(); i-- > 0;) {  // the coarsest first
      if (steps[i].finer) continue;
      sharing.push_back(&steps[i]), levels.push_back(steps[i].level);
      passed += covered_by(steps[i].y, steps[i].x);
      const Level all = cut_cells(levels, pyramid.bins);
      int64_t work = covered_by(all.y, all.x) + kBin * all.bins();
      for (const Level* level : levels) work += covered_by(in_terms_of(level->y, all.y), in_terms_of(level->x, all.x));
      if (passed - work > gain) gain = passed - work, count = levels.size(), cells = all;
    }
    if (count == 0) return;
    for (size_t i = 0; i < count; ++i) {
      const Level& level = *levels[i];
      *sharing[i] = {&level, &cells, in_terms_of(level.y, cells.y), in_terms_of(level.x, cells.x)};
    }
    steps.insert(steps.begin(), {&cells, nullptr, cells.y, cells.x});
    bins += cells.bins();
  }
};

// For each cell, row by row, the bins that cover it.
struct Cover {
  Level cells;

  explicit Cover(const std::vector<const Level*>& levels) : cells(cut_cells(levels, 0)) {
    std::vector<std::vector<Span>> y, x;  // of each level: the bins over each cell
    for (const Level* level : levels) y.push_back(covering(level->y, cells.y)), x.push_back(covering(level->x, cells.x));
    first_.reserve(size_t(cells.bins()) + 1);
    for (int64_t cell = 0; cell < cells.bins(); ++cell) {
      first_.push_back(int64_t(bins_.size()));
      for (size_t l = 0; l < levels.size(); ++l) {
        const Span &rows = y[l][cell / cells.width], &columns = x[l][cell % cells.width];
        for (int64_t i = rows.begin; i < rows.end; ++i)
          for (int64_t j = columns.begin; j < columns.end; ++j) bins_.push_back(levels[l]->first + i * levels[l]->width + j);
      }
    }
    first_.push_back(int64_t(bins_.size()));
  }
  const int64_t* begin(int64_t cell) const { return bins_.data() + first_[cell]; }
  const int64_t* end(int64_t cell) const { return bins_.data() + first_[cell + 1]; }

 private:
  std::vector<int64_t> bins_, first_;  // bins of cell k: [first_[k], first_[k + 1])

  static std::vector<Span> covering(const std::vector<Span>& bins, const std::vector<Span>& cells) {
    std::vector<Span> spans;
    Span span{0, 0};
    for (const Span& cell : cells) {
      while (bins[span.begin].end <= cell.begin) ++span.begin;
      while (span.end < int64_t(bins.size()) && bins[span.end].begin < cell.end) ++span.end;
      spans.push_back(span);
    }
    return spans;
  }
};

// A pyramid over maps of one size. What a thread did last, it will do again: a network pools maps of one size, and a small one in less
// time than the plan takes.
struct Prepared {
  std::vector<int64_t> sizes;
  int64_t height, width;
  bool average;
  Pyramid pyramid;
  Plan plan;

  // By all bins of a mean; of a maximum, by those that are not made of others.
  const Cover& cover() const {
    if (!cover_) {
      std::vector<const Level*> levels;
      for (const Step& step : plan.steps)
        if (step.level != &plan.cells && (average || !plan.is_nested(step))) levels.push_back(step.level);
      cover_.emplace(levels);
    }
    return *cover_;
  }

  static const Prepared& of(const std::vector<int64_t>& sizes, const FeatureMap& map, bool average) {
    static thread_local std::unique_ptr<const Prepared> last;
    if (!last || last->sizes != sizes || last->height != map.height || last->width != map.width || last->average != average)
      last.reset(new Prepared(sizes, map, average));
    return *last;
  }

 private:
  mutable std::optional<Cover> cover_;

  Prepared(const std::vector<int64_t>& sizes, const FeatureMap& map, bool average)
      : sizes(sizes), height(map.height), width(map.width), average(average), pyramid(sizes, height, width), plan(pyramid, map, average) {}
};

// Channels to a task: long runs of memory or of lanes, but something to do for several threads.
inline int64_t block_width(const FeatureMap& map, int64_t most, double work) {
  while (work > kWorthAThread && most > 16 && map.images * map.channels < 4 * most) most /= 2;
  return most;
}

}  // namespace pyzoo::pyramid
