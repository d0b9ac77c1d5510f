// The gradients of a layer's weights and biases, after the backward recurrence has left grad_gates:
// products over all R = T*B rows, in the register tiles of step.h. Every element is summed by one
// thread in one order, so that the bits do not depend on how many there are.
#pragma once

#include "step.h"

namespace fusedrnn {
namespace {

// Rows of one partial sum. Sums of sums lose less than one long sum, and so many rows of 256 bytes
// (a tile's columns) stay in L1 while all tiles of a column pass over them.
constexpr int64_t kPartialRows = 128;

// out[u][k] (+)= sum over `rows` rows r of a[r][u] b[r][k]: one chunk of a^T b. A tile's row is u,
// its panel V columns k.
template <class T>
struct OuterStep {
  int64_t rows;
  const T* a;  // rows of a_stride
  int64_t a_stride;
  const T* b;  // rows of `columns`, dense
  int64_t columns;
  T* out;  // [..., columns]
  bool accumulate;
};

template <class T, int M, int P, bool kWhole>
FUSEDRNN_INLINE void outer_product(const OuterStep<T>& s, const T* a, const T* b, T* out,
                                   int last_lanes) {
  constexpr int V  = kLanes<T>;
  const auto lanes = [&](int p) FUSEDRNN_LAMBDA { return kWhole || p < P - 1 ? V : last_lanes; };
  Vec<T> acc[M][P] = {};
  for (int64_t r = 0; r < s.rows; ++r, a += s.a_stride, b += s.columns) {
    Vec<T> b_r[P];
    unroll<P>([&](auto p) FUSEDRNN_LAMBDA { b_r[p] = load(b + p * V, lanes(p)); });
    unroll<M>([&](auto m) FUSEDRNN_LAMBDA {
      const Vec<T> a_r = splat<Vec<T>>(a[m]);
      unroll<P>([&](auto p) FUSEDRNN_LAMBDA { acc[m][p] = fma(a_r, b_r[p], acc[m][p]); });
    });
  }
  unroll<M>([&](auto m) FUSEDRNN_LAMBDA {
    unroll<P>([&](auto p) FUSEDRNN_LAMBDA {
      T* const to = out + m * s.columns + p * V;
      if (s.accumulate) acc[m][p] = acc[m][p] + load(to, lanes(p));
      store(to, acc[m][p], lanes(p));
    });
  });
}

template <class T, int M, int P>
void outer_tile(const OuterStep<T>& s, int64_t u, int64_t block) {
  constexpr int64_t V = kLanes<T>;
  const int64_t k     = block * V;
  const int64_t left  = s.columns - k - (P - 1) * V;
  T* const out        = s.out + u * s.columns + k;
  if (left >= V) {
    outer_product<T, M, P, true>(s, s.a + u, s.b + k, out, int(V));
  } else {
    outer_product<T, M, P, false>(s, s.a + u, s.b + k, out, int(left));
  }
}

template <class T>
struct OuterTiles {
  using Step             = OuterStep<T>;
  static constexpr int Q = 1;
  template <int M, int P>
  static constexpr Tile<Step> tile = outer_tile<T, M, P>;
};

// out[u][k] = sum_r a[r][u] b[r][k] for u in [u_begin, u_end) and all k; zero if there are no rows.
template <class T>
void transposed_product(T* out, const T* a, int64_t a_stride, const T* b, int64_t columns,
                        int64_t rows, int64_t u_begin, int64_t u_end) {
  if (rows == 0) {
    std::memset(out + u_begin * columns, 0, sizeof(T) * size_t((u_end - u_begin) * columns));
  }
  for (int64_t r = 0; r < rows; r += kPartialRows) {
    const int64_t partial = rows - r < kPartialRows ? rows - r : kPartialRows;
    const OuterStep<T> step{partial, a + r * a_stride, a_stride, b + r * columns, columns, out,
                            r > 0};
    run_tiles<OuterTiles<T>>(step, u_begin, u_end, 0, blocks_of<T>(columns), false);
  }
}

// out[u] = sum_r a[r][u] for u in [u_begin, u_end), from partial sums of every eighth row.
template <class T>
void column_sums(T* out, const T* a, int64_t a_stride, int64_t rows, int64_t u_begin,
                 int64_t u_end) {
  for (int64_t u = u_begin; u < u_end; u += kLanes<T>) {
    const int lanes = lanes_of<T>(u_end, u);
    Vec<T> sum{};
    for (int64_t r = 0; r < rows; r += kPartialRows) {
      const int64_t end = rows - r < kPartialRows ? rows : r + kPartialRows;
      Vec<T> partial[8] = {};
      int64_t i         = r;
      for (; i + 8 <= end; i += 8) {
        unroll<8>([&](auto j) FUSEDRNN_LAMBDA {
          partial[j] = partial[j] + load(a + (i + j) * a_stride + u, lanes);
        });
      }
      for (; i < end; ++i) partial[0] = partial[0] + load(a + i * a_stride + u, lanes);
      sum = sum + (((partial[0] + partial[4]) + (partial[1] + partial[5])) +
                   ((partial[2] + partial[6]) + (partial[3] + partial[7])));
    }
    store(out + u, sum, lanes);
  }
}

}  // namespace
}  // namespace fusedrnn
