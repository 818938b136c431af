// Matrix products: a block of threads adds up 64 x 64 sums of products, of two operands that it reads where they lie, some columns at
// a time, through shared memory. float32 and float64 are multiplied as they are (no TF32), 16-bit types on tensor cores.
#pragma once

#include <climits>
#include <type_traits>

#include "common/cuda.cuh"

namespace pyzoo {

constexpr int kTile = 64, kTileThreads = 128;

// ------------------------------------------------------------------------------------------------------------ operands

// Where a row or a column of an operand lies. Its entry at a row and a column is found at the sum of their offsets, if the sum of
// their y and x is inside the map; else it is zero.
struct Place {
  int64_t offset;
  int y, x;
};
constexpr int kOutside = INT_MIN / 2;  // a y that no other brings into a map

// The columns of an operand: an iterator, which starts anywhere and then only advances.

// Column k is at k % period * stride; only the first `live` of each period are there.
struct Line {
  int64_t size, period, live, stride;
  int64_t k = 0, at = 0;

  __device__ void start(int64_t first) { k = first, at = first % period; }
  __device__ void advance(int n) {
    k += n;
    for (at += n; at >= period;) at -= period;
  }
  __device__ Place place() const { return {at * stride, k < size && at < live ? 0 : kOutside, 0}; }
};

// The pixels of all images.
struct Pixels {
  int64_t images, image_stride, row_stride, pixel_stride;
  int height, width;
  int64_t image = 0;
  int y = 0, x = 0;

  __device__ void start(int64_t first) {
    const int64_t pixels = int64_t(height) * width;
    const int p = int(first % pixels);
    image = first / pixels, y = p / width, x = p % width;
  }
  __device__ void advance(int n) {
    for (x += n; x >= width;) {
      x -= width;
      if (++y == height) y = 0, ++image;
    }
  }
  __device__ Place place() const { return {image * image_stride + y * row_stride + x * pixel_stride, image < images ? y : kOutside, x}; }
};

template <class T, class Columns>
struct Operand {
  const T* data;
  Columns columns;
  int height, width;  // of the map
  bool by_columns;    // whether columns are the neighbours in memory, or rows
  bool wide;          // whether these can be read 16 bytes at once
};

// Where the 64 rows of an operand lie.
class Rows {
 public:
  __device__ void set(int row, const Place& place) { offset_(row) = place.offset, y_(row) = place.y, x_(row) = place.x; }
  __device__ Place operator()(int row) { return {offset_(row), y_(row), x_(row)}; }

 private:
  Shared<int64_t, kTile> offset_;
  Shared<int, kTile> y_, x_;
};

// Which entries of 64 rows and kDepth columns a thread brings: kPairs times two neighbouring columns of a row. Neighbours in memory
// go to neighbouring threads, or are the kPairs numbers that a thread reads at once.
template <int kDepth, bool kByColumns, bool kWide>
struct Share {
  static constexpr int kPairs = kDepth / 4, kAcross = kDepth / 2;  // pairs of a thread, of a row

