// A forward step of a call too short to pay for packing: both products straight from the weights as
// they lie in memory, [G*H, K] by rows. A vector's lanes run along k there, and their sum at the end
// is what a packed panel saves. Which calls are that short: plan.h.
#pragma once

#include "step.h"

namespace fusedrnn {
namespace {

// Lane i is the sum of rows[i]'s lanes: each round adds the halves of pairs of rows kHalf apart, and
// leaves half as many rows.
template <class T, int kHalf = kLanes<T> / 2>
FUSEDRNN_INLINE Vec<T> lane_sums(Vec<T> (&rows)[kLanes<T>]) {
  unroll<kHalf>([&](auto i) FUSEDRNN_LAMBDA {
    exchange_halves<T, kHalf>(rows[i], rows[i + kHalf],
                              std::make_integer_sequence<int, kLanes<T>>{});
    rows[i] = rows[i] + rows[i + kHalf];
  });
  if constexpr (kHalf > 1) {
    return lane_sums<T, kHalf / 2>(rows);
  } else {
    return rows[0];
  }
}

// Rows of a that share one pass over the weights: 4 weight rows x M accumulators at a time.
constexpr int kUnpackedRows = kAccumulators / 6;

// out[m] = bias + a W^T for M rows of a and the `units` rows of weight and bias (or null) given.
template <class T, class Terms, int M>
void affine_unpacked(Vec<T> (&out)[M], const typename Terms::Stored* a, int64_t lda, int64_t K,
                     const typename Terms::Stored* weight, const T* bias, int units) {
  constexpr int V = kLanes<T>;
  // With one row, loads are the limit, and caches deliver runs of lines faster: float32's of an LSTM
  // cell from L2 in 0.83 to 1.0 of the time of single lines of 8 weight rows, depending on address
  // (Zen 5, H=128). bfloat16's rows are short for that: 0.97 to 1.16.
  constexpr bool kRuns       = M == 1 && Terms::kGroup == 1;
  constexpr int kRows        = kRuns ? V : M == 1 ? 8 : 4;  // of weights: to hide latency
  constexpr int U            = V < kRows ? V : kRows;
  constexpr int64_t kNumbers = V * Terms::kGroup;
  Vec<T> sums[M][V];
  unroll<V / U>([&](auto part) FUSEDRNN_LAMBDA {
    const typename Terms::Stored* rows[U];
    unroll<U>([&](auto u) FUSEDRNN_LAMBDA {
      const int unit = part * U + u;
      rows[u]        = weight + (unit < units ? unit : units - 1) * K;  // any, for lanes not stored
    });
    Vec<T> acc[U][M] = {};
    int64_t k        = 0;
    // `vectors` of each weight row, one row after the other.
    const auto step = [&](auto vectors, int64_t numbers) FUSEDRNN_LAMBDA {
      Vec<T> a_k[vectors][M];
      unroll<vectors * M>([&](auto im) FUSEDRNN_LAMBDA {
        a_k[im / M][im % M] = Terms::load(a + im % M * lda + k + im / M * kNumbers, numbers);
      });
      unroll<U * vectors>([&](auto ui) FUSEDRNN_LAMBDA {
        constexpr int u = ui / vectors, i = ui % vectors;
        const Vec<T> w = Terms::load(rows[u] + k + i * kNumbers, numbers);
        unroll<M>([&](auto m) FUSEDRNN_LAMBDA {
          acc[u][m] = Terms::multiply_add(a_k[i][m], w, acc[u][m]);
        });
      });
      k += vectors * kNumbers;
    };
    if constexpr (kRuns) {
      constexpr std::integral_constant<int, kAccumulators / 3> many;
      constexpr std::integral_constant<int, many / 2> some;
      while (k + many * kNumbers <= K) step(many, kNumbers);
      if (k + some * kNumbers <= K) step(some, kNumbers);
    }
    constexpr std::integral_constant<int, 1> one;
    while (k + kNumbers <= K) step(one, kNumbers);
    if (k < K) step(one, K - k);
    unroll<U * M>([&](auto um)
                      FUSEDRNN_LAMBDA { sums[um % M][part * U + um / M] = acc[um / M][um % M]; });
  });
  const Vec<T> b = bias ? load(bias, units) : Vec<T>{};
  unroll<M>([&](auto m) FUSEDRNN_LAMBDA { out[m] = lane_sums<T>(sums[m]) + b; });
}

template <class T, class Terms>
struct UnpackedStep {
  using Stored = typename Terms::Stored;
  ForwardStep<T> step;
  int64_t I, P;
  const Stored* input;  // rows of I
  int64_t input_stride;
  const Stored *weight_ih, *weight_hh;
  const T *bias_ih, *bias_hh;
};

template <class Cell, class T, class Terms, int M>
void unpacked_tile(const UnpackedStep<T, Terms>& s, int64_t row, int64_t block) {
  constexpr int G    = Cell::kGates;
  const int64_t H    = s.step.H;
  const int64_t P    = s.P;
  const int64_t unit = block * kLanes<T>;
  const int units    = lanes_of<T>(H, unit);
  // h_prev_stride counts lanes.
  const int64_t h_stride = s.step.h_prev_stride * Terms::kGroup;
  const auto* const h =
      reinterpret_cast<const typename Terms::Stored*>(s.step.h_prev) + row * h_stride;
  Vec<T> gates_x[G][M], gates_h[G][M];
  for (int g = 0; g < G; ++g) {
    const int64_t first = g * H + unit;
    affine_unpacked<T, Terms, M>(gates_x[g], s.input + row * s.input_stride, s.input_stride, s.I,
                                 s.weight_ih + first * s.I, s.bias_ih ? s.bias_ih + first : nullptr,
                                 units);
    affine_unpacked<T, Terms, M>(gates_h[g], h, h_stride, P, s.weight_hh + first * P,
                                 s.bias_hh ? s.bias_hh + first : nullptr, units);
  }
  for (int m = 0; m < M; ++m) {
    Vec<T> x[G], h[G];
    unroll<G>([&](auto g) FUSEDRNN_LAMBDA { x[g] = gates_x[g][m], h[g] = gates_h[g][m]; });
    forward_units<Cell, T>(s.step, row + m, block, x, h);
  }
}

// Rows [row, row_end), at most M, of one block.
template <class Cell, class T, class Terms, int M>
FUSEDRNN_INLINE void last_unpacked_tile(const UnpackedStep<T, Terms>& s, int64_t row,
                                        int64_t row_end, int64_t block) {
  if constexpr (M > 0) {
    row_end - row == M ? unpacked_tile<Cell, T, Terms, M>(s, row, block)
                       : last_unpacked_tile<Cell, T, Terms, M - 1>(s, row, row_end, block);
  }
}

// All units [block_begin, block_end) of rows [row_begin, row_end). All rows of a block before the next
// one: its weights are in a cache then, at the second pass.
template <class Cell, class T, class Terms>
void run_unpacked(const UnpackedStep<T, Terms>& s, int64_t row_begin, int64_t row_end,
                  int64_t block_begin, int64_t block_end) {
  for (int64_t block = block_begin; block < block_end; ++block) {
    int64_t row = row_begin;
    for (; row + kUnpackedRows <= row_end; row += kUnpackedRows) {
      unpacked_tile<Cell, T, Terms, kUnpackedRows>(s, row, block);
    }
    last_unpacked_tile<Cell, T, Terms, kUnpackedRows - 1>(s, row, row_end, block);
  }
}

}  // namespace
}  // namespace fusedrnn
