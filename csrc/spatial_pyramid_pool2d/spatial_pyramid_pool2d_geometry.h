// Where the bins of adaptive pooling lie. Shared by all devices.
#pragma once

#include <cstdint>

namespace pyzoo {

// Bin i of `bins` along an axis of `size` pixels is [bin_begin, bin_end): never empty, and where sizes do not divide, neighbours share a
// pixel.
constexpr int64_t bin_begin(int64_t i, int64_t bins, int64_t size) { return i * size / bins; }
constexpr int64_t bin_end(int64_t i, int64_t bins, int64_t size) { return ((i + 1) * size + bins - 1) / bins; }

}  // namespace pyzoo
