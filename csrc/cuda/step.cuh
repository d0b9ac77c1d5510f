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

// Where a sum [rows, kUnitTile] lies in shared memory: a store's lanes (8 units of every second row)
// and a load's (16 units of two rows) then lie in 32 different banks.
constexpr int kTwoRows = 2 * kUnitTile + 8;
__device__ __forceinline__ int sum_at(int row, int unit) {
  return row / 2 * kTwoRows + row % 2 * kUnitTile + unit;
}

// Both directions' steps: direction 1 walks from the other end.
struct StepPair {
  Step of[2];
  bool goes_on;  // with another kernel of the same call, which waits for this one by itself
};

template <class N, int kSegments, int kTiles>
constexpr int kStepShared =
    kStepWarps * kSegments * kTiles * kRowTile / 2 * kTwoRows * int(sizeof(typename N::acc_t));

// A warp's part of the product of one tile of units with rows of states: every kStepWarps-th block of
// K. A block's operands are loaded as soon as their registers are free, up to kBuffers - 1 blocks
// before they are multiplied: from L2 a load takes longer than the multiplications of several. What
// weights, input and saved values hold was there before the first step's kernel began; so a step loads
// of them what it can before it waits for the step before, and computes the addresses of the rest.
template <class N, int kSegments, int kTiles, bool kSameStates>
class Product {
 public:
  using scalar_t = typename N::scalar_t;
  using acc_t    = typename N::acc_t;

  // Of a matrix in fragment order, whose first weights it loads, with the rows `row_of(i)`,
  // i < 8 * kTiles (null for zeros); the states of segment s begin at s * size. Rows of whole vectors
  // begin at whole vectors.
  template <class RowOf>
  __device__ __forceinline__ Product(const Vec16* matrix, int tile, int size, const RowOf& row_of)
      : size_(size), blocks_(blocks_of<N>(size)) {
    matrix_ = matrix + int64_t(tile) * blocks_ * kSegments * kFragment<N>;
#pragma unroll
    for (int i = 0; i < kBuffers; ++i) load_weights_of(i, warp() + i * kStepWarps);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < N::kStateVectors; ++i) {
        rows_[t][i] = row_of(t * kRowTile + N::state_row(threadIdx.x % kWarp, i));
      }
    }
  }

  // Leaves the product in shared memory for `sum_of`. For all threads of the CTA; it ends in a barrier.
  __device__ __forceinline__ void multiply() {
    Sums sums = {};
    if (size_ % N::kVector == 0) {
      add_product<true>(sums);
    } else {
      add_product<false>(sums);
    }
    // [warps][segments][rows][units]
    acc_t* shared  = reinterpret_cast<acc_t*>(shared_memory());
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          const int row = t * kRowTile + sum_row(lane, i);
          store(shared +
                    sum_at((warp() * kSegments + s) * kTiles * kRowTile + row, sum_unit(lane, i)),
                sums[s][t][i]);
        }
      }
    }
    sync_threads();
  }

 private:
  static constexpr int kSets    = kSameStates ? 1 : kSegments;
  static constexpr int kVectors = 2 * kSegments + kSets * kTiles * N::kStateVectors;
  // As many as there are registers for: with one more, a kernel spills.
  static constexpr int kBuffers = sizeof(acc_t) == 8 ? 1
                                  : kTiles > 1       ? (kVectors > 12 ? 1 : 2)
                                  : kVectors > 12    ? 2
                                  : kVectors > 9     ? 3
                                                     : 4;
  using Sums                    = acc_t[kSegments][kTiles][kSums];
  using States                  = Vec16[kSets][kTiles][N::kStateVectors];

  static __device__ __forceinline__ int warp() { return threadIdx.x / kWarp; }

  template <bool kWhole>
  __device__ __forceinline__ void add_product(Sums& sums) {
    States states[kBuffers];
#pragma unroll
    for (int i = 0; i < kBuffers; ++i) load_states<kWhole>(states[i], warp() + i * kStepWarps);
    for (int first = warp(); first < blocks_; first += kBuffers * kStepWarps) {
#pragma unroll
      for (int i = 0; i < kBuffers; ++i) {
        const int block = first + i * kStepWarps;
        if (block >= blocks_) break;
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
          for (int set = 0; set < kSets; ++set) {
#pragma unroll
            for (Vec16& v : states[i][set][t]) v = N::prepared(v);
          }
#pragma unroll
          for (int s = 0; s < kSegments; ++s) {
            N::multiply(sums[s][t], weights_[i][s], states[i][kSameStates ? 0 : s][t]);
          }
        }
        load_weights_of(i, block + kBuffers * kStepWarps);
        load_states<kWhole>(states[i], block + kBuffers * kStepWarps);
      }
    }
  }

  __device__ __forceinline__ void load_weights_of(int buffer, int block) {
    if (block >= blocks_) return;
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      load_weights<N>(weights_[buffer][s],
                      matrix_ + (int64_t(block) * kSegments + s) * kFragment<N>,
                      threadIdx.x % kWarp);
    }
  }

  template <bool kWhole>
  __device__ __forceinline__ void load_states(States& to, int block) const {
    const int k = block * N::kBlock + N::state_k(threadIdx.x % kWarp);
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < N::kStateVectors; ++i) {
          to[set][t][i] = Vec16{};
          if (!rows_[t][i] || k >= size_) continue;
          const scalar_t* const from = rows_[t][i] + int64_t(set) * size_ + k;
          if constexpr (kWhole) {
            to[set][t][i] = load_past_l1(reinterpret_cast<const Vec16*>(from));
          } else {
            scalar_t numbers[N::kVector]{};
#pragma unroll
            for (int n = 0; n < N::kVector; ++n) {
              if (k + n < size_) numbers[n] = load_past_l1(from + n);
            }
            memcpy(&to[set][t][i], numbers, sizeof(Vec16));
          }
        }
      }
    }
  }

  const Vec16* matrix_;
  int size_, blocks_;
  const scalar_t* rows_[kTiles][N::kStateVectors];
  Vec16 weights_[kBuffers][kSegments][2];
};

