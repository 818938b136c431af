// The boxes are sorted by counting: the rank of a box is the number of boxes that come before it by score, its place that number when
// classes, where they are compared, come before scores. Places are then taken in chunks. Which boxes of a chunk suppress which of it is
// a matrix of bits; one block walks over the chunk and decides which are kept; and with those all boxes after the chunk are compared, for
// which no bits are stored. Nobody waits for the host, and a box takes kChunk bits of memory, however many there are.
#include "common/cuda.cuh"
#include "nms/nms.h"
#include "nms/nms_geometry.h"

namespace pyzoo {

namespace {

constexpr int kThreads = 256;
constexpr int kWalk = 1024;   // boxes that the walk decides on at a time, and its threads
constexpr int kChunk = 4096;  // boxes
constexpr int kPart = 512;    // kept boxes that one block compares others with
constexpr int kWalkWords = kWalk / kWarp;

struct Strided {  // of B entries
  const void* data;
  DType dtype;
  int64_t batch, row, column;

  template <class T>
  __device__ T at(int64_t entry, int64_t i, int64_t k = 0) const {
    return load_as<T>(data, dtype, entry * batch + i * row + k * column);
  }
  __device__ int64_t class_at(int64_t entry, int64_t i) const {
    const int64_t at = entry * batch + i * row;
    return is_floating(dtype) ? int64_t(load_as<double>(data, dtype, at)) : static_cast<const int64_t*>(data)[at];
  }
};

// What is kept between the kernels, for each of B entries of n boxes.
template <class T>
struct Sorted {
  int64_t n;
  uint64_t* keys;         // of the scores
  int64_t* classes;       // of the boxes; null where they are not compared
  int64_t* classes_at;    // at each place
  int32_t *rank, *place;  // of a box; the same where classes are not compared
  int32_t* order;         // the box of each rank
  int32_t* rank_at;       // the rank at each place
  Box<T>* boxes;          // at each place
  uint8_t* dead;          // at each place: known to be suppressed
  uint8_t* kept;          // by rank
  int32_t* places;        // of the kept boxes, ascending
};

// --------------------------------------------------------------------------------------------------------------- sorting

template <class T>
__global__ void __launch_bounds__(kThreads) nms_key_kernel(Sorted<T> s, Strided scores, Strided idxs, int64_t total) {
  for_each_element(total, [&](int64_t i) {
    const int64_t entry = i / s.n, box = i % s.n;
    s.keys[i] = scores.dtype == DType::f64 ? descending_key(scores.at<double>(entry, box)) : descending_key(scores.at<float>(entry, box));
    if (s.classes) s.classes[i] = idxs.class_at(entry, box), s.place[i] = 0;
    s.rank[i] = 0;
  });
}

// Counts, for kThreads boxes, those of one part of all boxes that come before.
template <class T>
__global__ void __launch_bounds__(kThreads) nms_rank_kernel(Sorted<T> s, int tiles, int parts) {
  __shared__ Shared<uint64_t, kThreads> keys;
  __shared__ Shared<int64_t, kThreads> classes;
  const int part = blockIdx.x % parts, tile = blockIdx.x / parts % tiles;
  const int64_t first = int64_t(blockIdx.x) / parts / tiles * s.n, i = int64_t(tile) * kThreads + threadIdx.x;
  const uint64_t key = i < s.n ? s.keys[first + i] : 0;
  const int64_t its_class = s.classes && i < s.n ? s.classes[first + i] : 0;
  int rank = 0, place = 0;
  for (int64_t j0 = int64_t(part) * kThreads; j0 < s.n; j0 += int64_t(parts) * kThreads) {
    const int64_t count = s.n - j0 < kThreads ? s.n - j0 : kThreads;
    if (int(threadIdx.x) < count) {
      keys(threadIdx.x) = s.keys[first + j0 + threadIdx.x];
      if (s.classes) classes(threadIdx.x) = s.classes[first + j0 + threadIdx.x];
    }
    __syncthreads();
    for (int t = 0; t < count; ++t) {
      const uint64_t other = keys(t);
      const bool before = other < key || (other == key && j0 + t < i);
      rank += before;
      if (s.classes) {
        const int64_t other_class = classes(t);
        place += other_class < its_class || (other_class == its_class && before);
      }
    }
    __syncthreads();
  }
  if (i >= s.n) return;
  atomicAdd(s.rank + first + i, rank);
  if (s.classes) atomicAdd(s.place + first + i, place);
}

template <class T>
__device__ T larger(T a, T b) {
  return a != a || a > b ? a : b;  // NaN stays
}

template <class T>
__global__ void __launch_bounds__(kThreads) nms_largest_kernel(Strided boxes, int64_t n, T* largest) {
  __shared__ Shared<T, kThreads> of_thread;
  T most = -std::numeric_limits<T>::infinity();
  for (int64_t i = threadIdx.x; i < 4 * n; i += kThreads) most = larger(boxes.at<T>(blockIdx.x, i / 4, i % 4), most);
  of_thread(threadIdx.x) = most;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) of_thread(threadIdx.x) = larger<T>(of_thread(threadIdx.x), of_thread(threadIdx.x + half));
  }
  if (threadIdx.x == 0) largest[blockIdx.x] = of_thread(0);
}

