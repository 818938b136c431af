// Includes the kernel source PZ_KERNEL once per instruction set, each time in a namespace of its own:
//
//   namespace pyzoo {
//   #define PZ_KERNEL "roi_align/roi_align_cpu.inc"
//   #include "common/foreach_isa.h"
//   }
//
// The namespaces are anonymous inside, so that the linker never merges code for different processors; standard headers must be
// included before, outside the target regions.
#if defined(__x86_64__)

namespace baseline {
namespace {
#define PZ_VECTOR_BYTES 16
#include "common/vec.inc"
#include PZ_KERNEL
#undef PZ_VECTOR_BYTES
}  // namespace
}  // namespace baseline

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
namespace {
#define PZ_VECTOR_BYTES 32
#define PZ_AVX2
#include "common/vec.inc"
#include PZ_KERNEL
#undef PZ_VECTOR_BYTES
}  // namespace
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#endif
namespace avx512 {
namespace {
#define PZ_VECTOR_BYTES 64
#define PZ_AVX512
#include "common/vec.inc"
#include PZ_KERNEL
#undef PZ_VECTOR_BYTES
#undef PZ_AVX512
#undef PZ_AVX2
}  // namespace
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else  // one instruction set: NEON on 64-bit Arm, or whatever the compiler makes of 16-byte vectors

namespace baseline {
namespace {
#define PZ_VECTOR_BYTES 16
#include "common/vec.inc"
#include PZ_KERNEL
#undef PZ_VECTOR_BYTES
}  // namespace
}  // namespace baseline

#endif
#undef PZ_KERNEL
