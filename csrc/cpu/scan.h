// WHEN: a layer's forward and backward pass over all time steps, in one parallel region.
// Instantiated once per ISA through isa.h.
#pragma once

#include <cstdlib>

#include "../memory.h"
#include "../sequence.h"
#include "layer_grads.h"
#include "plan.h"
#include "step.h"
#include "threads.h"
#include "unpacked.h"

namespace fusedrnn {
namespace {

// Scratch of one call, shared by its threads: for each direction `elements` numbers, on a cache
// line boundary, and barrier counters.
template <class T>
class Scratch {
 public:
  Scratch(int64_t elements, int64_t directions, int threads)
      : elements_((elements + 63) / 64 * 64), threads_(threads) {
    const size_t counters = sizeof(BarrierCounter) * size_t(directions * (threads + 1));
    const size_t numbers  = sizeof(T) * size_t(elements_ * directions);
    const size_t bytes    = counters + numbers;
    // From 2 large pages on, a multiple of them.
    const size_t alignment = bytes < 2 * kLargePage ? 64 : kLargePage;
    const size_t rounded   = (bytes + alignment - 1) / alignment * alignment;
    memory_                = static_cast<char*>(std::aligned_alloc(alignment, rounded));
    if (!memory_) return;
    advise_large_pages(memory_, rounded);
    std::memset(memory_, 0, counters);
    numbers_ = reinterpret_cast<T*>(memory_ + counters);
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&)            = delete;
  Scratch& operator=(const Scratch&) = delete;

  bool ok() const { return memory_ != nullptr; }
  T* numbers(int64_t direction) const { return numbers_ + direction * elements_; }

  // The barrier of all threads of a direction.
  Barrier direction_barrier(int64_t direction, const Shard& s) const {
    return Barrier(counter(direction, 0), s.direction_threads);
  }
  // The barrier after each step, for the threads that split the units of the same rows.
  Barrier step_barrier(int64_t direction, const Shard& s) const {
    return Barrier(counter(direction, 1 + s.row_shard), s.unit_shards);
  }

 private:
  BarrierCounter* counter(int64_t direction, int i) const {
    return reinterpret_cast<BarrierCounter*>(memory_) + direction * (threads_ + 1) + i;
  }

  int64_t elements_;
  int threads_;
  char* memory_ = nullptr;
  T* numbers_   = nullptr;
};

// Packs a direction's weights, each of its threads a part. Threads that split only units pack what
// they will read themselves, into their own cache, and need not wait.
template <class PackBlocks>
void pack_shared(const Shard& s, int64_t blocks, Barrier& barrier, const PackBlocks& pack_blocks) {
  if (s.direction_threads == s.unit_shards) {
    pack_blocks(s.block_begin, s.block_end);
  } else {
    pack_blocks(blocks * s.direction_rank / s.direction_threads,
                blocks * (s.direction_rank + 1) / s.direction_threads);
    barrier.wait();
  }
}

// Calls copy(row, unit, n) for each row of the shard, whose units are the n from `unit` on.
template <class T, class Copy>
void for_each_row(const Shard& s, int64_t H, const Copy& copy) {
  const int64_t begin = s.block_begin * kLanes<T>;
  const int64_t end   = min64(s.block_end * kLanes<T>, H);
  for (int64_t row = s.row_begin; row < s.row_end; ++row) copy(row, begin, size_t(end - begin));
}

template <class Cell, class T, class Args>
Shape shape_of(const Args& a, int64_t weight_elements, int max_rows) {
  return {
      a.T,        a.B,     a.H, a.D, Cell::kGates, kLanes<T>, int64_t(sizeof(T)) * weight_elements,
      l2_bytes(), max_rows};
}

// How a forward call lays out a direction's scratch, and how it walks time: the input of a chunk of
// steps is projected just before they run, so that gates_x is still in the cache when they read it.
template <class Cell, class T>
struct ForwardLayout {
  int64_t recurrent = 0;  // elements: packed weight_hh,
  int64_t input     = 0;  // packed weight_ih,
  int64_t gates     = 0;  // gates_x of a chunk, unless it goes to the saved gates
  int64_t chunk     = 1;  // steps

  bool packed() const { return recurrent > 0; }

