#include "nms/nms.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>

#include "common/vec.h"
#include "nms/nms_geometry.h"

namespace pyzoo {
namespace {

// Neither suppresses nor is suppressed at a threshold >= 0: its intersection with any box is 0, or its area is not finite, and
// the overlap is 0 or NaN.
template <class T>
bool is_inert(const Box<T>& b) {
  const T area = area_of(b);
  return !(b.x2 > b.x1 && b.y2 > b.y1 && area > 0 && area <= std::numeric_limits<T>::max());
}

// 64 kept boxes: exact, and as bytes for the filter.
template <class T>
struct alignas(64) Leaf {
  static constexpr int capacity = 64;
  uint8_t bytes[4][capacity];  // x1, y1, x2, y2 in steps of the grid, modulo 256
  T x1[capacity], y1[capacity], x2[capacity], y2[capacity], area[capacity];
  int32_t size, next;
};

// What an overlap must be above; and a little less, to tell most overlaps that are not by a product instead of a quotient. Rounding is
// monotonic, so intersection < low * union, computed, implies that the quotient, computed, is not above; but for thresholds near the
// least T, where rounding is coarse, and for negative ones, where areas may be anything: there low is NaN, which tells nothing.
template <class T>
struct Threshold {
  T exact, low;

  explicit Threshold(double x) : exact(round_down<T>(x)), low(x > 1e-30 ? T(x * (1 - 1e-5)) : std::numeric_limits<T>::quiet_NaN()) {}
};

// Uninitialised memory.
template <class T>
using Array = std::unique_ptr<T[]>;
template <class T>
Array<T> allocate(int64_t n) {
  return Array<T>(new T[n]);
}

// What the walk over n boxes needs; used again for the next group of boxes.
template <class T>
struct WalkMemory {
  Array<Leaf<T>> leaves;
  Array<int32_t> heads;
  int64_t capacity = -1;

  void reserve(int64_t n) {
    if (n <= capacity) return;
    // Full leaves, and one that is not for each tile, of which there are fewer than boxes / 64: see KeptIndex::refine.
    leaves = allocate<Leaf<T>>(n / 32 + 2);
    heads = allocate<int32_t>(n / 64 + 4);
    capacity = n;
  }
};

}  // namespace

#define PZ_KERNEL "nms/nms_cpu.inc"
#include "common/foreach_isa.h"

namespace {

template <class K>
struct Keyed {
  K key;
  uint32_t index;
  bool operator<(const Keyed& other) const { return key != other.key ? key < other.key : index < other.index; }
};

// Sorts by key, equal keys by index; the indices must come ascending. By the leading of the bits that vary first, which leaves little to
// sort behind them.
template <class K>
void sort_keys(Keyed<K>* items, int64_t n) {
  if (n < 128) return std::sort(items, items + n);
  K varying = 0;
  for (int64_t i = 0; i < n; ++i) varying |= items[i].key ^ items[0].key;
  if (!varying) return;
  const int bits = n < 512 ? 8 : n < 4096 ? 10 : 11, rounds = n < 4096 ? 2 : 3;
  const int lowest = __builtin_ctzll(varying), first = std::max(lowest, 64 - __builtin_clzll(varying) - rounds * bits);
  const uint32_t buckets = 1u << bits;
  const Array<Keyed<K>> spare = allocate<Keyed<K>>(n);
  Keyed<K>*from = items, *to = spare.get();
  std::vector<uint32_t> begins(size_t(rounds) * buckets);  // of all rounds, counted in one walk
  for (int64_t i = 0; i < n; ++i)
    for (int round = 0; round < rounds; ++round) ++begins[round * buckets + (items[i].key >> first >> round * bits & (buckets - 1))];
  for (int round = 0; round < rounds; ++round) {
    const int shift = first + round * bits;
    if (shift >= int(8 * sizeof(K)) || !(varying >> shift & (buckets - 1))) continue;
    uint32_t *begin = begins.data() + round * buckets, sum = 0;
    for (uint32_t b = 0; b < buckets; ++b) sum += std::exchange(begin[b], sum);
    for (int64_t i = 0; i < n; ++i) to[begin[from[i].key >> shift & (buckets - 1)]++] = from[i];
    std::swap(from, to);
  }
  if (first > lowest) {
    for (int64_t i = 0, end; i < n; i = end) {
      for (end = i + 1; end < n && !((from[i].key ^ from[end].key) >> first);) ++end;
      if (end > i + 1 && !std::is_sorted(from + i, from + end)) std::sort(from + i, from + end);
    }
  }
  if (from != items) std::copy(from, from + n, items);
}

template <class T>
class Nms {
 public:
  Nms(const Tensor& boxes, const Tensor& scores, const Tensor* idxs, double threshold, const Tensor& keep, bool shift_classes)
      : boxes_(boxes),
        scores_(scores),
        idxs_(idxs),
        keep_(keep),
        threshold_(threshold),
        shift_(idxs && shift_classes),
        dim_(boxes.ndim - 2),
        batch_(dim_ ? boxes.shape[0] : 1),
        n_(boxes.shape[dim_]),
        limit_(keep.shape[dim_]) {}