  static __device__ int row(int pair) {
    const int t = threadIdx.x;
    if (!kByColumns) return kWide ? t % (kTile / kPairs) * kPairs + pair : t % kTile;
    return kWide ? t / 4 + pair / (kPairs / 2) * (kTile / 2) : t / kAcross + pair * (kTileThreads / kAcross);
  }
  static __device__ int column(int pair) {
    const int t = threadIdx.x;
    if (!kByColumns) return kWide ? t / (kTile / kPairs) * 2 : t / kTile * 2 + pair * 4;
    return kWide ? t % 4 * kPairs + pair % (kPairs / 2) * 2 : t % kAcross * 2;
  }
};

// Calls f with the Share of an operand.
template <int kDepth, class T, class Columns, class F>
__device__ void with_share(const Operand<T, Columns>& operand, F&& f) {
  if (operand.by_columns) operand.wide ? f(Share<kDepth, true, true>()) : f(Share<kDepth, true, false>());
  else operand.wide ? f(Share<kDepth, false, true>()) : f(Share<kDepth, false, false>());
}

// On their way to shared memory: n pairs.
template <class T, int n>
struct Pairs {
  T first[n], second[n];
};

template <int kDepth, bool kByColumns, bool kWide, class T, class Columns, int n>
__device__ void fetch(const Operand<T, Columns>& operand, Rows& rows, Columns columns, Share<kDepth, kByColumns, kWide>, Pairs<T, n>& to) {
  using Mine = Share<kDepth, kByColumns, kWide>;
  const auto inside = [&](const Place& row, const Place& column) {
    return unsigned(row.y + column.y) < unsigned(operand.height) && unsigned(row.x + column.x) < unsigned(operand.width);
  };
  const auto one = [&](const Place& row, const Place& column) {
    return inside(row, column) ? operand.data[row.offset + column.offset] : T{};
  };
  const auto pack = [&](const Place& row, const Place& column) {
    return inside(row, column) ? load_pack<n>(operand.data + row.offset + column.offset) : Pack<T, n>{};
  };
  if constexpr (kByColumns && kWide) {
    const Place column = columns.place();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Pack<T, n> found = pack(rows(Mine::row(half * (n / 2))), column);
#pragma unroll
      for (int i = 0; i < n / 2; ++i) {
        to.first[half * (n / 2) + i] = found.at[2 * i];
        to.second[half * (n / 2) + i] = found.at[2 * i + 1];
      }
    }
  } else if constexpr (kWide) {
    const Place row = rows(Mine::row(0));
    const Pack<T, n> first = pack(row, columns.place());
    columns.advance(1);
    const Pack<T, n> second = pack(row, columns.place());
#pragma unroll
    for (int i = 0; i < n; ++i) to.first[i] = first.at[i], to.second[i] = second.at[i];
  } else if constexpr (kByColumns) {
    const Place first = columns.place();
    columns.advance(1);
    const Place second = columns.place();
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const Place row = rows(Mine::row(i));
      to.first[i] = one(row, first), to.second[i] = one(row, second);
    }
  } else {
    const Place row = rows(Mine::row(0));
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (i > 0) columns.advance(3);
      to.first[i] = one(row, columns.place());
      columns.advance(1);
      to.second[i] = one(row, columns.place());
    }
  }
}

// --------------------------------------------------------------------------------------------------------------- tiles

// The sums of a thread. All four warps of a block take 32 x 32 of the 64 x 64.
__device__ inline int warp_row() { return threadIdx.x / kWarp / 2 * 32; }
__device__ inline int warp_column() { return threadIdx.x / kWarp % 2 * 32; }

// 8 x 4 sums of a thread, one multiplication after the other.
template <class E>
class FmaTile {
 public:
  using Sum = E;
  static constexpr int kDepth = 64 / int(sizeof(E));  // columns at a time

  class Stage {
   public:
    template <class T>
    __device__ void put(int buffer, int row, int column, T first, T second) {
      of_(buffer, column, row) = to_float(first), of_(buffer, column + 1, row) = to_float(second);
    }
    __device__ E at(int buffer, int row, int column) { return of_(buffer, column, row); }

   private:
    Shared<E, 2, kDepth, kTile + 4> of_;
  };

  // Adds the products of all columns to the sums whose column of the tile `takes` names.
  template <class F>
  __device__ void add(Stage& a, Stage& b, int buffer, F&& takes) {
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      E left[kHigh], right[kWide];
#pragma unroll
      for (int i = 0; i < kHigh; ++i) left[i] = a.at(buffer, row() + i, k);
#pragma unroll
      for (int j = 0; j < kWide; ++j) right[j] = b.at(buffer, column() + j, k);
#pragma unroll
      for (int j = 0; j < kWide; ++j)
        if (takes(column() + j))
#pragma unroll
          for (int i = 0; i < kHigh; ++i) sums_[i][j] = fma(left[i], right[j], sums_[i][j]);
    }
  }
  // f(row, column, sum)
  template <class F>
  __device__ void each(F&& f) {
#pragma unroll
    for (int i = 0; i < kHigh; ++i)
#pragma unroll
      for (int j = 0; j < kWide; ++j) f(row() + i, column() + j, sums_[i][j]);
  }
  // The first ones: nothing is to be done where they are outside.
  static __device__ int row() { return warp_row() + threadIdx.x % kWarp / 8 * kHigh; }
  static __device__ int column() { return warp_column() + threadIdx.x % 8 * kWide; }
  static constexpr int kHigh = 8, kWide = 4;

 private:
  E sums_[kHigh][kWide] = {};
};

