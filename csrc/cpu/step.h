// HOW one time step runs on the CPU: register tiles of M batch rows x P panels (V hidden units
// each) that hold the product of all gates in registers and, in the recurrence, apply the cell
// there. Not when steps run, nor who runs which: forward.h, backward.h.
#pragma once

#include "../cells/math.h"
#include "amx.h"
#include "pack.h"
#include "vec.h"

namespace fusedrnn {
namespace {

// Rows of the tallest tile whose product has Q vectors per panel row. Chosen for few loads per FMA:
// 24 accumulators as 6 x 4 (LSTM: one panel of 4 gates; backward and RNN: 4 panels), GRU 8 x 3; 12 as
// 3 x 4 (LSTM), 4 x 3 (GRU), 6 x 2 (backward and RNN). Speedup of training over 3 x 4 for these too,
// with AVX2 on a Zen 4 core, LSTM / GRU / RNN at (B, T, H): (8, 100, 128) 1.01 / 1.05 / 1.03, (48,
// 30, 192) 1.03 / 1.04 / 1.07, (64, 20, 512) 1.01 / 1.0 / 1.09, (64, 49, 58) with I = 498 1.12 / 1.07
// / 1.12.
template <class Terms, int Q>
constexpr int kMaxRows = Terms::kTileRows > 0 ? Terms::kTileRows
                         : Q == 1             ? 6
                                              : kAccumulators / Q;

// Panels of the widest tile of M rows: enough independent accumulators to hide the FMA's latency
// where there are few rows. At most 8, the streams that hardware prefetchers follow. AMX has 4
// accumulators. Only a last panel is Folded.
template <class Terms, int Q>
constexpr int max_panels(int M) {
  if (Terms::kTileRows > 0) return Q == 1 ? 4 : 1;
  if (Terms::kFold > 1) return 1;
  int P = 1;
  while (2 * P * M * Q <= kAccumulators && P < 8) P *= 2;
  return P;
}

// f(m) for the rows of a tile: M, each in its own registers, or of AMX's tiles the first `rows`.
template <class Terms, int M, class F>
FUSEDRNN_INLINE void for_rows([[maybe_unused]] int rows, F&& f) {
  if constexpr (Terms::kTileRows > 0) {
    for (int m = 0; m < rows; ++m) f(m);
  } else {
    unroll<M>(f);
  }
}

// Terms of one partial sum over k. Sums of sums lose less than one long sum: with 512 terms in one,
// an RNN's error was 1.5 times torch's, this way 1.2 times. Costs LSTM 0.7 percent at H=512; 128
// terms would cost 2.
constexpr int64_t kPartialTerms = 256;
// Where the part of K terms that begins with the k-th ends.
FUSEDRNN_INLINE int64_t part_end(int64_t k, int64_t K) {
  return K - k < kPartialTerms ? K : k + kPartialTerms;
}

// Whether a tile has work enough to fetch weights for later ones beside it, more than two thirds of the
// accumulators: a low one's has not (0.98 to 1.0 at 8 rows of an LSTM, H=512), nor AVX2's of several
// gates (0.96 to 0.99; an RNN's, H=1024, 1.03 to 1.06). Not measured, and never, with 16-byte vectors.
constexpr bool fetches(int64_t M, int64_t P, int64_t Q) {
  return (kVectorBytes == 64 || (kVectorBytes == 32 && Q == 1)) &&
         3 * M * P * Q > 2 * kAccumulators;
}

// acc[m][n] += *a(m) b(n), with the factor of which there are fewer in registers.
template <class Terms, class T, int M, int N, class First, class Second>
FUSEDRNN_INLINE void add_term(Vec<T> (&acc)[M][N], const First& a, const Second& b) {
  if constexpr (M <= N) {
    decltype(Terms::spread(static_cast<const T*>(nullptr))) a_k[M];
    unroll<M>([&](auto m) FUSEDRNN_LAMBDA { a_k[m] = Terms::spread(a(m)); });
    unroll<N>([&](auto n) FUSEDRNN_LAMBDA {
      const Vec<T> b_k = b(n);
      unroll<M>([&](auto m)
                    FUSEDRNN_LAMBDA { acc[m][n] = Terms::multiply_add(a_k[m], b_k, acc[m][n]); });
    });
  } else {
    Vec<T> b_k[N];
    unroll<N>([&](auto n) FUSEDRNN_LAMBDA { b_k[n] = b(n); });
    unroll<M>([&](auto m) FUSEDRNN_LAMBDA {
      const auto a_k = Terms::spread(a(m));
      unroll<N>([&](auto n)
                    FUSEDRNN_LAMBDA { acc[m][n] = Terms::multiply_add(a_k, b_k[n], acc[m][n]); });
    });
  }
}

// acc[m][p*Q + q] += sum_k a[m*lda + k] panel_p[k][q] for k in [begin, end), ascending; k counts
// lanes of terms. Beside each k, the line k * Q vectors after `next` is fetched to L2, if that is a
// pointer and the tile fetches.
template <class Terms, int M, int P, int Q, class T, class Next>
FUSEDRNN_INLINE void partial_product(Vec<T> (&acc)[M][P * Q], const T* a, int64_t lda,
                                     int64_t begin, int64_t end, const T* panels,
                                     int64_t panel_size, [[maybe_unused]] Next next) {
  constexpr int V = kLanes<T>;
  static_assert(kPartialTerms % Terms::kFold == 0, "begin is that of a row");
  const T* row = panels + begin / Terms::kFold * Q * V;
  for (int64_t k = begin; k < end; k += Terms::kFold, row += Q * V) {
    if constexpr (std::is_pointer<Next>::value && Terms::kFold == 1 && fetches(M, P, Q)) {
      __builtin_prefetch(next + k * Q * kVectorBytes, 0, 2);
    }
    add_term<Terms, T>(
        acc, [&](auto m) FUSEDRNN_LAMBDA { return a + (m * lda + k); },
        [&](auto pq) FUSEDRNN_LAMBDA { return load(row + pq / Q * panel_size + pq % Q * V); });
  }
}

// acc[m][p*Q + q] += sum_k a[m*lda + k] panel_p[k][q], in one order whatever M and P are: a row's
// bits do not depend on the tile that it falls into. Folded: kFold terms for each row of the panel, then
// a unit's lanes are added up, then what is left of K, one by one.
template <class Terms, int M, int P, int Q, class T, class Next>
FUSEDRNN_INLINE void product(Vec<T> (&acc)[M][P * Q], [[maybe_unused]] int rows, const T* a,
                             int64_t lda, int64_t K, const T* panels, int64_t panel_size,
                             [[maybe_unused]] Next next) {
  if constexpr (Terms::kTileRows > 0) {
    constexpr int V = kLanes<T>;
    Terms::add_product(
        acc, rows, K,
        [&](auto tile, int64_t k)
            FUSEDRNN_LAMBDA { Terms::template load_tile<tile>(a + k, lda * int64_t(sizeof(T))); },
        [&](auto tile, int64_t k, auto pq) FUSEDRNN_LAMBDA {
          Terms::template load_tile<tile>(panels + pq / Q * panel_size + (k * Q + pq % Q) * V,
                                          Q * kVectorBytes);
        });
  } else {
    const int64_t whole = K - K % Terms::kFold;
    int64_t end         = part_end(0, whole);
    if constexpr (std::is_pointer<Next>::value) {
      if (!next) next = reinterpret_cast<const char*>(panels);  // read anyway: no branch per term
    }
    partial_product<Terms, M, P, Q>(acc, a, lda, 0, end, panels, panel_size, next);
    while (end < whole) {
      const int64_t begin   = end;
      end                   = part_end(begin, whole);
      Vec<T> part[M][P * Q] = {};
      partial_product<Terms, M, P, Q>(part, a, lda, begin, end, panels, panel_size, next);
      unroll<M * P * Q>([&](auto i) FUSEDRNN_LAMBDA {
        constexpr int m = i / (P * Q), pq = i % (P * Q);
        acc[m][pq] = acc[m][pq] + part[m][pq];
      });
    }
    if constexpr (Terms::kFold > 1) {
      static_assert(P == 1);
      unroll<M * Q>([&](auto i) FUSEDRNN_LAMBDA {
        acc[i / Q][i % Q] = folded<Terms::kFold, T>(acc[i / Q][i % Q]);
      });
      partial_product<typename Terms::Single, M, P, Q>(
          acc, a + whole, lda, 0, K - whole, panels + whole / Terms::kFold * Q * kLanes<T>,
          panel_size, nullptr);
    }
  }
}

// pack_forward's panels of the blocks from `first` on.
template <class T>
struct ForwardPanels {
  const T* data;
  int64_t first = 0;

