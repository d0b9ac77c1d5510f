// The weights, laid out in the order in which the register tiles of step.h read them: panels of V
// hidden units (V lanes of one vector), each dense, so that a step streams them front to back.
//
//   forward   [H/V] x { bias row [G][V], then [K] rows of [G][V] }: all gates of V units
//   backward  [P/V] x {                       [K] rows of    [V] }
//
// for weight_ih or weight_hh [G*H, K] and, back, weight_hh [K, P]; weight_hr [P, H] has G = 1 in both.
// Where a group of numbers takes fewer or more lanes (vec.h), there are lanes(K) rows of terms.
//
// A last panel of few units has kFold rows of terms in one, side by side, and after these what is left of
// K, a row each (Folded in vec.h).
// Units beyond H are zero. Not a cache: a packed copy lives as long as the call (weights change in
// ways that no version counter shows), unless the caller keeps it (ForwardArgs::panels).
#pragma once

#include "vec.h"

namespace fusedrnn {
namespace {

// Rows of a V x V block, transposed in registers: log2(V) rounds, each exchanging the off-diagonal
// halves of pairs of rows kHalf apart. Or of a block of V / kFold rows, at every kFold-th place, whose
// elements are kFold lanes.
template <class T, int kHalf, int... Is>
FUSEDRNN_INLINE void exchange_halves(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, Is...>) {
  constexpr int V      = kLanes<T>;
  const Vec<T> upper_a = __builtin_shufflevector(a, b, ((Is & kHalf) ? V + Is - kHalf : Is)...);
  const Vec<T> lower_b = __builtin_shufflevector(a, b, ((Is & kHalf) ? V + Is : Is + kHalf)...);
  a                    = upper_a;
  b                    = lower_b;
}
template <class T, int kFold = 1, int kHalf = kLanes<T> / 2>
FUSEDRNN_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  unroll<kLanes<T> / kFold>([&](auto n) FUSEDRNN_LAMBDA {
    constexpr int i = n * kFold;
    if constexpr ((i & kHalf) == 0) {
      exchange_halves<T, kHalf>(rows[i], rows[i + kHalf],
                                std::make_integer_sequence<int, kLanes<T>>{});
    }
  });
  if constexpr (kHalf > kFold) transpose<T, kFold, kHalf / 2>(rows);
}

template <class T>
constexpr int64_t blocks_of(int64_t H) {
  return (H + kLanes<T> - 1) / kLanes<T>;
}

// Lanes of a vector of units (or columns) that begins at `unit`, of H in all.
template <class T>
FUSEDRNN_INLINE int lanes_of(int64_t H, int64_t unit) {
  return int(H - unit < kLanes<T> ? H - unit : kLanes<T>);
}

// In numbers, with K lanes of terms.
template <int G, class T>
constexpr int64_t forward_panel_size(int64_t K) {
  return (K + 1) * G * kLanes<T>;
}

// read(bf16) if that is given and is what Terms read, else read(numbers).
template <class Terms, class T, class Read>
FUSEDRNN_INLINE void as_stored(const T* numbers, const uint16_t* bf16, const Read& read) {
  if constexpr (!std::is_same<typename Terms::Stored, T>::value) {
    if (bf16) return read(bf16);
  }
  read(numbers);
}

// Interleaves the lanes of N vectors.
template <class T, int N, int... Is>
FUSEDRNN_INLINE void interleave(Vec<T> (&v)[N], std::integer_sequence<int, Is...>) {
  static_assert(N == 1 || N == 3);
  if constexpr (N == 3) {
    constexpr int V   = kLanes<T>;
    const Vec<T> a[N] = {v[0], v[1], v[2]};
    unroll<N>([&](auto i) FUSEDRNN_LAMBDA {
      constexpr int at   = i * V;
      const Vec<T> of_01 = __builtin_shufflevector(
          a[0], a[1], ((at + Is) % N == 1 ? V + (at + Is) / N : (at + Is) / N)...);
      v[i] = __builtin_shufflevector(of_01, a[2], ((at + Is) % N == 2 ? V + (at + Is) / N : Is)...);
    });
  }
}

// Rows of `columns` numbers to rows of a first factor's terms; `to` begins where `from` does.
template <class Terms, class From, class T>
void to_terms(const From* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows,
              int64_t columns) {
  constexpr int V = kLanes<T>, kParts = Terms::kGroupLanes;
  for (int64_t row = 0; row < rows; ++row, from += from_stride, to += to_stride) {
    for (int64_t at = 0; at < columns; at += V * Terms::kGroup) {
      Vec<T> terms[kParts];
      unroll<kParts>([&](auto part) FUSEDRNN_LAMBDA {
        terms[part] = Terms::template load<kFirst, part>(from + at, columns - at);
      });
      interleave<T>(terms, std::make_integer_sequence<int, V>{});
      T* const out       = to + lanes<Terms>(at);
      const int64_t left = lanes<Terms>(columns - at);
      unroll<kParts>([&](auto i) FUSEDRNN_LAMBDA {
        const int64_t n = left - i * V;
        if (i == 0 || n > 0) store(out + i * V, terms[i], int(n < V ? n : V));
      });
    }
  }
}

// Columns of a factor's terms: of `rows` rows of `from`, each group gives kGroupLanes rows of `to`
// [lanes, columns].
template <class Terms, Factor kFactor, class From, class T>
void to_columns_of_terms(const From* from, int64_t from_stride, T* to, int64_t to_stride,
                         int64_t rows, int64_t columns) {
  constexpr int V = kLanes<T>;
  for (int64_t row = 0; row < rows; row += Terms::kGroup) {
    const From* const a = from + row * from_stride;
    const From* const b = row + 1 < rows ? a + from_stride : nullptr;
    unroll<Terms::kGroupLanes>([&](auto part) FUSEDRNN_LAMBDA {
      for (int64_t j = 0; j < columns; j += V) {
        const int n = int(columns - j < V ? columns - j : V);
        store(to + j, Terms::template interleave_rows<kFactor, part>(a + j, b ? b + j : nullptr, n),
              n);
      }
      to += to_stride;
    });
  }
}

// The same of a first factor, transposed: row m of `to` [columns, lanes], whole vectors, has the
// terms of column m.
template <class Terms, class From, class T>
void to_transposed_terms(const From* from, int64_t from_stride, T* to, int64_t to_stride,
                         int64_t rows, int64_t columns) {
  constexpr int V = kLanes<T>, kParts = Terms::kGroupLanes;
  constexpr int64_t kRows = V * Terms::kGroup;
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t some_rows = rows - row < kRows ? rows - row : kRows;
    for (int64_t m = 0; m < columns; m += V) {
      const int64_t some_columns = columns - m < V ? columns - m : V;
      Vec<T> block[kParts][V]    = {};
      to_columns_of_terms<Terms, kFirst>(from + row * from_stride + m, from_stride,
                                         reinterpret_cast<T*>(block), V, some_rows, some_columns);
      for (int i = 0; i < kParts; ++i) {
        transpose<T>(block[i]);
        T* const out = to + m * to_stride + lanes<Terms>(row) + i * V;
        for (int64_t j = 0; j < some_columns; ++j) store(out + j * to_stride, block[i][j]);
      }
    }
  }
}

