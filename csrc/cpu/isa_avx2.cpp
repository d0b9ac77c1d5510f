// The CPU kernels for the avx2 instruction set; flags in CMakeLists.txt.
#define FUSEDRNN_ISA_NAME avx2
#include "isa.h"
