// WHEN: a layer's backward pass, chunk by chunk of its time steps: the steps, then what they add to the
// gradients of the weights.
#pragma once

#include "call.h"
#include "layer_grads.h"
#include "step.h"

namespace fusedrnn {
namespace {

// Whether gates that are computed again may lie where their gradients will: each is read just before
// its gradient is written.
template <class Cell>
constexpr bool kShareGates = Cell::kGates == Cell::kGradGates;

// A chunk: steps whose gradients are held at once, and added to those of the weights while they are in
// the cache. Rows of one at least: enough that reading and writing all of the weights' gradients for
// each chunk costs little (with half as many, 0.98 at H = 512), and for 128 K numbers of grad_gates; or
// for 1 M where threads copy second factors for each other, since what another core has just written
// comes slowly (with 128 K, 0.91 in bfloat16 on two cores far apart). Speedup of training over one
// chunk on a Zen 4 core, LSTM / GRU / RNN at (B, T, H): (8, 100, 128) 1.02 / 1.01 / 1.01, (32, 100,
// 128) 1.12 / 1.11 / 1.03, (128, 100, 128) 1.16 / 1.15 / 1.06, (128, 50, 32) 1.09 / 1.14 / 0.99, (128,
// 50, 256) 1.02 / 1.0 / 1.03; two threads (128, 100, 128) 1.12 / 1.14 / 1.07, in bfloat16 1.04 / 1.06 /
// 1.0.
template <class Cell, class T>
int64_t least_chunk(const BackwardArgs<T>& a, bool copies) {
  const int64_t weights = Cell::kGates * a.H * (a.I + a.P);
  return max64(weights / 512, (copies ? 1024 : 128) * 1024 / (Cell::kGradGates * a.H));
}

// How a backward call lays out a direction's scratch.
template <class Cell, class T, class Terms>
struct BackwardLayout {
  static constexpr bool kConverts = Terms::kGroup > 1;

  bool several_chunks;
  int64_t chunk;       // rows that every chunk but the last one has at least,
  int64_t chunk_rows;  // and all have at most

  Pieces panels;
  Piece recurrent, projection;  // of weight_hh and of weight_hr
  Pieces numbers;
  // Copies of second factors, where it pays or products take pairs:
  Piece input_strips;  // [lanes, I], in_strips: the input of a chunk's rows,
  Piece h_strips;      // [lanes, P], in_strips: h_prev
  // For gates that are computed again:
  Piece forward_input, forward_recurrent;  // packed weight_ih and weight_hh,
  Piece gates;  // [chunk_rows, G*H], unless they share grad_gates' memory,
  Piece extra;  // [chunk_rows, H], GRU's
  // For all calls:
  Piece h_prev;  // [N, P], if it is wanted
  // [B, H], of steps that some rows begin with; [chunk_rows, H] where gates are computed again.
  Piece c_prev;
  Piece carry;          // [B, H]: the cell's part of the gradient of the state before,
  Piece initial_carry;  // [B, H], and of h0 or c0
  Piece initial_gates;  // [B, E*H]: grad_gates, summed over a row's steps that begin with h0
  // [places, chunk_rows, E*H], of one or two chunks: gradients of the pre-activations. LSTM (i, f, g,
  // o) and RNN: of gates_x and gates_h alike. GRU: (n_h, r, z, n_x): the first 3H columns are the
  // gradient of gates_h, its n part first; the last 3H that of gates_x, in torch's order.
  Piece grad_gates;
  Piece grad_h;       // [places, chunk_rows, P], of the projection's result
  Piece unprojected;  // [places, chunk_rows, H]: what weight_hr was multiplied with
  // Where products take other than numbers, the terms of a step's grad_gates: [2, B, lanes].
  Piece step_terms;
  // Where grad_weight_ih and _hh are summed, if they are narrow: [G*H, I] and [G*H, P], or if there is
  // one chunk some rows, of each thread.
  Piece grad_ih, grad_hh;
  // Of each thread: the terms of the rows, or the copy of the part of grad_gates, that it works on, and
  // of the part of a weight.
  Piece rows_terms, weight_terms;
  Piece group_rows;  // of each thread that has groups: what a sample's gradients are products of

