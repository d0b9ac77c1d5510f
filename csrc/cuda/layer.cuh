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
  int64_t rows;                // N
  const scalar_t* gates_x[2];  // [N, G*H] of each direction: the input projection with bias_ih
  const Vec16* weight_hh[2];   // in fragment order: H units, K = P, G segments
  const Vec16* weight_hr[2];   // P units, K = H, 1 segment; null without a projection
  const scalar_t* bias_hh[2];  // [G*H], or null
  const scalar_t *h0, *c0;     // [D, B, P], [D, B, H], or null for zeros
  scalar_t* gates;             // [D, N, G*H], or null if not wanted
  acc_t* extra;           // LSTM: c [D, N, H], or without every_cell [D, B, H] on the step path
                          // and null on the block path. GRU: a_hn [D, N, H], or null
  bool every_cell;        // LSTM
  scalar_t* unprojected;  // with a projection: [D, B, H], o tanh(c) of the present step
  scalar_t* hidden;       // [D, N, P], a copy of h for backward, or null
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
  acc_t* carry;              // [D, B, H]: the step path's working memory
  acc_t *grad_h0, *grad_c0;  // [D, B, P], [D, B, H]; zero at first; null if not wanted
};

// One step of one direction's walk.
struct Step {
  int64_t offset, offset_before;         // rows before this step's, and before the previous one's
  int count, count_before, count_after;  // rows of this step, of the previous and of the next one
  bool first;                            // no previous one
  const bool* boundaries;                // [count] or null, as Walk has them
  bool reset_to_initial;

  // Whether it is the last of some row.
  __device__ __forceinline__ bool ends_some() const { return count_after < count; }

  // Whether all its rows' states are the previous step's.
  __device__ __forceinline__ bool all_previous() const {
    return !boundaries && !first && count_before >= count;
  }

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
  if (all_alike(sequences)) {  // the same as below, at once
    const int64_t B    = sequences.B;
    step.offset        = walk.time(i) * B;
    step.offset_before = i > 0 ? walk.time(i - 1) * B : 0;
    step.count         = int(B);
    step.count_before  = i > 0 ? int(B) : 0;
    step.count_after   = i + 1 < sequences.T ? int(B) : 0;
    step.first         = i == 0;
    return step;
  }
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

// Where the numbers lie that a thread computes: the i-th is that of row `row` + Numbers::row(i) of the
// batch and of unit `unit` + Numbers::unit(i), known to the compiler but for the first. So a matrix
// takes one long calculation of an address for all of them. Numbers::kOverlaps: each step is a kernel,
// which may begin beside the step before.
template <class Numbers>
struct Place {
  int row, unit;

  __device__ __forceinline__ int row_of(int i) const { return row + Numbers::row(i); }
  __device__ __forceinline__ int unit_of(int i) const { return unit + Numbers::unit(i); }

  // The first in a matrix [.., width], whose row `begin` is the batch's first; the i-th from there.
  template <class T>
  __device__ __forceinline__ T* in(T* matrix, int64_t begin, int width) const {
    return matrix + ((begin + row) * width + unit);
  }
  template <class T>
  static __device__ __forceinline__ T* ith(T* first, int width, int i) {
    return first + Numbers::row(i) * width + Numbers::unit(i);
  }

  // Which of them rows below `rows` and units below `units` have.
  struct Has {
    bool of[Numbers::kCount];
  };
  __device__ __forceinline__ Has has(int rows, int units) const {
    Has has;
#pragma unroll
    for (int i = 0; i < Numbers::kCount; ++i) {
      has.of[i] = row_of(i) < rows && unit_of(i) < units;
    }
    return has;
  }

  // f(i) for these.
  template <class F>
  static __device__ __forceinline__ void each(const Has& has, const F& f) {
#pragma unroll
    for (int i = 0; i < Numbers::kCount; ++i) {
      if (has.of[i]) f(i);
    }
  }

