// The gradients of a layer's input, weights and biases, after the backward steps of a chunk have left
// grad_gates: products in the register tiles of step.h, over operands as they lie in memory or, where
// that pays or products take other than numbers, copies of them. Every element is summed by one thread
// in one order, so that the bits do not depend on how many there are.
#pragma once

#include "../walk.h"
#include "call.h"
#include "narrow.h"
#include "step.h"

namespace fusedrnn {
namespace {

// Terms of one partial sum here: so many rows of a strip of b (256 bytes with AVX-512) stay in L1 while
// all tiles of a column pass over them; rounded down to whole blocks of to_transposed_terms.
constexpr int64_t kPartialRows = 128;
template <class Terms, class T>
constexpr int64_t kPartialLanes = kPartialRows - kPartialRows % (kLanes<T> * Terms::kGroupLanes);

// Panels of a strip, side by side in either layout of a product's second factor: a full tile's. A tile
// begins with a strip, and where it is wider goes on in the next one, or it lies within one: so the
// widths of fewer_panels in step.h fall.
constexpr int kStripPanels = max_panels<Numbers<float>, 1>(kMaxRows<Numbers<float>, 1>);
template <class T>
constexpr int64_t kStrip = kStripPanels * kLanes<T>;

// The second factor of a product, of columns from `first` on, a strip's first one: b(k, first + n) =
// data[n / kStrip * strip + k * stride + n % kStrip], k in lanes of terms.
template <class T>
struct Columns {
  T* data;
  int64_t stride, strip, first = 0;

  T* at(int64_t n) const {  // b(0, n)
    return data + (n - first) / kStrip<T> * strip + (n - first) % kStrip<T>;
  }
};
// A matrix with rows of so many columns.
template <class T>
Columns<T> in_rows(T* data, int64_t columns) {
  return {data, columns, kStrip<T>};
}
// Every kStrip columns a matrix of their own, of K rows.
template <class T>
Columns<T> in_strips(T* data, int64_t K) {
  return {data, kStrip<T>, K * kStrip<T>};
}
template <class T>
constexpr int64_t strips_size(int64_t K, int64_t columns) {
  return (columns + kStrip<T> - 1) / kStrip<T> * kStrip<T> * K;
}

// The columns [left, right) of rows into their places in strips, from the first row on.
template <class Terms, class From, class T>
void to_strips(const From* from, int64_t from_stride, int64_t rows, int64_t left, int64_t right,
               const Columns<T>& b) {
  for (int64_t n = left; n < right; n += kStrip<T>) {
    to_columns_of_terms<Terms, kSecond>(from + n, from_stride, b.at(n), b.stride, rows,
                                        min64(right - n, kStrip<T>));
  }
}

// The result of a product. Rows of 16 bits are narrowed as soon as they are summed. Speedup of
// training in bfloat16 over an array of all numbers, narrowed in the end, on a Zen 4 core at (B, T,
// H), LSTM / GRU / RNN: (12, 1, 768) 1.58 / 1.46 / 1.02, (8, 10, 512) 1.06 / 1.15 / 0.99, from (32,
// 100, 256) on 1.0.
template <class T>
struct Product {
  T* numbers;  // [.., columns], or with `few_rows` [kBlockRows, columns]: of the rows being summed
  int64_t columns;
  bool few_rows    = false;
  uint16_t* narrow = nullptr;  // [.., columns], of `kind`: rows are narrowed from the cache
  Narrow kind      = kBfloat16;