  // For so many threads at most.
  BackwardLayout(const BackwardArgs<T>& a, int64_t all_threads) {
    const Sequences& s       = a.sequences;
    const int64_t rows       = rows_before(s, s.T);
    const int64_t gate_size  = Cell::kGradGates * a.H;
    const int64_t gate_lanes = Cell::kGates * lanes<Terms>(a.H);
    const auto pays          = [&](int64_t columns) {
      return a.groups <= 1 && (kConverts || pays_to_copy(gate_size, columns));
    };
    const bool copies_input = pays(a.I), copies_h = pays(a.P);
    const int64_t least  = least_chunk<Cell>(a, copies_input || copies_h);
    const int64_t chunks = a.groups > 1 ? 1 : min64(s.T, max64(1, rows / least));
    several_chunks       = chunks > 1;
    chunk                = (rows + chunks - 1) / chunks;
    chunk_rows           = min64(rows, chunk + max64(s.B, 1) - 1);
    // A chunk's first step to run reads the gradients of the chunk before it.
    const int64_t places  = several_chunks ? 2 : 1;
    const int64_t threads = threads_of_direction(all_threads, a.D);
    if (s.T > 1) recurrent = panels.take(blocks_of<T>(a.P) * kLanes<T> * gate_lanes);
    if (a.weight_hr[0]) {
      projection  = panels.take(blocks_of<T>(a.H) * kLanes<T> * a.P);
      grad_h      = numbers.take(places * chunk_rows * a.P);
      unprojected = numbers.take(places * chunk_rows * a.H);
    }
    const bool again = a.gates == nullptr;
    if (again) {
      const auto panels_of = [&](int64_t K) {
        return numbers.take(blocks_of<T>(a.H) *
                            forward_panel_size<Cell::kGates, T>(lanes<Terms>(K)));
      };
      forward_input     = panels_of(a.I);
      forward_recurrent = panels_of(a.P);
      if (!kShareGates<Cell>) gates = numbers.take(chunk_rows * Cell::kGates * a.H);
      if (Cell::kHasExtra && !Cell::kHasCell) extra = numbers.take(chunk_rows * a.H);
    }
    if (again || Cell::kPrevIsH || a.grad_weight_hh[0] || a.grad_weight_hh[1]) {
      h_prev = numbers.take(rows * a.P);
    }
    if (Cell::kHasCell) c_prev = numbers.take((again ? chunk_rows : all_alike(s) ? 0 : s.B) * a.H);
    if (Cell::kHasCarry) {
      carry         = numbers.take(s.B * a.H);
      initial_carry = numbers.take(s.B * a.H);
    }
    if (a.grad_h0) initial_gates = numbers.take(s.B * gate_size);
    grad_gates = numbers.take(places * chunk_rows * gate_size);
    if (a.groups > 1) {
      const int64_t columns = gate_size + a.I + a.P + (a.weight_hr[0] ? a.P + a.H : 0);
      group_rows            = numbers.take(rows / a.groups * columns, min64(threads, a.groups));
    }
    int64_t copied_rows = 0, copied_weights = 0;
    if (kConverts) {
      step_terms = numbers.take(2 * s.B * gate_lanes);
      if (again) copied_rows = kChunkRows * (lanes<Terms>(a.I) + lanes<Terms>(a.P));
      const auto product_with = [&](int64_t columns) {
        copied_rows    = max64(copied_rows, kCopiedPart);
        copied_weights = max64(copied_weights, copied_weight<T>(columns));
      };
      if (a.grad_input[0] || a.grad_input[1]) product_with(a.I);
      if (a.grad_h0) product_with(a.P);
    }
    const auto copy = [&](const GradWeight<T>(&grads)[2], int64_t columns) {
      if (!grads[0] && !grads[1]) return Piece{};
      copied_rows = max64(copied_rows, kCopiedPart);
      return numbers.take(strips_size<T>(lanes<Terms>(chunk_rows), columns));
    };
    if (copies_input) input_strips = copy(a.grad_weight_ih, a.I);
    if (copies_h) h_strips = copy(a.grad_weight_hh, a.P);
    rows_terms      = numbers.take(copied_rows, threads);
    weight_terms    = numbers.take(copied_weights, threads);
    const auto sums = [&](const GradWeight<T>(&grads)[2], int64_t columns) {
      if (!grads[0].narrow && !grads[1].narrow) return Piece{};
      return several_chunks ? numbers.take(Cell::kGates * a.H * columns)
                            : numbers.take(min64(kBlockRows, a.H) * columns, threads);
    };
    grad_ih = sums(a.grad_weight_ih, a.I);
    grad_hh = sums(a.grad_weight_hh, a.P);
  }
};

// A thread's part of the terms of gates [count, G*H], rows `stride` apart, to [count, G*lanes(H)].
template <class Terms, class T>
void gates_to_terms(const Part& part, int64_t H, const T* gates, int64_t stride, T* to, int G) {
  const int64_t gate_lanes = lanes<Terms>(H);
  for (int g = 0; g < G; ++g) {
    to_terms<Terms>(gates + part.row_begin * stride + g * H + part.column, stride,
                    to + (part.row_begin * G + g) * gate_lanes + lanes<Terms>(part.column),
                    G * gate_lanes, part.row_end - part.row_begin, part.columns);
  }
}

// The steps [begin, end), whose rows [first, first + rows) begin at row `place` of the chunks' arrays.
struct Chunk {
  int64_t begin, end, first, rows, place;
};

// One thread's part of a direction's backward pass.
template <class Cell, class T, class Terms>
struct BackwardDirection {
  BackwardDirection(const BackwardArgs<T>& args, const BackwardLayout<Cell, T, Terms>& of_call,
                    int64_t direction, const Shard& own_shard, const Scratch<T>& scratch)
      : a(args),
        s(args.sequences),
        d(direction),
        H(args.H),
        P(args.P),
        shard(own_shard),
        layout(of_call),
        walk(args.sequences, direction),
        direction_barrier(scratch.direction_barrier(direction, own_shard)),
        step_barrier(scratch.step_barrier(direction, own_shard)) {
    const int64_t rows = rows_before(s, s.T);

    const auto at  = [&](const Piece& piece) { return scratch.numbers(d) + piece.at; };
    const auto own = [&](const Piece& piece) {
      return at(piece) + shard.direction_rank * piece.size;
    };
    const auto sums = [&](const Piece& piece) {
      return layout.several_chunks ? at(piece) : own(piece);
    };
    input_strips      = at(layout.input_strips);
    h_strips          = at(layout.h_strips);
    rows_terms        = own(layout.rows_terms);
    weight_terms      = own(layout.weight_terms);
    forward_input     = at(layout.forward_input);
    forward_recurrent = at(layout.forward_recurrent);
    own_gates         = at(layout.gates);
    own_extra         = at(layout.extra);
    h_prev            = at(layout.h_prev);
    c_prev            = at(layout.c_prev);
    carry             = at(layout.carry);
    initial_carry     = at(layout.initial_carry);
    initial_gates     = at(layout.initial_gates);
    grad_h            = at(layout.grad_h);
    unprojected       = at(layout.unprojected);
    grad_gates        = at(layout.grad_gates);
    step_terms        = at(layout.step_terms);
    group_rows        = at(layout.group_rows);
    grad_ih           = sums(layout.grad_ih);
    grad_hh           = sums(layout.grad_hh);
    recurrent         = scratch.panels(d, shard) + layout.recurrent.at;
    projection        = scratch.panels(d, shard) + layout.projection.at;

    h0     = a.h0 + d * s.B * P;
    c0     = Cell::kHasCell ? a.c0 + d * s.B * H : nullptr;
    gates  = again() ? nullptr : a.gates + d * rows * G * H;
    extra  = Cell::kHasExtra && a.extra ? a.extra + d * rows * H : nullptr;
    hidden = a.hidden ? a.hidden + d * rows * P : nullptr;
  }

