#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace pyzoo {

namespace {

bool has(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();  // also asks the operating system whether it saves the wide registers
  switch (isa) {
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512dq") && has(Isa::avx2);
    case Isa::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // every such processor has F16C, too
    default: return true;
  }
#else
  return isa == Isa::baseline;
#endif
}

Isa parse(const std::string& name) {
  std::string allowed;
  for (const std::string& candidate : available_isas()) {
    allowed += (allowed.empty() ? "" : ", ") + candidate;
    for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
      if (candidate == name && name == isa_name(isa)) return isa;
  }
  throw std::invalid_argument("PYZOO_CPU_ISA must be one of " + allowed + " on this processor, got '" + name + "'");
}

Isa best() {
  for (Isa isa : {Isa::avx512, Isa::avx2})
    if (has(isa)) return isa;
  return Isa::baseline;
}

Isa& chosen() {
  static Isa isa = [] {
    const char* name = std::getenv("PYZOO_CPU_ISA");
    return name && *name ? parse(name) : best();
  }();
  return isa;
}

}  // namespace

Isa isa() { return chosen(); }

const char* isa_name(Isa isa) {
#if defined(__x86_64__)
  constexpr const char* baseline = "x86-64";
#elif defined(__aarch64__)
  constexpr const char* baseline = "neon";
#else
  constexpr const char* baseline = "generic";
#endif
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : baseline;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
    if (has(isa)) names.push_back(isa_name(isa));
  return names;
}

void set_isa(const std::string& name) { chosen() = name.empty() ? best() : parse(name); }

}  // namespace pyzoo