  explicit ForwardLayout(const ForwardArgs<T>& a) {
    const int64_t passes  = a.T * ((a.B + kUnpackedRows - 1) / kUnpackedRows);
    const int64_t weights = Cell::kGates * a.H * (a.I + a.H) * int64_t(sizeof(T));
    if (passes <= (weights <= l2_bytes() ? kMaxUnpackedPasses : 2 * kMaxUnpackedPasses)) return;
    const auto round_up = [](int64_t elements) { return (elements + 15) / 16 * 16; };
    recurrent           = round_up(blocks_of<T>(a.H) * forward_panel_size<Cell, T>(a.H));
    input               = round_up(blocks_of<T>(a.H) * forward_panel_size<Cell, T>(a.I));
    // Rows of consecutive steps are one matrix: then a chunk is one product.
    const bool uniform = a.B == 1 || a.input_stride_t == a.B * a.input_stride_b;
    if (uniform) chunk = max64(1, min64(a.T, kChunkRows / max64(1, a.B)));
    if (!a.save) gates = chunk * a.B * Cell::kGates * a.H;
  }
  int64_t elements() const { return recurrent + input + gates; }
};

template <class Cell, class T>
void forward_direction(const ForwardArgs<T>& a, int64_t d, const Shard& shard,
                       const Scratch<T>& scratch) {
  constexpr int G   = Cell::kGates;
  const int64_t H   = a.H;
  const int64_t BH  = a.B * H;
  const int64_t DH  = a.D * H;
  const int64_t seq = d * a.T * BH;  // of this direction, in arrays [D, T, B, H]
  const T* const h0 = a.h0 + d * BH;
  const T* const c0 = Cell::kHasCell ? a.c0 + d * BH : nullptr;
  T* const c_n      = Cell::kHasCell ? a.c_n + d * BH : nullptr;
  const ForwardLayout<Cell, T> layout(a);

  UnpackedStep<T> unpacked{};
  ForwardStep<T>& step = unpacked.step;
  step.H               = H;
  step.save            = a.save;
  step.h_stride        = DH;
  ProjectStep<T> project{};
  project.I            = a.I;
  project.H            = H;
  project.input_stride = a.B == 1 ? a.input_stride_t : a.input_stride_b;
  T* const chunk_gates = scratch.numbers(d) + layout.recurrent + layout.input;
  if (layout.packed()) {
    T* const recurrent        = scratch.numbers(d);
    T* const input            = recurrent + layout.recurrent;
    Barrier direction_barrier = scratch.direction_barrier(d, shard);
    pack_shared(shard, blocks_of<T>(H), direction_barrier, [&](int64_t begin, int64_t end) {
      pack_forward<Cell, T>(recurrent, a.weight_hh[d], a.bias_hh[d], H, H, begin, end);
      pack_forward<Cell, T>(input, a.weight_ih[d], a.bias_ih[d], H, a.I, begin, end);
    });
    step.panels    = recurrent;
    project.panels = input;
  } else {
    unpacked.I            = a.I;
    unpacked.input_stride = a.input_stride_b;
    unpacked.weight_ih    = a.weight_ih[d];
    unpacked.bias_ih      = a.bias_ih[d];
    unpacked.weight_hh    = a.weight_hh[d];
    unpacked.bias_hh      = a.bias_hh[d];
  }
  // gates_x of time t, and of the chunk's first time in memory, t_begin
  const auto gates_of = [&](int64_t t, int64_t t_begin) {
    return layout.gates ? chunk_gates + (t - t_begin) * BH * G : a.gates + (seq + t * BH) * G;
  };

  Barrier barrier = scratch.step_barrier(d, shard);
  T* h            = nullptr;
  int64_t t_begin = 0;
  for (int64_t i = 0; i < a.T; ++i) {
    const int64_t t = d == 0 ? i : a.T - 1 - i;
    if (layout.packed() && i % layout.chunk == 0) {
      const int64_t steps = min64(layout.chunk, a.T - i);
      t_begin             = d == 0 ? t : t - steps + 1;
      project.input       = a.input + t_begin * a.input_stride_t;
      project.gates       = gates_of(t_begin, t_begin);
      if (shard.row_begin == 0 && shard.row_end == a.B) {
        run_tiles<ProjectTiles<Cell, T>>(project, 0, steps * a.B, shard.block_begin,
                                         shard.block_end, false);
      } else {
        for (int64_t s = 0; s < steps; ++s) {
          run_tiles<ProjectTiles<Cell, T>>(project, shard.row_begin, shard.row_end,
                                           shard.block_begin, shard.block_end, false);
          project.input += a.input_stride_t;
          project.gates += BH * G;
        }
      }
    }
    T* const h_prev = h;
    h               = a.output + t * a.B * DH + d * H;

    step.gates         = a.save || layout.gates ? gates_of(t, t_begin) : nullptr;
    step.h_prev        = i == 0 ? h0 : h_prev;
    step.h_prev_stride = i == 0 ? H : DH;
    step.h             = h;
    if constexpr (Cell::kHasCell) {  // c passes through extra if it is saved, else in place in c_n
      step.prev        = i == 0 ? c0 : step.extra;
      step.prev_stride = H;
      step.extra       = a.save ? a.extra + seq + t * BH : c_n;
    } else if constexpr (Cell::kHasExtra) {
      step.extra = a.save ? a.extra + seq + t * BH : nullptr;
    }
    if constexpr (Cell::kPrevIsH) {
      step.prev        = step.h_prev;
      step.prev_stride = step.h_prev_stride;
    }

    if (layout.packed()) {
      run_tiles<ForwardTiles<Cell, T>>(step, shard.row_begin, shard.row_end, shard.block_begin,
                                       shard.block_end, i % 2 == 1);
    } else {
      unpacked.input = a.input + t * a.input_stride_t;
      run_unpacked<Cell, T>(unpacked, shard.row_begin, shard.row_end, shard.block_begin,
                            shard.block_end);
    }
    barrier.wait();
  }
  for_each_row<T>(shard, H, [&](int64_t row, int64_t unit, size_t n) {
    if (a.h_n) std::memcpy(a.h_n + d * BH + row * H + unit, h + row * DH + unit, n * sizeof(T));
    if (Cell::kHasCell && a.save) {
      std::memcpy(c_n + row * H + unit, step.extra + row * H + unit, n * sizeof(T));
    }
  });
}

// How a backward call lays out a direction's scratch.
template <class Cell, class T>
struct BackwardLayout {
  int64_t recurrent = 0;  // elements: packed weight_hh,
  int64_t h_prev    = 0;  // [T, B, H], if it is wanted
  int64_t carry     = 0;  // [B, H]: the cell's part of the gradient of the state before
  // [T, B, E*H]: gradients of the pre-activations. LSTM (i, f, g, o) and RNN: of gates_x and gates_h
  // alike. GRU: (n_h, r, z, n_x): the first 3H columns are the gradient of gates_h, its n part
  // first; the last 3H that of gates_x, in torch's order.
  int64_t grad_gates;