// A thread's numbers: of one unit, in every 8th row.
template <int kTiles>
struct StepNumbers {
  static constexpr int kCount     = kTiles;
  static constexpr int kRows      = kTiles;
  static constexpr bool kOverlaps = true;
  FUSEDRNN_INLINE static constexpr int row(int i) { return i * kRowTile; }
  FUSEDRNN_INLINE static constexpr int unit(int) { return 0; }
};
template <int kTiles>
using StepPlace = Place<StepNumbers<kTiles>>;

template <int kTiles>
__device__ __forceinline__ StepPlace<kTiles> step_place() {
  static_assert(kRowTile * kUnitTile == kStepThreads);
  return {int(blockIdx.x * kTiles * kRowTile + threadIdx.x / kUnitTile),
          int(blockIdx.y * kUnitTile + threadIdx.x % kUnitTile)};
}

// The product's sum of the thread's i-th number.
template <class N, int kSegments, int kTiles>
__device__ __forceinline__ typename N::acc_t sum_of(int segment, int i) {
  using acc_t         = typename N::acc_t;
  const acc_t* shared = reinterpret_cast<const acc_t*>(shared_memory());
  const int row       = i * kRowTile + int(threadIdx.x) / kUnitTile;
  acc_t sum           = 0;
#pragma unroll
  for (int warp = 0; warp < kStepWarps; ++warp) {
    sum += load(shared + sum_at((warp * kSegments + segment) * kTiles * kRowTile + row,
                                int(threadIdx.x) % kUnitTile));
  }
  return sum;
}

