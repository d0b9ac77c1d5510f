// Picks the ISA. Compiled with baseline flags: this runs before anything is known about the CPU.
#include "dispatch.h"

#if defined(FUSEDRNN_ARM)
#include <sys/auxv.h>
#endif
#if defined(FUSEDRNN_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
  bool only_by_name = false;
};

#if defined(FUSEDRNN_X86) || defined(FUSEDRNN_ARM)
// Those of an ISA, `all`, and less precise products.
Kernels with_products(Kernels all, const char* isa, const KernelsOf<float>* high,
                      const KernelsOf<float>* medium) {
  all.isa          = isa;
  all.f32[kHigh]   = high;
  all.f32[kMedium] = medium;
  return all;
}
#endif
#if defined(FUSEDRNN_X86)
const Kernels& avx512_bf16() {
  static const Kernels kernels =
      with_products(kernels_avx512(), "avx512_bf16", nullptr, &kernels_avx512_bf16());
  return kernels;
}
#elif defined(FUSEDRNN_ARM)
const Kernels& neon_bf16() {
  static const Kernels kernels =
      with_products(kernels_generic(), "neon_bf16", nullptr, &kernels_neon_bf16());
  return kernels;
}
#endif

#if defined(FUSEDRNN_AMX)
// Whether the CPU has AMX for bfloat16; older compilers' __builtin_cpu_supports does not know it.
bool has_amx() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // of leaf 7's edx
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) && (d & kTile);
}

// Linux must be asked for the tiles, for the whole process and for good: not before they are chosen.
const Kernels& amx() {
  static const Kernels kernels = [] {
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    if (syscall(SYS_arch_prctl, kRequest, kTileData) != 0) {
      throw std::runtime_error(
          "FUSEDRNN_ISA=amx: Linux refuses this process the use of AMX's tiles. Unset FUSEDRNN_ISA "
          "to get the best kernels that do without.");
    }
    return with_products(kernels_avx512(), "amx", &kernels_amx_high(), &kernels_amx());
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
  const bool avx512_bf16_too = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
#if defined(FUSEDRNN_ARM)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16
  const bool bf16               = (getauxval(AT_HWCAP2) & kBf16) != 0;
#endif
  static const std::vector<Isa> all = {
#if defined(FUSEDRNN_AMX)
      {"amx", avx512_bf16_too && has_amx(), amx, true},
#endif
#if defined(FUSEDRNN_X86)
      {"avx512_bf16", avx512_bf16_too, avx512_bf16},
      {"avx512", avx512, kernels_avx512},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), kernels_avx2},
#endif
#if defined(FUSEDRNN_ARM)
      {"neon_bf16", bf16, neon_bf16},
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
    if (any ? isa.present && !isa.only_by_name : std::strcmp(isa.name, name) == 0) {
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