  void run() {
    find_h_prev();
    prepare();
    int64_t place = 0;
    for (int64_t begin = s.T; begin > 0; place = layout.chunk_rows - place) {
      const Chunk chunk = chunk_before(begin, place);
      begin             = chunk.begin;
      if (again()) compute_gates(chunk);
      recurrence(chunk);
      // Once all of a chunk's steps have run, each thread takes a part of every product. Others may begin
      // the next chunk meanwhile, at the other place, but meet before the one after it comes to this.
      direction_barrier.wait();
      layer_grads(chunk);
    }
    initial_grads();
  }

  static constexpr int G = Cell::kGates;
  static constexpr int E = Cell::kGradGates;

  bool again() const { return a.gates == nullptr; }
  // Whether steps compute h of the step before.
  bool computes_h_prev() const { return layout.h_prev.size && !hidden && !Cell::kPrevIsH; }
  bool projects() const { return a.weight_hr[d] != nullptr; }

  // This thread's part of so many things that the direction's threads share, [mine, next).
  int64_t mine(int64_t of) const { return of * shard.direction_rank / shard.direction_threads; }
  int64_t next(int64_t of) const {
    return of * (shard.direction_rank + 1) / shard.direction_threads;
  }
  Part part_of_h(int64_t count) const { return own_part<T>(shard, count, P); }
  Part part_of_c(int64_t count) const { return own_part<T>(shard, count, H); }
  T* h_prev_of(int64_t i) const { return h_prev + walk.offset(i) * P; }

  Chunk chunk_before(int64_t end, int64_t place) const {
    Chunk chunk{end, end, 0, 0, place};
    do {
      chunk.rows += walk.count(--chunk.begin);
    } while (chunk.begin > 0 && chunk.rows < layout.chunk);
    chunk.first = min64(walk.offset(chunk.begin), walk.offset(end - 1));
    return chunk;
  }
  // Where step i's rows begin in its chunk.
  int64_t row_of(const Chunk& chunk, int64_t i) const { return walk.offset(i) - chunk.first; }
  // The gates of a chunk's rows that are computed again.
  T* gates_again(const Chunk& chunk) const {
    return kShareGates<Cell> ? grad_gates + chunk.place * E * H : own_gates;
  }
  const T* gates_of(const Chunk& chunk, int64_t i) const {
    return again() ? gates_again(chunk) + row_of(chunk, i) * G * H : gates + walk.offset(i) * G * H;
  }
  const T* extra_of(const Chunk& chunk, int64_t i) const {
    return extra ? extra + walk.offset(i) * H : own_extra + row_of(chunk, i) * H;
  }

