// The CPU kernels for the baseline instruction set of the architecture (SSE2, NEON); flags in
// CMakeLists.txt.
#define FUSEDRNN_ISA_NAME generic
#include "isa.h"
