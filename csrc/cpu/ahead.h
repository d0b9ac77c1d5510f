// One sequence alone: its input is projected a few steps ahead, beside the recurrence. A step of one
// row waits for its weights to come from L2 and leaves half of the multipliers idle; the projection,
// whose operands serve several rows, needs little of L2 and all multipliers. In one loop they
// overlap: speedup on a Zen 4 core at B=1 in float32 1.19 (LSTM, H=64), 1.16 (128), 1.14 (160), 1.13
// (GRU, 128), 1.14 (192), 1.12 (RNN, 128), 1.12 (192).
#pragma once

#include "../walk.h"
#include "step.h"

namespace fusedrnn {
namespace {

// Panels of a tile: enough accumulators for the recurrent product's latency.
template <class Cell>
constexpr int kAheadPanels = Cell::kGates == 1 ? 4 : 1;
// Rows of a tile, with the recurrent product's accumulators beside theirs.
template <class Cell>
constexpr int kAheadTile = kAccumulators / (kAheadPanels<Cell> * Cell::kGates) - 1;
// Tiles that take turns, a piece of terms each: the second finds its weights in L1. Speedup over
// one tile: 1.03 (H=128), 1.03 (160).
constexpr int kAheadTiles     = 2;
constexpr int64_t kAheadPiece = 16;
static_assert(kPartialTerms % kAheadPiece == 0, "a piece lies in one part");

// With 12 accumulators the projection would be of 2 rows: 1.1 times as long on AVX2, for all that is
// read anew. Other numbers than float32's gain less than they lose with it: GRU is 0.91 to 0.96 as fast
// in float64 and 0.92 to 1 with bfloat16 products; LSTM, on a Zen 5 core, 0.88 (H=48) to 1.09 (96) and
// 0.82 (96) to 1.02 (256).
template <class Terms>
constexpr bool kCanGoAhead = kAccumulators == 24 && std::is_same_v<Terms, Numbers<float>>;

// The sum of a product's terms in the order of step.h's `product`: parts of kPartialTerms.
template <class T, int N>
struct PartialSums {
  Vec<T> part[N], sum[N];
  bool first = true;

  void start(const Vec<T> (&from)[N]) {
    unroll<N>([&](auto i) FUSEDRNN_LAMBDA { part[i] = from[i]; });
    first = true;
  }
  // After each kPartialTerms terms, and the last one.
  FUSEDRNN_INLINE void end_part() {
    unroll<N>([&](auto i) FUSEDRNN_LAMBDA {
      sum[i]  = first ? part[i] : sum[i] + part[i];
      part[i] = Vec<T>{};
    });
    first = false;
  }
};

// A projection of up to kAheadTiles tiles of rows that goes on a little at a time.
template <class Cell, class T>
class Ahead {
 public:
  static constexpr int P = kAheadPanels<Cell>, G = Cell::kGates, Q = P * G;
  static constexpr int V = kLanes<T>, R = kAheadTile<Cell>;

  // For blocks [begin, end) of units, a multiple of P; step.input and step.gates are of the rows that
  // `start` begins.
  Ahead(int64_t begin, int64_t end) : begin_(begin), end_(end), block_(end) {}

  void start(const ProjectStep<T>& step, int tiles) {
    step_  = step;
    tiles_ = tiles;
    block_ = begin_;
    start_block();
  }
  void finish() {
    while (block_ < end_) beside(terms_left(), [](int64_t) FUSEDRNN_LAMBDA {});
  }
  // Terms up to the end of a tile's turn; 0 if all rows are done.
  int64_t terms_left() const { return block_ < end_ ? piece_end_ - k_ : 0; }

  // The next n terms, n <= terms_left(), and beside the i-th of them other(i).
  template <class Other>
  FUSEDRNN_INLINE void beside(int64_t n, const Other& other) {
    Vec<T> acc[R * Q];
    auto& part = sums_[tile_].part;
    unroll<R * Q>([&](auto i) FUSEDRNN_LAMBDA { acc[i] = part[i]; });
    const T* a   = step_.input + tile_ * R * step_.input_stride + k_;
    const T* row = panel() + (1 + k_) * G * V;
    for (int64_t i = 0; i < n; ++i, ++a, row += G * V) {
      other(i);
      Vec<T> w[Q];
      unroll<Q>([&](auto q)
                    FUSEDRNN_LAMBDA { w[q] = load(row + q / G * panel_size() + q % G * V); });
      unroll<R>([&](auto r) FUSEDRNN_LAMBDA {
        const Vec<T> a_k = splat<Vec<T>>(a[r * step_.input_stride]);
        unroll<Q>([&](auto q) FUSEDRNN_LAMBDA { acc[r * Q + q] = fma(a_k, w[q], acc[r * Q + q]); });
      });
    }
    unroll<R * Q>([&](auto i) FUSEDRNN_LAMBDA { part[i] = acc[i]; });
    k_ += n;
    if (k_ == piece_end_) end_turn();
  }

