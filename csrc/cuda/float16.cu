#include "run.cuh"

namespace fusedrnn {
const CudaKernels& cuda_kernels_float16() { return kKernelsOf<Float16>; }
}  // namespace fusedrnn