// pack_forward of one panel, folded or not.
template <int G, int kFold, class Terms, class T, class From>
void pack_forward_panel(T* panel, const From* weight, const T* bias, int64_t H, int64_t K,
                        int64_t block) {
  static_assert(kFold == 1 || Terms::kGroupLanes == 1);
  constexpr int V         = kLanes<T>;
  constexpr int64_t kLine = 64 / int64_t(sizeof(From));
  const int units         = lanes_of<T>(H, block * V);
  for (int g = 0; g < G; ++g) {
    const int64_t row           = g * H + block * V;
    const From* const next_rows = weight + (g + 1 < G ? row + H : (block + 1) * V) * K;
    store(panel + g * V, unfolded<kFold, T>(bias ? load(bias + row, units) : Vec<T>{}));
    for (int64_t k = 0; k < K; k += V * Terms::kGroup) {
      const int64_t columns = groups<Terms>(K - k);
      for (int64_t i = 0; i < V * V * Terms::kGroup; i += kLine) {
        __builtin_prefetch(next_rows + k * V + i, 0, 2);
      }
      unroll<Terms::kGroupLanes>([&](auto part) FUSEDRNN_LAMBDA {
        Vec<T> tile[V];
        unroll<V / kFold>([&](auto u) FUSEDRNN_LAMBDA {
          const From* const from = weight + (row + u) * K + k;
          tile[u * kFold] = u < units ? Terms::template load<kSecond, part>(from, K - k) : Vec<T>{};
        });
        transpose<T, kFold>(tile);
        T* const out = panel + ((lanes<Terms>(k) / kFold + part + 1) * G + g) * V;
        unroll<V / kFold>([&](auto j) FUSEDRNN_LAMBDA {
          const int64_t left = columns - j * kFold;
          if (left >= kFold) store(out + j * Terms::kGroupLanes * G * V, tile[j * kFold]);
          unroll<kFold - 1>([&](auto i) FUSEDRNN_LAMBDA {  // less than kFold terms
            if (i < left && left < kFold) {
              store(out + (j + i) * G * V, every<kFold, i, T>(tile[j * kFold]));
            }
          });
        });
      });
    }
  }
}

