// Kernels that are right, and the same with one fault each: what the emulator must say of them. Names a case, prints what came.
#include <cstdio>
#include <map>

#include "common/cuda.cuh"

namespace pyzoo {

constexpr int kThreads = 64;

enum class Fault { none, barrier, second_barrier, bound, unwritten, early_return, warp_barrier, lane, other_warp };

// output [blocks, kThreads]: the inputs in reverse, plus the sum of their warp.
__global__ void reverse_kernel(Fault fault, const float* input, float* output) {
  __shared__ Shared<float, 2, kThreads / 2> tile;
  const int t = threadIdx.x, lane = t % kWarp, row = t / kWarp;
  const int64_t first = int64_t(blockIdx.x) * kThreads;
  if (fault == Fault::early_return && t == 5) return;
  for (int round = 0; round < 2; ++round) {
    const int column = fault == Fault::bound ? lane + 1 : lane;
    if (fault != Fault::unwritten || t != 7) tile(row, column) = input[first + t];
    if (fault != Fault::barrier) __syncthreads();
    const float mirrored = tile(1 - row, kWarp - 1 - lane);
    if (fault != Fault::second_barrier) __syncthreads();
    float sum = input[first + t];
    if (fault == Fault::lane && t == 3) continue;  // and the others wait for it
    sum = warp_sum(sum);
    output[first + t] = mirrored + sum;
  }
}

// output [blocks, kThreads]: the input of the next lane, through shared memory: a barrier of the warp is enough.
__global__ void rotate_kernel(Fault fault, const float* input, float* output) {
  __shared__ Shared<float, kThreads> tile;
  const int t = threadIdx.x, next = t / kWarp * kWarp + (t + 1) % kWarp;
  const int64_t first = int64_t(blockIdx.x) * kThreads;
  tile(t) = input[first + t];
  if (fault != Fault::warp_barrier) __syncwarp();
  output[first + t] = tile(fault == Fault::other_warp ? (t + kWarp) % kThreads : next);
}

}  // namespace pyzoo

int main(int, char** argv) {
  using namespace pyzoo;
  const std::map<std::string, Fault> faults = {{"none", Fault::none},
                                               {"barrier", Fault::barrier},
                                               {"second_barrier", Fault::second_barrier},
                                               {"bound", Fault::bound},
                                               {"unwritten", Fault::unwritten},
                                               {"early_return", Fault::early_return},
                                               {"warp_barrier", Fault::warp_barrier},
                                               {"lane", Fault::lane},
                                               {"other_warp", Fault::other_warp}};
  const Fault fault = faults.at(argv[1]);
  constexpr int kBlocks = 5;
  std::vector<float> input(kBlocks * kThreads), reversed(input.size()), rotated(input.size());
  for (size_t i = 0; i < input.size(); ++i) input[i] = float(i * i % 97);
  try {
    launch(reverse_kernel, kBlocks, kThreads, Tensor{}, fault, input.data(), reversed.data());
    launch(rotate_kernel, kBlocks, kThreads, Tensor{}, fault, input.data(), rotated.data());
  } catch (const std::exception& e) {
    std::puts(e.what());
    return 0;
  }
  for (int i = 0; i < kBlocks * kThreads; ++i) {
    const int block = i / kThreads, t = i % kThreads, warp = i / kWarp * kWarp;
    float sum = 0;
    for (int lane = 0; lane < kWarp; ++lane) sum += input[warp + lane];
    if (reversed[i] != input[block * kThreads + kThreads - 1 - t] + sum || rotated[i] != input[warp + (t + 1) % kWarp]) {
      std::puts("wrong");
      return 0;
    }
  }
  std::puts("right");
}