  // Where the states before a step of B sequences come from; for rows beyond those, anywhere.
  struct Sources {
    bool all_previous;
    Source of[Numbers::kCount];
  };
  __device__ __forceinline__ Sources sources(const Step& step, int64_t B) const {
    const bool all = step.count == B || row_of(Numbers::kRows - 1) < step.count;
    Sources sources{all && step.all_previous()};
#pragma unroll
    for (int i = 0; i < Numbers::kCount; ++i) {
      sources.of[i] = i >= Numbers::kRows      ? sources.of[i - Numbers::kRows]  // of the same row
                      : sources.all_previous   ? Source::kPrevious
                      : row_of(i) < step.count ? step.source(row_of(i))
                                               : Source::kZero;
    }
    return sources;
  }

  // Adds value to the i-th number of a matrix, unless that is null.
  template <class acc_t>
  __device__ __forceinline__ void add(acc_t* matrix, int64_t begin, int width, int i,
                                      acc_t value) const {
    if (!matrix) return;
    acc_t* const to = ith(in(matrix, begin, width), width, i);
    store(to, (Numbers::kOverlaps ? load_past_l1(to) : load(to)) + value);
  }
};

template <class T, class acc_t>
__device__ __forceinline__ void put(T* to, acc_t value) {
  store(to, Rounded<T>::of(value));
}

// Gates as they are saved. A sigmoid that is rounded to 1 would lose 1 - s, which its derivative and
// GRU's h are products with; so in types of 16 bits one above 1/2 is saved as s - 1, which the sign
// tells (of -0 too).
template <class C, class scalar_t, class acc_t>
__device__ __forceinline__ acc_t gate_to_save(int g, acc_t gate) {
  return sizeof(scalar_t) == 2 && C::is_sigmoid(g) && !(gate <= acc_t(0.5)) ? -(1 - gate) : gate;
}
template <class C, class acc_t, class scalar_t>
__device__ __forceinline__ acc_t saved_gate(int g, scalar_t saved) {
  const acc_t gate = to_float(saved);
  return sizeof(scalar_t) == 2 && C::is_sigmoid(g) && to_bits(gate) < 0 ? 1 + gate : gate;
}

// What forward reads of the thread's numbers, as it is stored: converted when it was loaded, it would
// be waited for at once.
template <class N, class C, class Numbers>
struct Inputs {
  using scalar_t = typename N::scalar_t;
  using acc_t    = typename N::acc_t;

  scalar_t gates_x[Numbers::kCount][C::kGates]{};  // from the projection of the input

  __device__ __forceinline__ void load_from(const ForwardLayer<N>& a, int d, const Step& step,
                                            const Place<Numbers>& place) {
    const int width             = C::kGates * a.H;
    const scalar_t* const first = place.in(a.gates_x[d], step.offset, width);
    place.each(place.has(step.count, a.H), [&](int i) {
#pragma unroll
      for (int g = 0; g < C::kGates; ++g) {
        gates_x[i][g] = load(place.ith(first + g * a.H, width, i));
      }
    });
  }

  __device__ __forceinline__ auto forward(int i, const acc_t (&gates_h)[C::kGates],
                                          acc_t prev) const {
    acc_t x[C::kGates];
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) x[g] = to_float(gates_x[i][g]);
    auto units = C::begin(x, gates_h, prev);
    C::finish(&units, prev);
    return units;
  }
};

// The recurrent bias of a unit.
template <class N, class C>
__device__ __forceinline__ void load_bias(typename N::scalar_t (&bias)[C::kGates],
                                          const ForwardLayer<N>& a, int d, int unit) {
#pragma unroll
  for (int g = 0; g < C::kGates; ++g) {
    if (a.bias_hh[d] && unit < a.H) bias[g] = load(a.bias_hh[d] + g * a.H + unit);
  }
}

// h of units of P.
template <class N, class Numbers, class H>
__device__ __forceinline__ void put_h(const ForwardLayer<N>& a, int d, const Step& step,
                                      const Place<Numbers>& place, const H& h) {
  const auto has    = place.has(step.count, a.P);
  const auto output = place.in(a.output + d * a.P, step.offset, a.D * a.P);
  place.each(has, [&](int i) { put(place.ith(output, a.D * a.P, i), h(i)); });
  if (a.hidden) {
    const auto hidden = place.in(a.hidden, d * a.rows + step.offset, a.P);
    place.each(has, [&](int i) { put(place.ith(hidden, a.P, i), h(i)); });
  }
  if (step.ends_some()) {
    const auto h_n = place.in(a.h_n, d * a.sequences.B, a.P);
    place.each(has, [&](int i) {
      if (place.row_of(i) >= step.count_after) put(place.ith(h_n, a.P, i), h(i));
    });
  }
}

