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
template <class T, int M>
void affine_unpacked(Vec<T> (&out)[M], const T* a, int64_t lda, int64_t K, const T* weight,
                     const T* bias, int units) {
  constexpr int V = kLanes<T>;
  constexpr int U = M == 1 ? (V < 8 ? V : 8) : (V < 4 ? V : 4);  // weight rows: to hide latency
  Vec<T> sums[M][V];
  unroll<V / U>([&](auto part) FUSEDRNN_LAMBDA {
    const T* rows[U];
    unroll<U>([&](auto u) FUSEDRNN_LAMBDA {
      const int unit = part * U + u;
      rows[u]        = weight + (unit < units ? unit : units - 1) * K;  // any, for lanes not stored
    });
    Vec<T> acc[U][M] = {};
    const auto step  = [&](int64_t k, int lanes) FUSEDRNN_LAMBDA {
      Vec<T> a_k[M];
      unroll<M>([&](auto m) FUSEDRNN_LAMBDA { a_k[m] = load(a + m * lda + k, lanes); });
      unroll<U>([&](auto u) FUSEDRNN_LAMBDA {
        const Vec<T> w = load(rows[u] + k, lanes);
        unroll<M>([&](auto m) FUSEDRNN_LAMBDA { acc[u][m] = fma(a_k[m], w, acc[u][m]); });
      });
    };
    int64_t k = 0;
    for (; k + V <= K; k += V) step(k, V);
    if (k < K) step(k, int(K - k));
    unroll<U * M>([&](auto um)
                      FUSEDRNN_LAMBDA { sums[um % M][part * U + um / M] = acc[um / M][um % M]; });
  });
  const Vec<T> b = bias ? load(bias, units) : Vec<T>{};
  unroll<M>([&](auto m) FUSEDRNN_LAMBDA { out[m] = lane_sums<T>(sums[m]) + b; });
}

template <class T>
struct UnpackedStep {
  ForwardStep<T> step;
  int64_t I;
  const T* input;  // rows of I
  int64_t input_stride;
  const T *weight_ih, *bias_ih, *weight_hh, *bias_hh;
};

template <class Cell, class T, int M>
void unpacked_tile(const UnpackedStep<T>& s, int64_t row, int64_t block) {
  constexpr int G    = Cell::kGates;
  const int64_t H    = s.step.H;
  const int64_t P    = s.step.K;
  const int64_t unit = block * kLanes<T>;
  const int units    = lanes_of<T>(H, unit);
  Vec<T> gates_x[G][M], gates_h[G][M];
  for (int g = 0; g < G; ++g) {
    const int64_t first = g * H + unit;
    affine_unpacked<T, M>(gates_x[g], s.input + row * s.input_stride, s.input_stride, s.I,
                          s.weight_ih + first * s.I, s.bias_ih ? s.bias_ih + first : nullptr,
                          units);
    affine_unpacked<T, M>(gates_h[g], s.step.h_prev + row * s.step.h_prev_stride,
                          s.step.h_prev_stride, P, s.weight_hh + first * P,
                          s.bias_hh ? s.bias_hh + first : nullptr, units);
  }
  for (int m = 0; m < M; ++m) {
    Vec<T> x[G], h[G];
    unroll<G>([&](auto g) FUSEDRNN_LAMBDA { x[g] = gates_x[g][m], h[g] = gates_h[g][m]; });
    forward_units<Cell, T>(s.step, row + m, block, x, h);
  }
}

// All units [block_begin, block_end) of rows [row, row_end).
template <class Cell, class T, int M = kUnpackedRows>
void run_unpacked(const UnpackedStep<T>& s, int64_t row, int64_t row_end, int64_t block_begin,
                  int64_t block_end) {
  for (; row + M <= row_end; row += M) {
    for (int64_t block = block_begin; block < block_end; ++block) {
      unpacked_tile<Cell, T, M>(s, row, block);
    }
  }
  if constexpr (M > 1) run_unpacked<Cell, T, M - 1>(s, row, row_end, block_begin, block_end);
}

}  // namespace
}  // namespace fusedrnn
