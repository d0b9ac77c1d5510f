// The CPU kernels for the products of the avx512_bf16 instruction set; flags in CMakeLists.txt.
#define FUSEDRNN_ISA_NAME avx512_bf16
#define FUSEDRNN_TERMS Pairs
#include "isa.h"