  // h of the step before each, what grad_weight_hh is the product with. Not the output, which its
  // owner may have changed by now: if h was not saved, it is computed from the saved gates, GRU's
  // here, forwards, LSTM's and RNN's by `recurrence`.
  void find_h_prev() const {
    for (int64_t i = 0; layout.h_prev.size && i < s.T; ++i) {
      const States<T> states{hidden && i > 0 ? hidden + walk.offset(i - 1) * P : nullptr, P, h0, P};
      if (hidden) {
        states.copy_before(walk, i, shard, h_prev_of(i));
        continue;
      }
      const Part part = part_of_h(walk.count(i));
      if (i > 0 && !Cell::kPrevIsH && walk.uniform(i, part.row_begin, part.row_end)) continue;
      for (int64_t row = part.row_begin; row < part.row_end; ++row) {
        if (walk.source(i, row) != Source::kPrevious) {
          copy_rows<T>({row, row + 1, part.column, part.columns}, h_prev_of(i), P,
                       [&](int64_t) { return states.before(walk, i, row); });
        } else if constexpr (Cell::kPrevIsH) {
          compute_h_prev(i, row);
        }
      }
    }
  }
  // One row's, from the gates that were saved.
  void compute_h_prev(int64_t i, int64_t row) const {
    const int64_t from = walk.offset(i - 1) + row;
    compute_h<Cell>(H, shard.block_begin, shard.block_end, gates + from * G * H,
                    Cell::kHasCell ? extra + from * H : nullptr, h_prev + from * P,
                    h_prev_of(i) + row * P);
  }
  // Those of a chunk's first step: the step before it is the next chunk's, which runs too late.
  void finish_h_prev(const Chunk& chunk) const {
    if (!computes_h_prev() || chunk.begin == 0) return;
    const Part part = part_of_h(walk.count(chunk.begin));
    for (int64_t row = part.row_begin; row < part.row_end; ++row) {
      if (walk.source(chunk.begin, row) == Source::kPrevious) compute_h_prev(chunk.begin, row);
    }
  }

  // LSTM's c of the step before the i-th.
  void copy_c_prev(int64_t i, T* to) const {
    const T* const previous = i == 0 ? nullptr : extra + walk.offset(i - 1) * H;
    States<T>{previous, H, c0, H}.copy_before(walk, i, shard, to);
  }

  // Packs the weights, and sets what the steps add to or begin with.
  void prepare() {
    if constexpr (Cell::kHasCarry) {
      const T* const grad_c_n = Cell::kHasCell && a.grad_c_n ? a.grad_c_n + d * s.B * H : nullptr;
      copy_rows<T>(part_of_c(s.B), carry, H,
                   [&](int64_t row) { return grad_c_n ? grad_c_n + row * H : nullptr; });
      copy_rows<T>(part_of_c(s.B), initial_carry, H, [](int64_t) -> const T* { return nullptr; });
    }
    if (a.grad_h0) {
      std::memset(initial_gates + mine(s.B) * E * H, 0,
                  sizeof(T) * size_t((next(s.B) - mine(s.B)) * E * H));
    }
    if (layout.recurrent.size) {
      const Blocks h_blocks = own_blocks(shard, blocks_of<T>(P));
      as_stored<Terms>(a.weight_hh[d], a.weight_hh_bf16[d], [&](const auto* weight) {
        pack_backward<Cell, T, Terms>(recurrent, weight, H, P, h_blocks.begin, h_blocks.end);
      });
    }
    if (projects()) {
      pack_backward<Projection, T>(projection, a.weight_hr[d], P, H, shard.block_begin,
                                   shard.block_end);
    }
    if (again()) {
      const int64_t blocks = blocks_of<T>(H);
      pack_input<Cell, Terms>(a, d, forward_input, mine(blocks), next(blocks));
      pack_recurrent<Cell, Terms>(a, d, forward_recurrent, mine(blocks), next(blocks));
    }
  }

