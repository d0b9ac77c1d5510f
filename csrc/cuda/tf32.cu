#include "run.cuh"

namespace fusedrnn {
const CudaKernels& cuda_kernels_tf32() { return kKernelsOf<Tf32>; }
}  // namespace fusedrnn
