// The block path: one launch for all time steps, for layers so small that one CTA holds all their
// recurrent weights, in registers and shared memory. A CTA takes 8 sequences of one direction and
// waits for nobody else.
//
// Each warp owns a tile of 16 units with all their gates, so that a cell's arithmetic, its c and its
// carried gradients stay in the registers of the lane that has its sums. What the warps exchange, h
// or the gates' gradients, goes through shared memory, two buffers by turns: one barrier a step.
#pragma once

#include "layer.cuh"

namespace fusedrnn {
namespace {

constexpr int kBlockWarps = 12;  // at most, so that each thread can have 168 registers
constexpr int kBlockUnits = kBlockWarps * kUnitTile;

// How many fragments of its weights a warp keeps in registers, 8 each: whole blocks of an LSTM's gates.
// With two more each way, nvcc 13.0 spills forward (LSTM, bfloat16).
template <class N>
FUSEDRNN_INLINE constexpr int in_registers(bool backward) {
  return N::kWeightLanes < kWarp ? 0 : backward ? 4 : 8;
}

// Bytes of a row of states in shared memory, such that what a quarter of a warp reads at once lies in
// different banks: two neighbouring rows of 64 bytes each, or (Exact) every second row's 16 bytes.
template <class N>
FUSEDRNN_INLINE int state_row_bytes(int size, int segments) {
  const int bytes = segments * blocks_of<N>(size) * N::kBlock * int(sizeof(typename N::scalar_t));
  if (N::kStateVectors == 2) return (bytes + 47) / 64 * 64 + 16;
  return (bytes + 63) / 128 * 128 + 64;
}

// The others, in shared memory.
template <class N>
FUSEDRNN_INLINE int in_shared(int size, int segments, bool backward) {
  const int fragments = blocks_of<N>(size) * segments - in_registers<N>(backward);
  return fragments > 0 ? fragments : 0;
}

// Bytes of all warps' weights there.
template <class N>
FUSEDRNN_INLINE int64_t shared_weights(int H, int segments, bool backward) {
  return int64_t(tiles_of(H)) * in_shared<N>(H, segments, backward) * kFragment<N> *
         int64_t(sizeof(Vec16));
}

// What a CTA of the block path needs, of H units.
template <class N>
FUSEDRNN_INLINE int64_t block_shared(int H, int segments, bool backward) {
  return shared_weights<N>(H, segments, backward) +
         2 * kRowTile * state_row_bytes<N>(H, backward ? segments : 1);
}

// One warp's weights, for as long as the kernel runs.
template <class N, int kSegments, bool kBackward>
class Resident {
 public:
  // In the shared memory of the CTA this warp has a part that it alone writes and reads.
  __device__ __forceinline__ Resident(const Vec16* weights, int size, int tile, int lane)
      : blocks_(blocks_of<N>(size)), lane_(lane) {
    const Vec16* own = weights + int64_t(tile) * blocks_ * kSegments * kFragment<N>;
#pragma unroll
    for (int f = 0; f < kInRegisters; ++f) {
      registers_[f][0] = registers_[f][1] = Vec16{};
      if (f < blocks_ * kSegments) {
        load_weights<N>(registers_[f], own + f * kFragment<N>, lane);
      }
    }
    const int vectors = in_shared<N>(size, kSegments, kBackward) * kFragment<N>;
    Vec16* shared     = reinterpret_cast<Vec16*>(shared_memory()) + int64_t(tile) * vectors;
    for (int v = lane; v < vectors; v += kWarp) {
      store(shared + v, load(own + kInRegisters * kFragment<N> + v));
    }
    shared_ = shared;
    // Used once, to no effect (blocks_ > 0). Else the first product of every step waited for them, and
    // so for all loads that are on their way then.
#pragma unroll
    for (int f = 0; f < kInRegisters; ++f) {
#pragma unroll
      for (Vec16& half : registers_[f]) {
#pragma unroll
        for (uint32_t& word : half.word) word ^= uint32_t(blocks_ >> 31);
      }
    }
  }

  // sums += weights times states; states(s, b, i): the lane's i-th vector of block b in segment s.
  template <bool kSameStates, class States>
  __device__ __forceinline__ void multiply(typename N::acc_t (&sums)[kSegments][kSums],
                                           const States& states) const {
    constexpr int kUnrolled = (kInRegisters + kSegments - 1) / kSegments;
#pragma unroll
    for (int b = 0; b < kUnrolled; ++b) {
      if (b == 0 || b < blocks_) multiply_block<kSameStates, true>(sums, states, b);
    }
#pragma unroll 1
    for (int b = kUnrolled; b < blocks_; ++b) multiply_block<kSameStates, false>(sums, states, b);
  }

 private:
  static constexpr int kInRegisters = in_registers<N>(kBackward);