// What the cells computed, but h where it still has to be projected.
template <class N, class C, class Numbers>
__device__ __forceinline__ void put_cells(
    const ForwardLayer<N>& a, int d, const Step& step, const Place<Numbers>& place,
    const typename C::template Forward<typename N::acc_t> (&results)[Numbers::kCount]) {
  const int64_t row = d * a.rows + step.offset, state = d * a.sequences.B;
  const auto has = place.has(step.count, a.H);
  if (a.gates) {
    const int width  = C::kGates * a.H;
    const auto gates = place.in(a.gates, row, width);
    place.each(has, [&](int i) {
#pragma unroll
      for (int g = 0; g < C::kGates; ++g) {
        put(place.ith(gates + g * a.H, width, i),
            gate_to_save<C, typename N::scalar_t>(g, results[i].gates[g]));
      }
    });
  }
  if constexpr (C::kHasExtra) {
    if (a.extra) {
      const auto extra = place.in(a.extra, C::kHasCell && !a.every_cell ? state : row, a.H);
      place.each(has, [&](int i) { put(place.ith(extra, a.H, i), results[i].extra); });
    }
  }
  if (C::kHasCell && step.ends_some()) {
    const auto c_n = place.in(a.c_n, state, a.H);
    place.each(has, [&](int i) {
      if (place.row_of(i) >= step.count_after) put(place.ith(c_n, a.H, i), results[i].extra);
    });
  }
  if (a.unprojected) {
    const auto unprojected = place.in(a.unprojected, state, a.H);
    place.each(has, [&](int i) { put(place.ith(unprojected, a.H, i), results[i].h); });
  } else {
    put_h(a, d, step, place, [&](int i) { return results[i].h; });
  }
}

// What backward reads of the thread's numbers that forward left or that came from outside, as it is
// stored.
template <class N, class C, class Numbers>
struct Saved {
  using scalar_t = typename N::scalar_t;
  using acc_t    = typename N::acc_t;

  scalar_t gates[Numbers::kCount][C::kGates]{};
  acc_t extra[Numbers::kCount]{};
  std::conditional_t<C::kPrevIsH, scalar_t, acc_t> prev[Numbers::kCount]{};
  scalar_t grad_h[Numbers::kCount]{};  // of the output

  // Of cells, for `sources` of their step.
  __device__ __forceinline__ void load_from(const BackwardLayer<N>& a, int d, const Step& step,
                                            const Place<Numbers>& place,
                                            const typename Place<Numbers>::Sources& sources) {
    const int64_t row        = d * a.rows + step.offset;
    const int width          = C::kGates * a.H;
    const auto has           = place.has(step.count, a.H);
    const auto of_gates      = place.in(a.gates, row, width);
    const acc_t* const extra = place.in(a.extra, row, a.H);
    place.each(has, [&](int i) {
#pragma unroll
      for (int g = 0; g < C::kGates; ++g) {
        gates[i][g] = load(place.ith(of_gates + g * a.H, width, i));
      }
      if constexpr (C::kHasExtra) this->extra[i] = load(place.ith(extra, a.H, i));
    });
    if constexpr (C::kPrevIsH) {
      const auto previous = place.in(a.previous, row, a.P);
      place.each(has, [&](int i) { prev[i] = load(place.ith(previous, a.P, i)); });
    }
    if constexpr (C::kHasCell) {
      const auto before = place.in(a.extra, d * a.rows + step.offset_before, a.H);
      if (sources.all_previous) {
        place.each(has, [&](int i) { prev[i] = load(place.ith(before, a.H, i)); });
      } else {
        place.each(has, [&](int i) {
          prev[i] = 0;
          if (sources.of[i] == Source::kPrevious) {
            prev[i] = load(place.ith(before, a.H, i));
          } else if (sources.of[i] == Source::kInitial && a.c0) {
            prev[i] = to_float(load(place.ith(place.in(a.c0, d * a.sequences.B, a.H), a.H, i)));
          }
        });
      }
    }
  }