  T* rows_from(int64_t m) const { return few_rows ? numbers : numbers + m * columns; }
  void finish([[maybe_unused]] int64_t m, [[maybe_unused]] int64_t rows) const {
    if constexpr (std::is_same<T, float>::value) {
      if (narrow) fusedrnn::narrow(kind, rows_from(m), narrow + m * columns, rows * columns);
    }
  }
};

// out[m][n] (+)= sum_k a(m, k) b(k, n) over K lanes of terms. A tile's row is m, its panels V columns n
// each.
template <class T>
struct ProductStep {
  int64_t K;
  // a(m, k) = a[m * a_stride_m + k * a_stride_k]; one of the strides is 1, with AMX a_stride_k.
  const T* a;
  int64_t a_stride_m, a_stride_k;
  Columns<const T> b;
  Product<T> out;
  bool accumulate;
};

template <class T, class Terms, int M, int P, bool kWhole>
FUSEDRNN_INLINE void product_columns(const ProductStep<T>& s, const T* a, const T* b, T* out,
                                     int last_lanes, int rows) {
  constexpr int V  = kLanes<T>;
  const auto lanes = [&](int p) FUSEDRNN_LAMBDA { return kWhole || p < P - 1 ? V : last_lanes; };
  Vec<T> acc[M][P] = {};
  if constexpr (Terms::kTileRows > 0) {
    static_assert(P <= kStripPanels, "b lies in one strip");
    // b's last vector may have lanes that nothing wrote, and that are not stored.
    Terms::add_product(
        acc, rows, s.K,
        [&](auto tile, int64_t k) FUSEDRNN_LAMBDA {
          Terms::template load_tile<tile>(a + k, s.a_stride_m * int64_t(sizeof(T)));
        },
        [&](auto tile, int64_t k, auto p) FUSEDRNN_LAMBDA {
          Terms::template load_tile<tile>(b + k * s.b.stride + p * V,
                                          s.b.stride * int64_t(sizeof(T)));
        });
  } else {
    for (int64_t k = 0; k < s.K; ++k, a += s.a_stride_k, b += s.b.stride) {
      add_term<Terms, T>(
          acc, [&](auto m) FUSEDRNN_LAMBDA { return a + m * s.a_stride_m; },
          [&](auto p) FUSEDRNN_LAMBDA {
            return load(b + p / kStripPanels * s.b.strip + p % kStripPanels * V, lanes(p));
          });
    }
  }
  for_rows<Terms, M>(rows, [&](auto m) FUSEDRNN_LAMBDA {
    unroll<P>([&](auto p) FUSEDRNN_LAMBDA {
      T* const to = out + m * s.out.columns + p * V;
      if (s.accumulate) acc[m][p] = acc[m][p] + load(to, lanes(p));
      store(to, acc[m][p], lanes(p));
    });
  });
}

template <class T, class Terms, int M, int P>
void product_tile(const ProductStep<T>& s, int64_t m, int64_t block, int rows, const char*) {
  constexpr int64_t V = kLanes<T>;
  const int64_t n     = block * V;
  const int64_t left  = s.out.columns - n - (P - 1) * V;
  const T* const a    = s.a + m * s.a_stride_m;
  const T* const b    = s.b.at(n);
  T* const out        = s.out.numbers + m * s.out.columns + n;
  if (left >= V) {
    product_columns<T, Terms, M, P, true>(s, a, b, out, int(V), rows);
  } else {
    product_columns<T, Terms, M, P, false>(s, a, b, out, int(left), rows);
  }
}

template <class T, class Terms_>
struct ProductTiles {
  using Step                     = ProductStep<T>;
  using Terms                    = Terms_;
  static constexpr int Q         = 1;
  static constexpr bool kFetches = false;
  template <int M, int P>
  static constexpr Tile<Step> tile = product_tile<T, Terms, M, P>;
};

// Rows that take all their terms before the next ones do, so that the partial sums stay in L2
// (96 and 384: within 2 percent, mostly slower).
constexpr int64_t kBlockRows = 192;
// Numbers of the copy of a part of a product's first factor.
constexpr int64_t kCopiedPart = kBlockRows * kPartialRows;
// Columns whose terms are made at once: kPartialRows of these are half of an L2 of 1 MB.
template <class T>
constexpr int64_t kColumnsAtOnce = 16 * kStrip<T>;
template <class T>
constexpr int64_t copied_weight(int64_t columns) {
  return strips_size<T>(kPartialRows, columns < kColumnsAtOnce<T> ? columns : kColumnsAtOnce<T>);
}

// Calls part(m, rows, k, terms) for each block of `rows` rows of [begin, end) from m on and each
// piece of `terms` of K lanes from k on, and finish(m, rows) after the last piece of a block.
template <class Terms, class T, class AddPart, class Finish>
void for_parts(int64_t K, int64_t begin, int64_t end, const AddPart& part, const Finish& finish) {
  for (int64_t m = begin; m < end; m += kBlockRows) {
    const int64_t rows = min64(end - m, kBlockRows);
    for (int64_t k = 0; k < K; k += kPartialLanes<Terms, T>) {
      part(m, rows, k, min64(K - k, kPartialLanes<Terms, T>));
    }
    finish(m, rows);
  }
}

// The columns [begin, end) of s, of one strip and half a vector at most, as rows of a product with the
// factors exchanged, out^T[n][m]: few columns take few multiplications so, and no bit changes. Speedup of training on a
// Zen 4 core at (64, 30, H), LSTM / GRU / RNN: H = 20 1.07 / 1.06 / 1.06, 50 1.08 / 1.06 / 1.06, 100
// 1.02 / 1.02 / 1.02, in bfloat16 1.0 / 1.0 / 1.01, 1.06 / 1.05 / 1.04, 1.04 / 1.04 / 1.02.
template <class Terms, class T>
void run_turned(const ProductStep<T>& s, int64_t rows, int64_t begin, int64_t end) {
  T sums[kLanes<T> / 2 * kBlockRows];
  const Columns<const T> b{s.a, s.a_stride_k, kStrip<T>};
  run_panels<ProductTiles<T, Terms>>(
      ProductStep<T>{s.K, s.b.at(begin), 1, s.b.stride, b, {sums, rows}, false}, 0, end - begin, 0,
      blocks_of<T>(rows), false);
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = begin; n < end; ++n) {
      T& out      = s.out.numbers[m * s.out.columns + n];
      const T sum = sums[(n - begin) * rows + m];
      out         = s.accumulate ? sum + out : sum;
    }
  }
}