template <class T>
__global__ void __launch_bounds__(kThreads) nms_gather_kernel(Sorted<T> s, Strided boxes, Strided idxs, const T* largest, int64_t total) {
  for_each_element(total, [&](int64_t i) {
    const int64_t entry = i / s.n, box = i % s.n, first = i - box;
    const int64_t rank = s.rank[i], place = s.place[i];
    Box<T> b = {boxes.at<T>(entry, box, 0), boxes.at<T>(entry, box, 1), boxes.at<T>(entry, box, 2), boxes.at<T>(entry, box, 3)};
    if (largest) {  // what torchvision does to separate classes, rounding included
      const T by = T(idxs.class_at(entry, box)) * (largest[entry] + T(1));
      b = {b.x1 + by, b.y1 + by, b.x2 + by, b.y2 + by};
    }
    s.boxes[first + place] = b;
    s.order[first + rank] = int32_t(box);
    s.rank_at[first + place] = int32_t(rank);
    if (s.classes) s.classes_at[first + place] = s.classes[i];
    s.dead[i] = s.kept[i] = 0;
  });
}

// ----------------------------------------------------------------------------------------------------------- suppression

// mask [B, words, chunk]: bit b of word w for box j of the chunk that box 32 * w is in: whether box 32 * w + b < j, if kept, suppresses j.
template <class T>
__global__ void __launch_bounds__(kThreads) nms_mask_kernel(Sorted<T> s, int64_t words, int chunk, T threshold, uint32_t* mask) {
  __shared__ Shared<Box<T>, kWarp> boxes;
  __shared__ Shared<T, kWarp> areas;
  __shared__ Shared<int64_t, kWarp> classes;
  const int tiles = chunk / kThreads;
  const int64_t word = int64_t(blockIdx.x) / tiles % words, entry = int64_t(blockIdx.x) / tiles / words;
  const int64_t i0 = word * kWarp, j0 = i0 / chunk * chunk + int64_t(blockIdx.x) % tiles * kThreads;
  if (j0 >= s.n || j0 + kThreads <= i0) return;  // no such boxes, or all before: nobody will look
  const int64_t first = entry * s.n, j = j0 + threadIdx.x;
  const int count = int(s.n - i0 < kWarp ? s.n - i0 : kWarp);
  if (int(threadIdx.x) < count) {
    const Box<T> box = s.boxes[first + i0 + threadIdx.x];
    boxes(threadIdx.x) = box;
    areas(threadIdx.x) = area_of(box);
    if (s.classes) classes(threadIdx.x) = s.classes_at[first + i0 + threadIdx.x];
  }
  __syncthreads();
  if (j >= s.n) return;
  const Box<T> box = s.boxes[first + j];
  const T area = area_of(box);
  const int64_t its_class = s.classes ? s.classes_at[first + j] : 0;
  uint32_t bits = 0;
  for (int b = 0; b < count && i0 + b < j; ++b) {
    if (s.classes && int64_t(classes(b)) != its_class) continue;
    bits |= uint32_t(suppresses<T>(boxes(b), areas(b), box, area, threshold)) << b;
  }
  mask[(entry * words + word) * chunk + j % chunk] = bits;
}