  // The gates of a chunk, of all its rows at once: what a step begins with is known.
  void compute_gates(const Chunk& chunk) {
    for (int64_t i = chunk.begin; Cell::kHasCell && i < chunk.end; ++i) {
      copy_c_prev(i, c_prev + row_of(chunk, i) * H);
    }
    direction_barrier.wait();
    const auto terms_of = [&](const T* numbers, const uint16_t* bf16, int64_t row, T* to,
                              int64_t columns, int64_t count) -> const T* {
      if (!layout.kConverts) return numbers + row * columns;
      as_stored<Terms>(numbers, bf16, [&](const auto* from) {
        to_terms<Terms>(from + row * columns, columns, to, lanes<Terms>(columns), count, columns);
      });
      return to;
    };
    T* const h_rows = rows_terms + kChunkRows * lanes<Terms>(a.I);
    ProjectStep<T> project{};
    project.K            = lanes<Terms>(a.I);
    project.H            = H;
    project.input_stride = project.K;
    project.gates_stride = G * H;
    project.panels       = {forward_input};
    ForwardStep<T> step{};
    step.H               = H;
    step.K               = lanes<Terms>(P);
    step.save            = true;
    step.h_prev_stride   = step.K;
    step.prev_stride     = H;
    step.panels          = {forward_recurrent};
    const int64_t blocks = blocks_of<T>(H);
    for (int64_t row = mine(chunk.rows); row < next(chunk.rows); row += kChunkRows) {
      const int64_t count = min64(next(chunk.rows) - row, kChunkRows);
      const int64_t at    = chunk.first + row;
      project.input       = terms_of(a.input, a.input_bf16, at, rows_terms, a.I, count);
      project.gates       = gates_again(chunk) + row * G * H;
      step.h_prev         = terms_of(h_prev, nullptr, at, h_rows, P, count);
      step.prev           = Cell::kHasCell ? c_prev + row * H : h_prev + at * H;
      step.gates          = project.gates;
      step.extra          = layout.extra.size ? own_extra + row * H : nullptr;
      run_tiles<ProjectTiles<Cell, T, Terms>>(project, 0, count, 0, blocks, false);
      run_tiles<ForwardTiles<Cell, T, Terms>>(step, 0, count, 0, blocks, false);
    }
    direction_barrier.wait();
  }

  // Back over a chunk's steps: their grad_gates.
  void recurrence(const Chunk& chunk) {
    BackwardStep<T> step{};
    step.finish = backward_tile<Cell, T>;
    // Only where the gates outgrow L2: speedup on a Zen 5 core 1.01 to 1.03 in float32, 1.01 to 1.05 in
    // bfloat16, from (8, 100, 128) on.
    const int64_t gate_bytes = rows_before(s, s.T) * (G + E) * H * int64_t(sizeof(T));
    step.fetch               = gate_bytes > l2_bytes() ? fetch_tile<Cell, T> : nullptr;
    step.H                   = H;
    step.carry               = carry;
    step.grad_cells_stride   = a.D * H;
    ProjectedGradHStep<T> projected{};
    projected.finish      = store_grad_h<T>;
    GradH<T>& of_h        = projects() ? projected.grad_h : step.grad_h;
    of_h.K                = G * lanes<Terms>(H);
    of_h.stride           = layout.kConverts ? of_h.K : E * H;
    of_h.panels           = recurrent;
    of_h.output_stride    = a.D * P;
    of_h.P                = P;
    const Blocks h_blocks = own_blocks(shard, blocks_of<T>(P));
    const auto terms_of   = [&](int64_t i) { return step_terms + i % 2 * s.B * of_h.K; };

    for (int64_t i = chunk.end - 1; i >= chunk.begin; --i) {
      const int64_t offset    = walk.offset(i);
      const int64_t chunk_row = chunk.place + row_of(chunk, i);
      const int64_t count     = walk.count(i);
      const int64_t row_begin = min64(shard.row_begin, count);
      const int64_t row_end   = min64(shard.row_end, count);
      // The rows before this one go on at the next step, the others end here.
      const int64_t ending =
          i == s.T - 1 ? row_begin : max64(row_begin, min64(row_end, walk.count(i + 1)));
      const bool descending = i % 2 == 1;
      step.gates            = gates_of(chunk, i);
      step.grad_cells       = a.grad_cells ? a.grad_cells + offset * a.D * H + d * H : nullptr;
      step.grad_gates       = grad_gates + chunk_row * E * H;
      if constexpr (Cell::kHasExtra) step.extra = extra_of(chunk, i);
      if constexpr (Cell::kPrevIsH) step.prev = h_prev_of(i);
      if constexpr (Cell::kHasCell) {
        if (again()) {
          step.prev = c_prev + row_of(chunk, i) * H;
        } else if (walk.uniform(i, row_begin, row_end)) {
          step.prev = i == 0 ? c0 : extra + walk.offset(i - 1) * H;
        } else {
          copy_c_prev(i, c_prev);
          step.prev = c_prev;
        }
      }
      T* const grad_of_h = projects() ? grad_h + chunk_row * P : nullptr;
      of_h.output        = a.grad_output ? a.grad_output + offset * a.D * P + d * P : nullptr;
      const auto run     = [&](int64_t begin, int64_t end) {
        if (projects()) {
          projected.out = grad_of_h;
          run_tiles<GradHTiles<T>>(projected, begin, end, h_blocks.begin, h_blocks.end, descending);
        } else {
          run_tiles<GradHTiles<T, Terms>>(step, begin, end, shard.block_begin, shard.block_end,
                                          descending);
        }
      };
      if (row_begin < ending) {
        of_h.terms = layout.kConverts ? terms_of(i + 1) : grad_gates_after;
        of_h.cut   = walk.boundaries(i + 1);
        of_h.h_n   = nullptr;
        step.h     = computes_h_prev() && i + 1 < chunk.end ? h_prev_of(i + 1) : nullptr;
        run(row_begin, ending);
      }
      of_h.terms = nullptr;
      of_h.cut   = nullptr;
      of_h.h_n   = a.grad_h_n ? a.grad_h_n + d * s.B * P : nullptr;
      step.h     = nullptr;
      run(ending, row_end);
      if (projects()) {
        step_barrier.wait();
        step.grad_h        = {};
        step.grad_h.terms  = grad_of_h;
        step.grad_h.K      = P;
        step.grad_h.stride = P;
        step.grad_h.panels = projection;
        step.grad_h.P      = H;
        step.h             = unprojected + chunk_row * H;
        run_tiles<GradHTiles<T>>(step, row_begin, row_end, shard.block_begin, shard.block_end,
                                 descending);
      }
      if (Cell::kHasCarry && !(i > 0 && walk.uniform(i, row_begin, row_end))) end_carry(i);
      if (layout.kConverts && i > 0) {
        gates_to_terms<Terms>(part_of_c(count), H, step.grad_gates, E * H, terms_of(i), G);
      }
      grad_gates_after = step.grad_gates;
      step_barrier.wait();
    }
    finish_h_prev(chunk);
  }

