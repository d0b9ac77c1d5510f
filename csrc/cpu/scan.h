// WHEN: a layer's forward and backward pass over all time steps, in one parallel region. Instantiated
// once per ISA through isa.h.
#pragma once

#include <cstdlib>

#include "../sequence.h"
#include "plan.h"
#include "step.h"
#include "threads.h"

namespace fusedrnn {
namespace {

// Scratch of one call, shared by its threads: packed weights of each direction and barrier counters.
template <class T>
class Scratch {
 public:
  Scratch(int64_t panel_elements, int64_t directions, int threads)
      : panel_elements_(panel_elements), threads_(threads) {
    const size_t counters = sizeof(BarrierCounter) * size_t(2 * directions * (threads + 1));
    const size_t panels   = sizeof(T) * size_t(panel_elements * directions);
    memory_ = static_cast<char*>(std::aligned_alloc(64, (counters + panels + 63) / 64 * 64));
    if (!memory_) return;
    std::memset(memory_, 0, counters);
    panels_ = reinterpret_cast<T*>(memory_ + counters);
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&)            = delete;
  Scratch& operator=(const Scratch&) = delete;

  bool ok() const { return memory_ != nullptr; }
  T* panels(int64_t direction) const { return panels_ + direction * panel_elements_; }

  // The barrier at which all threads of a direction meet once its weights are packed.
  Barrier packed_barrier(int64_t direction, const Shard& s) const {
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

  int64_t panel_elements_;
  int threads_;
  char* memory_ = nullptr;
  T* panels_    = nullptr;
};

// Packs a direction's weights, each of its threads a part. Threads that split only units pack what
// they will read themselves, into their own cache, and need not wait.
template <class PackBlocks>
void pack_shared(const Shard& s, int64_t blocks, Barrier barrier, const PackBlocks& pack_blocks) {
  if (s.direction_threads == s.unit_shards) {
    pack_blocks(s.block_begin, s.block_end);
  } else {
    pack_blocks(blocks * s.direction_rank / s.direction_threads,
                blocks * (s.direction_rank + 1) / s.direction_threads);
    barrier.wait();
  }
}

// Calls copy(offset, n) for each row of the shard: its units as a run of n elements of a dense [B, H].
template <class T, class Copy>
void for_each_row(const Shard& s, int64_t H, const Copy& copy) {
  const int64_t begin = s.block_begin * kLanes<T>;
  const int64_t end   = min64(s.block_end * kLanes<T>, H);
  for (int64_t row = s.row_begin; row < s.row_end; ++row) copy(row, begin, size_t(end - begin));
}

template <class Cell, class T, class Args>
Shape shape_of(const Args& a, int max_rows) {
  return {a.T, a.B, a.H, a.D, Cell::kGates, kLanes<T>,
          int64_t(sizeof(T)) * blocks_of<T>(a.H) * forward_panel_size<Cell, T>(a.H), max_rows};
}

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

  ForwardStep<T> step{};
  step.H        = H;
  step.save     = a.save;
  step.h_stride = DH;
  if (a.T > 1) {
    T* const panels = scratch.panels(d);
    pack_shared(shard, blocks_of<T>(H), scratch.packed_barrier(d, shard),
                [&](int64_t begin, int64_t end) {
                  pack_forward<Cell, T>(panels, a.weight_hh[d], a.bias_hh[d], H, begin, end);
                });
    step.panels = panels;
  } else {
    step.gates_h = a.gates_h + d * BH * G;
  }

  Barrier barrier = scratch.step_barrier(d, shard);
  T* h            = nullptr;
  for (int64_t i = 0; i < a.T; ++i) {
    const int64_t t = d == 0 ? i : a.T - 1 - i;
    T* const h_prev = h;
    h               = a.output + t * a.B * DH + d * H;

    step.gates         = a.gates + (seq + t * BH) * G;
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

    if (step.gates_h) {
      for (int64_t row = shard.row_begin; row < shard.row_end; ++row) {
        for (int64_t block = shard.block_begin; block < shard.block_end; ++block) {
          forward_from_gates_h<Cell>(step, row, block);
        }
      }
    } else {
      run_tiles<ForwardTiles<Cell, T>>(step, shard.row_begin, shard.row_end, shard.block_begin,
                                       shard.block_end, i % 2 == 1);
      barrier.wait();
    }
  }
  for_each_row<T>(shard, H, [&](int64_t row, int64_t unit, size_t n) {
    std::memcpy(a.h_n + d * BH + row * H + unit, h + row * DH + unit, n * sizeof(T));
    if (Cell::kHasCell && a.save) {
      std::memcpy(c_n + row * H + unit, step.extra + row * H + unit, n * sizeof(T));
    }
  });
}

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
  const auto h_prev = [&](int64_t i) { return a.h_prev + seq + time(i) * BH; };

  if (a.h_prev) {
    for_each_row<T>(shard, H, [&](int64_t row, int64_t unit, size_t n) {
      std::memcpy(h_prev(0) + row * H + unit, h0 + row * H + unit, n * sizeof(T));
    });
  }
  if constexpr (Cell::kPrevIsH) {  // GRU: h again from the saved gates, forwards; the units are its own
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
  if constexpr (Cell::kHasCarry) step.carry = a.carry + d * BH;
  if (a.T > 1) {
    T* const panels = scratch.panels(d);
    pack_shared(shard, blocks_of<T>(H), scratch.packed_barrier(d, shard),
                [&](int64_t begin, int64_t end) {
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
    step.grad_gates      = a.grad_gates + (seq + t * BH) * E;
    step.h               = a.h_prev && i + 1 < a.T ? h_prev(i + 1) : nullptr;
    if constexpr (Cell::kHasExtra) step.extra = a.extra + seq + t * BH;
    if constexpr (Cell::kHasCell) {
      step.prev = i == 0 ? a.c0 + d * BH : a.extra + seq + time(i - 1) * BH;
    }
    if constexpr (Cell::kPrevIsH) step.prev = h_prev(i);

    run_tiles<BackwardTiles<Cell, T>>(step, shard.row_begin, shard.row_end, shard.block_begin,
                                      shard.block_end, i % 2 == 1);
    barrier.wait();
  }
}

template <class Cell, class T>
bool forward(const ForwardArgs<T>& a) {
  const Shape shape  = shape_of<Cell, T>(a, kMaxRows<Cell::kGates>);
  const int threads  = useful_threads(shape, a.num_threads);
  const int64_t size = a.T > 1 ? blocks_of<T>(a.H) * forward_panel_size<Cell, T>(a.H) : 0;
  const Scratch<T> scratch(size, a.D, threads);
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
bool backward(const BackwardArgs<T>& a) {
  const Shape shape  = shape_of<Cell, T>(a, kMaxRows<1>);
  const int threads  = useful_threads(shape, a.num_threads);
  const int64_t size = a.T > 1 ? blocks_of<T>(a.H) * backward_panel_size<Cell, T>(a.H) : 0;
  const Scratch<T> scratch(size, a.D, threads);
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
          {backward<Lstm, T>, backward<Gru, T>, backward<Rnn<false>, T>, backward<Rnn<true>, T>}};
}

}  // namespace
}  // namespace fusedrnn
