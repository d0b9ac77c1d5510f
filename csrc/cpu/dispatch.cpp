// Picks the ISA. Compiled with baseline flags: this runs before anything is known about the CPU.
#include "dispatch.h"

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace fusedrnn {
namespace {

struct Isa {
  const char* name;
  bool present;
  const Kernels& (*kernels)();
};

#if defined(FUSEDRNN_X86)
// avx512's, and products of bfloat16 numbers.
const Kernels& with_bf16_products() {
  static const Kernels kernels = [] {
    Kernels all       = kernels_avx512();
    all.isa           = "avx512_bf16";
    all.bf16_products = &kernels_avx512_bf16();
    return all;
  }();
  return kernels;
}
#endif

// What this build holds, best first.
const std::vector<Isa>& isas() {
#if defined(FUSEDRNN_X86)
  // __builtin_cpu_supports asks the operating system too whether it saves the wide registers.
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  static const std::vector<Isa> all = {
#if defined(FUSEDRNN_X86)
      {"avx512_bf16", avx512 && __builtin_cpu_supports("avx512bf16"), with_bf16_products},
      {"avx512", avx512, kernels_avx512},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), kernels_avx2},
#endif
      {"generic", true, kernels_generic},
  };
  return all;
}

std::string names(bool only_present) {
  std::string out;
  for (const Isa& isa : isas()) {
    if (only_present && !isa.present) continue;
    out += (out.empty() ? "" : ", ") + std::string(isa.name);
  }
  return out;
}

}  // namespace

const char* isa_names() {
  static const std::string all = names(false);
  return all.c_str();
}

const Kernels& select_kernels(const char* name) {
  const bool any = !name || !*name;
  for (const Isa& isa : isas()) {
    if (any ? isa.present : std::strcmp(isa.name, name) == 0) {
      if (isa.present) return isa.kernels();
      throw std::runtime_error("FUSEDRNN_ISA=" + std::string(name) +
                               ": this CPU lacks it. Set FUSEDRNN_ISA to one of " + names(true) +
                               ", or unset it to get the best of them.");
    }
  }
  throw std::runtime_error("FUSEDRNN_ISA=" + std::string(name) + " is not known. Expected one of " +
                           names(false) + "; unset it to get the best that this CPU has.");
}

}  // namespace fusedrnn