// Grid: tiles of rows, tiles of H, directions.
template <class N, class C, int kTiles>
__global__ void __launch_bounds__(kStepThreads, kStepCtas)
    forward_step(const __grid_constant__ ForwardLayer<N> a,
                 const __grid_constant__ StepPair steps) {
  using scalar_t   = typename N::scalar_t;
  using acc_t      = typename N::acc_t;
  const int d      = blockIdx.z;
  const Step step  = steps.of[d];
  const int first  = blockIdx.x * kTiles * kRowTile;
  const int64_t B  = a.sequences.B;
  const auto place = step_place<kTiles>();
  if (steps.goes_on) let_next_kernel_start();
  const auto row_of = [&](int i) -> const scalar_t* {
    const int row = first + i;
    if (row >= step.count) return nullptr;
    const Source source = step.source(row);
    if (source == Source::kPrevious) {
      return a.output + (step.offset_before + row) * a.D * a.P + d * a.P;
    }
    return source == Source::kInitial && a.h0 ? a.h0 + (d * B + row) * a.P : nullptr;
  };
  Product<N, C::kGates, kTiles, true> product(a.weight_hh[d], blockIdx.y, a.P, row_of);
  Inputs<N, C, StepNumbers<kTiles>> inputs;
  inputs.load_from(a, d, step, place);
  scalar_t bias[C::kGates]{};
  load_bias<N, C>(bias, a, d, place.unit);
  const auto sources = place.sources(step, B);
  wait_for_previous_kernel();
  if (first >= step.count) return;
  // The cells' states before the step: c, or h.
  std::conditional_t<C::kPrevIsH, scalar_t, acc_t> prev[kTiles]{};
  const auto load_prev = [&](const auto* previous, int64_t begin, int width,
                             const scalar_t* initial) {
    const auto from = place.in(previous, begin, width);
    place.each(place.has(step.count, a.H), [&](int i) {
      if (sources.of[i] == Source::kPrevious) {
        prev[i] = load_past_l1(place.ith(from, width, i));
      } else if (sources.of[i] == Source::kInitial && initial) {
        const scalar_t x = load(place.ith(place.in(initial, d * B, a.H), a.H, i));
        if constexpr (C::kPrevIsH) {
          prev[i] = x;
        } else {
          prev[i] = to_float(x);
        }
      }
    });
  };
  if constexpr (C::kPrevIsH) load_prev(a.output + d * a.P, step.offset_before, a.D * a.P, a.h0);
  if constexpr (C::kHasCell) {
    load_prev(a.extra, a.every_cell ? d * a.rows + step.offset_before : d * B, a.H, a.c0);
  }
  product.multiply();
  typename C::template Forward<acc_t> results[kTiles];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    acc_t gates_h[C::kGates];
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) {
      gates_h[g] = acc_t(to_float(bias[g])) + sum_of<N, C::kGates, kTiles>(g, i);
    }
    results[i] = inputs.forward(i, gates_h, acc_t(to_float(prev[i])));
  }
  put_cells<N, C>(a, d, step, place, results);
}

// h = weight_hr (o tanh(c)), after forward_step. Grid: tiles of rows, tiles of P, directions.
template <class N, int kTiles>
__global__ void __launch_bounds__(kStepThreads, kStepCtas)
    forward_projection(const __grid_constant__ ForwardLayer<N> a,
                       const __grid_constant__ StepPair steps) {
  const int d     = blockIdx.z;
  const Step step = steps.of[d];
  const int first = blockIdx.x * kTiles * kRowTile;
  if (steps.goes_on) let_next_kernel_start();
  const auto row_of = [&](int i) -> const typename N::scalar_t* {
    const int row = first + i;
    return row < step.count ? a.unprojected + (d * a.sequences.B + row) * a.H : nullptr;
  };
  Product<N, 1, kTiles, true> product(a.weight_hr[d], blockIdx.y, a.H, row_of);
  wait_for_previous_kernel();
  if (first >= step.count) return;
  product.multiply();
  put_h(a, d, step, step_place<kTiles>(), [&](int i) { return sum_of<N, 1, kTiles>(0, i); });
}

// The carry that the step after left, LSTM's for c and GRU's for h: loaded before the product, while
// which it arrives.
template <class N, class C, int kTiles>
struct Carry {
  using acc_t = typename N::acc_t;
  acc_t of[kTiles]{};

  __device__ __forceinline__ void load_from(const BackwardLayer<N>& a, int d, const Step& after,
                                            const StepPlace<kTiles>& place) {
    if constexpr (C::kHasCarry) {
      const auto from = place.in(a.carry, d * a.sequences.B, a.H);
      place.each(place.has(after.count, a.H),
                 [&](int i) { of[i] = load_past_l1(place.ith(from, a.H, i)); });
    }
  }

  // What of it the step before receives, in its place.
  __device__ __forceinline__ void receive_from(const BackwardLayer<N>& a, int d,
                                               const StepPlace<kTiles>& place,
                                               const typename StepPlace<kTiles>::Sources& after) {
    if constexpr (C::kHasCarry) {
      receive(after, place, of, C::kHasCell ? a.grad_c0 : a.grad_h0, d * a.sequences.B, a.H);
    }
  }
};

