// What vec.inc and the kernels need from outside the target regions.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "dtype.h"
#include "isa.h"
#include "parallel.h"
#include "transpose.h"

#define PZ_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define PZ_APART __attribute__((noinline))
#else
#define PZ_APART __attribute__((noinline, noclone))
#endif
#define PZ_LAMBDA __attribute__((always_inline))  // [&](...) PZ_LAMBDA { }

// PZ_SHUFFLE(integer vector type, a, b, indices...)
#if defined(__clang__) || __GNUC__ >= 12
#define PZ_SHUFFLE(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PZ_SHUFFLE(type, a, b, ...) __builtin_shuffle(a, b, type{__VA_ARGS__})
#endif