// d [16, 8] += a [16, 16] b [16, 8], by a warp together: the fragments of mma.m16n8k16. Lane 4 * g + t holds of a rows g and g + 8,
// of b column g, both at 2 * t + {0, 1, 8, 9}, of d rows g and g + 8 and columns 2 * t + {0, 1}.
template <class T>
__device__ void multiply_fragments(float (&d)[4], const Pack<T, 2> (&a)[4], const Pack<T, 2> (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  unsigned x[4], y[2];
  memcpy(x, a, sizeof(x)), memcpy(y, b, sizeof(y));
#define PZ_MMA(type)                                                                                                                \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                              \
      : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]))
  if constexpr (std::is_same_v<T, Half>) PZ_MMA("f16");
  else PZ_MMA("bf16");
#undef PZ_MMA
#else  // the emulator, and GPUs without this instruction
  struct Words {
    unsigned at[6];
  } mine;
  memcpy(mine.at, a, 16), memcpy(mine.at + 4, b, 8);
#ifdef PYZOO_EMULATED
  Words all[kWarp];
  emulator::gather(mine, all);
  const auto word = [&](int lane, int i) { return all[lane].at[i]; };
#else
  const auto word = [&](int lane, int i) { return __shfl_sync(kAllLanes, mine.at[i], lane); };
#endif
  const auto pair = [&](int lane, int i) {
    const unsigned bits = word(lane, i);
    return Pack<T, 2>{{{uint16_t(bits)}, {uint16_t(bits >> 16)}}};
  };
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Pack<T, 2> rows[2] = {pair(4 * g + k, 2 * half), pair(4 * g + k, 2 * half + 1)};
      const Pack<T, 2> columns[2] = {pair(8 * t + k, 4 + half), pair(8 * t + 4 + k, 4 + half)};
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) d[i] = fma(to_float(rows[i / 2].at[j]), to_float(columns[i % 2].at[j]), d[i]);
    }
#endif
}

// 32 x 32 sums of a warp on tensor cores, in float32.
template <class T>
class MmaTile {
 public:
  using Sum = float;
  static constexpr int kDepth = 32;

  class Stage {
   public:
    __device__ void put(int buffer, int row, int column, T first, T second) { of_(buffer, row, column / 2) = Pack<T, 2>{{first, second}}; }
    __device__ Pack<T, 2> at(int buffer, int row, int column) { return of_(buffer, row, column / 2); }

   private:
    Shared<Pack<T, 2>, 2, kTile, kDepth / 2 + 4> of_;
  };

  template <class F>
  __device__ void add(Stage& a, Stage& b, int buffer, F&& takes) {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int k = 2 * t; k < kDepth; k += 16) {
      Pack<T, 2> left[2][4], right[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int part = 0; part < 4; ++part) left[i][part] = a.at(buffer, row() + i * 16 + part % 2 * 8 + g, k + part / 2 * 8);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int part = 0; part < 2; ++part) right[part] = b.at(buffer, column() + j * 8 + g, k + part * 8);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float sums[4] = {sums_[i][j][0], sums_[i][j][1], sums_[i][j][2], sums_[i][j][3]};
          multiply_fragments<T>(sums, left[i], right);
#pragma unroll
          for (int s = 0; s < 4; ++s)
            if (takes(column() + j * 8 + 2 * t + s % 2)) sums_[i][j][s] = sums[s];
        }
      }
    }
  }
  template <class F>
  __device__ void each(F&& f) {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int s = 0; s < 4; ++s) f(row() + i * 16 + s / 2 * 8 + g, column() + j * 8 + 2 * t + s % 2, sums_[i][j][s]);
  }
  static __device__ int row() { return warp_row(); }
  static __device__ int column() { return warp_column(); }
  static constexpr int kHigh = 32, kWide = 32;

 private:
  float sums_[2][4][4] = {};
};

template <class T>
using TileOf = std::conditional_t<sizeof(T) == 2, MmaTile<T>, FmaTile<T>>;

// How many columns a thread reads at once: 16 bytes.
template <class T>
constexpr int kPackOf = TileOf<T>::kDepth / 4;

// Whether packs of them may be read: whole and aligned, if they are neighbours and `count` of them come before anything else.
template <class T, class... Strides>
bool reads_packs(const void* data, int64_t stride, int64_t count, Strides... others) {
  constexpr int64_t n = kPackOf<T>;
  return stride == 1 && count % n == 0 && ((others % n == 0) && ...) && reinterpret_cast<uintptr_t>(data) % (n * sizeof(T)) == 0;
}

