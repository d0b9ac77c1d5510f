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

// h after a row's step, from what forward saved; `before`: h before it, which only GRU asks for.
template <class N, class C>
__device__ __forceinline__ typename N::scalar_t hidden_of(const PreviousLayer<N>& a, int64_t row,
                                                          int unit, typename N::scalar_t before) {
  using acc_t = typename N::acc_t;
  if (a.hidden) return load(a.hidden + row * a.P + unit);
  acc_t gates[C::kGates], h;
#pragma unroll
  for (int g = 0; g < C::kGates; ++g) {
    gates[g] = saved_gate<C, acc_t>(g, load(a.gates + (row * C::kGates + g) * a.H + unit));
  }
  if constexpr (C::kPrevIsH) {  // GRU
    h = C::hidden(gates[1], gates[2], acc_t(to_float(before)));
  } else if constexpr (C::kHasCell) {  // LSTM: o tanh(c)
    h = gates[3] * tanh(load(a.extra + row * a.H + unit));
  } else {
    h = gates[0];
  }
  return Rounded<typename N::scalar_t>::of(h);
}

// A thread takes one sequence's unit, for a.chunk steps: all where each h follows from the one
// before. Grid: B*P numbers, directions, chunks of steps.
template <class N, class C>
__global__ void __launch_bounds__(kPreviousThreads)
    previous_states(const __grid_constant__ PreviousLayer<N> a) {
  using acc_t     = typename N::acc_t;
  const int d     = blockIdx.y;
  const int64_t B = a.sequences.B;
  const int64_t n = int64_t(blockIdx.x) * kPreviousThreads + threadIdx.x;
  const int row = int(n / a.P), unit = int(n % a.P);
  if (row >= B) return;
  const int64_t begin = int64_t(blockIdx.z) * a.chunk;
  const int64_t end   = min64(begin + a.chunk, a.sequences.T);
  typename N::scalar_t h{};
  for (int64_t t = begin > 0 ? begin - 1 : 0; t < end; ++t) {
    const Step step = step_of(a.sequences, d, t);
    if (row >= step.count) continue;
    const Source source = step.source(row);
    if (source != Source::kPrevious) {
      h = {};
      if (source == Source::kInitial && a.h0) h = load(a.h0 + (d * B + row) * a.P + unit);
    }
    const int64_t at = d * a.rows + step.offset + row;
    if (t >= begin) store(a.previous + at * a.P + unit, h);
    h = hidden_of<N, C>(a, at, unit, h);
  }
}

}  // namespace
}  // namespace fusedrnn
