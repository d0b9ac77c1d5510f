// The contract between fusedrnn/ops.py and the kernels: every pointer's shape, lifetime and
// aliasing, once. Plain data only: no torch, no Python, no STL.
//
// Legend, used in every comment below csrc/:
//   T time steps, B batch, I input features, H hidden units, D directions (1 or 2),
//   G gates of a cell (LSTM 4, GRU 3, RNN 1), E gradient rows of a cell (LSTM 4, GRU 4, RNN 1).
//
// All arrays are dense and row-major in the order given, of one dtype (float or double), and live
// in the caller's memory until the call returns; unless said otherwise no two of them overlap.
// Direction d = 0 runs from t = 0 upwards, d = 1 from t = T-1 downwards; "the step before t" is
// meant in the direction's own order. The kernels read no shape but these numbers: checking is the
// caller's.
#pragma once

#include <cstdint>

namespace fusedrnn {

// Order as in fusedrnn/ops.py and in kernel tables.
enum Cell { kLstm, kGru, kRnnTanh, kRnnRelu, kNumCells };

// What a caller must know of a cell; csrc/cells/ has the rest.
struct CellInfo {
  int gates;  // G
  int saved;  // numbers saved for backward for each (t, b, unit): the gates, then `extra`
  bool has_cell_state;
};
constexpr CellInfo kCells[kNumCells] = {{4, 5, true}, {3, 4, false}, {1, 1, false}, {1, 1, false}};

template <class scalar_t>
struct ForwardArgs {
  int64_t T, B, I, H, D;
  int num_threads;  // at most; fewer run where the work does not pay for them
  bool save;        // whether a backward pass will follow

  // Features are dense, the other strides, in elements, free.
  const scalar_t* input;  // [T, B, I]
  int64_t input_stride_t, input_stride_b;
  const scalar_t* weight_ih[2];  // [G*H, I] of each direction
  const scalar_t* bias_ih[2];    // [G*H], or null
  const scalar_t* weight_hh[2];  // [G*H, H]
  const scalar_t* bias_hh[2];    // [G*H], or null

  // Out, if save: the activated gates (LSTM i f g o, GRU r z n, RNN h).
  scalar_t* gates;  // [D, T, B, G*H]
  // Out, if save: LSTM c, GRU a_hn (the recurrent part of n before the reset gate). RNN: not used.
  scalar_t* extra;  // [D, T, B, H]

  const scalar_t* h0;  // [D, B, H]
  const scalar_t* c0;  // [D, B, H], LSTM only

  scalar_t* output;  // [T, B, D*H], direction d at column d*H
  scalar_t* h_n;     // [D, B, H], or null if not wanted
  scalar_t* c_n;     // [D, B, H], LSTM only; working memory until the call returns
};

template <class scalar_t>
struct BackwardArgs {
  int64_t T, B, I, H, D;
  int num_threads;
  // 0, or N: the batch is N samples of B / N rows each, side by side, and each has its own gradients
  // of the weights and biases, which then are [N, ...].
  int64_t groups;

  const scalar_t* gates;         // [D, T, B, G*H], as ForwardArgs left it
  const scalar_t* extra;         // [D, T, B, H], as ForwardArgs left it
  const scalar_t* input;         // [T, B, I]
  const scalar_t* weight_ih[2];  // [G*H, I]; not read without grad_input
  const scalar_t* weight_hh[2];  // [G*H, H]
  const scalar_t* h0;            // [D, B, H]
  const scalar_t* c0;            // [D, B, H], LSTM only

  const scalar_t* grad_output;  // [T, B, D*H], or null for zero
  const scalar_t* grad_h_n;     // [D, B, H], or null for zero
  const scalar_t* grad_c_n;     // [D, B, H], or null for zero; LSTM only

  // Out, each null if not wanted.
  scalar_t* grad_input[2];      // [T, B, I]: each direction's share
  scalar_t* grad_h0;            // [D, B, H]
  scalar_t* grad_c0;            // [D, B, H]; LSTM only
  scalar_t* grad_weight_ih[2];  // [G*H, I]
  scalar_t* grad_weight_hh[2];  // [G*H, H]
  scalar_t* grad_bias_ih[2];    // [G*H]
  scalar_t* grad_bias_hh[2];    // [G*H]
};

// Types that are stored but not computed in.
enum Narrow { kFloat16, kBfloat16 };

// How a forward call of a shape would run.
struct Plan {
  int64_t threads;      // in all
  int64_t row_shards;   // of one direction: shares of the batch,
  int64_t unit_shards;  // and of the hidden units
  bool packed;          // whether the weights are laid out anew for the call
  int64_t chunk;        // steps whose input is projected at once
};

// One ISA's kernels. Forward and backward return false, having done nothing, when their scratch
// memory could not be had. A plan reads nothing but the numbers of its argument.
template <class scalar_t>
struct KernelsOf {
  bool (*forward[kNumCells])(const ForwardArgs<scalar_t>&);
  bool (*backward[kNumCells])(const BackwardArgs<scalar_t>&);
  Plan (*plan[kNumCells])(const ForwardArgs<scalar_t>&);
};

struct Kernels {
  const char* isa;
  KernelsOf<float> f32;
  KernelsOf<double> f64;
  // Conversion of n numbers; num_threads as above.
  void (*widen)(Narrow, const uint16_t* from, float* to, int64_t n, int num_threads);
  void (*narrow)(Narrow, const float* from, uint16_t* to, int64_t n, int num_threads);
};

}  // namespace fusedrnn
