#include "run.cuh"

namespace fusedrnn {
const CudaKernels& cuda_kernels_bfloat16() { return kKernelsOf<Bfloat16>; }
}  // namespace fusedrnn
