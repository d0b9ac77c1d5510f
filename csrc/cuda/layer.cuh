// What the kernels of both paths are given of a layer, in device memory, and what they share: where
// a row's state comes from, and what is written for it.
//
// Shapes in the letters of sequence.h. scalar_t is storage, acc_t arithmetic: what is carried from
// step to step without being an output (c, and the gradients of c and of the states) is acc_t, so
// that only h and the gates are ever rounded to float16 or bfloat16.
#pragma once

#include "product.cuh"
// The cells after it: their arithmetic is that of scalar.cuh.
#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "../walk.h"

namespace fusedrnn {
namespace {

template <class N>
struct ForwardLayer {
  using scalar_t = typename N::scalar_t;
  using acc_t    = typename N::acc_t;

  Sequences sequences;  // offsets in device memory; the step path reads none of it there
  int H, P, D;
  int64_t rows;                  // N
  const scalar_t* gates_x[2];    // [N, G*H] of each direction: the input projection with bias_ih
  const Vec16* weight_hh[2];     // in fragment order: H units, K = P, G segments
  const Vec16* weight_hr[2];     // P units, K = H, 1 segment; null without a projection
  const scalar_t* bias_hh[2];    // [G*H], or null
  const scalar_t *h0, *c0;       // [D, B, P], [D, B, H], or null for zeros
  scalar_t* gates;               // [D, N, G*H], or null if not wanted
  acc_t* extra;                  // LSTM: c [D, N, H], or [D, B, H] without every_cell. GRU: a_hn
                                 // [D, N, H], or null if not wanted
  bool every_cell;               // LSTM
  scalar_t* unprojected;         // with a projection: [D, B, H], o tanh(c) of the present step
  scalar_t* hidden;              // [D, N, P], a copy of h for backward, or null
  scalar_t *output, *h_n, *c_n;  // [N, D*P], [D, B, P], [D, B, H]
};

template <class N>
struct BackwardLayer {
  using scalar_t = typename N::scalar_t;
  using acc_t    = typename N::acc_t;

  Sequences sequences;
  int H, P, D;
  int64_t rows;
  const Vec16* weight_hh[2];  // P units, K = H of each of G segments, from block kRecurrentRow on
  const Vec16* weight_hr[2];  // H units, K = P, 1 segment; null without a projection
  const scalar_t* gates;      // [D, N, G*H], as forward left it
  const acc_t* extra;         // [D, N, H], as forward left it
  const scalar_t* previous;   // [D, N, P]: h before each row's step
  const scalar_t* c0;         // [D, B, H], or null for zeros
  const scalar_t *grad_output, *grad_h_n, *grad_c_n;  // or null for zero
  const scalar_t* grad_cells;                         // [N, D*H], or null for zero
  scalar_t* grad_gates;                               // [D, N, E*H]
  scalar_t* grad_hidden;     // [D, N, P]: the whole gradient of h; with a projection only
  acc_t* carry;              // [D, B, H]; zero at first
  acc_t *grad_h0, *grad_c0;  // [D, B, P], [D, B, H]; zero at first; null if not wanted
};

// One step of one direction's walk.
struct Step {
  int64_t offset, offset_before;         // rows before this step's, and before the previous one's
  int count, count_before, count_after;  // rows of this step, of the previous and of the next one
  bool first;                            // no previous one
  const bool* boundaries;                // [count] or null, as Walk has them
  bool reset_to_initial;