  std::vector<int64_t> run() {
    const int64_t total = batch_ * n_;
    order_ = allocate<uint32_t>(total);
    sorted_ = allocate<Box<T>>(total);
    kept_ = allocate<uint8_t>(total);
    if (idxs_) rank_ = allocate<uint32_t>(total);

    std::vector<std::vector<Group>> groups(batch_);
    parallel_for(batch_, total * 10.0, [&](int64_t b) {
      if (scores_.dtype == DType::f64) {
        sort_scores<double>(b);
      } else {
        sort_scores<float>(b);
      }
      groups[b] = idxs_ ? group(b) : std::vector<Group>{{b * n_, (b + 1) * n_}};
    });
    constexpr int64_t kPiece = 2048;
    const int64_t pieces = (n_ + kPiece - 1) / kPiece;
    parallel_for(batch_ * pieces, total * 1.0, [&](int64_t i) {
      const int64_t begin = i % pieces * kPiece;
      gather(i / pieces, begin, std::min(n_, begin + kPiece));
    });
    if (shift_) parallel_for(batch_, total * 1.0, [&](int64_t b) { shift(b, groups[b]); });
    solve(groups);

    std::vector<int64_t> counts(batch_);
    parallel_for(batch_, total * 1.0, [&](int64_t b) { counts[b] = emit(b); });
    return counts;
  }

 private:
  struct Group {  // of boxes that can suppress each other: a range of sorted_
    int64_t begin, end;
  };

  int64_t offset(const Tensor& t, int64_t b) const { return dim_ ? b * t.stride[0] : 0; }

  template <class S>
  void sort_scores(int64_t b) {
    using Item = Keyed<decltype(descending_key(S{}))>;
    const Array<Item> items = allocate<Item>(n_);
    dispatch_floating(scores_.dtype, [&](auto tag) {
      const auto* scores = scores_.ptr<decltype(tag)>() + offset(scores_, b);
      const int64_t stride = scores_.stride[dim_];
      for (int64_t i = 0; i < n_; ++i) items[i] = {descending_key(S(to_float(scores[i * stride]))), uint32_t(i)};
    });
    sort_keys(items.get(), n_);
    for (int64_t i = 0; i < n_; ++i) order_[b * n_ + i] = items[i].index;
  }

