// The CPU kernels for the avx512 instruction set; flags in CMakeLists.txt.
#define FUSEDRNN_ISA_NAME avx512
#include "isa.h"
