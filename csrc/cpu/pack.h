// The weights, laid out once per call in the order in which the register tiles of step.h read them: panels of V hidden units (V lanes of one vector), each dense, so that a step
// streams them front to back.
//
//   forward   [H/V] x { bias row [G][V], then [K] rows of [G][V] }: all gates of V units
//   backward  [P/V] x {                       [K] rows of    [V] }
//
// for weights [G*H, K], K = I or P, and [K, P], K = G*H; of weight_hr, [P, H] and [P, H], with G = 1.
//
// Units beyond H are zero. Not a cache: a packed copy lives as long as the call (weights change in
// ways that no version counter shows).
#pragma once

#include "vec.h"

namespace fusedrnn {
namespace {

// Rows of a V x V block, transposed in registers: log2(V) rounds, each exchanging the off-diagonal
// halves of pairs of rows kHalf apart.
template <class T, int kHalf, int... Is>
FUSEDRNN_INLINE void exchange_halves(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, Is...>) {
  constexpr int V      = kLanes<T>;
  const Vec<T> upper_a = __builtin_shufflevector(a, b, ((Is & kHalf) ? V + Is - kHalf : Is)...);
  const Vec<T> lower_b = __builtin_shufflevector(a, b, ((Is & kHalf) ? V + Is : Is + kHalf)...);
  a                    = upper_a;
  b                    = lower_b;
}
template <class T, int kHalf = kLanes<T> / 2>
FUSEDRNN_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  unroll<kLanes<T>>([&](auto i) FUSEDRNN_LAMBDA {
    if constexpr ((i & kHalf) == 0) {
      exchange_halves<T, kHalf>(rows[i], rows[i + kHalf],
                                std::make_integer_sequence<int, kLanes<T>>{});
    }
  });
  if constexpr (kHalf > 1) transpose<T, kHalf / 2>(rows);
}

template <class T>
constexpr int64_t blocks_of(int64_t H) {
  return (H + kLanes<T> - 1) / kLanes<T>;
}

template <class Cell, class T>
constexpr int64_t forward_panel_size(int64_t K) {
  return (K + 1) * Cell::kGates * kLanes<T>;
}

// The panels of blocks [begin, end), from weight [G*H, K] and bias [G*H] (or null).
template <class Cell, class T>
void pack_forward(T* panels, const T* weight, const T* bias, int64_t H, int64_t K, int64_t begin,
                  int64_t end) {
  constexpr int G = Cell::kGates, V = kLanes<T>;
  for (int64_t block = begin; block < end; ++block) {
    T* panel        = panels + block * forward_panel_size<Cell, T>(K);
    const int units = int(H - block * V < V ? H - block * V : V);
    for (int g = 0; g < G; ++g) {
      const int64_t row = g * H + block * V;
      store(panel + g * V, bias ? load(bias + row, units) : Vec<T>{});
      for (int64_t k = 0; k < K; k += V) {
        const int columns = int(K - k < V ? K - k : V);
        Vec<T> tile[V];
        unroll<V>([&](auto u) FUSEDRNN_LAMBDA {
          tile[u] = u < units ? load(weight + (row + u) * K + k, columns) : Vec<T>{};
        });
        transpose<T>(tile);
        T* out = panel + ((k + 1) * G + g) * V;
        unroll<V>([&](auto j) FUSEDRNN_LAMBDA {
          if (j < columns) store(out + j * G * V, tile[j]);
        });
      }
    }
  }
}

// The same for the backward product, from weight [G*H, columns]. Its row blocks begin with
// Cell::kRecurrentRow, in the order of grad_gates (sequence.h).
template <class Cell, class T>
void pack_backward(T* panels, const T* weight, int64_t H, int64_t columns, int64_t begin,
                   int64_t end) {
  constexpr int G = Cell::kGates, V = kLanes<T>;
  for (int64_t block = begin; block < end; ++block) {
    T* out         = panels + block * G * H * V;
    const int left = int(columns - block * V < V ? columns - block * V : V);
    for (int g = 0; g < G; ++g) {
      const T* in = weight + (g + Cell::kRecurrentRow) % G * H * columns + block * V;
      for (int64_t k = 0; k < H; ++k, in += columns, out += V) store(out, load(in, left));
    }
  }
}

}  // namespace
}  // namespace fusedrnn