  // Brings the boxes of one class together, in score order, and returns where each class lies.
  std::vector<Group> group(int64_t b) {
    constexpr uint64_t kFewClasses = 4096;
    const int64_t *idxs = idxs_->ptr<int64_t>() + offset(*idxs_, b), stride = idxs_->stride[dim_];
    const uint32_t* order = order_.get() + b * n_;
    uint32_t* rank = rank_.get() + b * n_;
    std::vector<Group> groups;
    if (n_ == 0) return groups;
    int64_t least = idxs[0], most = idxs[0];
    for (int64_t i = 0; i < n_; ++i) least = std::min(least, idxs[i * stride]), most = std::max(most, idxs[i * stride]);
    if (const uint64_t range = uint64_t(most) - uint64_t(least); range < kFewClasses) {
      const Array<uint16_t> classes = allocate<uint16_t>(n_);
      std::vector<uint32_t> begin(range + 1);
      for (int64_t i = 0; i < n_; ++i) ++begin[classes[i] = uint16_t(idxs[order[i] * stride] - least)];
      uint32_t sum = 0;
      for (uint32_t& count : begin) {
        if (count > 0) groups.push_back({b * n_ + sum, b * n_ + sum + count});
        sum += std::exchange(count, sum);
      }
      for (int64_t i = 0; i < n_; ++i) rank[begin[classes[i]]++] = uint32_t(i);
      return groups;
    }
    const Array<Keyed<uint64_t>> items = allocate<Keyed<uint64_t>>(n_);
    for (int64_t i = 0; i < n_; ++i) items[i] = {uint64_t(idxs[order[i] * stride]) ^ uint64_t(1) << 63, uint32_t(i)};
    sort_keys(items.get(), n_);
    for (int64_t i = 0; i < n_; ++i) {
      rank[i] = items[i].index;
      if (i == 0 || items[i].key != items[i - 1].key) groups.push_back({b * n_ + i, 0});
      groups.back().end = b * n_ + i + 1;
    }
    return groups;
  }

  void gather(int64_t b, int64_t begin, int64_t end) {
    const int64_t row = boxes_.stride[dim_], column = boxes_.stride[dim_ + 1];
    dispatch_floating(boxes_.dtype, [&](auto tag) {
      const auto* boxes = boxes_.ptr<decltype(tag)>() + offset(boxes_, b);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t rank = rank_ ? rank_[b * n_ + i] : i;
        const auto* box = boxes + row * order_[b * n_ + rank];
        const auto coordinate = [&](int64_t k) { return T(to_float(box[k * column])); };
        sorted_[b * n_ + i] = {coordinate(0), coordinate(1), coordinate(2), coordinate(3)};
      }
    });
  }

  // What torchvision does to separate classes, rounding included. Where that leaves two of them in touch, they become one group.
  void shift(int64_t b, std::vector<Group>& groups) {
    move_classes(b);
    if (threshold_ >= 0 && are_apart(groups)) return;
    groups = {{b * n_, (b + 1) * n_}};
    for (int64_t i = 0; i < n_; ++i) rank_[b * n_ + i] = uint32_t(i);
    gather(b, 0, n_);
    move_classes(b);
  }

  void move_classes(int64_t b) {
    Box<T>* boxes = sorted_.get() + b * n_;
    const auto raise = [](T& largest, T x) {
      if (x > largest || x != x) largest = x;  // NaN stays
    };
    T largest = -std::numeric_limits<T>::infinity();
    Box<T> most = {largest, largest, largest, largest};  // four, so that they need not wait for each other
    for (int64_t i = 0; i < n_; ++i)
      raise(most.x1, boxes[i].x1), raise(most.y1, boxes[i].y1), raise(most.x2, boxes[i].x2), raise(most.y2, boxes[i].y2);
    for (T x : {most.x1, most.y1, most.x2, most.y2}) raise(largest, x);
    const int64_t* idxs = idxs_->ptr<int64_t>() + offset(*idxs_, b);
    for (int64_t i = 0; i < n_; ++i) {
      const T by = T(idxs[order_[b * n_ + rank_[b * n_ + i]] * idxs_->stride[dim_]]) * (largest + T(1));
      boxes[i] = {boxes[i].x1 + by, boxes[i].y1 + by, boxes[i].x2 + by, boxes[i].y2 + by};
    }
  }

  // Whether no box reaches, from left to right, into the boxes of the groups before its own: their intersection is 0 then.
  bool are_apart(const std::vector<Group>& groups) const {
    T reached = -std::numeric_limits<T>::infinity();
    for (const Group& g : groups) {
      T most = reached;
      for (int64_t i = g.begin; i < g.end; ++i) {
        const Box<T>& box = sorted_[i];
        if (!(box.x1 >= reached && box.x2 >= reached)) return false;  // NaN is not, either
        most = std::max(most, std::max(box.x1, box.x2));
      }
      reached = most;
    }
    return true;
  }

