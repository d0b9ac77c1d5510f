// The CPU kernels for the products of the amx instruction set and float32's precision "high"; flags in CMakeLists.txt.
#define FUSEDRNN_ISA_NAME amx_high
#define FUSEDRNN_TERMS TileSplitPairs
#include "isa.h"