  __device__ __forceinline__ Source source(int row) const {
    const bool cut = boundaries && (first || row < count_before) && load(boundaries + row);
    return source_of(first, count_before, row, cut, reset_to_initial);
  }
};

// Step i of a direction; one without rows where i is before the first or behind the last.
FUSEDRNN_INLINE Step step_of(const Sequences& sequences, int direction, int64_t i) {
  Step step{};
  if (i < 0 || i >= sequences.T) return step;
  const Walk walk(sequences, direction);
  step.offset = walk.offset(i);
  step.count  = int(walk.count(i));
  step.first  = i == 0;
  if (i > 0) {
    step.offset_before = walk.offset(i - 1);
    step.count_before  = int(walk.count(i - 1));
  }
  if (i + 1 < sequences.T) step.count_after = int(walk.count(i + 1));
  step.boundaries       = walk.boundaries(i);
  step.reset_to_initial = sequences.reset_to_initial;
  return step;
}

// x[i] in arithmetic; 0 of a null pointer.
template <class acc_t, class scalar_t>
__device__ __forceinline__ acc_t number(const scalar_t* x, int64_t i) {
  return x ? acc_t(to_float(load(x + i))) : acc_t(0);
}
template <class acc_t, class scalar_t>
__device__ __forceinline__ void put(scalar_t* x, int64_t i, acc_t value) {
  if (x) store(x + i, Rounded<scalar_t>::of(value));
}

// x[i] += value, unless x is null.
template <class acc_t>
__device__ __forceinline__ void add(acc_t* x, int64_t i, acc_t value) {
  if (x) store(x + i, load(x + i) + value);
}

// Gates as they are saved. A sigmoid that is rounded to 1 would lose 1 - s, which its derivative and
// GRU's h are products with; so in types of 16 bits one above 1/2 is saved as s - 1, which the sign
// tells (of -0 too).
template <class C, class acc_t, class scalar_t>
__device__ __forceinline__ void put_gate(scalar_t* gates, int64_t i, int g, acc_t gate) {
  if (sizeof(scalar_t) == 2 && C::is_sigmoid(g) && !(gate <= acc_t(0.5))) gate = -(1 - gate);
  put(gates, i, gate);
}
template <class C, class acc_t, class scalar_t>
__device__ __forceinline__ acc_t saved_gate(const scalar_t* gates, int64_t i, int g) {
  const acc_t gate = number<acc_t>(gates, i);
  return sizeof(scalar_t) == 2 && C::is_sigmoid(g) && to_bits(gate) < 0 ? 1 + gate : gate;
}

// The gates' arguments of one unit, from the projection of the input.
template <class N, class C>
__device__ __forceinline__ void load_gates_x(typename N::acc_t (&gates_x)[C::kGates],
                                             const ForwardLayer<N>& a, int d, int64_t row,
                                             int unit) {
#pragma unroll
  for (int g = 0; g < C::kGates; ++g) {
    gates_x[g] = number<typename N::acc_t>(a.gates_x[d], (row * C::kGates + g) * a.H + unit);
  }
}

template <class N, class C>
__device__ __forceinline__ void load_bias(typename N::acc_t (&bias)[C::kGates],
                                          const ForwardLayer<N>& a, int d, int unit) {
#pragma unroll
  for (int g = 0; g < C::kGates; ++g) {
    bias[g] = number<typename N::acc_t>(a.bias_hh[d], int64_t(g) * a.H + unit);
  }
}

// h of unit `unit` of P, in the caller's row of the step.
template <class N>
__device__ __forceinline__ void put_h(const ForwardLayer<N>& a, int d, const Step& step, int row,
                                      int unit, typename N::acc_t h) {
  const int64_t at = step.offset + row;
  put(a.output, at * a.D * a.P + d * a.P + unit, h);
  if (a.hidden) put(a.hidden, (d * a.rows + at) * a.P + unit, h);
  if (row >= step.count_after) {
    put(a.h_n, (d * a.sequences.B + row) * a.P + unit, h);
  }
}

// What one cell computed, but h where it still has to be projected.
template <class N, class C>
__device__ __forceinline__ void put_cell(
    const ForwardLayer<N>& a, int d, const Step& step, int row, int unit,
    const typename C::template Forward<typename N::acc_t>& result) {
  const int64_t at = d * a.rows + step.offset + row, state = d * a.sequences.B + row;
  if (a.gates) {
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) {
      put_gate<C>(a.gates, (at * C::kGates + g) * a.H + unit, g, result.gates[g]);
    }
  }
  if constexpr (C::kHasCell) {
    put(a.extra, (a.every_cell ? at : state) * a.H + unit, result.extra);
    if (row >= step.count_after) put(a.c_n, state * a.H + unit, result.extra);
  } else if constexpr (C::kHasExtra) {
    put(a.extra, at * a.H + unit, result.extra);
  }
  if (a.unprojected) {
    put(a.unprojected, state * a.H + unit, result.h);
  } else {
    put_h(a, d, step, row, unit, result.h);
  }
}

// What backward reads of one cell.
template <class N, class C>
struct Saved {
  using acc_t = typename N::acc_t;
  acc_t gates[C::kGates], extra, prev;
};

template <class N, class C>
__device__ __forceinline__ Saved<N, C> load_saved(const BackwardLayer<N>& a, int d,
                                                  const Step& step, int row, int unit) {
  using acc_t = typename N::acc_t;
  Saved<N, C> saved{};
  const int64_t at = d * a.rows + step.offset + row;
#pragma unroll
  for (int g = 0; g < C::kGates; ++g) {
    saved.gates[g] = saved_gate<C, acc_t>(a.gates, (at * C::kGates + g) * a.H + unit, g);
  }
  if constexpr (C::kHasExtra) saved.extra = number<acc_t>(a.extra, at * a.H + unit);
  if constexpr (C::kPrevIsH) saved.prev = number<acc_t>(a.previous, at * a.P + unit);
  if constexpr (C::kHasCell) {
    const Source source = step.source(row);
    if (source == Source::kPrevious) {
      saved.prev = number<acc_t>(a.extra, (d * a.rows + step.offset_before + row) * a.H + unit);
    } else if (source == Source::kInitial) {
      saved.prev = number<acc_t>(a.c0, (d * a.sequences.B + row) * a.H + unit);
    }
  }
  return saved;
}

// `passed`, the gradient of a state before the step `after`, goes to that state's source: it is what
// the step before receives (returned), the initial state's (then add_to_initial(passed)), or nobody's.
template <class acc_t, class Add>
__device__ __forceinline__ acc_t receive(const Step& after, int row, acc_t passed,
                                         const Add& add_to_initial) {
  if (row >= after.count) return 0;
  const Source source = after.source(row);
  if (source == Source::kPrevious) return passed;
  if (source == Source::kInitial) add_to_initial(passed);
  return 0;
}

// What reaches a state of a row's step from outside: from its place in `every`, [N, D*width], and, at
// the row's last step, from `last`, [D, B, width]. Either may be null, for zero.
template <class N>
__device__ __forceinline__ typename N::acc_t grad_from_outside(const BackwardLayer<N>& a, int d,
                                                               const Step& step, int row, int unit,
                                                               int width,
                                                               const typename N::scalar_t* every,
                                                               const typename N::scalar_t* last) {
  using acc_t = typename N::acc_t;
  acc_t grad  = number<acc_t>(every, ((step.offset + row) * a.D + d) * width + unit);
  if (row >= step.count_after) {
    grad += number<acc_t>(last, (d * a.sequences.B + row) * width + unit);
  }
  return grad;
}

template <class N>
__device__ __forceinline__ typename N::acc_t grad_of_h(const BackwardLayer<N>& a, int d,
                                                       const Step& step, int row, int unit) {
  return grad_from_outside(a, d, step, row, unit, a.P, a.grad_output, a.grad_h_n);
}

template <class N>
__device__ __forceinline__ typename N::acc_t grad_of_c(const BackwardLayer<N>& a, int d,
                                                       const Step& step, int row, int unit) {
  return grad_from_outside(a, d, step, row, unit, a.H, a.grad_cells, a.grad_c_n);
}

template <class N, class C>
__device__ __forceinline__ void put_grad_gates(
    const BackwardLayer<N>& a, int d, const Step& step, int row, int unit,
    const typename N::acc_t (&grad_gates)[C::kGradGates]) {
  const int64_t at = d * a.rows + step.offset + row;
#pragma unroll
  for (int e = 0; e < C::kGradGates; ++e) {
    put(a.grad_gates, (at * C::kGradGates + e) * a.H + unit, grad_gates[e]);
  }
}

}  // namespace
}  // namespace fusedrnn
