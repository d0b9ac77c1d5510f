// The Python functions of the CUDA kernels.
#pragma once

#include <pybind11/pybind11.h>

namespace fusedrnn {

// Adds them to a module: cuda_forward and so on, for fusedrnn/cuda.py alone.
void add_cuda(pybind11::module_& module);

}  // namespace fusedrnn