// Decides on the boxes of a chunk, one block for each entry. counts [B, chunks + 1]: how many are kept before each chunk.
template <class T>
__global__ void __launch_bounds__(kWalk) nms_walk_kernel(Sorted<T> s, const uint32_t* mask, int64_t words, int chunk, int64_t number,
                                                         int64_t chunks, int64_t limit, int32_t* counts) {
  __shared__ Shared<uint32_t, kChunk / kWarp> kept_words;
  __shared__ Shared<int, kWalkWords> kept_before;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first = int64_t(blockIdx.x) * s.n, begin = number * chunk;
  counts += blockIdx.x * (chunks + 1) + number;
  mask += (blockIdx.x * words + begin / kWarp) * chunk;
  int count = number > 0 ? counts[0] : 0;
  const int64_t rest = s.n - begin;
  const int size = count >= limit ? 0 : int(rest < chunk ? rest : chunk);
  for (int j0 = 0; j0 < size; j0 += kWalk) {
    const int j = j0 + threadIdx.x;
    // Against what is kept of the boxes before these ...
    bool alive = j < size && !s.dead[first + begin + j];
    for (int w = 0; w < j0 / kWarp; ++w) {
      const uint32_t kept = kept_words(w);
      if (kept && alive) alive = !(mask[int64_t(w) * chunk + j] & kept);
    }
    // ... and among these: a box is kept if no kept box suppresses it. Starting from all, what holds for the first t boxes of a chain of
    // suppressions is right after t rounds; few chains are longer than three.
    bool now = alive;
    int changed;
    do {
      const uint32_t word = __ballot_sync(kAllLanes, now);
      if (lane == 0) kept_words(j0 / kWarp + warp) = word;
      __syncthreads();
      bool then = alive;
      for (int w = 0; w <= warp; ++w) {
        const uint32_t kept = kept_words(j0 / kWarp + w);
        if (kept && then) then = !(mask[int64_t(j0 / kWarp + w) * chunk + j] & kept);
      }
      changed = __syncthreads_or(then != now);
      now = then;
    } while (changed);
    // kept_words hold what is kept of these now.
    const uint32_t word = kept_words(j0 / kWarp + warp);
    if (lane == 0) kept_before(warp) = __popc(word);
    __syncthreads();
    int position = count, all = 0;
    for (int w = 0; w < kWalkWords; ++w) {
      const int of_word = kept_before(w);
      if (w < warp) position += of_word;
      all += of_word;
    }
    if (now) {
      s.places[first + position + __popc(word & ((1u << lane) - 1))] = int32_t(begin + j);
      s.kept[first + s.rank_at[first + begin + j]] = 1;
    }
    count += all;
  }
  if (threadIdx.x > 0) return;
  if (number == 0) counts[0] = 0;
  counts[1] = count;
}

