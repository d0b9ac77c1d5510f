// h before each step, for all steps: backward's `previous`, which the gradient of weight_hh is a
// product with. Either from a copy of h, or computed again from what forward saved.
#pragma once

#include "layer.cuh"

namespace fusedrnn {
namespace {

template <class N>
struct PreviousLayer {
  using scalar_t = typename N::scalar_t;
  using acc_t    = typename N::acc_t;

  Sequences sequences;  // offsets in device memory
  int H, P, D;
  int64_t rows, chunk;
  const scalar_t *gates, *hidden;  // [D, N, G*H], [D, N, P]: gates are read where hidden is null
  const acc_t* extra;              // [D, N, H]
  const scalar_t* h0;              // [D, B, P], or null for zeros
  scalar_t* previous;              // [D, N, P]
};

constexpr int kPreviousThreads = 128;

// What forward saved of a row's step that h after it is made of.
template <class N, class C>
struct Left {
  using scalar_t = typename N::scalar_t;
  using acc_t    = typename N::acc_t;

  scalar_t hidden{}, gates[C::kGates]{};
  acc_t extra{};

  __device__ __forceinline__ void load_from(const PreviousLayer<N>& a, int64_t row, int unit) {
    if (a.hidden) {
      hidden = load(a.hidden + row * a.P + unit);
      return;
    }
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) {
      gates[g] = load(a.gates + (row * C::kGates + g) * a.H + unit);
    }
    if constexpr (C::kHasCell) extra = load(a.extra + row * a.H + unit);
  }

  // `before`: h before the step, which only GRU asks for.
  __device__ __forceinline__ scalar_t h(const PreviousLayer<N>& a, scalar_t before) const {
    if (a.hidden) return hidden;
    acc_t gate[C::kGates];
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) gate[g] = saved_gate<C, acc_t>(g, gates[g]);
    return Rounded<scalar_t>::of(C::hidden(gate, extra, acc_t(to_float(before))));
  }
};

constexpr int kPreviousAtOnce = 8;  // steps whose numbers are loaded before any is used

// A thread takes one sequence's unit, for a.chunk steps: all where each h follows from the one
// before. Grid: B*P numbers, directions, chunks of steps.
template <class N, class C>
__global__ void __launch_bounds__(kPreviousThreads)
    previous_states(const __grid_constant__ PreviousLayer<N> a) {
  const int d     = blockIdx.y;
  const int64_t B = a.sequences.B;
  const int64_t n = int64_t(blockIdx.x) * kPreviousThreads + threadIdx.x;
  const int row = int(n / a.P), unit = int(n % a.P);
  if (row >= B) return;
  const int64_t begin = int64_t(blockIdx.z) * a.chunk;
  const int64_t end   = min64(begin + a.chunk, a.sequences.T);
  typename N::scalar_t h{};
  for (int64_t t = begin > 0 ? begin - 1 : 0; t < end; t += kPreviousAtOnce) {
    Left<N, C> left[kPreviousAtOnce];
    int64_t at[kPreviousAtOnce];  // the row in all steps'; -1: the step has it not
    Source from[kPreviousAtOnce];
#pragma unroll
    for (int i = 0; i < kPreviousAtOnce; ++i) {
      const Step step = step_of(a.sequences, d, t + i < end ? t + i : -1);
      at[i]           = row < step.count ? d * a.rows + step.offset + row : -1;
      if (at[i] < 0) continue;
      from[i] = step.source(row);
      left[i].load_from(a, at[i], unit);
    }
#pragma unroll
    for (int i = 0; i < kPreviousAtOnce; ++i) {
      if (at[i] < 0) continue;
      if (from[i] != Source::kPrevious) {
        h = {};
        if (from[i] == Source::kInitial && a.h0) h = load(a.h0 + (d * B + row) * a.P + unit);
      }
      if (t + i >= begin) store(a.previous + at[i] * a.P + unit, h);
      h = left[i].h(a, h);
    }
  }
}

}  // namespace
}  // namespace fusedrnn
