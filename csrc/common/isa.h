// Which instruction set the CPU kernels run with: the best one the processor has, or the one PYZOO_CPU_ISA names.
#pragma once

#include <string>
#include <vector>

namespace pyzoo {

enum class Isa { baseline, avx2, avx512 };

Isa isa();  // the one in use
const char* isa_name(Isa isa);
std::vector<std::string> available_isas();  // on this processor, worst first
void set_isa(const std::string& name);      // "" : back to the best; throws std::invalid_argument naming the allowed ones

}  // namespace pyzoo

// PZ_FOR_ISA(f)(args...): calls <isa>::f for the instruction set in use. The kernels exist once per instruction set through
// foreach_isa.h.
#if defined(__x86_64__)
#define PZ_FOR_ISA(...)                                               \
  [&](auto&&... args) -> decltype(auto) {                             \
    switch (::pyzoo::isa()) {                                         \
      case ::pyzoo::Isa::avx512: return avx512::__VA_ARGS__(args...); \
      case ::pyzoo::Isa::avx2: return avx2::__VA_ARGS__(args...);     \
      default: return baseline::__VA_ARGS__(args...);                 \
    }                                                                 \
  }
#else
#define PZ_FOR_ISA(...) [&](auto&&... args) -> decltype(auto) { return baseline::__VA_ARGS__(args...); }
#endif

// The same for kernels of `type`. float64 is there to check gradients and results: it runs on the baseline alone, which saves a fifth of
// the binary and of the time to build it.
#define PZ_FOR_ISA_OF(type, ...)                                                         \
  [&](auto&&... args) -> decltype(auto) {                                                \
    if constexpr (sizeof(type) == sizeof(double)) return baseline::__VA_ARGS__(args...); \
    else return PZ_FOR_ISA(__VA_ARGS__)(args...);                                        \
  }
