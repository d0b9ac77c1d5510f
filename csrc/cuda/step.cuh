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

// Numbers from one row of sums to the next in shared memory: the lanes of a store, of 8 units in rows
// 0, 2, 4 and 6, then lie in 32 different banks.
constexpr int kSumStride = kUnitTile + 4;

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
    kStepWarps * kSegments * kTiles * kRowTile * kSumStride * int(sizeof(typename N::acc_t));

// One block of a warp's weights. What weights, input and saved values hold was there before the first
// step's kernel began; so a step loads of them what it can before it waits for the step before.
template <class N, int kSegments>
struct Fragments {
  Vec16 of[kSegments][2];

  // Block `block` of a tile of units; zeros behind the last of `blocks`.
  __device__ __forceinline__ Fragments(const Vec16* weights, int tile, int blocks, int block) {
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      of[s][0] = of[s][1] = Vec16{};
      if (block < blocks) {
        const int64_t at = (int64_t(tile) * blocks + block) * kSegments + s;
        load_weights<N>(of[s], weights + at * kFragment<N>, threadIdx.x % kWarp);
      }
    }
  }
};

// The warp's first.
template <class N, int kSegments>
__device__ __forceinline__ Fragments<N, kSegments> first_fragments(const Vec16* weights, int tile,
                                                                   int size) {
  return {weights, tile, blocks_of<N>(size), int(threadIdx.x / kWarp)};
}

// The product of one tile of units with the rows `row_of(i)`, i < 8 * kTiles (null for zeros), the
// states of segment s beginning at s * size; left in shared memory for `sum_of`. `fragments`: the
// first. For all threads of the CTA; it ends in a barrier.
template <class N, int kSegments, int kTiles, bool kSameStates, class RowOf>
__device__ __forceinline__ void multiply(Fragments<N, kSegments> fragments, const Vec16* weights,
                                         int tile, int size, const RowOf& row_of) {
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
  const int blocks = blocks_of<N>(size);
  for (int block = warp; block < blocks; block += kStepWarps) {
    const Fragments<N, kSegments> next(weights, tile, blocks, block + kStepWarps);
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
#pragma unroll
      for (int t = 0; t < kTiles; ++t) N::multiply(sums[s][t], fragments.of[s], states[t]);
    }
    fragments = next;
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
        store(shared + ((warp * kSegments + s) * kTiles * kRowTile + row) * kSumStride +
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
        load(shared + ((warp * kSegments + segment) * kTiles * kRowTile + row) * kSumStride + unit);
  }
  return sum;
}