// ------------------------------------------------------------------------------------------------------------- product

// What a block has in shared memory.
template <class Tile>
struct TileRoom {
  Rows a_rows, b_rows;
  typename Tile::Stage a, b;
  Shared<typename Tile::Sum, kTile / 2, kTile + 1> result;
};

// Sums whatever is multiplied.
struct TakesAll {
  __device__ bool all(int64_t) const { return true; }
  __device__ bool takes(int64_t, int) const { return true; }
};

// Adds steps [begin, end) of Tile::kDepth columns each to the sums. The rows of `room` are set; those who are not active only help.
// Where filter.all(step) is false, filter.takes(step, column of the tile) tells which sums get anything.
template <class Tile, class T, class A, class B, class Filter>
__device__ void multiply(Tile& tile, const Operand<T, A>& a, const Operand<T, B>& b, TileRoom<Tile>& room, int64_t begin, int64_t end,
                         bool active, const Filter& filter) {
  constexpr int kDepth = Tile::kDepth;
  A a_columns = a.columns;
  B b_columns = b.columns;
  Pairs<T, kDepth / 4> from_a, from_b;
  with_share<kDepth>(a, [&](auto share) { a_columns.start(begin * kDepth + share.column(0)); });
  with_share<kDepth>(b, [&](auto share) { b_columns.start(begin * kDepth + share.column(0)); });
  __syncthreads();  // for the rows
  int buffer = 1;
  for (int64_t step = begin - 1; step < end; ++step, buffer ^= 1) {  // the first time it only fetches
    const bool more = step + 1 < end;
    if (more) {
      with_share<kDepth>(a, [&](auto share) { fetch(a, room.a_rows, a_columns, share, from_a); });
      with_share<kDepth>(b, [&](auto share) { fetch(b, room.b_rows, b_columns, share, from_b); });
      a_columns.advance(kDepth), b_columns.advance(kDepth);
    }
    if (active && step >= begin) {
      if (filter.all(step)) tile.add(room.a, room.b, buffer, [](int) { return true; });
      else tile.add(room.a, room.b, buffer, [&](int column) { return filter.takes(step, column); });
    }
    if (more) {
      const auto put = [&](typename Tile::Stage& stage, auto share, const auto& pairs) {
#pragma unroll
        for (int i = 0; i < kDepth / 4; ++i) stage.put(buffer ^ 1, share.row(i), share.column(i), pairs.first[i], pairs.second[i]);
      };
      with_share<kDepth>(a, [&](auto share) { put(room.a, share, from_a); });
      with_share<kDepth>(b, [&](auto share) { put(room.b, share, from_b); });
    }
    __syncthreads();
  }
}

// Where tiles are few, their sums are cut into so many parts as fill a GPU, of some steps each.
inline int64_t parts_of(int64_t tiles, int64_t steps) {
  constexpr int64_t kBlocks = 528, kLeastSteps = 8;
  return std::max<int64_t>(1, std::min(kBlocks / std::max<int64_t>(1, tiles), steps / kLeastSteps));
}

// The parts of a sum, added up in their order; four at a time, as the way to the memory is long.
template <class A>
__device__ A add_parts(const A* sums, int64_t parts, int64_t stride) {
  A total[4] = {};
  int64_t part = 0;
#pragma unroll 1
  for (; part + 4 <= parts; part += 4)
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] += sums[(part + i) * stride];
#pragma unroll 1
  for (; part < parts; ++part) total[0] += sums[part * stride];
  return (total[0] + total[1]) + (total[2] + total[3]);
}

// Calls f(row, column, sum) for all sums, neighbours in a row or in a column at the same time.
template <class Tile, class F>
__device__ void each_sum(Tile& tile, TileRoom<Tile>& room, bool by_columns, F&& f) {
  constexpr int kRows = kTile / 2;  // at a time
  for (int first = 0; first < kTile; first += kRows) {
    __syncthreads();
    if (warp_row() == first) tile.each([&](int row, int column, typename Tile::Sum sum) { room.result(row - first, column) = sum; });
    __syncthreads();
    for (int i = threadIdx.x; i < kRows * kTile; i += kTileThreads) {
      const int row = by_columns ? i / kTile : i % kRows, column = by_columns ? i % kTile : i / kRows;
      f(first + row, column, typename Tile::Sum(room.result(row, column)));
    }
  }
}

}  // namespace pyzoo
