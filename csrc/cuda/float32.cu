#include "run.cuh"

namespace fusedrnn {
const CudaKernels& cuda_kernels_float32() { return kKernelsOf<Float32>; }
}  // namespace fusedrnn
