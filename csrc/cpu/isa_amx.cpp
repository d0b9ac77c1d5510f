// The CPU kernels for the products of the amx instruction set; flags in CMakeLists.txt.
#define FUSEDRNN_ISA_NAME amx
#define FUSEDRNN_TERMS TilePairs
#include "isa.h"