  __device__ __forceinline__ void load_grad_h(const BackwardLayer<N>& a, int d, const Step& step,
                                              const Place<Numbers>& place) {
    if (!a.grad_output) return;
    const auto output = place.in(a.grad_output + d * a.P, step.offset, a.D * a.P);
    place.each(place.has(step.count, a.P),
               [&](int i) { grad_h[i] = load(place.ith(output, a.D * a.P, i)); });
  }

  // h's and c's gradients from outside, but of the output, are added to these. Loaded where they are
  // used: most steps have none.
  __device__ __forceinline__ static void receive_h(acc_t (&grad_h)[Numbers::kCount],
                                                   const BackwardLayer<N>& a, int d,
                                                   const Step& step, const Place<Numbers>& place) {
    receive_last(grad_h, a, d, step, place, a.P, a.grad_h_n);
  }
  __device__ __forceinline__ static void receive_c(acc_t (&grad_c)[Numbers::kCount],
                                                   const BackwardLayer<N>& a, int d,
                                                   const Step& step, const Place<Numbers>& place) {
    if (a.grad_cells) {
      const auto cells = place.in(a.grad_cells + d * a.H, step.offset, a.D * a.H);
      place.each(place.has(step.count, a.H),
                 [&](int i) { grad_c[i] += to_float(load(place.ith(cells, a.D * a.H, i))); });
    }
    receive_last(grad_c, a, d, step, place, a.H, a.grad_c_n);
  }

  // With all that h received, and the carry.
  __device__ __forceinline__ auto backward(int i, acc_t received, acc_t carry) const {
    acc_t of_gates[C::kGates];
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) of_gates[g] = saved_gate<C, acc_t>(g, gates[i][g]);
    return C::backward(of_gates, extra[i], acc_t(to_float(prev[i])), received, carry);
  }

 private:
  // From [D, B, width]: what the states after rows' last steps receive.
  __device__ __forceinline__ static void receive_last(acc_t (&grad)[Numbers::kCount],
                                                      const BackwardLayer<N>& a, int d,
                                                      const Step& step, const Place<Numbers>& place,
                                                      int width, const scalar_t* last) {
    if (!last || !step.ends_some()) return;
    const auto from = place.in(last, d * a.sequences.B, width);
    place.each(place.has(step.count, width), [&](int i) {
      if (place.row_of(i) < step.count_after) return;
      grad[i] += to_float(load(place.ith(from, width, i)));
    });
  }
};

// The gradients of the states before a step go to their sources. Left are those that the step before
// receives; what initial states do is added to `initial`, [.., width], unless that is null.
template <class acc_t, class Numbers>
__device__ __forceinline__ void receive(const typename Place<Numbers>::Sources& sources,
                                        const Place<Numbers>& place, acc_t (&grad)[Numbers::kCount],
                                        acc_t* initial, int64_t begin, int width) {
  if (sources.all_previous) return;
#pragma unroll
  for (int i = 0; i < Numbers::kCount; ++i) {
    if (sources.of[i] == Source::kPrevious) continue;
    if (sources.of[i] == Source::kInitial && place.unit_of(i) < width) {
      place.add(initial, begin, width, i, grad[i]);
    }
    grad[i] = 0;
  }
}

template <class N, class C, class Numbers>
__device__ __forceinline__ void put_grad_gates(
    const BackwardLayer<N>& a, int d, const Step& step, const Place<Numbers>& place,
    const typename C::template Backward<typename N::acc_t> (&results)[Numbers::kCount]) {
  const int width  = C::kGradGates * a.H;
  const auto first = place.in(a.grad_gates, d * a.rows + step.offset, width);
  place.each(place.has(step.count, a.H), [&](int i) {
#pragma unroll
    for (int e = 0; e < C::kGradGates; ++e) {
      put(place.ith(first + e * a.H, width, i), results[i].grad_gates[e]);
    }
  });
}

}  // namespace
}  // namespace fusedrnn