  // What the cell passes on leaves the recurrence where a row begins.
  void end_carry(int64_t i) const {
    const Part part = part_of_c(walk.count(i));
    for (int64_t row = part.row_begin; row < part.row_end; ++row) {
      const Source source = walk.source(i, row);
      if (source == Source::kPrevious) continue;
      T* const passed = carry + row * H + part.column;
      T* const sum    = initial_carry + row * H + part.column;
      for (int64_t j = 0; source == Source::kInitial && j < part.columns; ++j) sum[j] += passed[j];
      std::memset(passed, 0, sizeof(T) * size_t(part.columns));
    }
  }

  // What a chunk adds to the gradients of the layer's input, weights and biases, and of h0.
  void layer_grads(const Chunk& chunk) {
    if (layout.input_strips.size || layout.h_strips.size) {
      // This thread's part of the rows.
      const auto convert = [&](const auto* all, int64_t columns, T* strips) {
        const auto* const from = all + chunk.first * columns;
        const int64_t first    = mine(groups<Terms>(chunk.rows)) * Terms::kGroup;
        const int64_t end      = min64(chunk.rows, next(groups<Terms>(chunk.rows)) * Terms::kGroup);
        auto to                = in_strips(strips, lanes<Terms>(chunk.rows));
        to.data += lanes<Terms>(first) * to.stride;
        to_strips<Terms>(from + first * columns, columns, end - first, 0, columns, to);
      };
      if (layout.input_strips.size) {
        as_stored<Terms>(a.input, a.input_bf16,
                         [&](const auto* input) { convert(input, a.I, input_strips); });
      }
      if (layout.h_strips.size) convert(h_prev, P, h_strips);
      direction_barrier.wait();
    }
    const T* const chunk_gates = grad_gates + chunk.place * E * H;
    if (a.grad_input[d]) {  // = grad_gates_x weight_ih
      T* const out                = a.grad_input[d] + chunk.first * a.I;
      const T* const grad_gates_x = chunk_gates + (E - G) * H;
      if (layout.kConverts) {
        as_stored<Terms>(a.weight_ih[d], a.weight_ih_bf16[d], [&](const auto* weight) {
          gates_product<Terms>(part_of_product(chunk.rows, a.I),
                               GradGates<T>{grad_gates_x, E * H, H, G}, weight, 0, a.I, out,
                               rows_terms, weight_terms);
        });
      } else {
        matrix_product<T>(
            {G * H, grad_gates_x, E * H, 1, in_rows(a.weight_ih[d], a.I), {out, a.I}, false},
            mine(chunk.rows), next(chunk.rows));
      }
    }
    if (a.grad_h0) add_initial_gates(chunk, chunk_gates);
    if (a.groups <= 1) {
      weight_grads({chunk_gates, a.input ? a.input + chunk.first * a.I : nullptr,
                    h_prev + chunk.first * P, grad_h + chunk.place * P,
                    unprojected + chunk.place * H, chunk.rows, chunk.end < s.T, chunk.begin == 0},
                   0, {mine(H), next(H)}, {mine(P), next(P)});
    } else {
      group_grads();
    }
  }