// s, for up to kBlockRows rows and the columns [begin, end), the first of a strip; or all columns.
template <class Terms, class T>
void run_part(const ProductStep<T>& s, int64_t rows, int64_t begin, int64_t end) {
  constexpr int64_t V = kLanes<T>;
  if constexpr (Terms::kTileRows == 0) {
    const int64_t few = end % V;
    // Of fewer rows than lanes, exchanged factors would leave lanes empty, too.
    if (s.a_stride_m == 1 && few > 0 && 2 * few <= V && rows >= V) {
      run_turned<Terms>(s, rows, end - few, end);
      end -= few;
    }
  }
  run_panels<ProductTiles<T, Terms>>(s, 0, rows, begin / V, blocks_of<T>(end), false);
}
template <class Terms, class T>
void run_part(const ProductStep<T>& s, int64_t rows) {
  run_part<Terms>(s, rows, 0, s.out.columns);
}

// s, of numbers, with all its terms, for m in [begin, end) and all columns; without terms, zero is
// added.
template <class T>
void matrix_product(const ProductStep<T>& s, int64_t begin, int64_t end) {
  const auto part = [&](int64_t m, int64_t rows, int64_t k, int64_t terms) {
    ProductStep<T> part  = s;
    part.K               = terms;
    part.a              += m * s.a_stride_m + k * s.a_stride_k;
    part.b.data         += k * s.b.stride;
    part.out.numbers     = s.out.rows_from(m);
    part.accumulate      = s.accumulate || k > 0;
    run_part<Numbers<T>>(part, rows);
  };
  for_parts<Numbers<T>, T>(s.K, begin, end, part, [&](int64_t m, int64_t rows) {
    if (s.K == 0 && !s.accumulate) {
      std::memset(s.out.rows_from(m), 0, sizeof(T) * size_t(rows * s.out.columns));
    }
    s.out.finish(m, rows);
  });
}

