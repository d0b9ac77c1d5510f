// The step path: one kernel a time step, the recurrent product with the gates in its epilogue. Any
// shape, any kind of number, any option.
//
// A CTA computes one tile of units for kTiles * 8 rows, and all gates of these units. Its warps
// share K between them and read the operands straight from memory, in the order of their fragments:
// no weight is used by two warps. Their sums meet in shared memory, always in the same order.
#pragma once

#include "layer.cuh"

namespace fusedrnn {
namespace {

constexpr int kStepWarps   = 4;
constexpr int kStepThreads = kStepWarps * kWarp;
constexpr int kStepCtas    = 2;  // of a multiprocessor, at least: at 4, float32 spills

// Both directions' steps: direction 1 walks from the other end.
struct StepPair {
  Step of[2];
};

// 16 bytes of a row of states from k on; zeros behind its end, or of no row.
template <class N>
__device__ __forceinline__ Vec16 load_states(const typename N::scalar_t* row, int k, int size) {
  Vec16 v{};
  if (!row || k >= size) return v;
  if (reinterpret_cast<uintptr_t>(row) % sizeof v == 0 && k + N::kVector <= size) {
    v = load(reinterpret_cast<const Vec16*>(row + k));
  } else {
#pragma unroll
    for (int i = 0; i < N::kVector; ++i) {
      if (k + i < size) {
        const auto x = load(row + k + i);
        memcpy(reinterpret_cast<char*>(&v) + i * sizeof x, &x, sizeof x);
      }
    }
  }
  return N::prepared(v);
}

template <class N, int kSegments, int kTiles>
constexpr int kStepShared =
    kStepWarps * kSegments * kTiles * kRowTile * kUnitTile * int(sizeof(typename N::acc_t));

// The product of one tile of units with the rows `row_of(i)`, i < 8 * kTiles (null for zeros), the
// states of segment s beginning at s * kStride; left in shared memory for `sum_of`. For all threads
// of the CTA; it ends in a barrier.
template <class N, int kSegments, int kTiles, bool kSameStates, class RowOf>
__device__ __forceinline__ void multiply(const Vec16* weights, int tile, int size,
                                         const RowOf& row_of) {
  using acc_t    = typename N::acc_t;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  acc_t sums[kSegments][kTiles][kSums] = {};
  const typename N::scalar_t* rows[kTiles][N::kStateVectors];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < N::kStateVectors; ++i) {
      rows[t][i] = row_of(t * kRowTile + N::state_row(lane, i));
    }
  }
  const int blocks  = blocks_of<N>(size);
  weights          += int64_t(tile) * blocks * kSegments * kFragment<N>;
  for (int block = warp; block < blocks; block += kStepWarps) {
    const int k = block * N::kBlock + N::state_k(lane);
    Vec16 states[kTiles][N::kStateVectors];
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      if (s == 0 || !kSameStates) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
          for (int i = 0; i < N::kStateVectors; ++i) {
            const auto* row = rows[t][i] ? rows[t][i] + int64_t(s) * size : nullptr;
            states[t][i]    = load_states<N>(row, k, size);
          }
        }
      }
      Vec16 fragment[2];
      load_weights<N>(fragment, weights + (int64_t(block) * kSegments + s) * kFragment<N>, lane);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) N::multiply(sums[s][t], fragment, states[t]);
    }
  }
  // [warps][segments][rows][units]
  acc_t* shared = reinterpret_cast<acc_t*>(shared_memory());
#pragma unroll
  for (int s = 0; s < kSegments; ++s) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        const int row = t * kRowTile + sum_row(lane, i);
        store(shared + ((warp * kSegments + s) * kTiles * kRowTile + row) * kUnitTile +
                  sum_unit(lane, i),
              sums[s][t][i]);
      }
    }
  }
  sync_threads();
}

template <class N, int kSegments, int kTiles>
__device__ __forceinline__ typename N::acc_t sum_of(int segment, int row, int unit) {
  using acc_t         = typename N::acc_t;
  const acc_t* shared = reinterpret_cast<const acc_t*>(shared_memory());
  acc_t sum           = 0;
#pragma unroll
  for (int warp = 0; warp < kStepWarps; ++warp) {
    sum +=
        load(shared + ((warp * kSegments + segment) * kTiles * kRowTile + row) * kUnitTile + unit);
  }
  return sum;
}

