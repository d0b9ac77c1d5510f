// The weights, laid out in the order in which the register tiles of step.h read them: panels of V hidden
// units (V lanes of one vector), each dense, so that a step streams them front to back.
//
//   forward   [H/V] x { bias row [G][V], then [K] rows of [G][V] }: all gates of V units
//   backward  [P/V] x {                       [K] rows of    [V] }
//
// for weights [G*H, K], K = I or P, and [K, P], K = G*H; of weight_hr, [P, H] and [P, H], with G = 1.
// Pairs of terms (vec.h) share a lane: then there are half as many rows.
//
// Units beyond H are zero. Not a cache: a packed copy lives as long as the call (weights change in
// ways that no version counter shows), unless the caller keeps it (ForwardArgs::panels).
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

// In numbers, with K lanes of terms.
template <int G, class T>
constexpr int64_t forward_panel_size(int64_t K) {
  return (K + 1) * G * kLanes<T>;
}

// read(array), of bfloat16's bits if that is how it is stored: then there are no numbers.
template <class Terms, class T, class Read>
FUSEDRNN_INLINE void as_stored(const T* numbers, const uint16_t* bf16, const Read& read) {
  if constexpr (Terms::kInLane > 1) {
    if (bf16) return read(bf16);
  }
  read(numbers);
}

// Rows of `columns` numbers to rows of terms, lanes of them; `to` begins where `from` does.
template <class Terms, class From, class T>
void to_terms(const From* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows,
              int64_t columns) {
  constexpr int V = kLanes<T>;
  for (int64_t row = 0; row < rows; ++row, from += from_stride, to += to_stride) {
    const int64_t row_lanes = lanes<Terms>(columns);
    for (int64_t k = 0; k < row_lanes; k += V) {
      const int64_t at = k * Terms::kInLane;
      store(to + k, Terms::load(from + at, columns - at),
            int(row_lanes - k < V ? row_lanes - k : V));
    }
  }
}

// Columns of terms: a row of `to` [lanes, columns] has those of as many rows of `from` as a lane holds,
// of `rows` in all.
template <class Terms, class From, class T>
void to_columns_of_terms(const From* from, int64_t from_stride, T* to, int64_t to_stride,
                         int64_t rows, int64_t columns) {
  constexpr int V = kLanes<T>;
  for (int64_t row = 0; row < rows; row += Terms::kInLane, to += to_stride) {
    const From* const a = from + row * from_stride;
    const From* const b = row + 1 < rows ? a + from_stride : nullptr;
    for (int64_t j = 0; j < columns; j += V) {
      const int n = int(columns - j < V ? columns - j : V);
      store(to + j, Terms::above_each_other(a + j, b ? b + j : nullptr, n), n);
    }
  }
}

// The same turned: row m of `to` [columns, lanes], whole vectors, has the terms of column m.
template <class Terms, class From, class T>
void to_turned_columns_of_terms(const From* from, int64_t from_stride, T* to, int64_t to_stride,
                                int64_t rows, int64_t columns) {
  constexpr int V         = kLanes<T>;
  constexpr int64_t kRows = V * Terms::kInLane;
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t some_rows = rows - row < kRows ? rows - row : kRows;
    for (int64_t m = 0; m < columns; m += V) {
      const int64_t some_columns = columns - m < V ? columns - m : V;
      Vec<T> block[V]            = {};
      to_columns_of_terms<Terms>(from + row * from_stride + m, from_stride,
                                 reinterpret_cast<T*>(block), V, some_rows, some_columns);
      transpose<T>(block);
      for (int64_t j = 0; j < some_columns; ++j) {
        store(to + (m + j) * to_stride + row / Terms::kInLane, block[j]);
      }
    }
  }
}

// The panels of blocks [begin, end), from weight [G*H, K] and bias [G*H] (or null).
template <int G, class T, class Terms = Numbers<T>, class From = T>
void pack_forward(T* panels, const From* weight, const T* bias, int64_t H, int64_t K, int64_t begin,
                  int64_t end) {
  constexpr int V = kLanes<T>;
  for (int64_t block = begin; block < end; ++block) {
    T* panel        = panels + block * forward_panel_size<G, T>(lanes<Terms>(K));
    const int units = int(H - block * V < V ? H - block * V : V);
    for (int g = 0; g < G; ++g) {
      const int64_t row = g * H + block * V;
      store(panel + g * V, bias ? load(bias + row, units) : Vec<T>{});
      for (int64_t k = 0; k < lanes<Terms>(K); k += V) {
        const int64_t first = k * Terms::kInLane;
        const int columns   = int(lanes<Terms>(K) - k < V ? lanes<Terms>(K) - k : V);
        Vec<T> tile[V];
        unroll<V>([&](auto u) FUSEDRNN_LAMBDA {
          tile[u] = u < units ? Terms::load(weight + (row + u) * K + first, K - first) : Vec<T>{};
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
// Cell::kRecurrentRow, in the order of grad_gates (sequence.h); a lane's terms are of one block.
template <class Cell, class T, class Terms = Numbers<T>, class From = T>
void pack_backward(T* panels, const From* weight, int64_t H, int64_t columns, int64_t begin,
                   int64_t end) {
  constexpr int G = Cell::kGates, V = kLanes<T>;
  for (int64_t block = begin; block < end; ++block) {
    T* out         = panels + block * G * lanes<Terms>(H) * V;
    const int left = int(columns - block * V < V ? columns - block * V : V);
    for (int g = 0; g < G; ++g) {
      const From* in = weight + (g + Cell::kRecurrentRow) % G * H * columns + block * V;
      for (int64_t k = 0; k < H; k += Terms::kInLane, in += Terms::kInLane * columns, out += V) {
        store(out, Terms::above_each_other(in, k + 1 < H ? in + columns : nullptr, left));
      }
    }
  }
}

}  // namespace
}  // namespace fusedrnn
