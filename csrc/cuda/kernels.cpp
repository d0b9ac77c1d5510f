#include "kernels.h"

namespace fusedrnn {

const CudaKernels& cuda_kernels_float64();
const CudaKernels& cuda_kernels_float32();
const CudaKernels& cuda_kernels_tf32();
const CudaKernels& cuda_kernels_bfloat16();
const CudaKernels& cuda_kernels_float16();

const CudaKernels& cuda_kernels(Number number) {
  switch (number) {
    case kFloat64:
      return cuda_kernels_float64();
    case kFloat32:
      return cuda_kernels_float32();
    case kTf32:
      return cuda_kernels_tf32();
    case kBfloat16Number:
      return cuda_kernels_bfloat16();
    default:
      return cuda_kernels_float16();
  }
}

}  // namespace fusedrnn