// The panels of blocks [begin, end), from weight [G*H, K] and bias [G*H] (or null), into an array of
// those from block `first` on. V rows are read side by side, and those that are packed next fetched to L2
// meanwhile, in memory order. Speedup of an inference call over fetching each row's next lines to L1
// instead, column by column, on a Zen 4 core at (B, T, H), float32 LSTM / GRU / RNN: (1, 20,
// 128) 1.0, (1, 20, 256) 1.05 / 1.04 / 1.02, (1, 100, 512) 1.06 / 1.03 / 1.02, (1, 20, 1024) 1.15 /
// 1.15 / 1.18; bfloat16 (8, 20, 512) 1.05 / 1.03 / 1.0, (1, 20, 1024) 1.20 / 1.18 / 1.08; with AVX2 (1,
// 20, 512) 0.96 / 0.94 / 1.01, (1, 20, 1024) 1.03 to 1.06. On a Zen 5 core that way over no
// fetches: 1.08 / 1.13 / 0.96 at (1, 20, 512).
template <int G, class T, class Terms = Numbers<T>, class From = T>
void pack_forward(T* panels, const From* weight, const T* bias, int64_t H, int64_t K, int64_t begin,
                  int64_t end, int64_t first = 0) {
  const auto pack = [&](auto fold, int64_t block) {
    T* const panel = panels + (block - first) * forward_panel_size<G, T>(lanes<Terms>(K));
    pack_forward_panel<G, fold, Terms>(panel, weight, bias, H, K, block);
  };
  const int fold = fold_of<Terms>(H, lanes<Terms>(K), begin, end);
  for (int64_t block = begin; block < end - (fold > 1); ++block) {
    pack(std::integral_constant<int, 1>{}, block);
  }
  if (fold > 1) with_fold<Terms>(fold, [&](auto fold) { pack(fold, end - 1); });
}

// Rows of a weight that pack_backward fetches ahead.
constexpr int64_t kRowsAhead = 16;

// pack_backward of a folded panel, from the columns of its first unit on.
template <class Cell, int kFold, class Terms, class T, class From>
void pack_backward_folded(T* panel, const From* weight, int64_t H, int64_t columns, int units) {
  constexpr int G = Cell::kGates, V = kLanes<T>;
  const int64_t K     = G * lanes<Terms>(H);
  const int64_t whole = K - K % kFold;
  static_assert(Terms::kGroupLanes == 1);
  std::memset(panel, 0, sizeof(T) * size_t((whole / kFold + K - whole) * V));
  int64_t at = 0;
  for (int g = 0; g < G; ++g) {
    const From* from = weight + (g + Cell::kRecurrentRow) % G * H * columns;
    for (int64_t k = 0; k < H; k += Terms::kGroup, from += Terms::kGroup * columns, ++at) {
      const From* const below = k + 1 < H ? from + columns : nullptr;
      __builtin_prefetch(from + kRowsAhead * columns, 0, 2);
      T terms[V];
      store(terms, Terms::template interleave_rows<kSecond, 0>(from, below, units));
      T* const to      = panel + (at < whole ? at / kFold : whole / kFold + at - whole) * V;
      const int stride = at < whole ? kFold : 1, first = at < whole ? int(at % kFold) : 0;
      for (int u = 0; u < units; ++u) std::memcpy(to + u * stride + first, terms + u, sizeof(T));
    }
  }
}

// The same for the backward product, from weight [G*H, columns]. Its row blocks begin with
// Cell::kRecurrentRow, in the order of grad_gates (backward.h); a group is of one block. Several panels
// at a time, so that what is read of a row is more than one line, and rows that follow are fetched.
// Speedup of training over one panel at a time, on a Zen 4 core at (1, 20, H), LSTM / GRU / RNN:
// H = 512 1.06 / 1.01 / 1.0, 768 1.03 / 1.05 / 1.02, 1024 1.12 / 1.06 / 1.06.
template <class Cell, class T, class Terms = Numbers<T>, class From = T>
void pack_backward(T* panels, const From* weight, int64_t H, int64_t columns, int64_t begin,
                   int64_t end) {
  constexpr int G = Cell::kGates, V = kLanes<T>;
  constexpr int64_t kBlocks = 8;
  const int64_t K = G * lanes<Terms>(H), panel_size = K * V;
  if (const int fold = fold_of<Terms>(columns, K, begin, end); fold > 1) {
    --end;
    with_fold<Terms>(fold, [&](auto fold) {
      pack_backward_folded<Cell, fold, Terms>(panels + end * panel_size, weight + end * V, H,
                                              columns, lanes_of<T>(columns, end * V));
    });
  }
  for (int64_t first = begin; first < end; first += kBlocks) {
    const int64_t last = first + kBlocks < end ? first + kBlocks : end;
    T* out             = panels;
    for (int g = 0; g < G; ++g) {
      const From* in = weight + (g + Cell::kRecurrentRow) % G * H * columns;
      for (int64_t k = 0; k < H; k += Terms::kGroup, in += Terms::kGroup * columns) {
        for (int64_t block = first; block < last; ++block) {
          const From* const from  = in + block * V;
          const From* const below = k + 1 < H ? from + columns : nullptr;
          const int left          = lanes_of<T>(columns, block * V);
          for (int i = 0; i < Terms::kGroup; ++i) {
            __builtin_prefetch(from + (kRowsAhead + i) * columns, 0, 2);
          }
          unroll<Terms::kGroupLanes>([&](auto part) FUSEDRNN_LAMBDA {
            store(out + block * panel_size + part * V,
                  Terms::template interleave_rows<kSecond, part>(from, below, left));
          });
        }
        out += Terms::kGroupLanes * V;
      }
    }
  }
}

}  // namespace
}  // namespace fusedrnn
