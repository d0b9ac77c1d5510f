// What a call needs in device memory before its first step: weights in fragment order (product.cuh),
// and the offsets of packed sequences.
#pragma once

#include "product.cuh"

namespace fusedrnn {
namespace {

// Which numbers: those of segment s are weight[offset[s] + unit * unit_stride + k * k_stride].
template <class scalar_t>
struct Packing {
  const scalar_t* weight;
  Vec16* packed;
  int units, size, segments;
  int64_t offset[4], unit_stride, k_stride;
};

constexpr int kPackThreads = 256;

template <class N>
__global__ void __launch_bounds__(kPackThreads)
    pack(const __grid_constant__ Packing<typename N::scalar_t> p) {
  using scalar_t        = typename N::scalar_t;
  const int blocks      = blocks_of<N>(p.size);
  const int64_t vectors = packed_vectors<N>(p.units, p.size, p.segments);
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t v = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; v < vectors; v += threads) {
    // v counts [tiles][blocks][segments][2][kWeightLanes].
    const int place         = int(v % kFragment<N>);
    const uint32_t fragment = uint32_t(v / kFragment<N>);  // 64 bits' divisions are slow calls
    const uint32_t column   = fragment / uint32_t(p.segments);
    const int segment       = int(fragment - column * uint32_t(p.segments));
    const int tile          = int(column / uint32_t(blocks));
    const int block         = int(column) - tile * blocks;
    const int half = place / N::kWeightLanes, lane = place % N::kWeightLanes;
    Vec16 vector{};
    for (int i = 0; i < N::kVector; ++i) {
      const int unit = tile * kUnitTile + N::weight_unit(lane, half, i);
      const int k    = block * N::kBlock + N::weight_k(lane, half, i);
      if (unit >= p.units || k >= p.size) continue;
      const scalar_t x = load(p.weight + p.offset[segment] + unit * p.unit_stride + k * p.k_stride);
      memcpy(reinterpret_cast<char*>(&vector) + i * sizeof x, &x, sizeof x);
    }
    store(p.packed + v, N::prepared(vector));
  }
}

// Numbers on their way to device memory as a kernel's parameters: unlike a copy from the host's
// memory this never waits, and a CUDA graph keeps them.
constexpr int kUploaded = 256;
struct Upload {
  int64_t number[kUploaded];
};

__global__ void __launch_bounds__(kUploaded)
    upload(const __grid_constant__ Upload numbers, int64_t* to, int count) {
  const int i = threadIdx.x;
  if (i < count) store(to + i, numbers.number[i]);
}

}  // namespace
}  // namespace fusedrnn