  // Groups are independent. One with more than a thread's share of the boxes is solved by all threads, the others side by side.
  void solve(const std::vector<std::vector<Group>>& groups_of_entries) {
    const int64_t total = batch_ * n_, threads = max_threads();
    const double work = total * 20.0;
    const int64_t span = work > kWorthAThread ? total / (8 * threads) + 1 : total;
    std::vector<std::pair<Group, int64_t>> tasks;  // with the number of boxes to keep
    std::vector<size_t> spans = {0};               // the first task of each
    WalkMemory<T> memory;
    int64_t size = 0;
    for (const std::vector<Group>& groups : groups_of_entries) {
      for (const Group& g : groups) {
        const int64_t n = g.end - g.begin, limit = groups.size() == 1 ? limit_ : n;
        if (n > total / threads) {
          solve_group(g, limit, memory);
          continue;
        }
        tasks.emplace_back(g, limit);
        if ((size += n) >= span) spans.push_back(tasks.size()), size = 0;
      }
    }
    if (spans.back() != tasks.size()) spans.push_back(tasks.size());
    parallel_for(spans.size() - 1, work, [&](int64_t i) {
      WalkMemory<T> memory;
      for (size_t k = spans[i]; k < spans[i + 1]; ++k) solve_group(tasks[k].first, tasks[k].second, memory);
    });
  }

  void solve_group(const Group& g, int64_t limit, WalkMemory<T>& memory) {
    const Box<T>* boxes = sorted_.get() + g.begin;
    uint8_t* kept = kept_.get() + g.begin;
    const int64_t n = g.end - g.begin;
    if (limit == 0) return;
    if (threshold_ >= 1 || threshold_ != threshold_) {  // no overlap is above 1
      std::fill(kept, kept + n, 1);
    } else {
      PZ_FOR_ISA(walk<T>)(boxes, n, threshold_, limit, memory, kept);
    }
  }

  int64_t emit(int64_t b) {
    const uint8_t* kept = kept_.get() + b * n_;
    Array<uint8_t> by_rank;
    if (rank_) {
      by_rank = allocate<uint8_t>(n_);
      for (int64_t i = 0; i < n_; ++i) by_rank[rank_[b * n_ + i]] = kept[i];
      kept = by_rank.get();
    }
    int64_t* out = keep_.ptr<int64_t>() + offset(keep_, b);
    const int64_t stride = keep_.stride[dim_];
    int64_t count = 0;
    for (int64_t i = 0; i < n_ && count < limit_; ++i)
      if (kept[i]) out[count++ * stride] = order_[b * n_ + i];
    for (int64_t i = count; i < limit_; ++i) out[i * stride] = -1;
    return count;
  }

  const Tensor &boxes_, &scores_;
  const Tensor* idxs_;
  const Tensor& keep_;
  double threshold_;
  bool shift_;
  int dim_;  // of the boxes in every tensor: 1 behind a batch dimension, else 0
  int64_t batch_, n_, limit_;
  Array<uint32_t> order_;  // box index by rank
  Array<uint32_t> rank_;   // rank by place in sorted_; null: the same
  Array<Box<T>> sorted_;   // by class, then rank
  Array<uint8_t> kept_;    // by place in sorted_
};

}  // namespace

std::vector<int64_t> nms_cpu(const Tensor& boxes, const Tensor& scores, const Tensor* idxs, double iou_threshold, const Tensor& keep,
                             bool shift_classes) {
  check_nms(boxes, scores, idxs, keep, DeviceType::cpu);
  if (boxes.dtype == DType::f64) return Nms<double>(boxes, scores, idxs, iou_threshold, keep, shift_classes).run();
  return Nms<float>(boxes, scores, idxs, iou_threshold, keep, shift_classes).run();
}

}  // namespace pyzoo
