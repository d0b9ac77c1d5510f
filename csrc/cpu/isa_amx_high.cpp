// The CPU kernels for the products of the amx instruction set by parts: of float32 at precision "high"
// and of float16; flags in CMakeLists.txt.
#define FUSEDRNN_ISA_NAME amx_high
#define FUSEDRNN_TERMS TileSplitPairs
#include "isa.h"