  void add_initial_gates(const Chunk& chunk, const T* chunk_gates) const {
    for (int64_t i = chunk.begin; i < chunk.end; ++i) {
      const int64_t begin = mine(s.B), end = min64(next(s.B), walk.count(i));
      if (i > 0 && walk.uniform(i, begin, end)) continue;
      for (int64_t row = begin; row < end; ++row) {
        if (walk.source(i, row) != Source::kInitial) continue;
        const T* const from = chunk_gates + (row_of(chunk, i) + row) * E * H;
        for (int64_t j = 0; j < E * H; ++j) initial_gates[row * E * H + j] += from[j];
      }
    }
  }

  // This thread's part of a product of gates [all, E*H] and a weight [.., columns]. Each makes the
  // terms of its part of either: some rows, or, of fewer rows than columns, some columns.
  Part part_of_product(int64_t all, int64_t columns) const {
    const int64_t strips = (columns + kStrip<T> - 1) / kStrip<T>;
    if (!layout.kConverts || all > columns || strips < shard.direction_threads) {
      return {mine(all), next(all), 0, columns};
    }
    const int64_t left = mine(strips) * kStrip<T>;
    return {0, all, left, min64(columns, next(strips) * kStrip<T>) - left};
  }

  // What the gradients of weights and biases are made of: `count` rows, all, or of a chunk, which
  // adds to what is there, and after the last of which narrow results are rounded.
  struct Factors {
    const T *grad_gates, *input, *h_prev, *grad_h, *unprojected;
    int64_t count;
    bool adds, last;
  };
  // grad_weight_ih = grad_gates_x^T input, grad_weight_hh = grad_gates_h^T h_prev, the biases' are the
  // sums of grad_gates_x and _h, grad_weight_hr = grad_h^T unprojected; to the n-th place of each
  // gradient, for units [begin, end) and its rows of weight_hr.
  void weight_grads(const Factors& f, int64_t n, Blocks units, Blocks rows_of_hr) const {
    for (int g = 0; g < G; ++g) {
      // The columns of grad_gates that belong to row block g of weight_ih, and of weight_hh.
      const int64_t of_ih = (E - G + g) * H;
      const int64_t of_hh = (g - Cell::kRecurrentRow + G) % G * H;
      const int64_t row   = (n * G + g) * H;
      // Computes a product, or returns it for `copied` if its second factor was copied.
      const auto product = [&](int64_t column, const T* b, const T* strips, int64_t columns,
                               const GradWeight<T>& grad, T* narrow_sums) -> ColumnsProduct<T> {
        if (!grad) return {};
        Product<T> out{grad.narrow ? narrow_sums : grad.numbers, columns};
        out.few_rows = grad.narrow && !layout.several_chunks;
        if (!out.few_rows) out.numbers += row * columns;
        out.narrow = grad.narrow && f.last ? grad.narrow + row * columns : nullptr;
        out.kind   = a.narrow;
        if (strips) return {in_strips(strips, lanes<Terms>(f.count)), out};
        matrix_product<T>(
            {f.count, f.grad_gates + column, 1, E * H, in_rows(b, columns), out, f.adds},
            units.begin, units.end);
        return {};
      };
      const auto copied = [&](int64_t column, const ColumnsProduct<T>(&products)[2]) {
        if (!products[0].out.numbers && !products[1].out.numbers) return;
        columns_products<T, Terms>(f.grad_gates + column, E * H, f.count, products, f.adds,
                                   rows_terms, units.begin, units.end);
      };
      const ColumnsProduct<T> ih =
          product(of_ih, f.input, layout.input_strips.size ? input_strips : nullptr, a.I,
                  a.grad_weight_ih[d], grad_ih);
      const ColumnsProduct<T> hh =
          product(of_hh, f.h_prev, layout.h_strips.size ? h_strips : nullptr, P,
                  a.grad_weight_hh[d], grad_hh);
      if (of_ih == of_hh) {
        copied(of_ih, {ih, hh});
      } else {
        copied(of_ih, {ih, {}});
        copied(of_hh, {hh, {}});
      }
      const auto sums = [&](int64_t column, T* out) {
        column_sums(out + row, f.grad_gates + column, E * H, f.count, f.adds, units.begin,
                    units.end);
      };
      if (T* const out = a.grad_bias_ih[d]) sums(of_ih, out);
      if (T* const out = a.grad_bias_hh[d]) {
        if (E == G && a.grad_bias_ih[d]) {  // the same columns
          std::memcpy(out + row + units.begin, a.grad_bias_ih[d] + row + units.begin,
                      sizeof(T) * size_t(units.end - units.begin));
        } else {
          sums(of_hh, out);
        }
      }
    }
    if (T* const out = a.grad_weight_hr[d]) {
      matrix_product<T>(
          {f.count, f.grad_h, 1, P, in_rows(f.unprojected, H), {out + n * P * H, H}, f.adds},
          rows_of_hr.begin, rows_of_hr.end);
    }
  }