  template <bool kSameStates, bool kMayBeInRegisters, class States>
  __device__ __forceinline__ void multiply_block(typename N::acc_t (&sums)[kSegments][kSums],
                                                 const States& states, int b) const {
    Vec16 vectors[N::kStateVectors];
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      if (s == 0 || !kSameStates) {
#pragma unroll
        for (int i = 0; i < N::kStateVectors; ++i) vectors[i] = N::prepared(states(s, b, i));
      }
      const int f = b * kSegments + s;
      if (kMayBeInRegisters && f < kInRegisters) {
        N::multiply(sums[s], registers_[f], vectors);
      } else {
        Vec16 fragment[2];
        load_weights<N>(fragment, shared_ + (f - kInRegisters) * kFragment<N>, lane_);
        N::multiply(sums[s], fragment, vectors);
      }
    }
  }

  Vec16 registers_[kInRegisters > 0 ? kInRegisters : 1][2];
  const Vec16* shared_;
  int blocks_, lane_;
};

// The two buffers of states, [2][8 rows][segments of K], behind the weights.
template <class N>
class StateBuffers {
 public:
  using scalar_t = typename N::scalar_t;

  // Behind weights of so many segments.
  __device__ __forceinline__ StateBuffers(int size, int weights, int segments, bool backward)
      : begin_(shared_memory() + shared_weights<N>(size, weights, backward)),
        row_bytes_(state_row_bytes<N>(size, segments)),
        segment_bytes_(blocks_of<N>(size) * N::kBlock * int(sizeof(scalar_t))) {}

  // Zeros everywhere, also behind the ends of the rows, which `write` does not reach; for all threads.
  __device__ __forceinline__ void clear() const {
    const int vectors = 2 * kRowTile * row_bytes_ / int(sizeof(Vec16));
    for (int v = threadIdx.x; v < vectors; v += blockDim.x) {
      store(reinterpret_cast<Vec16*>(begin_) + v, Vec16{});
    }
  }

  __device__ __forceinline__ Vec16 read(int buffer, int lane, int s, int b, int i) const {
    const int row = N::state_row(lane, i);
    return load(reinterpret_cast<const Vec16*>(
        segment_of(buffer, row, s) + b * (N::kBlock * int(sizeof(scalar_t))) +
        in_turns(row, N::state_k(lane) * int(sizeof(scalar_t)))));
  }
  // To the i-th number of a segment of the place's rows, which begin with the batch's row `first`.
  template <class Numbers>
  __device__ __forceinline__ void write(int buffer, int first, int s, const Place<Numbers>& place,
                                        int i, scalar_t x) const {
    const int row = place.row_of(i) - first;
    // 8 units further is another bit, which may be set after the change of places.
    const int byte = in_turns(row, place.unit * int(sizeof(scalar_t))) ^
                     Numbers::unit(i) * int(sizeof(scalar_t));
    store(reinterpret_cast<scalar_t*>(segment_of(buffer, row, s) + byte), x);
  }

 private:
  __device__ __forceinline__ unsigned char* segment_of(int buffer, int row, int s) const {
    return begin_ + (buffer * kRowTile + row) * row_bytes_ + s * segment_bytes_;
  }
  // Where of a segment a byte lies. What a warp writes at once are 8 units of every second row, which
  // without this would lie in the same banks: of 64 bytes the vectors change places.
  static __device__ __forceinline__ int in_turns(int row, int byte) {
    return N::kStateVectors == 1 ? byte ^ row / 2 * int(sizeof(Vec16)) : byte;
  }