  template <int G>
  const T* of(int64_t block, int64_t K) const {
    return data + (block - first) * forward_panel_size<G, T>(K);
  }
};

// acc = bias + a W^T of M rows of K lanes and P panels.
template <int G, class Terms, int M, int P, class T>
FUSEDRNN_INLINE void affine(Vec<T> (&acc)[M][P * G], int rows, const T* a, int64_t lda, int64_t K,
                            const ForwardPanels<T>& all_panels, int64_t block, const char* next) {
  constexpr int V          = kLanes<T>;
  const int64_t panel_size = forward_panel_size<G, T>(K);
  const T* panels          = all_panels.template of<G>(block, K);
  unroll<P * G>([&](auto pg) FUSEDRNN_LAMBDA {
    const Vec<T> bias = load(panels + pg / G * panel_size + pg % G * V);
    for_rows<Terms, M>(rows, [&](auto m) FUSEDRNN_LAMBDA { acc[m][pg] = bias; });
  });
  product<Terms, M, P, G>(acc, rows, a, lda, K, panels + G * V, panel_size, next);
}

// A product by rows: the input projection (a row is one batch element at one time step), and
// weight_hr's, with G = 1 and P for H.
template <class T>
struct ProjectStep {
  int64_t K, H;
  const T* input;  // rows of K lanes of terms
  int64_t input_stride;
  T* gates;  // rows of G*H
  int64_t gates_stride;
  ForwardPanels<T> panels;
};

template <int G, class T, class Terms, int M, int P>
void project_tile(const ProjectStep<T>& s, int64_t row, int64_t block, int rows, const char* next) {
  Vec<T> acc[M][P * G];
  affine<G, Terms, M, P>(acc, rows, s.input + row * s.input_stride, s.input_stride, s.K, s.panels,
                         block, next);
  for_rows<Terms, M>(rows, [&](auto m) FUSEDRNN_LAMBDA {
    unroll<P>([&](auto p) FUSEDRNN_LAMBDA {
      const int64_t unit = (block + p) * kLanes<T>;
      const int lanes    = lanes_of<T>(s.H, unit);
      unroll<G>([&](auto g) FUSEDRNN_LAMBDA {
        store(s.gates + (row + m) * s.gates_stride + g * s.H + unit, acc[m][p * G + g], lanes);
      });
    });
  });
}

// One direction at one time step; a row is one batch element. Strides are in elements per row;
// gates and extra are dense.
template <class T>
struct ForwardStep {
  int64_t H;
  bool save;
  T* gates;         // [B, G*H]: for the activated gates, if save; forward_tile finds gates_x there
  T* extra;         // [B, H]: LSTM c, GRU a_hn; null: not wanted (LSTM's is, unless h is null)
  const T* h_prev;  // rows of K lanes of terms
  int64_t K, h_prev_stride;
  const T* prev;  // [B, H]: LSTM c_prev, GRU h_prev
  int64_t prev_stride;
  T* h;  // [B, H]: before the projection, if there is one; or null
  int64_t h_stride;
  ForwardPanels<T> panels;
};

// The cell's first part for V units of one row, both products in registers.
template <class Cell, class T>
FUSEDRNN_INLINE auto begin_units(const ForwardStep<T>& s, int64_t row, int64_t block,
                                 const Vec<T>* gates_x, const Vec<T>* gates_h) {
  constexpr int G    = Cell::kGates;
  const int64_t unit = block * kLanes<T>;
  const int lanes    = lanes_of<T>(s.H, unit);
  Vec<T> prev{};
  if constexpr (Cell::kHasCell) prev = load(s.prev + row * s.prev_stride + unit, lanes);
  const auto units = Cell::begin(gates_x, gates_h, prev);
  if constexpr (Cell::kHasExtra) {
    if (s.extra) store(s.extra + row * s.H + unit, units.extra, lanes);
  }
  if (s.save) {
    unroll<Cell::kFinishFrom>([&](auto g) FUSEDRNN_LAMBDA {
      store(s.gates + (row * G + g) * s.H + unit, units.gates[g], lanes);
    });
  }
  return units;
}
// Its second part.
template <class Cell, class T>
FUSEDRNN_INLINE void finish_units(const ForwardStep<T>& s, int64_t row, int64_t block,
                                  typename Cell::template Forward<Vec<T>> units) {
  constexpr int G    = Cell::kGates;
  const int64_t unit = block * kLanes<T>;
  const int lanes    = lanes_of<T>(s.H, unit);
  Vec<T> prev{};
  if constexpr (Cell::kPrevIsH) prev = load(s.prev + row * s.prev_stride + unit, lanes);
  Cell::finish(&units, prev);
  if (s.h) store(s.h + row * s.h_stride + unit, units.h, lanes);
  if (s.save) {
    unroll<G - Cell::kFinishFrom>([&](auto i) FUSEDRNN_LAMBDA {
      constexpr int g = Cell::kFinishFrom + i;
      store(s.gates + (row * G + g) * s.H + unit, units.gates[g], lanes);
    });
  }
}
template <class Cell, class T>
FUSEDRNN_INLINE void forward_units(const ForwardStep<T>& s, int64_t row, int64_t block,
                                   const Vec<T>* gates_x, const Vec<T>* gates_h) {
  finish_units<Cell, T>(s, row, block, begin_units<Cell, T>(s, row, block, gates_x, gates_h));
}

// The cell for M rows and P panels, whose products are `sums`. A loop that every tile calls: unrolled in
// each, its code made the library 1.07 times as large.
template <class Cell, class T>
void forward_cells(const ForwardStep<T>& s, int64_t row, int64_t block, int M, int P,
                   Vec<T>* sums) {
  constexpr int G           = Cell::kGates;
  constexpr int kFinishFrom = Cell::kFinishFrom;
  // All cells' first parts, then all second parts: one cell's two parts in a row fill the
  // out-of-order window, and no other cell's work hides their latency. Speedup of an inference call
  // on a Zen 5 core at (B, H) = (8, 128) and (32, 256): LSTM 1.02 and 1.01, GRU 1.03 and 1.01, with
  // bfloat16's products LSTM 1.04 and 1.02, GRU 1.06 and 1.03; of an LSTM's two cells (1, 32) 0.99.
  const bool apart = G > 1 && M * P > 2;
  Vec<T>* of_cell  = sums;
  for (int64_t m = row; m < row + M; ++m) {
    for (int64_t b = block; b < block + P; ++b, of_cell += G) {
      const int64_t unit = b * kLanes<T>;
      const int lanes    = lanes_of<T>(s.H, unit);
      Vec<T> gates_x[G];
      unroll<G>([&](auto g) FUSEDRNN_LAMBDA {
        gates_x[g] = load(s.gates + (m * G + g) * s.H + unit, lanes);
      });
      const auto units = begin_units<Cell, T>(s, m, b, gates_x, of_cell);
      if (apart) {
        for (int g = kFinishFrom; g < G; ++g) of_cell[g] = units.gates[g];
      } else {
        finish_units<Cell, T>(s, m, b, units);
      }
    }
  }
  if (!apart) return;
  of_cell = sums;
  for (int64_t m = row; m < row + M; ++m) {
    for (int64_t b = block; b < block + P; ++b, of_cell += G) {
      const int64_t unit = b * kLanes<T>;
      typename Cell::template Forward<Vec<T>> units{};
      for (int g = kFinishFrom; g < G; ++g) units.gates[g] = of_cell[g];
      if (Cell::kHasCell && s.extra) {
        units.extra = load(s.extra + m * s.H + unit, lanes_of<T>(s.H, unit));
      }
      finish_units<Cell, T>(s, m, b, units);
    }
  }
}

template <class Cell, class T, class Terms, int M, int P>
void forward_tile(const ForwardStep<T>& s, int64_t row, int64_t block, int rows, const char* next) {
  constexpr int G = Cell::kGates;
  Vec<T> acc[M][P * G];
  affine<G, Terms, M, P>(acc, rows, s.h_prev + row * s.h_prev_stride, s.h_prev_stride, s.K,
                         s.panels, block, next);
  Vec<T> sums[M * P * G];
  for_rows<Terms, M>(rows, [&](auto m) FUSEDRNN_LAMBDA {
    unroll<P * G>([&](auto pg) FUSEDRNN_LAMBDA { sums[m * (P * G) + pg] = acc[m][pg]; });
  });
  forward_cells<Cell, T>(s, row, block, Terms::kTileRows > 0 ? rows : M, P, sums);
}

// The terms whose sum is the gradient of h [B, P] of one direction at one time step. With a projection
// also of the cell's h [B, H], where only the product is set.
template <class T>
struct GradH {
  // The product: of the step after's grad_gates and weight_hh, or of the projection's gradient and
  // weight_hr.
  const T* terms;  // K lanes of each row, or null for zero
  int64_t K, stride;
  const T* panels;  // pack_backward's
  const bool* cut;  // [B] or null: whether a boundary lies between a row and the step after
  const T* output;  // [B, P] or null
  int64_t output_stride;
  const T* h_n;  // [B, P] or null
  int64_t P;     // columns: P, or of the cell's h H
};

// A gradient of h, and what is done with it: finish has the products of M x P vectors. It is called
// once a tile, so that its code stands once and not in every tile. fetch, if not null, is called before
// the product, to have in the cache what finish reads.
template <class T>
struct GradHStep {
  GradH<T> grad_h;
  void (*fetch)(const GradHStep&, int64_t row, int64_t block, int M, int P);
  void (*finish)(const GradHStep&, int64_t row, int64_t block, int M, int P,
                 const Vec<T>* products);
};

template <class T, class Terms, int M, int P>
void grad_h_tile(const GradHStep<T>& s, int64_t row, int64_t block, int rows, const char*) {
  const GradH<T>& g        = s.grad_h;
  const int64_t panel_size = g.K * kLanes<T>;
  const int tile_rows      = Terms::kTileRows > 0 ? rows : M;
  if (s.fetch) s.fetch(s, row, block, tile_rows, P);
  Vec<T> acc[M][P] = {};
  if (g.terms) {
    product<Terms, M, P, 1>(acc, rows, g.terms + row * g.stride, g.stride, g.K,
                            g.panels + block * panel_size, panel_size, nullptr);
  }
  Vec<T> products[M * P];
  for_rows<Terms, M>(rows, [&](auto m) FUSEDRNN_LAMBDA {
    unroll<P>([&](auto p) FUSEDRNN_LAMBDA { products[m * P + p] = acc[m][p]; });
  });
  s.finish(s, row, block, tile_rows, P, products);
}
template <class T>
FUSEDRNN_INLINE Vec<T> grad_h_sum(const GradH<T>& s, int64_t row, int64_t unit, int lanes,
                                  Vec<T> product) {
  Vec<T> grad_h = s.cut && s.cut[row] ? Vec<T>{} : product;
  if (s.output) grad_h = grad_h + load(s.output + row * s.output_stride + unit, lanes);
  if (s.h_n) grad_h = grad_h + load(s.h_n + row * s.P + unit, lanes);
  return grad_h;
}

// The gradient of a projection's result.
template <class T>
struct ProjectedGradHStep : GradHStep<T> {
  T* out;  // [B, P]
};

template <class T>
void store_grad_h(const GradHStep<T>& step, int64_t row, int64_t block, int M, int P,
                  const Vec<T>* products) {
  const auto& s = static_cast<const ProjectedGradHStep<T>&>(step);
  for (int64_t m = row; m < row + M; ++m) {
    for (int64_t b = block; b < block + P; ++b) {
      const int64_t unit = b * kLanes<T>;
      const int lanes    = lanes_of<T>(s.grad_h.P, unit);
      store(s.out + m * s.grad_h.P + unit, grad_h_sum<T>(s.grad_h, m, unit, lanes, *products++),
            lanes);
    }
  }
}

template <class T>
struct BackwardStep : GradHStep<T> {
  int64_t H;
  const T* gates;       // [B, G*H]
  const T* extra;       // [B, H]: LSTM c, GRU a_hn
  const T* prev;        // [B, H]: LSTM c_prev, GRU h_prev; dense
  const T* grad_cells;  // [B, H] or null: LSTM
  int64_t grad_cells_stride;
  T* carry;       // [B, H]
  T* grad_gates;  // [B, E*H]
  T* h;           // [B, H] or null: LSTM and RNN write this step's h here, but for the rows cut
};

// The cell's gradient for V units of one row, from the product in their gradient of h.
template <class Cell, class T>
FUSEDRNN_INLINE void backward_units(const BackwardStep<T>& s, int64_t row, int64_t block,
                                    Vec<T> product) {
  constexpr int G    = Cell::kGates;
  constexpr int E    = Cell::kGradGates;
  const int64_t H    = s.H;
  const int64_t unit = block * kLanes<T>;
  const int64_t at   = row * H + unit;
  const int lanes    = lanes_of<T>(H, unit);
  Vec<T> gates[G];
  unroll<G>([&](auto g)
                FUSEDRNN_LAMBDA { gates[g] = load(s.gates + row * G * H + g * H + unit, lanes); });
  const Vec<T> grad_h = grad_h_sum<T>(s.grad_h, row, unit, lanes, product);
  Vec<T> extra{}, prev{}, carry{};
  if constexpr (Cell::kHasExtra) extra = load(s.extra + at, lanes);
  if constexpr (Cell::kHasCell || Cell::kPrevIsH) prev = load(s.prev + at, lanes);
  if constexpr (Cell::kHasCarry) carry = load(s.carry + at, lanes);
  if constexpr (Cell::kHasCell) {
    if (s.grad_cells) {
      carry = carry + load(s.grad_cells + row * s.grad_cells_stride + unit, lanes);
    }
  }
  const auto out = Cell::backward(gates, extra, prev, grad_h, carry);
  unroll<E>([&](auto e) FUSEDRNN_LAMBDA {
    store(s.grad_gates + row * E * H + e * H + unit, out.grad_gates[e], lanes);
  });
  if constexpr (Cell::kHasCarry) store(s.carry + at, out.carry, lanes);
  if constexpr (!Cell::kPrevIsH) {
    if (s.h && !(s.grad_h.cut && s.grad_h.cut[row])) store(s.h + at, out.h, lanes);
  }
}

// What backward_tile reads and writes: short pieces of rows far apart, which hardware prefetchers miss.
template <class Cell, class T>
void fetch_tile(const GradHStep<T>& step, int64_t row, int64_t block, int M, int P) {
  constexpr int G  = Cell::kGates;
  constexpr int E  = Cell::kGradGates;
  const auto& s    = static_cast<const BackwardStep<T>&>(step);
  const auto fetch = [&](const T* from) FUSEDRNN_LAMBDA {
    const auto first = reinterpret_cast<const char*>(from + block * kLanes<T>);
    for (int byte = 0; byte < P * kVectorBytes; byte += 64) __builtin_prefetch(first + byte);
  };
  for (int64_t m = row; m < row + M; ++m) {
    for (int g = 0; g < G; ++g) fetch(s.gates + (m * G + g) * s.H);
    for (int e = 0; e < E && s.grad_gates != s.gates; ++e) fetch(s.grad_gates + (m * E + e) * s.H);
    if constexpr (Cell::kHasExtra) fetch(s.extra + m * s.H);
    if constexpr (Cell::kHasCell || Cell::kPrevIsH) fetch(s.prev + m * s.H);
    if (s.grad_h.output) fetch(s.grad_h.output + m * s.grad_h.output_stride);
  }
}

template <class Cell, class T>
void backward_tile(const GradHStep<T>& step, int64_t row, int64_t block, int M, int P,
                   const Vec<T>* products) {
  const auto& s = static_cast<const BackwardStep<T>&>(step);
  for (int64_t m = row; m < row + M; ++m) {
    for (int64_t b = block; b < block + P; ++b) backward_units<Cell, T>(s, m, b, *products++);
  }
}

// One row's h from its saved gates, by the arithmetic of the forward pass; h_prev is read by GRU only.
template <class Cell, class T>
void compute_h(int64_t H, int64_t block_begin, int64_t block_end, const T* gates, const T* extra,
               const T* h_prev, T* h) {
  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t unit = block * kLanes<T>;
    const int lanes    = lanes_of<T>(H, unit);
    Vec<T> gate[Cell::kGates], extra_v{}, prev{};
    unroll<Cell::kGates>([&](auto g)
                             FUSEDRNN_LAMBDA { gate[g] = load(gates + g * H + unit, lanes); });
    if constexpr (Cell::kHasCell) extra_v = load(extra + unit, lanes);
    if constexpr (Cell::kPrevIsH) prev = load(h_prev + unit, lanes);
    store(h + unit, Cell::hidden(gate, extra_v, prev), lanes);
  }
}

// Tiles by rows and panels; null where the accumulators would not fit. A tile of registers has
// its own number of rows, M; one of AMX's has those that it is called with. next: null, or a line of
// later panels, for those that fetch.
template <class Step>
using Tile = void (*)(const Step&, int64_t row, int64_t block, int rows, const char* next);

// Of a product: columns, and K lanes of terms.
struct ProductSize {
  int64_t units, K;
};

template <class Cell, class T, class Terms_ = Numbers<T>>
struct ProjectTiles {
  using Step                     = ProjectStep<T>;
  using Terms                    = Terms_;
  static constexpr int Q         = Cell::kGates;
  static constexpr bool kFetches = true;
  template <class Other>
  using With = ProjectTiles<Cell, T, Other>;
  static ProductSize size(const Step& step) { return {step.H, step.K}; }
  template <int M, int P>
  static constexpr Tile<Step> tile = project_tile<Q, T, Terms, M, P>;
};
template <class Cell, class T, class Terms_ = Numbers<T>>
struct ForwardTiles {
  using Step                     = ForwardStep<T>;
  using Terms                    = Terms_;
  static constexpr int Q         = Cell::kGates;
  static constexpr bool kFetches = true;
  template <class Other>
  using With = ForwardTiles<Cell, T, Other>;
  static ProductSize size(const Step& step) { return {step.H, step.K}; }
  template <int M, int P>
  static constexpr Tile<Step> tile = forward_tile<Cell, T, Terms, M, P>;
};
template <class T, class Terms_ = Numbers<T>>
struct GradHTiles {
  using Step                     = GradHStep<T>;
  using Terms                    = Terms_;
  static constexpr int Q         = 1;
  static constexpr bool kFetches = false;
  template <class Other>
  using With = GradHTiles<T, Other>;
  static ProductSize size(const Step& step) { return {step.grad_h.P, step.grad_h.K}; }
  template <int M, int P>
  static constexpr Tile<Step> tile = grad_h_tile<T, Terms, M, P>;
};

// Panels of the next narrower tile of M rows: of one row and one gate, which waits for its sums, any
// width. Not 3 where two panels hide the latency: float32's LSTM at (1, 100, 48) 0.98. Speedup over powers
// of two at B = 1, T = 100 on a Zen 4 core: RNN, H = 48 1.22, 80 1.14, 112 1.0, AVX2 40 1.27, 112 1.09; H
// = 48 GRU 1.07, bfloat16 LSTM 1.07, GRU 1.10, RNN 1.13; training GRU and RNN 1.10, AVX2 LSTM 1.04, RNN
// 1.10.
template <class Terms, int Q>
constexpr int64_t fewer_panels(int M, int64_t P) {
  if (Q == 4 && Terms::kGroup == 1) return P / 2;
  return P > 4 && M * Q > 1 ? 4 : P - 1;
}

// Whether tiles of M rows, for each M, have all widths that those of M + 1 have: side by side both take
// the taller's.
template <class Terms, int Q>
constexpr bool widths_nest() {
  for (int M = 1; M < kMaxRows<Terms, Q>; ++M) {
    int64_t low = max_panels<Terms, Q>(M), tall = max_panels<Terms, Q>(M + 1);
    for (; tall > 0; tall = tall > 1 ? fewer_panels<Terms, Q>(M + 1, tall) : 0) {
      while (low > tall) low = fewer_panels<Terms, Q>(M, low);
      if (low != tall) return false;
    }
  }
  return true;
}

// Null for a width that they do not have.
template <class Tiles, int M, int P>
FUSEDRNN_INLINE Tile<typename Tiles::Step> tile_of(int64_t panels) {
  if (panels == P) return Tiles::template tile<M, P>;
  if constexpr (P > 1) {
    return tile_of<Tiles, M, fewer_panels<typename Tiles::Terms, Tiles::Q>(M, P)>(panels);
  } else {
    return nullptr;
  }
}
template <class Tiles, int M = 1>
Tile<typename Tiles::Step> tile_of(int rows, int64_t panels) {
  using Terms      = typename Tiles::Terms;
  constexpr int kM = Terms::kTileRows > 0 ? Terms::kTileRows : M;
  if (Terms::kTileRows > 0 || rows == M) {
    return tile_of<Tiles, kM, max_panels<Terms, Tiles::Q>(kM)>(panels);
  }
  if constexpr (M < kMaxRows<Terms, Tiles::Q>) return tile_of<Tiles, M + 1>(rows, panels);
  return nullptr;
}

// Where the i-th tile of rows fetches to L2, for each term that it multiplies, a line of the P panels
// from `block` on: line i % kLines of panel i / kLines. Null if there is none, or if the tiles are
// too few for all lines: to fetch only some is slower than none (0.91 at 16 rows). So weights beyond
// L2 come while the multipliers have work. Speedup of an inference call on a Zen 5 core at H = 1024:
// 1.19 (LSTM), 1.28 (GRU) and 1.0 (RNN) for 32 rows, 1.07, 1.07 and 1.06 for 64; 1.0 to 1.03 at H =
// 512.
template <int Q, class T>
const char* next_line(const ForwardPanels<T>& panels, int64_t K, int64_t block, int64_t P,
                      int64_t tiles, int64_t i) {
  constexpr int64_t kLines = (Q * kVectorBytes + 63) / 64;
  if (tiles < P * kLines || i >= P * kLines) return nullptr;
  const T* const terms = panels.template of<Q>(block + i / kLines, K) + Q * kLanes<T>;
  return reinterpret_cast<const char*>(terms) + i % kLines * 64;
}

// All units [block_begin, block_end) of rows [row_begin, row_end), in tiles of nearly equal height.
// `descending` walks the panels from the last to the first: in every second step, so that a step begins
// with the panels that the last one left in the cache. Worth 1.6x a step on a Xeon at B=1, H=512;
// nothing on a Zen 4 core (0.96 to 1.01 of the time at H=256 and 512).
template <class Tiles>
void run_panels(const typename Tiles::Step& step, int64_t row_begin, int64_t row_end,
                int64_t block_begin, int64_t block_end, bool descending) {
  using Terms = typename Tiles::Terms;
  static_assert(Terms::kTileRows > 0 || widths_nest<Terms, Tiles::Q>(), "no tile is null");

  constexpr int kRows = kMaxRows<Terms, Tiles::Q>;
  const int64_t rows  = row_end - row_begin;
  if (rows <= 0) return;
  const int64_t tiles  = (rows + kRows - 1) / kRows;
  const int low        = int(rows / tiles);  // `taller` tiles have one row more
  const int64_t taller = rows % tiles;
  const int tallest    = low + (taller > 0);
  int64_t panels       = max_panels<Terms, Tiles::Q>(tallest);

  const int64_t blocks = block_end - block_begin;
  int64_t done         = 0;
  while (done < blocks) {
    while (panels > blocks - done) panels = fewer_panels<Terms, Tiles::Q>(tallest, panels);
    // The taller ones come first.
    [[maybe_unused]] const int64_t fetching = fetches(low, panels, Tiles::Q)       ? tiles
                                              : fetches(low + 1, panels, Tiles::Q) ? taller
                                                                                   : 0;
    const auto tall_tile                    = tile_of<Tiles>(low + 1, panels);
    const auto low_tile                     = tile_of<Tiles>(low, panels);
    for (; done + panels <= blocks; done += panels) {
      const int64_t block = descending ? block_end - done - panels : block_begin + done;
      int64_t row         = row_begin;
      for (int64_t i = 0; i < tiles; ++i) {
        const char* next = nullptr;
        if constexpr (Tiles::kFetches) {
          if (blocks - done >= 2 * panels) {  // else fewer panels follow, or none
            next = next_line<Tiles::Q>(step.panels, step.K, block + (descending ? -panels : panels),
                                       panels, fetching, i);
          }
        }
        if (i < taller) {
          tall_tile(step, row, block, low + 1, next);
          row += low + 1;
        } else {
          low_tile(step, row, block, low, next);
          row += low;
        }
      }
    }
  }
}

// The same where the last panel may be folded. Speedup by that, and run_turned, over a last panel packed
// as the others are, on a Zen 4 core at (B, T) = (64, 30), float32 LSTM / GRU / RNN, inference: H = 20
// 1.21 / 1.21 / 1.13, 50 1.15 / 1.15 / 1.14, 100 1.10 / 1.09 / 1.08, 200 1.03 / 1.04 / 1.02; training:
// 1.16 / 1.16 / 1.21, 1.10 / 1.12 / 1.14, 1.05 / 1.05 / 1.06, 1.03 / 1.02 / 1.03. bfloat16 at H = 50
// 1.10 / 1.10 / 1.07, training 1.09 / 1.10 / 1.10; one row, T = 100, H = 50 1.24 / 1.30 / 1.03; with
// AVX2 at H = 50 1.06 / 1.06 / 1.08.
template <class Tiles>
void run_tiles(const typename Tiles::Step& step, int64_t row_begin, int64_t row_end,
               int64_t block_begin, int64_t block_end, bool descending) {
  using Terms            = typename Tiles::Terms;
  const ProductSize size = Tiles::size(step);
  if (const int fold = fold_of<Terms>(size.units, size.K, block_begin, block_end); fold > 1) {
    --block_end;
    with_fold<Terms>(fold, [&](auto fold) {
      run_panels<typename Tiles::template With<Folded<Terms, fold>>>(
          step, row_begin, row_end, block_end, block_end + 1, false);
    });
  }
  run_panels<Tiles>(step, row_begin, row_end, block_begin, block_end, descending);
}

}  // namespace
}  // namespace fusedrnn
