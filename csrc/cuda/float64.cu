#include "run.cuh"

namespace fusedrnn {
const CudaKernels& cuda_kernels_float64() { return kKernelsOf<Float64>; }
}  // namespace fusedrnn