  // Each sample's own. Its rows are gathered one behind the other: steps apart, they would all fall
  // into the same few sets of the caches.
  void group_grads() const {
    const int64_t group_batch = s.B / a.groups;
    T* const rows = group_rows + layout.group_rows.size * (a.groups < shard.direction_threads
                                                               ? mine(a.groups)
                                                               : shard.direction_rank);
    for (int64_t n = mine(a.groups); n < next(a.groups); ++n) {
      T* to             = rows;
      const auto gather = [&](const T* from, int64_t columns) {
        T* const gathered = to;
        for (int64_t t = 0; from && t < s.T; ++t, to += group_batch * columns) {
          std::memcpy(to, from + (t * s.B + n * group_batch) * columns,
                      sizeof(T) * size_t(group_batch * columns));
        }
        return static_cast<const T*>(gathered);
      };
      const T* const own_gates = gather(grad_gates, E * H);
      weight_grads(
          {own_gates, gather(a.input, a.I), gather(layout.h_prev.size ? h_prev : nullptr, P),
           gather(projects() ? grad_h : nullptr, P), gather(projects() ? unprojected : nullptr, H),
           s.T * group_batch, false, true},
          n, {0, H}, {0, P});
    }
  }

  // The gradients of h0 and c0, after all chunks.
  void initial_grads() {
    const int64_t B_begin = mine(s.B), B_end = next(s.B);
    if (a.grad_h0) {  // = initial_gates_h weight_hh + initial_carry
      T* const out    = a.grad_h0 + d * s.B * P;
      const Part part = part_of_product(s.B, P);
      if (layout.kConverts) {
        direction_barrier.wait();
        as_stored<Terms>(a.weight_hh[d], a.weight_hh_bf16[d], [&](const auto* weight) {
          gates_product<Terms>(part, GradGates<T>{initial_gates, E * H, H, G}, weight,
                               Cell::kRecurrentRow, P, out, rows_terms, weight_terms);
        });
      } else {
        // The row blocks from kRecurrentRow on belong to the first columns, the ones before to the
        // rest.
        constexpr int kAfter = G - Cell::kRecurrentRow;
        const T* const w     = a.weight_hh[d];
        const auto after     = in_rows(w + Cell::kRecurrentRow * H * P, P);
        ProductStep<T> product{kAfter * H, initial_gates, E * H, 1, after, {out, P}, false};
        matrix_product<T>(product, B_begin, B_end);
        if (Cell::kRecurrentRow) {
          product.K          = Cell::kRecurrentRow * H;
          product.a          = initial_gates + kAfter * H;
          product.b          = in_rows(w, P);
          product.accumulate = true;
          matrix_product<T>(product, B_begin, B_end);
        }
      }
      // The (larger) carry last: small terms added to a large sum one by one lose more.
      for (int64_t row = part.row_begin; Cell::kPrevIsH && row < part.row_end; ++row) {
        for (int64_t at = row * P + part.column; at < row * P + part.column + part.columns; ++at) {
          out[at] += initial_carry[at];
        }
      }
    }
    if (Cell::kHasCell && a.grad_c0) {
      std::memcpy(a.grad_c0 + (d * s.B + B_begin) * H, initial_carry + B_begin * H,
                  sizeof(T) * size_t((B_end - B_begin) * H));
    }
  }

  const BackwardArgs<T>& a;
  const Sequences& s;
  const int64_t d, H, P;
  const Shard& shard;
  const BackwardLayout<Cell, T, Terms>& layout;
  const Walk walk;
  Barrier direction_barrier, step_barrier;

  const T *h0, *c0, *gates, *extra, *hidden;  // the direction's
  const T* grad_gates_after = nullptr;        // of the step after the one to come
  // Scratch, as BackwardLayout has it.
  T *input_strips, *h_strips, *rows_terms, *weight_terms;
  T *grad_ih, *grad_hh, *forward_input, *forward_recurrent, *own_gates, *own_extra;
  T *h_prev, *c_prev, *carry, *initial_carry, *initial_gates, *grad_h, *unprojected, *grad_gates;
  T *step_terms, *group_rows, *recurrent, *projection;
};

// With a projection or groups only of Numbers.
template <class Cell, class T, class Terms>
bool backward(const BackwardArgs<T>& a) {
  const int64_t row_bytes = Cell::kGates * a.H * int64_t(sizeof(T));
  Shape shape             = shape_of<Cell, T>(a, row_bytes, kShardRows<Terms, 1>);
  const int threads       = useful_threads(shape, a.num_threads);
  const BackwardLayout<Cell, T, Terms> layout(a, threads);
  const int64_t panels = layout.panels.size();
  shape.weight_bytes = shape.packed_bytes = panels * int64_t(sizeof(T));
  return run_call<T, Terms>(shape, layout.numbers.size(), panels, threads,
                            [&](int64_t d, const Shard& shard, const Scratch<T>& scratch) {
                              BackwardDirection<Cell, T, Terms>(a, layout, d, shard, scratch).run();
                            });
}

}  // namespace
}  // namespace fusedrnn
