// The CPU kernels for the products of 64-bit ARM's bfloat16 instructions; flags in CMakeLists.txt.
#define FUSEDRNN_ISA_NAME neon_bf16
#define FUSEDRNN_TERMS Pairs
#include "isa.h"
