// Which ISA's kernels this process runs.
#pragma once

#include "../sequence.h"

namespace fusedrnn {

const Kernels& kernels_generic();
#if defined(FUSEDRNN_X86)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const KernelsOf<float>& kernels_avx512_bf16();
const KernelsOf<float>& kernels_amx();
const KernelsOf<float>& kernels_amx_high();
#elif defined(FUSEDRNN_ARM)
const KernelsOf<float>& kernels_neon_bf16();
#endif

// The kernels of the best ISA that this CPU has, or of the one that `name` asks for; throws
// std::runtime_error if there is no such ISA, or this CPU or build lacks it. Null or "": the best but
// "amx", whose speed has not been measured.
const Kernels& select_kernels(const char* name);

// The names of the ISAs that this build has kernels for, best first: "avx2, generic".
const char* isa_names();

}  // namespace fusedrnn