// Calls f(row, unit) for the CTA's share of its tile, `row` from 0 to 8 * kTiles - 1.
template <int kTiles, class F>
__device__ __forceinline__ void for_each(const F& f) {
  for (int i = threadIdx.x; i < kTiles * kRowTile * kUnitTile; i += kStepThreads) {
    f(i / kUnitTile, i % kUnitTile);
  }
}

// Grid: tiles of rows, tiles of H, directions.
template <class N, class C, int kTiles>
__global__ void __launch_bounds__(kStepThreads, kStepCtas)
    forward_step(const __grid_constant__ ForwardLayer<N> a,
                 const __grid_constant__ StepPair steps) {
  using scalar_t  = typename N::scalar_t;
  using acc_t     = typename N::acc_t;
  const int d     = blockIdx.z;
  const Step step = steps.of[d];
  const int first = blockIdx.x * kTiles * kRowTile;
  const int64_t B = a.sequences.B;
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (first >= step.count) return;
  const auto h_before = [&](int row) -> const scalar_t* {
    if (row >= step.count) return nullptr;
    const Source source = step.source(row);
    if (source == Source::kPrevious) {
      return a.output + (step.offset_before + row) * a.D * a.P + d * a.P;
    }
    return source == Source::kInitial && a.h0 ? a.h0 + (d * B + row) * a.P : nullptr;
  };
  multiply<N, C::kGates, kTiles, true>(a.weight_hh[d], blockIdx.y, a.P,
                                       [&](int i) { return h_before(first + i); });
  for_each<kTiles>([&](int i, int j) {
    const int row = first + i, unit = blockIdx.y * kUnitTile + j;
    if (row >= step.count || unit >= a.H) return;
    acc_t gates_x[C::kGates], gates_h[C::kGates];
    load_gates_x<N, C>(gates_x, a, d, step.offset + row, unit);
    load_bias<N, C>(gates_h, a, d, unit);
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) gates_h[g] += sum_of<N, C::kGates, kTiles>(g, i, j);
    acc_t prev = 0;
    if constexpr (C::kPrevIsH) prev = number<acc_t>(h_before(row), unit);
    if constexpr (C::kHasCell) {
      const Source source = step.source(row);
      const int64_t state = d * B + row;
      const int64_t at    = a.every_cell ? d * a.rows + step.offset_before + row : state;
      if (source == Source::kPrevious) {
        prev = number<acc_t>(a.extra, at * a.H + unit);
      } else if (source == Source::kInitial) {
        prev = number<acc_t>(a.c0, state * a.H + unit);
      }
    }
    put_cell<N, C>(a, d, step, row, unit, C::forward(gates_x, gates_h, prev));
  });
}

// h = weight_hr (o tanh(c)), after forward_step. Grid: tiles of rows, tiles of P, directions.
template <class N, int kTiles>
__global__ void __launch_bounds__(kStepThreads, kStepCtas)
    forward_projection(const __grid_constant__ ForwardLayer<N> a,
                       const __grid_constant__ StepPair steps) {
  const int d     = blockIdx.z;
  const Step step = steps.of[d];
  const int first = blockIdx.x * kTiles * kRowTile;
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (first >= step.count) return;
  multiply<N, 1, kTiles, true>(a.weight_hr[d], blockIdx.y, a.H,
                               [&](int i) -> const typename N::scalar_t* {
                                 const int row = first + i;
                                 if (row >= step.count) return nullptr;
                                 return a.unprojected + (d * a.sequences.B + row) * a.H;
                               });
  for_each<kTiles>([&](int i, int j) {
    const int row = first + i, unit = blockIdx.y * kUnitTile + j;
    if (row >= step.count || unit >= a.P) return;
    put_h(a, d, step, row, unit, sum_of<N, 1, kTiles>(0, i, j));
  });
}

// The backward of one cell, for a thread's row and unit; grad_h: what h received, and its carry.
template <class N, class C>
__device__ __forceinline__ void backward_cell(const BackwardLayer<N>& a, int d, const Step& step,
                                              int row, int unit, typename N::acc_t grad_h,
                                              typename N::acc_t carry) {
  if constexpr (C::kHasCell) carry += grad_of_c(a, d, step, row, unit);
  const Saved<N, C> saved = load_saved<N, C>(a, d, step, row, unit);
  const auto result       = C::backward(saved.gates, saved.extra, saved.prev, grad_h, carry);
  put_grad_gates<N, C>(a, d, step, row, unit, result.grad_gates);
  if constexpr (C::kHasCarry) {
    put(a.carry, (d * a.sequences.B + row) * a.H + unit, result.carry);
  }
}

