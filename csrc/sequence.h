// The contract between fusedrnn/ops.py and the kernels: every pointer's shape, lifetime and
// aliasing, once. Plain data only: no torch, no Python, no STL.
//
// Legend, used in every comment below csrc/:
//   T time steps, B batch, I input features, H hidden units, D directions (1 or 2),
//   P size of h (H, or the rows of a projection), N rows of all time steps (T*B, or fewer),
//   G gates of a cell (LSTM 4, GRU 3, RNN 1), E gradient rows of a cell (LSTM 4, GRU 4, RNN 1).
// As template parameters of the CPU's tiles (cpu/step.h): T the type of a number, M rows, P panels, Q
// vectors of a panel's row; V is the lanes of a vector.
//
// All arrays are dense and row-major in the order given, of one dtype (float or double), and live
// in the caller's memory until the call returns; unless said otherwise none that is written overlaps
// another. [N, ...] holds the rows of time 0, then those of time 1 and so on: [T, B, ...] where all
// sequences are equally long. Direction d = 0 runs from t = 0 upwards, d = 1 from t = T-1 downwards;
// "the step before t" is meant in the direction's own order. The kernels read no shape but these
// numbers: checking is the caller's.
//
// "Speedup" beside a constant or a choice is the time without it over the time with it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FUSEDRNN_INLINE __host__ __device__ __forceinline__
#else
#define FUSEDRNN_INLINE inline __attribute__((always_inline))
#endif

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

// A batch of sequences, and where their states begin anew.
struct Sequences {
  int64_t T, B;  // the longest one's steps; how many there are, numbered by falling length
  // [T+1]: rows before time t, so that offsets[T] = N. At time t the first offsets[t+1] - offsets[t]
  // sequences run. Null: all have T steps.
  const int64_t* offsets;
  // [N]: whether a boundary that no state crosses lies between this row's step and the one before it
  // in time, for both directions; at time 0, between direction 0's first step and h0 and c0. Null: no
  // boundaries.
  const bool* reset;
  bool reset_to_initial;  // behind a boundary stand h0 and c0 again; else zeros
};

template <class scalar_t>
struct ForwardArgs {
  Sequences sequences;
  int64_t I, H, P, D;
  int num_threads;  // at most; fewer run where the work does not pay for them

  // Features are dense, the other strides, in elements, free; with offsets, only stride_b is read.
  const scalar_t* input;  // [N, I]
  int64_t input_stride_t, input_stride_b;
  const scalar_t* weight_ih[2];  // [G*H, I] of each direction
  const scalar_t* bias_ih[2];    // [G*H], or null
  const scalar_t* weight_hh[2];  // [G*H, P]
  const scalar_t* bias_hh[2];    // [G*H], or null
  const scalar_t* weight_hr[2];  // [P, H], LSTM only, or null: then P = H
  // In place of input, weight_ih, weight_hh for kernels of kMedium: bfloat16's bits, or null.
  const uint16_t *input_bf16, *weight_ih_bf16[2], *weight_hh_bf16[2];
  // The same weights and biases as KernelsOf::pack has laid them out; null: done for the call. With
  // them, only whether weight_hr is null is read.
  const scalar_t* panels[2];

  // Out, each null if not wanted: what backward needs. That is gates and extra, and with weight_hr
  // hidden; or, for backward to compute the gates again, hidden and LSTM's extra.
  scalar_t* gates;   // [D, N, G*H], activated: LSTM i f g o, GRU r z n, RNN h
  scalar_t* extra;   // [D, N, H]: LSTM c, GRU a_hn (the recurrent part of n before the reset gate)
  scalar_t* hidden;  // [D, N, P]: h

  const scalar_t* h0;  // [D, B, P]
  const scalar_t* c0;  // [D, B, H], LSTM only

  scalar_t* output;  // [N, D*P], direction d at column d*P
  scalar_t* h_n;     // [D, B, P], or null if not wanted
  scalar_t* c_n;     // [D, B, H], LSTM only; working memory until the call returns
};

// Types that are stored but not computed in.
enum Narrow { kFloat16, kBfloat16 };

// Where a weight's gradient goes: numbers, or their roundings to BackwardArgs::narrow; both null: it is
// not wanted.
template <class scalar_t>
struct GradWeight {
  scalar_t* numbers;
  uint16_t* narrow;

