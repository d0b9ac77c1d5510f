// The contract between fusedrnn/cuda.py and the CUDA kernels. Shapes in the letters of sequence.h;
// plain data only. All arrays lie in the memory of `device`, dense and row-major, but
// Sequences::offsets, which the host reads before the call returns. What kernels multiply or write
// begins at multiples of 16 bytes: workspace, h0, output, unprojected, grad_gates, grad_hidden. All may
// be freed after the call in the order of `stream`, as torch's allocator does.
//
// Torch computes the products with all time steps at once, before and after: the input projection,
// and the gradients of input, weights and biases. What is between, the recurrence, is the kernels'.
#pragma once

#include <cstddef>

#include "../sequence.h"

namespace fusedrnn {

// What is stored, and how products are computed: tf32 is float32 with its products on tensor cores.
enum Number { kFloat64, kFloat32, kTf32, kBfloat16Number, kFloat16Number, kNumNumbers };

// How the time steps are launched. Two more have their place here: clusters of CTAs that hold the
// weights together, and whole grids that do.
enum class Path { kStep, kBlock };

struct CudaCall {
  Sequences sequences;
  int64_t* device_offsets;  // [T+1], with sequences.offsets: working memory for a copy of them
  int H, P, D;
  int device;
  void* stream;  // cudaStream_t
};

// "scalar" and "acc" are Number's types of storage and of arithmetic: double and double, float and
// float, bfloat16 or float16 and float.
struct CudaForwardArgs : CudaCall {
  Path path;
  void* workspace;           // workspace_bytes()
  const void* gates_x[2];    // scalar [N, G*H]: input weight_ih^T + bias_ih
  const void* weight_hh[2];  // scalar [G*H, P]
  const void* bias_hh[2];    // scalar [G*H], or null
  const void* weight_hr[2];  // scalar [P, H], LSTM only, or null: then P = H
  const void *h0, *c0;       // scalar [D, B, P], [D, B, H], or null for zeros
  void* gates;               // out: scalar [D, N, G*H] as ForwardArgs's, but in 16 bits sigmoids
                             // above 1/2 less 1 (layer.cuh, gate_to_save); or null if not wanted
  void* extra;               // out: acc [D, N, H], ForwardArgs's; null where it is not wanted, but
                             // LSTM's step path has working memory then, acc [D, B, H]
  bool every_cell;           // LSTM: extra is [D, N, H]
  void* unprojected;         // with a projection: working memory, scalar [D, B, H]; else null
  void* hidden;              // out: scalar [D, N, P], a copy of h, or null if not wanted
  void *output, *h_n, *c_n;  // out: scalar [N, D*P], [D, B, P], [D, B, H]
};

struct CudaBackwardArgs : CudaCall {
  Path path;
  void* workspace;
  const void* weight_hh[2];
  const void* weight_hr[2];
  const void* gates;                              // scalar [D, N, G*H]
  const void* extra;                              // acc [D, N, H]
  const void* previous;                           // scalar [D, N, P], of cuda_previous
  const void* c0;                                 // scalar [D, B, H], or null for zeros
  const void *grad_output, *grad_h_n, *grad_c_n;  // scalar, or null for zero
  const void* grad_cells;                         // scalar [N, D*H], or null for zero
  void* grad_gates;                               // out: scalar [D, N, E*H]
  void* grad_hidden;        // out, with a projection only: scalar [D, N, P], of h
  void* carry;              // working memory, acc [D, B, H]: of the step path, not for RNN
  void *grad_h0, *grad_c0;  // out: acc [D, B, P], [D, B, H], zero at first; or null
};

// h before each step. From `hidden`, a copy of h, or, where that is null, from gates and extra.
struct CudaPreviousArgs : CudaCall {
  const void *gates, *extra, *hidden, *h0;
  void* previous;  // out: scalar [D, N, P]
};

// The kernels of one Number. All throw std::runtime_error for errors of CUDA's.
struct CudaKernels {
  void (*forward[kNumCells])(const CudaForwardArgs&);
  void (*backward[kNumCells])(const CudaBackwardArgs&);
  void (*previous[kNumCells])(const CudaPreviousArgs&);
  // Bytes of workspace, for forward and backward alike.
  size_t (*workspace[kNumCells])(int H, int P, int D, bool projected);
  // How many CTAs of the block path `device` runs at once; 0 where it cannot run this H at all.
  int (*block_ctas[kNumCells])(int H, bool backward, int device);
};

const CudaKernels& cuda_kernels(Number number);

}  // namespace fusedrnn