// The gradients of a thread's cells, and what they leave.
template <class N, class C, int kTiles>
__device__ __forceinline__ void backward_cells(const BackwardLayer<N>& a, int d, const Step& step,
                                               const StepPlace<kTiles>& place,
                                               const Saved<N, C, StepNumbers<kTiles>>& saved,
                                               const typename N::acc_t (&grad_h)[kTiles],
                                               typename N::acc_t (&carry)[kTiles]) {
  using acc_t = typename N::acc_t;
  if constexpr (C::kHasCell) saved.receive_c(carry, a, d, step, place);
  typename C::template Backward<acc_t> results[kTiles];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) results[i] = saved.backward(i, grad_h[i], carry[i]);
  put_grad_gates<N, C>(a, d, step, place, results);
  if constexpr (C::kHasCarry) {
    const auto to = place.in(a.carry, d * a.sequences.B, a.H);
    place.each(place.has(step.count, a.H),
               [&](int i) { store(place.ith(to, a.H, i), results[i].carry); });
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
  const int first  = blockIdx.x * kTiles * kRowTile;
  const auto place = step_place<kTiles>();
  const int64_t B  = a.sequences.B;
  if (steps.goes_on) let_next_kernel_start();
  const auto row_of = [&](int i) -> const scalar_t* {
    const int row = first + i;
    if (row >= after.count) return nullptr;
    return a.grad_gates + (d * a.rows + after.offset + row) * C::kGradGates * a.H;
  };
  Product<N, C::kGates, kTiles, false> product(a.weight_hh[d], blockIdx.y, a.H, row_of);
  Saved<N, C, StepNumbers<kTiles>> saved;
  if constexpr (!kProjected) saved.load_from(a, d, step, place, place.sources(step, B));
  saved.load_grad_h(a, d, step, place);
  wait_for_previous_kernel();
  if (first >= step.count && first >= after.count) return;
  Carry<N, C, kTiles> carry;
  if constexpr (!kProjected) carry.load_from(a, d, after, place);
  product.multiply();
  acc_t grad_h[kTiles];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    grad_h[i] = 0;
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) grad_h[i] += sum_of<N, C::kGates, kTiles>(g, i);
  }
  const auto sources = place.sources(after, B);
  receive(sources, place, grad_h, a.grad_h0, d * B, a.P);
#pragma unroll
  for (int i = 0; i < kTiles; ++i) grad_h[i] += acc_t(to_float(saved.grad_h[i]));
  saved.receive_h(grad_h, a, d, step, place);
  if constexpr (kProjected) {
    const auto to = place.in(a.grad_hidden, d * a.rows + step.offset, a.P);
    place.each(place.has(step.count, a.P), [&](int i) { put(place.ith(to, a.P, i), grad_h[i]); });
  } else {
    carry.receive_from(a, d, place, sources);
    backward_cells<N, C, kTiles>(a, d, step, place, saved, grad_h, carry.of);
  }
}

// From h to the gates, after backward_step. Grid: tiles of rows, of H, directions.
template <class N, class C, int kTiles>
__global__ void __launch_bounds__(kStepThreads, kStepCtas)
    backward_projection(const __grid_constant__ BackwardLayer<N> a,
                        const __grid_constant__ StepPair steps,
                        const __grid_constant__ StepPair afters) {
  const int d     = blockIdx.z;
  const Step step = steps.of[d], after = afters.of[d];
  const int first  = blockIdx.x * kTiles * kRowTile;
  const auto place = step_place<kTiles>();
  const int64_t B  = a.sequences.B;
  if (steps.goes_on) let_next_kernel_start();
  const auto row_of = [&](int i) -> const typename N::scalar_t* {
    const int row = first + i;
    return row < step.count ? a.grad_hidden + (d * a.rows + step.offset + row) * a.P : nullptr;
  };
  Product<N, 1, kTiles, true> product(a.weight_hr[d], blockIdx.y, a.P, row_of);
  Saved<N, C, StepNumbers<kTiles>> saved;
  saved.load_from(a, d, step, place, place.sources(step, B));
  wait_for_previous_kernel();
  if (first >= step.count && first >= after.count) return;
  Carry<N, C, kTiles> carry;
  carry.load_from(a, d, after, place);
  product.multiply();
  carry.receive_from(a, d, place, place.sources(after, B));
  typename N::acc_t grad_h[kTiles];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) grad_h[i] = sum_of<N, 1, kTiles>(0, i);
  backward_cells<N, C, kTiles>(a, d, step, place, saved, grad_h, carry.of);
}

}  // namespace
}  // namespace fusedrnn