  FUSEDRNN_INLINE explicit operator bool() const { return numbers || narrow; }
};

template <class scalar_t>
struct BackwardArgs {
  Sequences sequences;
  int64_t I, H, P, D;
  int num_threads;
  // 0, or a divisor of B where there are no offsets: the batch is so many samples side by side, and
  // each has its own gradients of the weights and biases, which then are [groups, ...].
  int64_t groups;

  const scalar_t* gates;         // [D, N, G*H], as ForwardArgs left it, or null: computed again
  const scalar_t* extra;         // [D, N, H], as ForwardArgs left it
  const scalar_t* hidden;        // [D, N, P], as ForwardArgs left it
  const scalar_t* input;         // [N, I]
  const scalar_t* weight_ih[2];  // [G*H, I]; not read with gates and without grad_input
  const scalar_t* bias_ih[2];    // [G*H], or null; not read with gates
  const scalar_t* weight_hh[2];  // [G*H, P]
  const scalar_t* bias_hh[2];    // [G*H], or null; not read with gates
  const scalar_t* weight_hr[2];  // [P, H], or null
  // In place of input, weight_ih and weight_hh, as in ForwardArgs.
  const uint16_t *input_bf16, *weight_ih_bf16[2], *weight_hh_bf16[2];
  const scalar_t* h0;  // [D, B, P]
  const scalar_t* c0;  // [D, B, H], LSTM only

  const scalar_t* grad_output;  // [N, D*P], or null for zero
  const scalar_t* grad_h_n;     // [D, B, P], or null for zero
  const scalar_t* grad_c_n;     // [D, B, H], or null for zero; LSTM only
  const scalar_t* grad_cells;   // [N, D*H], of c at every step, or null for zero; LSTM only

  // Out, each null if not wanted.
  scalar_t* grad_input[2];                 // [N, I]: each direction's share
  scalar_t* grad_h0;                       // [D, B, P]
  scalar_t* grad_c0;                       // [D, B, H]; LSTM only
  GradWeight<scalar_t> grad_weight_ih[2];  // [G*H, I]
  GradWeight<scalar_t> grad_weight_hh[2];  // [G*H, P]
  scalar_t* grad_bias_ih[2];               // [G*H]
  scalar_t* grad_bias_hh[2];               // [G*H]
  scalar_t* grad_weight_hr[2];             // [P, H]
  Narrow narrow;
};

// How a forward call of a shape would run.
struct Plan {
  int64_t threads;      // in all
  int64_t row_shards;   // of one direction: shares of the batch,
  int64_t unit_shards;  // and of the hidden units
  bool packed;          // whether the weights are laid out anew for the call
  int64_t chunk;        // steps whose input is projected at once, at the beginning
};

// One ISA's kernels. Forward and backward return false, having done nothing, when their scratch
// memory could not be had. A plan reads nothing but the numbers of its argument.
template <class scalar_t>
struct KernelsOf {
  bool (*forward[kNumCells])(const ForwardArgs<scalar_t>&);
  bool (*backward[kNumCells])(const BackwardArgs<scalar_t>&);
  Plan (*plan[kNumCells])(const ForwardArgs<scalar_t>&);
  // For ForwardArgs::panels: how many numbers direction d's panels take; writes them, unless panels
  // (64-byte aligned) is null. Only sizes and weights are read.
  int64_t (*pack[kNumCells])(const ForwardArgs<scalar_t>&, int64_t d, scalar_t* panels);
};

// What float32's products are, as torch.set_float32_matmul_precision's words have it; sums are float32.
enum Precision {
  kHighest,  // of the numbers themselves
  kHigh,     // of two bfloat16 parts of each, high and low, without low times low
  kMedium    // of the numbers rounded to bfloat16
};

struct Kernels {
  const char* isa;
  // By Precision. All but kHighest take no projection and no groups, and are null where the CPU has no
  // instruction that makes them faster.
  const KernelsOf<float>* f32[kMedium + 1];
  KernelsOf<double> f64;
  // Conversion of n numbers; num_threads as above.
  void (*widen)(Narrow, const uint16_t* from, float* to, int64_t n, int num_threads);
  void (*narrow)(Narrow, const float* from, uint16_t* to, int64_t n, int num_threads);
};

}  // namespace fusedrnn