// Compares the boxes after a chunk with some of those kept in it.
template <class T>
__global__ void __launch_bounds__(kThreads) nms_apply_kernel(Sorted<T> s, T threshold, int64_t begin, int tiles, int parts, int64_t number,
                                                             int64_t chunks, int64_t limit, const int32_t* counts) {
  __shared__ Shared<Box<T>, kWarp> boxes;
  __shared__ Shared<T, kWarp> areas;
  __shared__ Shared<int64_t, kWarp> classes;
  const int part = blockIdx.x % parts, tile = blockIdx.x / parts % tiles;
  const int64_t entry = int64_t(blockIdx.x) / parts / tiles, first = entry * s.n;
  counts += entry * (chunks + 1) + number;
  const int64_t from = counts[0] + int64_t(part) * kPart, all = counts[1], to = all < from + kPart ? all : from + kPart;
  if (all >= limit || from >= to) return;
  const int64_t j = begin + int64_t(tile) * kThreads + threadIdx.x;
  if (s.classes && s.classes_at[first + s.places[first + to - 1]] < s.classes_at[first + begin + int64_t(tile) * kThreads]) return;
  const Box<T> box = j < s.n ? s.boxes[first + j] : Box<T>{};
  const T area = area_of(box);
  const int64_t its_class = s.classes && j < s.n ? s.classes_at[first + j] : 0;
  bool dead = j >= s.n || s.dead[first + j];
  for (int64_t k0 = from; k0 < to; k0 += kWarp) {
    const int count = int(to - k0 < kWarp ? to - k0 : kWarp);
    if (int(threadIdx.x) < count) {
      const int64_t place = first + s.places[first + k0 + threadIdx.x];
      const Box<T> kept = s.boxes[place];
      boxes(threadIdx.x) = kept;
      areas(threadIdx.x) = area_of(kept);
      if (s.classes) classes(threadIdx.x) = s.classes_at[place];
    }
    __syncthreads();
    for (int k = 0; k < count && !dead; ++k)
      if (!s.classes || int64_t(classes(k)) == its_class) dead = suppresses<T>(boxes(k), areas(k), box, area, threshold);
    if (!__syncthreads_or(!dead)) break;
  }
  if (dead && j < s.n) s.dead[first + j] = 1;  // blocks that find the same box write the same
}

// keep [B, limit]: the kept boxes by rank, then -1.
template <class T>
__global__ void __launch_bounds__(kWalk)
    nms_emit_kernel(Sorted<T> s, int64_t limit, int64_t* keep, int64_t batch_stride, int64_t stride, int64_t* number) {
  __shared__ Shared<int, kWalkWords> of_warp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first = int64_t(blockIdx.x) * s.n;
  keep += blockIdx.x * batch_stride;
  int64_t count = 0;
  for (int64_t r0 = 0; r0 < s.n && count < limit; r0 += kWalk) {
    const int64_t r = r0 + threadIdx.x;
    const bool kept = r < s.n && s.kept[first + r];
    const uint32_t word = __ballot_sync(kAllLanes, kept);
    if (lane == 0) of_warp(warp) = __popc(word);
    __syncthreads();
    int64_t position = count + __popc(word & ((1u << lane) - 1));
    for (int w = 0; w < kWalkWords; ++w) {
      const int some = of_warp(w);
      if (w < warp) position += some;
      count += some;
    }
    if (kept && position < limit) keep[position * stride] = s.order[first + r];
    __syncthreads();
  }
  if (count > limit) count = limit;
  for (int64_t k = count + threadIdx.x; k < limit; k += kWalk) keep[k * stride] = -1;
  if (threadIdx.x == 0) number[blockIdx.x] = count;
}

// -------------------------------------------------------------------------------------------------------------- launches