// Calls f(j, row, unit) for the thread's numbers of the CTA's tile, j < kTiles, row < 8 * kTiles.
template <int kTiles, class F>
__device__ __forceinline__ void for_each(const F& f) {
  static_assert(kRowTile * kUnitTile == kStepThreads);
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    f(j, int(j * kRowTile + threadIdx.x / kUnitTile), int(threadIdx.x % kUnitTile));
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
  const auto fragments = first_fragments<N, C::kGates>(a.weight_hh[d], blockIdx.y, a.P);
  acc_t gates_x[kTiles][C::kGates]{}, bias[C::kGates]{};
  for_each<kTiles>([&](int j, int i, int u) {
    const int row = first + i, unit = blockIdx.y * kUnitTile + u;
    if (row >= step.count || unit >= a.H) return;
    load_gates_x<N, C>(gates_x[j], a, d, step.offset + row, unit);
    if (j == 0) load_bias<N, C>(bias, a, d, unit);  // all of a thread's numbers have one unit
  });
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
  multiply<N, C::kGates, kTiles, true>(fragments, a.weight_hh[d], blockIdx.y, a.P,
                                       [&](int i) { return h_before(first + i); });
  for_each<kTiles>([&](int j, int i, int u) {
    const int row = first + i, unit = blockIdx.y * kUnitTile + u;
    if (row >= step.count || unit >= a.H) return;
    acc_t gates_h[C::kGates];
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) {
      gates_h[g] = bias[g] + sum_of<N, C::kGates, kTiles>(g, i, u);
    }
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
    put_cell<N, C>(a, d, step, row, unit, C::forward(gates_x[j], gates_h, prev));
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
  const auto fragments = first_fragments<N, 1>(a.weight_hr[d], blockIdx.y, a.H);
  wait_for_previous_kernel();
  if (first >= step.count) return;
  multiply<N, 1, kTiles, true>(fragments, a.weight_hr[d], blockIdx.y, a.H,
                               [&](int i) -> const typename N::scalar_t* {
                                 const int row = first + i;
                                 if (row >= step.count) return nullptr;
                                 return a.unprojected + (d * a.sequences.B + row) * a.H;
                               });
  for_each<kTiles>([&](int, int i, int u) {
    const int row = first + i, unit = blockIdx.y * kUnitTile + u;
    if (row >= step.count || unit >= a.P) return;
    put_h(a, d, step, row, unit, sum_of<N, 1, kTiles>(0, i, u));
  });
}

// What the backward of a thread's cells reads that forward left, or came from outside.
template <class N, class C, int kTiles>
struct Loaded {
  using acc_t = typename N::acc_t;
  Saved<N, C> saved[kTiles]{};
  acc_t grad_c[kTiles]{};

  __device__ __forceinline__ Loaded(const BackwardLayer<N>& a, int d, const Step& step, int first) {
    for_each<kTiles>([&](int j, int i, int u) {
      const int row = first + i, unit = blockIdx.y * kUnitTile + u;
      if (row >= step.count || unit >= a.H) return;
      saved[j] = load_saved<N, C>(a, d, step, row, unit);
      if constexpr (C::kHasCell) grad_c[j] = grad_of_c(a, d, step, row, unit);
    });
  }

  // The j-th cell; grad_h: what h received, and carry.
  __device__ __forceinline__ void backward(int j, const BackwardLayer<N>& a, int d,
                                           const Step& step, int row, int unit, acc_t grad_h,
                                           acc_t carry) const {
    const Saved<N, C>& s = saved[j];
    const auto result    = C::backward(s.gates, s.extra, s.prev, grad_h, carry + grad_c[j]);
    put_grad_gates<N, C>(a, d, step, row, unit, result.grad_gates);
    if constexpr (C::kHasCarry) {
      put(a.carry, (d * a.sequences.B + row) * a.H + unit, result.carry);
    }
  }
};

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
// no rows: then there is nothing to receive, or nothing but the initial states to give. kProjected:
// it ends at h, and backward_projection goes on. Grid: tiles of rows, of P, directions.
template <class N, class C, int kTiles, bool kProjected>
__global__ void __launch_bounds__(kStepThreads, kStepCtas)
    backward_step(const __grid_constant__ BackwardLayer<N> a,
                  const __grid_constant__ StepPair steps, const __grid_constant__ StepPair afters) {
  using scalar_t  = typename N::scalar_t;
  using acc_t     = typename N::acc_t;
  const int d     = blockIdx.z;
  const Step step = steps.of[d], after = afters.of[d];
  const int first = blockIdx.x * kTiles * kRowTile;
  let_next_kernel_start();
  const auto fragments = first_fragments<N, C::kGates>(a.weight_hh[d], blockIdx.y, a.H);
  const Loaded<N, C, kTiles> loaded(a, d, kProjected ? Step{} : step, first);
  wait_for_previous_kernel();
  if (first >= step.count && first >= after.count) return;
  multiply<N, C::kGates, kTiles, false>(
      fragments, a.weight_hh[d], blockIdx.y, a.H, [&](int i) -> const scalar_t* {
        const int row = first + i;
        if (row >= after.count) return nullptr;
        return a.grad_gates + (d * a.rows + after.offset + row) * C::kGradGates * a.H;
      });
  for_each<kTiles>([&](int j, int i, int u) {
    const int row = first + i, unit = blockIdx.y * kUnitTile + u;
    if (unit >= a.P) return;
    acc_t grad_h = 0;
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) grad_h += sum_of<N, C::kGates, kTiles>(g, i, u);
    grad_h      = receive(after, row, grad_h, [&](acc_t passed) {
      add(a.grad_h0, (d * a.sequences.B + row) * a.P + unit, passed);
    });
    acc_t carry = 0;
    if constexpr (!kProjected) carry = receive_carry<N, C>(a, d, after, row, unit);
    if (row >= step.count) return;
    grad_h += grad_of_h(a, d, step, row, unit);
    if constexpr (kProjected) {
      put(a.grad_hidden, (d * a.rows + step.offset + row) * a.P + unit, grad_h);
    } else {
      loaded.backward(j, a, d, step, row, unit, grad_h, carry);
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
  const auto fragments = first_fragments<N, 1>(a.weight_hr[d], blockIdx.y, a.P);
  const Loaded<N, C, kTiles> loaded(a, d, step, first);
  wait_for_previous_kernel();
  if (first >= step.count && first >= after.count) return;
  multiply<N, 1, kTiles, true>(fragments, a.weight_hr[d], blockIdx.y, a.P,
                               [&](int i) -> const typename N::scalar_t* {
                                 const int row = first + i;
                                 if (row >= step.count) return nullptr;
                                 return a.grad_hidden + (d * a.rows + step.offset + row) * a.P;
                               });
  for_each<kTiles>([&](int j, int i, int u) {
    const int row = first + i, unit = blockIdx.y * kUnitTile + u;
    if (unit >= a.H) return;
    const typename N::acc_t carry = receive_carry<N, C>(a, d, after, row, unit);
    if (row >= step.count) return;
    loaded.backward(j, a, d, step, row, unit, sum_of<N, 1, kTiles>(0, i, u), carry);
  });
}

}  // namespace
}  // namespace fusedrnn