  explicit BackwardLayout(const BackwardArgs<T>& a) {
    if (a.T > 1) recurrent = blocks_of<T>(a.H) * backward_panel_size<Cell, T>(a.H);
    if (Cell::kPrevIsH || a.grad_weight_hh[0] || a.grad_weight_hh[1]) h_prev = a.T * a.B * a.H;
    if (Cell::kHasCarry) carry = a.B * a.H;
    grad_gates = a.T * a.B * Cell::kGradGates * a.H;
  }
  int64_t elements() const { return recurrent + h_prev + carry + grad_gates; }
};

template <class Cell, class T>
void backward_direction(const BackwardArgs<T>& a, int64_t d, const Shard& shard,
                        const Scratch<T>& scratch) {
  constexpr int G   = Cell::kGates;
  constexpr int E   = Cell::kGradGates;
  const int64_t H   = a.H;
  const int64_t BH  = a.B * H;
  const int64_t DH  = a.D * H;
  const int64_t seq = d * a.T * BH;
  const T* const h0 = a.h0 + d * BH;
  const auto time   = [&](int64_t i) { return d == 0 ? i : a.T - 1 - i; };  // of the i-th step
  const BackwardLayout<Cell, T> layout(a);

  // h of the step before each t, h0 before the first: what grad_weight_hh is the product with. Not
  // the output, which its owner may have changed by now.
  T* const all_h_prev = layout.h_prev ? scratch.numbers(d) + layout.recurrent : nullptr;
  const auto h_prev   = [&](int64_t i) { return all_h_prev + time(i) * BH; };
  if (all_h_prev) {
    for_each_row<T>(shard, H, [&](int64_t row, int64_t unit, size_t n) {
      std::memcpy(h_prev(0) + row * H + unit, h0 + row * H + unit, n * sizeof(T));
    });
  }
  if constexpr (
      Cell::kPrevIsH) {  // GRU: from the saved gates, forwards; a thread's units are its own
    for (int64_t i = 0; i + 1 < a.T; ++i) {
      const T* const gates = a.gates + (seq + time(i) * BH) * G;
      for (int64_t row = shard.row_begin; row < shard.row_end; ++row) {
        recompute_h<Cell>(H, shard.block_begin, shard.block_end, gates + row * G * H,
                          h_prev(i) + row * H, h_prev(i + 1) + row * H);
      }
    }
  }

  BackwardStep<T> step{};
  step.H                  = H;
  step.grad_output_stride = DH;
  T* const carry          = scratch.numbers(d) + layout.recurrent + layout.h_prev;
  T* const grad_gates     = carry + layout.carry;
  if constexpr (Cell::kHasCarry) {
    step.carry = carry;
    for_each_row<T>(shard, H, [&](int64_t row, int64_t unit, size_t n) {
      T* const to = carry + row * H + unit;
      if (Cell::kHasCell && a.grad_c_n) {
        std::memcpy(to, a.grad_c_n + d * BH + row * H + unit, n * sizeof(T));
      } else {
        std::memset(to, 0, n * sizeof(T));
      }
    });
  }
  Barrier direction_barrier = scratch.direction_barrier(d, shard);
  if (a.T > 1) {
    T* const panels = scratch.numbers(d);
    pack_shared(shard, blocks_of<T>(H), direction_barrier, [&](int64_t begin, int64_t end) {
      pack_backward<Cell, T>(panels, a.weight_hh[d], H, begin, end);
    });
    step.panels = panels;
  }

  Barrier barrier = scratch.step_barrier(d, shard);
  for (int64_t i = a.T - 1; i >= 0; --i) {
    const int64_t t      = time(i);
    step.gates           = a.gates + (seq + t * BH) * G;
    step.grad_output     = a.grad_output ? a.grad_output + t * a.B * DH + d * H : nullptr;
    step.grad_h_n        = a.grad_h_n && i == a.T - 1 ? a.grad_h_n + d * BH : nullptr;
    step.grad_gates_next = i == a.T - 1 ? nullptr : step.grad_gates;
    step.grad_gates      = grad_gates + t * BH * E;
    step.h               = all_h_prev && i + 1 < a.T ? h_prev(i + 1) : nullptr;
    if constexpr (Cell::kHasExtra) step.extra = a.extra + seq + t * BH;
    if constexpr (Cell::kHasCell) {
      step.prev = i == 0 ? a.c0 + d * BH : a.extra + seq + time(i - 1) * BH;
    }
    if constexpr (Cell::kPrevIsH) step.prev = h_prev(i);

    run_tiles<BackwardTiles<Cell, T>>(step, shard.row_begin, shard.row_end, shard.block_begin,
                                      shard.block_end, i % 2 == 1);
    barrier.wait();
  }

  // Once grad_gates and h_prev are whole, each thread takes some rows of every gradient.
  direction_barrier.wait();
  const auto mine = [&](int64_t rows) {
    return rows * shard.direction_rank / shard.direction_threads;
  };
  const auto next = [&](int64_t rows) {
    return rows * (shard.direction_rank + 1) / shard.direction_threads;
  };
  const int64_t rows   = a.T * a.B;
  const T* const grads = grad_gates;
  if (T* const out = a.grad_input[d]) {  // = grad_gates_x weight_ih
    matrix_product<T>({G * H, grads + (E - G) * H, E * H, 1, a.weight_ih[d], a.I, out, a.I, false},
                      mine(rows), next(rows));
  }
  if (a.grad_h0) {  // = grad_gates_h[first step] weight_hh + carry
    T* const out = a.grad_h0 + d * BH;
    // The row blocks from kRecurrentRow on belong to the first columns, the ones before to the rest.
    constexpr int kFirst = G - Cell::kRecurrentRow;
    const T* const first = grads + time(0) * BH * E;
    const T* const w     = a.weight_hh[d];
    ProductStep<T> part{kFirst * H, first, E * H, 1,    w + Cell::kRecurrentRow * H * H,
                        H,          out,   H,     false};
    matrix_product<T>(part, mine(a.B), next(a.B));
    if (Cell::kRecurrentRow) {
      part = {Cell::kRecurrentRow * H, first + kFirst * H, E * H, 1, w, H, out, H, true};
      matrix_product<T>(part, mine(a.B), next(a.B));
    }
    // The (larger) carry last: small terms added to a large sum one by one lose more.
    for (int64_t j = mine(a.B) * H; Cell::kPrevIsH && j < next(a.B) * H; ++j) out[j] += carry[j];
  }
  if (Cell::kHasCell && a.grad_c0) {
    const size_t bytes = sizeof(T) * size_t((next(a.B) - mine(a.B)) * H);
    std::memcpy(a.grad_c0 + d * BH + mine(a.B) * H, carry + mine(a.B) * H, bytes);
  }
  // The terms of a weight's gradient: all (t, b), or of a group all t, one b after the other.
  const int64_t groups = max64(a.groups, 1);
  const int64_t series = a.groups ? a.B / groups : 1;
  const int64_t stride = a.groups ? a.B : 1;
  const int64_t terms  = a.groups ? (series ? a.T : 0) : rows;
  for (int64_t i = 0; i < groups * max64(series, 1); ++i) {
    const int64_t n = series ? i / series : i;
    const bool more = series && i % series != 0;
    for (int g = 0; g < G; ++g) {
      // The columns of grad_gates that belong to row block g of weight_ih, and of weight_hh.
      const T* const of_ih = grads + i * E * H + (E - G + g) * H;
      const T* const of_hh = grads + i * E * H + (g - Cell::kRecurrentRow + G) % G * H;
      const int64_t row    = (n * G + g) * H;
      if (T* const out = a.grad_weight_ih[d]) {  // = grad_gates_x^T input
        matrix_product<T>({terms, of_ih, 1, stride * E * H, a.input + i * a.I, stride * a.I,
                           out + row * a.I, a.I, more},
                          mine(H), next(H));
      }
      if (T* const out = a.grad_weight_hh[d]) {  // = grad_gates_h^T h_prev
        matrix_product<T>({terms, of_hh, 1, stride * E * H, all_h_prev + i * H, stride * H,
                           out + row * H, H, more},
                          mine(H), next(H));
      }
      if (T* const out = a.grad_bias_ih[d]) {
        column_sums(out + row, of_ih, stride * E * H, terms, mine(H), next(H), more);
      }
      if (T* const out = a.grad_bias_hh[d]) {
        if (E == G && a.grad_bias_ih[d]) {  // the same columns
          std::memcpy(out + row + mine(H), a.grad_bias_ih[d] + row + mine(H),
                      sizeof(T) * size_t(next(H) - mine(H)));
        } else {
          column_sums(out + row, of_hh, stride * E * H, terms, mine(H), next(H), more);
        }
      }
    }
  }
}

template <class Cell, class T>
bool forward(const ForwardArgs<T>& a) {
  const ForwardLayout<Cell, T> layout(a);
  const Shape shape = shape_of<Cell, T>(a, layout.recurrent + layout.input, kMaxRows<Cell::kGates>);
  const int threads = useful_threads(shape, a.num_threads);
  const Scratch<T> scratch(layout.elements(), a.D, threads);
  if (!scratch.ok()) return false;
  parallel(threads, [&](int thread, int running) {
    const FlushDenormals<T> flush;
    const Shard shard = shard_of(shape, thread, running);
    for (int64_t d = shard.direction_begin; d < shard.direction_end; ++d) {
      forward_direction<Cell, T>(a, d, shard, scratch);
    }
  });
  return true;
}

template <class Cell, class T>
Plan plan(const ForwardArgs<T>& a) {
  const ForwardLayout<Cell, T> layout(a);
  const Shape shape = shape_of<Cell, T>(a, layout.recurrent + layout.input, kMaxRows<Cell::kGates>);
  const int threads = useful_threads(shape, a.num_threads);
  const Shard shard = shard_of(shape, 0, threads);
  return {threads, shard.direction_threads / shard.unit_shards, shard.unit_shards, layout.packed(),
          layout.chunk};
}

template <class Cell, class T>
bool backward(const BackwardArgs<T>& a) {
  const BackwardLayout<Cell, T> layout(a);
  const Shape shape = shape_of<Cell, T>(a, layout.recurrent, kMaxRows<1>);
  const int threads = useful_threads(shape, a.num_threads);
  const Scratch<T> scratch(layout.elements(), a.D, threads);
  if (!scratch.ok()) return false;
  parallel(threads, [&](int thread, int running) {
    const FlushDenormals<T> flush;
    const Shard shard = shard_of(shape, thread, running);
    for (int64_t d = shard.direction_begin; d < shard.direction_end; ++d) {
      backward_direction<Cell, T>(a, d, shard, scratch);
    }
  });
  return true;
}

template <class T>
constexpr KernelsOf<T> kernels_of() {
  return {{forward<Lstm, T>, forward<Gru, T>, forward<Rnn<false>, T>, forward<Rnn<true>, T>},
          {backward<Lstm, T>, backward<Gru, T>, backward<Rnn<false>, T>, backward<Rnn<true>, T>},
          {plan<Lstm, T>, plan<Gru, T>, plan<Rnn<false>, T>, plan<Rnn<true>, T>}};
}

}  // namespace
}  // namespace fusedrnn
