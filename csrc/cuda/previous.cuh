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
  int64_t rows;
  const scalar_t *gates, *hidden;  // [D, N, G*H], [D, N, P]: gates are read where hidden is null
  const acc_t* extra;              // [D, N, H]
  const scalar_t* h0;              // [D, B, P], or null for zeros
  scalar_t* previous;              // [D, N, P]
};

constexpr int kPreviousThreads = 128;

// A thread walks over time for one sequence's unit. Grid: B*P numbers, directions.
template <class N, class C>
__global__ void __launch_bounds__(kPreviousThreads)
    previous_states(const __grid_constant__ PreviousLayer<N> a) {
  using acc_t     = typename N::acc_t;
  const int d     = blockIdx.y;
  const int64_t B = a.sequences.B;
  const int64_t n = int64_t(blockIdx.x) * kPreviousThreads + threadIdx.x;
  const int row = int(n / a.P), unit = int(n % a.P);
  if (row >= B) return;
  typename N::scalar_t h{};
  for (int64_t t = 0; t < a.sequences.T; ++t) {
    const Step step = step_of(a.sequences, d, t);
    if (row >= step.count) continue;
    const Source source = step.source(row);
    if (source != Source::kPrevious) {
      h = Rounded<typename N::scalar_t>::of(
          source == Source::kInitial ? number<acc_t>(a.h0, (d * B + row) * a.P + unit) : acc_t(0));
    }
    const int64_t at = d * a.rows + step.offset + row;
    store(a.previous + at * a.P + unit, h);
    if (a.hidden) {
      h = load(a.hidden + at * a.P + unit);
      continue;
    }
    acc_t gates[C::kGates], next;
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) {
      gates[g] = number<acc_t>(a.gates, (at * C::kGates + g) * a.H + unit);
    }
    if constexpr (C::kPrevIsH) {  // GRU
      next = C::hidden(gates[1], gates[2], acc_t(to_float(h)));
    } else if constexpr (C::kHasCell) {  // LSTM: o tanh(c)
      next = gates[3] * tanh(number<acc_t>(a.extra, at * a.H + unit));
    } else {
      next = gates[0];
    }
    h = Rounded<typename N::scalar_t>::of(next);
  }
}

}  // namespace
}  // namespace fusedrnn
