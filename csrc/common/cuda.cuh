// What the CUDA kernels stand on: launches, shared memory, loops over much work, sums of a warp. Includes the runtime's header
// only, so that the tests can put an emulator in its place (tests/emulator), where kernels are ordinary C++.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <tuple>

#include "tensor.h"

namespace pyzoo {

#ifdef PYZOO_EMULATED
constexpr DeviceType kCuda = DeviceType::cpu;
#else
constexpr DeviceType kCuda = DeviceType::cuda;
#endif

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

// ------------------------------------------------------------------------------------------------------------- launches

// Calls kernel(args...) in `blocks` blocks of `threads` threads, on the device of `like` and in the stream that its owner works in.
// Throws what is wrong with the launch; what goes wrong later is told by who waits for it.
template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, const Tensor& like, A... args) {
  if (blocks == 0) return;
  PZ_CHECK(blocks <= INT32_MAX, "a CUDA kernel would need " + std::to_string(blocks) + " blocks, at most 2^31 - 1 are allowed");
#ifdef PYZOO_EMULATED
  (void)like;
  emulator::run(unsigned(blocks), threads, [&] { kernel(P(args)...); });
#else
  const auto succeed = [&](cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // forgets it
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion || error == cudaErrorInvalidDeviceFunction) {
      int major = 0, minor = 0;
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, like.device_id);
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, like.device_id);
      const std::string here = std::to_string(major) + std::to_string(minor);
      throw std::runtime_error("pyzoo's CUDA kernels were built for compute capability " PYZOO_CUDA_ARCHS ", this GPU has " + here +
                               ": install pyzoo from source with PYZOO_CUDA_ARCHS=" + here + ", or use pyzoo.backend(\"triton\")");
    }
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  };
  int before = 0;
  succeed(cudaGetDevice(&before));
  if (before != like.device_id) succeed(cudaSetDevice(like.device_id));
  std::tuple<P...> values(args...);
  const auto call = [&](P&... value) {
    void* pointers[] = {&value...};
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), unsigned(blocks), threads, pointers, 0,
                            static_cast<cudaStream_t>(like.stream));
  };
  const cudaError_t error = std::apply(call, values);
  if (before != like.device_id) cudaSetDevice(before);
  succeed(error);
#endif
}

// The blocks for a kernel that goes through n elements as for_each_element does. A few times what a GPU runs at once is enough.
inline int64_t blocks_for(int64_t n, int threads) { return std::min<int64_t>(ceil_div(n, threads), 1 << 16); }

template <class F>
__device__ void for_each_element(int64_t n, F&& f) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) f(i);
}

// n neighbours, read and written at once: an address must be a multiple of their size.
template <class T, int n>
struct alignas(n * sizeof(T)) Pack {
  T at[n];
};
template <int n, class T>
__device__ Pack<T, n> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, n>*>(from);
}
template <class T, int n>
__device__ void store_pack(T* to, const Pack<T, n>& pack) {
  *reinterpret_cast<Pack<T, n>*>(to) = pack;
}

// -------------------------------------------------------------------------------------------------------- shared memory

// __shared__ Shared<float, 32, 33> tile;  tile(row, column) = ...;
// An array on a GPU; in the emulator one that knows who wrote what.
template <class T, int... kSizes>
class Shared {
 public:
#ifdef PYZOO_EMULATED
  using Element = emulator::Ref<T>;
#else
  using Element = T&;
#endif
  template <class... I>
  __device__ Element operator()(I... indices) {
    static_assert(sizeof...(I) == sizeof...(kSizes));
    int at = 0;
#ifdef PYZOO_EMULATED
    const auto step = [&](int64_t i, int size) {
      if (i < 0 || i >= size) emulator::fail("shared memory: index " + std::to_string(i) + " of " + std::to_string(size));
      at = at * size + int(i);
    };
    (step(indices, kSizes), ...);
    return Element(elements_[at]);
#else
    ((at = at * kSizes + int(indices)), ...);
    return elements_[at];
#endif
  }
  // n neighbours at once, from a multiple of n on.
  template <int n>
  __device__ Pack<T, n> pack(int at) {
#ifdef PYZOO_EMULATED
    if (at % n != 0) emulator::fail("shared memory: " + std::to_string(n) + " neighbours from " + std::to_string(at) + " on");
    Pack<T, n> out;
    for (int i = 0; i < n; ++i) out.at[i] = (*this)(at + i);
    return out;
#else
    return load_pack<n>(elements_ + at);
#endif
  }
  template <int n>
  __device__ void put(int at, const Pack<T, n>& pack) {
#ifdef PYZOO_EMULATED
    if (at % n != 0) emulator::fail("shared memory: " + std::to_string(n) + " neighbours from " + std::to_string(at) + " on");
    for (int i = 0; i < n; ++i) (*this)(at + i) = pack.at[i];
#else
    store_pack(elements_ + at, pack);
#endif
  }

 private:
#ifdef PYZOO_EMULATED
  emulator::Cell<T> elements_[(kSizes * ...)];
#else
  alignas(16) alignas(T) T elements_[(kSizes * ...)];
#endif
};

// --------------------------------------------------------------------------------------------------------------- warps

// The sum over the lanes of a warp, in every lane, always in the same order.
template <class T>
__device__ T warp_sum(T x) {
  for (int bits = kWarp / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(kAllLanes, x, bits);
  return x;
}

}  // namespace pyzoo