template <class T>
void run(const Tensor& boxes, const Tensor& scores, const Tensor* idxs, double iou_threshold, const Tensor& keep, bool shift_classes,
         const Tensor& count) {
  const int dim = boxes.ndim - 2;  // of the boxes in every tensor: 1 behind a batch dimension, else 0
  const int64_t batch = dim ? boxes.shape[0] : 1, n = boxes.shape[dim], limit = keep.shape[dim], total = batch * n;
  const auto strided = [&](const Tensor& t) {
    return Strided{t.data, t.dtype, dim ? t.stride[0] : 0, t.stride[dim], t.ndim > dim + 1 ? t.stride[dim + 1] : 0};
  };
  const Strided from = strided(boxes), score = strided(scores), its_class = idxs ? strided(*idxs) : Strided{};
  const bool grouped = idxs && !shift_classes;
  const auto elements = [&](auto kernel, auto... args) { launch(kernel, blocks_for(total, kThreads), kThreads, boxes, args...); };

  const auto keys = boxes.scratch<uint64_t>(total);
  const auto classes = boxes.scratch<int64_t>(grouped ? 2 * total : 0);
  const auto sorted = boxes.scratch<Box<T>>(total);
  const auto numbers = boxes.scratch<int32_t>((grouped ? 5 : 4) * total);
  const auto flags = boxes.scratch<uint8_t>(2 * total);
  int32_t* const number = numbers.get();
  const Sorted<T> s = {n,
                       keys.get(),
                       grouped ? classes.get() : nullptr,
                       grouped ? classes.get() + total : nullptr,
                       number,
                       grouped ? number + 4 * total : number,
                       number + total,
                       number + 2 * total,
                       sorted.get(),
                       flags.get(),
                       flags.get() + total,
                       number + 3 * total};

  elements(nms_key_kernel<T>, s, score, its_class, total);
  const int64_t tiles = ceil_div(n, kThreads), parts = std::min(tiles, 1 + 1024 / std::max<int64_t>(1, batch * tiles));
  launch(nms_rank_kernel<T>, batch * tiles * parts, kThreads, boxes, s, tiles, parts);
  std::shared_ptr<T> largest;
  if (idxs && shift_classes) {
    largest = boxes.scratch<T>(batch);
    launch(nms_largest_kernel<T>, batch, kThreads, boxes, from, n, largest.get());
  }
  elements(nms_gather_kernel<T>, s, from, its_class, largest.get(), total);

  const T threshold = round_down<T>(iou_threshold);
  const int64_t chunk = std::min<int64_t>(kChunk, std::max<int64_t>(1, ceil_div(n, kWalk)) * kWalk), chunks = ceil_div(n, chunk),
                words = ceil_div(n, kWarp);
  const int64_t enough = grouped ? n : limit;  // to be kept; classes come one after the other, not by score
  const auto mask = boxes.scratch<uint32_t>(batch * words * chunk);
  const auto counts = boxes.scratch<int32_t>(batch * (chunks + 1));
  launch(nms_mask_kernel<T>, batch * words * (chunk / kThreads), kThreads, boxes, s, words, chunk, threshold, mask.get());
  for (int64_t i = 0; i < chunks; ++i) {
    launch(nms_walk_kernel<T>, batch, kWalk, boxes, s, mask.get(), words, chunk, i, chunks, enough, counts.get());
    const int64_t begin = (i + 1) * chunk, after = ceil_div(std::max<int64_t>(0, n - begin), kThreads), some = kChunk / kPart;
    launch(nms_apply_kernel<T>, batch * after * some, kThreads, boxes, s, threshold, begin, after, some, i, chunks, enough, counts.get());
  }
  launch(nms_emit_kernel<T>, batch, kWalk, boxes, s, limit, keep.ptr<int64_t>(), dim ? keep.stride[0] : 0, keep.stride[dim],
         count.ptr<int64_t>());
}

}  // namespace

void nms_cuda(const Tensor& boxes, const Tensor& scores, const Tensor* idxs, double iou_threshold, const Tensor& keep, bool shift_classes,
              const Tensor& count) {
  check_nms(boxes, scores, idxs, keep, kCuda);
  check_device(count, "count", kCuda), check_dtype(count, "count", DType::i64), check_contiguous(count, "count");
  if (boxes.dtype == DType::f64) run<double>(boxes, scores, idxs, iou_threshold, keep, shift_classes, count);
  else run<float>(boxes, scores, idxs, iou_threshold, keep, shift_classes, count);
}

}  // namespace pyzoo