// The carry that the step `after` left, LSTM's for c and GRU's for h.
template <class N, class C>
__device__ __forceinline__ typename N::acc_t receive_carry(const BackwardLayer<N>& a, int d,
                                                           const Step& after, int row, int unit) {
  if constexpr (C::kHasCarry) {
    if (row >= after.count) return 0;
    using acc_t      = typename N::acc_t;
    const int64_t at = (d * a.sequences.B + row) * a.H + unit;
    return receive(after, row, load(a.carry + at),
                   [&](acc_t passed) { add(C::kHasCell ? a.grad_c0 : a.grad_h0, at, passed); });
  } else {
    return 0;
  }
}

// The gradients of step `steps`, of what `afters`, the step after it, passes back. Either may have
// no rows: then there is nothing to receive, or nothing but the initial states to give. With a
// projection it ends at h, and backward_projection goes on. Grid: tiles of rows, of P, directions.
template <class N, class C, int kTiles>
__global__ void __launch_bounds__(kStepThreads, kStepCtas)
    backward_step(const __grid_constant__ BackwardLayer<N> a,
                  const __grid_constant__ StepPair steps, const __grid_constant__ StepPair afters) {
  using scalar_t  = typename N::scalar_t;
  using acc_t     = typename N::acc_t;
  const int d     = blockIdx.z;
  const Step step = steps.of[d], after = afters.of[d];
  const int first = blockIdx.x * kTiles * kRowTile;
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (first >= step.count && first >= after.count) return;
  multiply<N, C::kGates, kTiles, false>(
      a.weight_hh[d], blockIdx.y, a.H, [&](int i) -> const scalar_t* {
        const int row = first + i;
        if (row >= after.count) return nullptr;
        return a.grad_gates + (d * a.rows + after.offset + row) * C::kGradGates * a.H;
      });
  for_each<kTiles>([&](int i, int j) {
    const int row = first + i, unit = blockIdx.y * kUnitTile + j;
    if (unit >= a.P) return;
    acc_t grad_h = 0;
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) grad_h += sum_of<N, C::kGates, kTiles>(g, i, j);
    grad_h      = receive(after, row, grad_h, [&](acc_t passed) {
      add(a.grad_h0, (d * a.sequences.B + row) * a.P + unit, passed);
    });
    acc_t carry = 0;
    if (!a.weight_hr[d]) carry = receive_carry<N, C>(a, d, after, row, unit);
    if (row >= step.count) return;
    grad_h += grad_of_h(a, d, step, row, unit);
    if (a.weight_hr[d]) {
      put(a.grad_hidden, (d * a.rows + step.offset + row) * a.P + unit, grad_h);
    } else {
      backward_cell<N, C>(a, d, step, row, unit, grad_h, carry);
    }
  });
}

// From h to the gates, after backward_step. Grid: tiles of rows, of H, directions.
template <class N, class C, int kTiles>
__global__ void __launch_bounds__(kStepThreads, kStepCtas)
    backward_projection(const __grid_constant__ BackwardLayer<N> a,
                        const __grid_constant__ StepPair steps,
                        const __grid_constant__ StepPair afters) {
  const int d     = blockIdx.z;
  const Step step = steps.of[d], after = afters.of[d];
  const int first = blockIdx.x * kTiles * kRowTile;
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (first >= step.count && first >= after.count) return;
  multiply<N, 1, kTiles, true>(a.weight_hr[d], blockIdx.y, a.P,
                               [&](int i) -> const typename N::scalar_t* {
                                 const int row = first + i;
                                 if (row >= step.count) return nullptr;
                                 return a.grad_hidden + (d * a.rows + step.offset + row) * a.P;
                               });
  for_each<kTiles>([&](int i, int j) {
    const int row = first + i, unit = blockIdx.y * kUnitTile + j;
    if (unit >= a.H) return;
    const typename N::acc_t carry = receive_carry<N, C>(a, d, after, row, unit);
    if (row >= step.count) return;
    backward_cell<N, C>(a, d, step, row, unit, sum_of<N, 1, kTiles>(0, i, j), carry);
  });
}

}  // namespace
}  // namespace fusedrnn