// A direction's gradients of the pre-activations, [.., gates * H], the rows `stride` apart.
template <class T>
struct GradGates {
  const T* data;
  int64_t stride, H;
  int count;
};

// A part, whose columns begin with a strip's, of out [rows, columns] = gates weight: gate g's row block
// of the weight [gates * H, columns] is (g + first) % gates. The terms are made piece by piece, in
// copies of kCopiedPart and of copied_weight(columns) numbers. Speedup of a cell's training in bfloat16
// over making both weights' terms before their products, on Zen 4, LSTM / GRU / RNN, at (B, H):
// (32, 256) 1.02 / 1.03 / 1.01, (12, 768) 1.16 / 1.14 / 1.06, (128, 512) 1.05 / 1.06 / 1.01; on two
// threads 1.07 / 1.06 / 1.05, 1.31 / 1.35 / 1.19, 1.08 / 1.09 / 1.03. Layers of 50 and 100 steps 0.99
// to 1.01. Not for numbers: to read them where they lie takes 0.95 to 1.0 of the time.
template <class Terms, class T, class From>
void gates_product(const Part& of_out, const GradGates<T>& a, const From* weight, int first,
                   int64_t columns, T* out, T* a_copy, T* b_copy) {
  constexpr int64_t kPart = kPartialLanes<Terms, T> / Terms::kGroupLanes * Terms::kGroup;
  const int64_t end       = of_out.column + of_out.columns;
  for (int64_t left = of_out.column; left < end; left += kColumnsAtOnce<T>) {
    const int64_t right = min64(end, left + kColumnsAtOnce<T>);
    Columns<T> b        = in_strips(b_copy, kPartialRows);
    b.first             = left;
    for (int64_t k = 0; k < a.count * a.H;) {
      const int64_t g    = k / a.H;
      const int64_t some = min64((g + 1) * a.H - k, kPart);
      const int64_t row  = (k + first * a.H) % (a.count * a.H);
      to_strips<Terms>(weight + row * columns, columns, some, left, right, b);
      for (int64_t m = of_out.row_begin; m < of_out.row_end; m += kBlockRows) {
        const int64_t rows = min64(of_out.row_end - m, kBlockRows);
        to_terms<Terms>(a.data + m * a.stride + k, a.stride, a_copy, kPartialRows, rows, some);
        run_part<Terms>(ProductStep<T>{lanes<Terms>(some),
                                       a_copy,
                                       kPartialRows,
                                       1,
                                       {b.data, b.stride, b.strip, b.first},
                                       {out + m * columns, columns},
                                       k > 0},
                        rows, left, right);
      }
      k += some;
    }
  }
}

// Whether columns_products is the faster way for numbers: b, N columns, is copied once for all gates,
// which are M columns of a and copied once for each b. Speedup of training in float32 by the copies, on
// a Zen 5 core: 1.02 (LSTM and GRU, H=256), 1.03 to 1.06 (LSTM, 512), 1.02 (RNN, 1024), but 0.99
// (RNN, 256), 1.0 (LSTM, 192), 0.95 (RNN, 128); with AVX2 1.2 (LSTM and GRU, 256), 1.05 (RNN, 512) and
// 0.95 (LSTM, 192). Terms of pairs have to be made anyway.
inline bool pays_to_copy(int64_t M, int64_t N) { return M >= 1024 && N >= 256; }

template <class T>
struct ColumnsProduct {
  Columns<const T> b;
  Product<T> out;  // null: not wanted
};