 private:
  int64_t panel_size() const { return forward_panel_size<G, T>(step_.K); }
  const T* panel() const { return step_.panels.template of<G>(block_, step_.K); }

  void start_block() {
    if (block_ == end_) return;
    Vec<T> bias[R * Q];
    unroll<R * Q>([&](auto i) FUSEDRNN_LAMBDA {
      bias[i] = load(panel() + i % Q / G * panel_size() + i % G * V);
    });
    for (int tile = 0; tile < tiles_; ++tile) sums_[tile].start(bias);
    start_piece(0);
  }
  void start_piece(int64_t k) {
    tile_        = 0;
    piece_begin_ = k_ = k;
    piece_end_        = min64(k + kAheadPiece, step_.K);
  }
  void end_turn() {
    if (piece_end_ == step_.K || piece_end_ % kPartialTerms == 0) sums_[tile_].end_part();
    if (++tile_ < tiles_) {
      k_ = piece_begin_;
    } else if (piece_end_ < step_.K) {
      start_piece(piece_end_);
    } else {
      end_block();
    }
  }
  void end_block() {
    for (int tile = 0; tile < tiles_; ++tile) {
      T* const gates = step_.gates + tile * R * step_.gates_stride;
      unroll<R * Q>([&](auto i) FUSEDRNN_LAMBDA {
        const int64_t unit = (block_ + i % Q / G) * V;
        store(gates + i / Q * step_.gates_stride + i % G * step_.H + unit, sums_[tile].sum[i],
              lanes_of<T>(step_.H, unit));
      });
    }
    block_ += P;
    start_block();
  }

  int64_t begin_, end_, block_;
  ProjectStep<T> step_{};
  int tiles_ = 0, tile_ = 0;
  int64_t k_ = 0, piece_begin_ = 0, piece_end_ = 0;
  PartialSums<T, R * Q> sums_[kAheadTiles];
};

// forward_tile of one row, and as much of the projection ahead as fits beside it.
template <class Cell, class T>
void forward_beside(const ForwardStep<T>& s, int64_t block, Ahead<Cell, T>& ahead) {
  using A         = Ahead<Cell, T>;
  constexpr int P = A::P, G = A::G, Q = A::Q, V = A::V;
  // Recurrent terms for each of the projection: fewer than its rows, so that it stays ahead of the
  // steps.
  constexpr int kUnit      = A::R - 1;
  const int64_t panel_size = forward_panel_size<G, T>(s.K);
  const T* const panel     = s.panels.template of<G>(block, s.K);
  Vec<T> acc[Q];
  PartialSums<T, Q> sums{};
  unroll<Q>([&](auto q) FUSEDRNN_LAMBDA { acc[q] = load(panel + q / G * panel_size + q % G * V); });
  sums.start(acc);
  int64_t k       = 0;
  const auto term = [&](int64_t at) FUSEDRNN_LAMBDA {
    const Vec<T> h_k   = splat<Vec<T>>(s.h_prev[at]);
    const T* const row = panel + (1 + at) * G * V;
    unroll<Q>([&](auto q) FUSEDRNN_LAMBDA {
      const T* const w = row + q / G * panel_size + q % G * V;
      // LSTM, where a vector is a cache line: 0.98 of the time on a Zen 4, 0.98 to 1.01 on a Zen 5;
      // but GRU 1.05, RNN 1.0 to 1.01.
      if (kVectorBytes == 64 && G == 4) __builtin_prefetch(w + 4 * G * V);
      acc[q] = fma(h_k, load(w), acc[q]);
    });
  };
  while (k < s.K) {
    const int64_t end = part_end(k, s.K);
    unroll<Q>([&](auto q) FUSEDRNN_LAMBDA { acc[q] = sums.part[q]; });
    while (const int64_t n = min64(ahead.terms_left(), (end - k) / kUnit)) {
      ahead.beside(n, [&](int64_t i) FUSEDRNN_LAMBDA {
        unroll<kUnit>([&](auto u) FUSEDRNN_LAMBDA { term(k + i * kUnit + u); });
      });
      k += n * kUnit;
    }
    for (; k < end; ++k) term(k);
    unroll<Q>([&](auto q) FUSEDRNN_LAMBDA { sums.part[q] = acc[q]; });
    sums.end_part();
  }
  unroll<P>([&](auto p) FUSEDRNN_LAMBDA {
    const int64_t unit = (block + p) * V;
    const int lanes    = lanes_of<T>(s.H, unit);
    Vec<T> gates_x[G];
    unroll<G>([&](auto g) FUSEDRNN_LAMBDA { gates_x[g] = load(s.gates + g * s.H + unit, lanes); });
    forward_units<Cell, T>(s, 0, block + p, gates_x, &sums.sum[p * G]);
  });
}

}  // namespace
}  // namespace fusedrnn