  unsigned char* begin_;
  int row_bytes_, segment_bytes_;
};

// A lane's numbers, those of its sums: two rows, and units that are 8 apart.
struct BlockNumbers {
  static constexpr int kCount     = kSums;
  static constexpr int kRows      = 2;
  static constexpr bool kOverlaps = false;
  FUSEDRNN_INLINE static constexpr int row(int i) { return i % 2; }
  FUSEDRNN_INLINE static constexpr int unit(int i) { return i / 2 * 8; }
};
using BlockPlace = Place<BlockNumbers>;

__device__ __forceinline__ BlockPlace block_place() {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  return {int(blockIdx.x) * kRowTile + sum_row(lane, 0), warp * kUnitTile + sum_unit(lane, 0)};
}

// Grid: tiles of 8 rows, directions. One warp for each tile of units.
template <class N, class C>
__global__ void __launch_bounds__(kBlockWarps* kWarp, 1)
    forward_block(const __grid_constant__ ForwardLayer<N> a) {
  using acc_t    = typename N::acc_t;
  using scalar_t = typename N::scalar_t;
  const int d    = blockIdx.y;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int first  = blockIdx.x * kRowTile;
  const int64_t T  = a.sequences.T;
  const auto place = block_place();

  const Resident<N, C::kGates, false> weights(a.weight_hh[d], a.H, warp, lane);
  const StateBuffers<N> states(a.H, C::kGates, 1, false);
  states.clear();

  scalar_t bias[kSums / 2][C::kGates]{};
#pragma unroll
  for (int i = 0; i < kSums; i += 2) load_bias<N, C>(bias[i / 2], a, d, place.unit_of(i));
  acc_t prev[kSums]{};  // c, or h
  Inputs<N, C, BlockNumbers> inputs;

  // The states before step t, made of what the step before it left.
  const auto begin_step = [&](int64_t t, const Step& step, acc_t(&h)[kSums], acc_t(&c)[kSums]) {
    const auto sources = place.sources(step, a.sequences.B);
    const auto has     = place.has(step.count, a.H);
    if (!sources.all_previous) {
      place.each(has, [&](int i) {
        if (sources.of[i] == Source::kPrevious) return;
        h[i] = c[i]     = 0;
        const int64_t B = a.sequences.B;
        const auto of   = [&](const scalar_t* initial) {
          return acc_t(to_float(load(place.ith(place.in(initial, d * B, a.H), a.H, i))));
        };
        // Added to zero, and so waited for, here and not where other steps come by.
        if (sources.of[i] == Source::kInitial && a.h0) h[i] += of(a.h0);
        if (sources.of[i] == Source::kInitial && a.c0) c[i] += of(a.c0);
      });
    }
    place.each(has, [&](int i) {
      const scalar_t stored = Rounded<scalar_t>::of(h[i]);
      states.write(int(t % 2), first, 0, place, i, stored);
      prev[i] = C::kHasCell ? c[i] : acc_t(to_float(stored));
    });
  };

  sync_threads();  // cleared
  Step step = step_of(a.sequences, d, 0);
  inputs.load_from(a, d, step, place);
  acc_t h[kSums]{}, c[kSums]{};
  begin_step(0, step, h, c);
  sync_threads();
  for (int64_t t = 0; t < T; ++t) {
    acc_t sums[C::kGates][kSums]{};
    weights.template multiply<true>(
        sums, [&](int s, int b, int i) { return states.read(int(t % 2), lane, s, b, i); });
    // Of all four, also where the layer has no such row or unit: one waits while others compute.
    typename C::template Forward<acc_t> results[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      acc_t gates_h[C::kGates];
#pragma unroll
      for (int g = 0; g < C::kGates; ++g) gates_h[g] = acc_t(to_float(bias[i / 2][g])) + sums[g][i];
      results[i] = inputs.forward(i, gates_h, prev[i]);
      h[i]       = results[i].h;
      if constexpr (C::kHasCell) c[i] = results[i].extra;
    }
    const Step next = step_of(a.sequences, d, t + 1);
    begin_step(t + 1, next, h, c);
    inputs.load_from(a, d, next, place);  // arrives during the next product
    put_cells<N, C>(a, d, step, place, results);
    step = next;
    sync_threads();
  }
}

// Grid and warps as forward_block's.
template <class N, class C>
__global__ void __launch_bounds__(kBlockWarps* kWarp, 1)
    backward_block(const __grid_constant__ BackwardLayer<N> a) {
  using acc_t    = typename N::acc_t;
  using scalar_t = typename N::scalar_t;
  const int d    = blockIdx.y;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int first  = blockIdx.x * kRowTile;
  const int64_t B  = a.sequences.B;
  const auto place = block_place();

  const Resident<N, C::kGates, true> weights(a.weight_hh[d], a.H, warp, lane);
  const StateBuffers<N> states(a.H, C::kGates, C::kGates, true);
  states.clear();
  acc_t carry[kSums]{};
  sync_threads();

  Saved<N, C, BlockNumbers> saved;
  BlockPlace::Sources after = place.sources(Step{}, B);  // of the step after
  const int64_t last        = a.grad_h0 || a.grad_c0 ? -1 : 0;
  for (int64_t t = a.sequences.T - 1; t >= last; --t) {  // at -1 only the initial states receive
    const Step step    = step_of(a.sequences, d, t);
    const auto sources = place.sources(step, B);
    saved.load_from(a, d, step, place, sources);  // arrives during the product
    saved.load_grad_h(a, d, step, place);
    acc_t sums[C::kGates][kSums]{};
    weights.template multiply<false>(
        sums, [&](int s, int b, int i) { return states.read(int((t + 1) & 1), lane, s, b, i); });
    acc_t grad_h[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      grad_h[i] = 0;
#pragma unroll
      for (int g = 0; g < C::kGates; ++g) grad_h[i] += sums[g][i];
    }
    receive(after, place, grad_h, a.grad_h0, d * B, a.H);
    if constexpr (C::kHasCarry) {
      receive(after, place, carry, C::kHasCell ? a.grad_c0 : a.grad_h0, d * B, a.H);
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) grad_h[i] += acc_t(to_float(saved.grad_h[i]));
    saved.receive_h(grad_h, a, d, step, place);
    if constexpr (C::kHasCell) saved.receive_c(carry, a, d, step, place);
    typename C::template Backward<acc_t> results[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) results[i] = saved.backward(i, grad_h[i], carry[i]);
    place.each(place.has(step.count, a.H), [&](int i) {
      carry[i] = results[i].carry;
#pragma unroll
      for (int g = 0; g < C::kGates; ++g) {
        states.write(int(t & 1), first, g, place, i,
                     Rounded<scalar_t>::of(results[i].grad_gates[g]));
      }
    });
    put_grad_gates<N, C>(a, d, step, place, results);
    after = sources;
    sync_threads();
  }
}

}  // namespace
}  // namespace fusedrnn