// out[m][n] (+)= sum_r a[r][m] b(r, n) over `count` > 0 rows of numbers, for m in [begin, end), of two
// products. Each part of a is made a matrix of terms in `copy` first: where it lies, its rows are far
// apart, mostly a power of two, and fall into the same few sets of the caches. One copy serves both:
// with two, training an LSTM takes 1.02 of the time at (32, 100, 256), 1.0 at (64, 50, 1024), on a
// Zen 5.
template <class T, class Terms>
void columns_products(const T* a, int64_t a_stride, int64_t count,
                      const ColumnsProduct<T> (&products)[2], bool accumulate, T* copy,
                      int64_t begin, int64_t end) {
  constexpr bool kTransposed = Terms::kTileRows > 0;
  const int64_t K            = lanes<Terms>(count);
  const auto part            = [&](int64_t m, int64_t rows, int64_t k, int64_t terms) {
    const auto numbers  = [](int64_t k) { return k / Terms::kGroupLanes * Terms::kGroup; };
    const T* const from = a + m + numbers(k) * a_stride;
    const int64_t some  = min64(count - numbers(k), numbers(terms));
    if constexpr (kTransposed) {
      to_transposed_terms<Terms>(from, a_stride, copy, kPartialRows, some, rows);
    } else {
      to_columns_of_terms<Terms, kFirst>(from, a_stride, copy, kBlockRows, some, rows);
    }
    for (const ColumnsProduct<T>& p : products) {
      if (!p.out.numbers) continue;
      const Columns<const T> b{p.b.data + k * p.b.stride, p.b.stride, p.b.strip};
      run_part<Terms>(ProductStep<T>{terms,
                                     copy,
                                     kTransposed ? kPartialRows : 1,
                                     kTransposed ? 1 : kBlockRows,
                                     b,
                                     {p.out.rows_from(m), p.out.columns},
                                     accumulate || k > 0},
                      rows);
    }
  };
  for_parts<Terms, T>(K, begin, end, part, [&](int64_t m, int64_t rows) {
    for (const ColumnsProduct<T>& p : products) p.out.finish(m, rows);
  });
}

// out[0..] (+)= sum_r a[r][0..] for N vectors of columns, the last of `lanes` lanes. Sums of 16 rows,
// then of kPartialRows, then of all: as for products, sums of sums lose less.
template <class T, int N>
void column_sums_strip(T* out, const T* a, int64_t a_stride, int64_t rows, bool accumulate,
                       int lanes) {
  constexpr int V = kLanes<T>;
  const auto n    = [&](int j) FUSEDRNN_LAMBDA { return j < N - 1 ? V : lanes; };
  Vec<T> sum[N]{};
  for (int64_t r = 0; r < rows; r += kPartialRows) {
    Vec<T> part[N]{};
    for (int64_t end = rows - r < kPartialRows ? rows : r + kPartialRows, i = r; i < end;) {
      Vec<T> few[N]{};
      for (const int64_t few_end = end - i < 16 ? end : i + 16; i < few_end; ++i) {
        unroll<N>([&](auto j)
                      FUSEDRNN_LAMBDA { few[j] = few[j] + load(a + i * a_stride + j * V, n(j)); });
      }
      unroll<N>([&](auto j) FUSEDRNN_LAMBDA { part[j] = part[j] + few[j]; });
    }
    unroll<N>([&](auto j) FUSEDRNN_LAMBDA { sum[j] = sum[j] + part[j]; });
  }
  unroll<N>([&](auto j) FUSEDRNN_LAMBDA {
    if (accumulate) sum[j] = sum[j] + load(out + j * V, n(j));
    store(out + j * V, sum[j], n(j));
  });
}

// out[u] (+)= sum_r a[r][u] for u in [u_begin, u_end), in strips of columns: rows are far apart.
template <class T>
void column_sums(T* out, const T* a, int64_t a_stride, int64_t rows, bool accumulate,
                 int64_t u_begin, int64_t u_end) {
  constexpr int64_t V = kLanes<T>;
  int64_t u           = u_begin;
  for (; u + 4 * V <= u_end; u += 4 * V) {
    column_sums_strip<T, 4>(out + u, a + u, a_stride, rows, accumulate, int(V));
  }
  for (; u < u_end; u += V) {
    column_sums_strip<T, 1>(out + u, a + u, a_stride, rows, accumulate, lanes_of<T>(u_end, u));
  }
}

}  // namespace
}  // namespace fusedrnn
