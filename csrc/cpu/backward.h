// WHEN: a layer's backward pass over all time steps, and then the gradients of its weights.
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

// How a backward call lays out a direction's scratch.
template <class Cell, class T, class Terms>
struct BackwardLayout {
  static constexpr bool kConverts = Terms::kGroup > 1;

  // Elements. Copies of second factors, where it pays or products take pairs (first, with the threads'
  // own parts, to lie on cache lines):
  int64_t input_strips = 0;  // [lanes, I], in_strips: the input of all rows,
  int64_t h_strips     = 0;  // [lanes, P], in_strips: h_prev
  // For gates that are computed again: packed weight_ih and weight_hh,
  int64_t forward_input     = 0;
  int64_t forward_recurrent = 0;
  int64_t gates             = 0;  // [N, G*H], unless they share grad_gates' memory,
  int64_t extra             = 0;  // [N, H], GRU's
  // For all calls:
  int64_t h_prev = 0;         // [N, P], if it is wanted
  int64_t c_prev = 0;         // [B, H], of steps that some rows begin with; [N, H] where gates are
                              // computed again
  int64_t carry         = 0;  // [B, H]: the cell's part of the gradient of the state before,
  int64_t initial_carry = 0;  // [B, H], and of h0 or c0
  int64_t initial_gates = 0;  // [B, E*H]: grad_gates, summed over a row's steps that begin with h0
  // [N, E*H]: gradients of the pre-activations. LSTM (i, f, g, o) and RNN: of gates_x and gates_h
  // alike. GRU: (n_h, r, z, n_x): the first 3H columns are the gradient of gates_h, its n part
  // first; the last 3H that of gates_x, in torch's order.
  int64_t grad_gates;
  int64_t grad_h      = 0;  // [N, P], of the projection's result
  int64_t unprojected = 0;  // [N, H]: what weight_hr was multiplied with
  // Where products take other than numbers, the terms of a step's grad_gates: [2, B, lanes].
  int64_t step_terms = 0;
  // Of each thread: the terms of the rows, or the copy of the part of grad_gates, that it works on; of
  // the part of a weight; and the rows of grad_weight_ih and of grad_weight_hh, if these are narrow.
  int64_t rows_terms    = 0;
  int64_t weight_terms  = 0;
  int64_t grad_ih_rows  = 0;
  int64_t grad_hh_rows  = 0;
  int64_t group_rows    = 0;  // of each of group_threads: what a sample's gradients are products of
  int64_t group_threads = 0;
  int64_t threads;  // at most
  // Panels of weight_hh, and of weight_hr.
  int64_t recurrent  = 0;
  int64_t projection = 0;

  explicit BackwardLayout(const BackwardArgs<T>& a) : threads(a.num_threads) {
    const Sequences& s       = a.sequences;
    const int64_t rows       = rows_before(s, s.T);
    const int64_t gate_size  = Cell::kGradGates * a.H;
    const int64_t gate_lanes = Cell::kGates * lanes<Terms>(a.H);
    if (s.T > 1) recurrent = blocks_of<T>(a.P) * kLanes<T> * gate_lanes;
    if (a.weight_hr[0]) {
      projection  = blocks_of<T>(a.H) * kLanes<T> * a.P;
      grad_h      = rows * a.P;
      unprojected = rows * a.H;
    }
    const bool again = a.gates == nullptr;
    if (again) {
      const auto panels = [&](int64_t K) {
        return blocks_of<T>(a.H) * forward_panel_size<Cell::kGates, T>(lanes<Terms>(K));
      };
      forward_input     = panels(a.I);
      forward_recurrent = panels(a.P);
      if (!kShareGates<Cell>) gates = rows * Cell::kGates * a.H;
      if (Cell::kHasExtra && !Cell::kHasCell) extra = rows * a.H;
    }
    if (again || Cell::kPrevIsH || a.grad_weight_hh[0] || a.grad_weight_hh[1]) h_prev = rows * a.P;
    if (Cell::kHasCell) c_prev = (again ? rows : all_alike(s) ? 0 : s.B) * a.H;
    if (Cell::kHasCarry) carry = initial_carry = s.B * a.H;
    if (a.grad_h0) initial_gates = s.B * gate_size;
    grad_gates = rows * gate_size;
    if (a.groups > 1) {
      group_threads = min64(threads, a.groups);
      group_rows    = rows / a.groups * (gate_size + a.I + a.P + (a.weight_hr[0] ? a.P + a.H : 0));
    }
    if (kConverts) {
      step_terms = 2 * s.B * gate_lanes;
      if (again) rows_terms = kChunkRows * (lanes<Terms>(a.I) + lanes<Terms>(a.P));
      const auto product_with = [&](int64_t columns) {
        rows_terms   = max64(rows_terms, kCopiedPart);
        weight_terms = max64(weight_terms, copied_weight<T>(columns));
      };
      if (a.grad_input[0] || a.grad_input[1]) product_with(a.I);
      if (a.grad_h0) product_with(a.P);
    }
    if (a.groups <= 1) {
      const auto strips = [&](int64_t columns) {
        return kConverts || pays_to_copy(gate_size, columns)
                   ? strips_size<T>(lanes<Terms>(rows), columns)
                   : 0;
      };
      if (a.grad_weight_ih[0] || a.grad_weight_ih[1]) input_strips = strips(a.I);
      if (a.grad_weight_hh[0] || a.grad_weight_hh[1]) h_strips = strips(a.P);
      if (input_strips || h_strips) rows_terms = max64(rows_terms, kCopiedPart);
    }
    const auto narrow_rows = [&](const GradWeight<T>(&grads)[2], int64_t columns) {
      return grads[0].narrow || grads[1].narrow ? min64(kBlockRows, a.H) * columns : 0;
    };
    grad_ih_rows = narrow_rows(a.grad_weight_ih, a.I);
    grad_hh_rows = narrow_rows(a.grad_weight_hh, a.P);
  }
  int64_t of_thread() const {  // in whole cache lines
    return (rows_terms + weight_terms + grad_ih_rows + grad_hh_rows + 15) / 16 * 16;
  }
  int64_t elements() const {
    return forward_input + forward_recurrent + gates + extra + h_prev + c_prev + carry +
           initial_carry + initial_gates + grad_gates + grad_h + unprojected + step_terms +
           threads * of_thread() + group_threads * group_rows + input_strips + h_strips;
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

template <class Cell, class T, class Terms>
void backward_direction(const BackwardArgs<T>& a, int64_t d, const Shard& shard,
                        const Scratch<T>& scratch) {
  constexpr int G     = Cell::kGates;
  constexpr int E     = Cell::kGradGates;
  const Sequences& s  = a.sequences;
  const int64_t H     = a.H;
  const int64_t P     = a.P;
  const int64_t rows  = rows_before(s, s.T);
  const T* const h0   = a.h0 + d * s.B * P;
  const T* const c0   = Cell::kHasCell ? a.c0 + d * s.B * H : nullptr;
  const bool again    = a.gates == nullptr;
  const bool projects = a.weight_hr[d] != nullptr;
  const Walk walk(s, d);
  const BackwardLayout<Cell, T, Terms> layout(a);

  T* const input_strips      = scratch.numbers(d);
  T* const h_strips          = input_strips + layout.input_strips;
  T* const thread_memory     = h_strips + layout.h_strips;
  T* const rows_terms        = thread_memory + shard.direction_rank * layout.of_thread();
  T* const weight_terms      = rows_terms + layout.rows_terms;
  T* const grad_ih_rows      = weight_terms + layout.weight_terms;
  T* const grad_hh_rows      = grad_ih_rows + layout.grad_ih_rows;
  T* const forward_input     = thread_memory + layout.threads * layout.of_thread();
  T* const forward_recurrent = forward_input + layout.forward_input;
  T* const own_gates         = forward_recurrent + layout.forward_recurrent;
  T* const own_extra         = own_gates + layout.gates;
  T* const all_h_prev        = own_extra + layout.extra;
  T* const c_prev            = all_h_prev + layout.h_prev;
  T* const carry             = c_prev + layout.c_prev;
  T* const initial_carry     = carry + layout.carry;
  T* const initial_gates     = initial_carry + layout.initial_carry;
  T* const all_grad_h        = initial_gates + layout.initial_gates;
  T* const unprojected       = all_grad_h + layout.grad_h;
  T* const grad_gates        = unprojected + layout.unprojected;
  T* const step_terms        = grad_gates + layout.grad_gates;
  T* const all_group_rows    = step_terms + layout.step_terms;
  T* const recurrent         = scratch.panels(d, shard);
  T* const projection        = recurrent + layout.recurrent;

  T* const gates_again = kShareGates<Cell> ? grad_gates : own_gates;
  const T* const gates = again ? gates_again : a.gates + d * rows * G * H;
  const T* extra       = own_extra;
  if (Cell::kHasExtra && a.extra) extra = a.extra + d * rows * H;
  const T* const hidden = a.hidden ? a.hidden + d * rows * P : nullptr;

  const Blocks h_blocks = own_blocks(shard, blocks_of<T>(P));
  const auto part_of_h  = [&](int64_t count) { return own_part<T>(shard, count, P); };
  const auto part_of_c  = [&](int64_t count) { return own_part<T>(shard, count, H); };

  // h of the step before each, what grad_weight_hh is the product with. Not the output, which its
  // owner may have changed by now: if h was not saved, GRU's is computed from the saved gates,
  // forwards, LSTM's and RNN's by the steps below.
  const auto h_prev = [&](int64_t i) { return all_h_prev + walk.offset(i) * P; };
  for (int64_t i = 0; layout.h_prev && i < s.T; ++i) {
    const States<T> states{hidden && i > 0 ? hidden + walk.offset(i - 1) * P : nullptr, P, h0, P};
    if (hidden) {
      states.copy_before(walk, i, shard, h_prev(i));
      continue;
    }
    const Part part = part_of_h(walk.count(i));
    if (i > 0 && !Cell::kPrevIsH && walk.uniform(i, part.row_begin, part.row_end)) continue;
    for (int64_t row = part.row_begin; row < part.row_end; ++row) {
      if (walk.source(i, row) != Source::kPrevious) {
        copy_rows<T>({row, row + 1, part.column, part.columns}, h_prev(i), P,
                     [&](int64_t) { return states.before(walk, i, row); });
      } else if constexpr (Cell::kPrevIsH) {
        recompute_h<Cell>(H, shard.block_begin, shard.block_end,
                          gates + (walk.offset(i - 1) + row) * G * H, h_prev(i - 1) + row * P,
                          h_prev(i) + row * P);
      }
    }
  }
  // LSTM's c of the step before the i-th, to c_to.
  const auto copy_c_prev = [&](int64_t i, T* c_to) {
    const T* const previous = i == 0 ? nullptr : extra + walk.offset(i - 1) * H;
    States<T>{previous, H, c0, H}.copy_before(walk, i, shard, c_to);
  };
  Barrier direction_barrier = scratch.direction_barrier(d, shard);
  const auto mine = [&](int64_t of) { return of * shard.direction_rank / shard.direction_threads; };
  const auto next = [&](int64_t of) {
    return of * (shard.direction_rank + 1) / shard.direction_threads;
  };

  if (again) {
    // The gates, of all rows at once: what a step begins with is known.
    for (int64_t i = 0; Cell::kHasCell && i < s.T; ++i) copy_c_prev(i, c_prev + walk.offset(i) * H);
    const int64_t blocks = blocks_of<T>(H);
    pack_input<Cell, Terms>(a, d, forward_input, mine(blocks), next(blocks));
    pack_recurrent<Cell, Terms>(a, d, forward_recurrent, mine(blocks), next(blocks));
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
    step.H             = H;
    step.K             = lanes<Terms>(P);
    step.save          = true;
    step.h_prev_stride = step.K;
    step.prev_stride   = H;
    step.panels        = {forward_recurrent};
    for (int64_t row = mine(rows); row < next(rows); row += kChunkRows) {
      const int64_t count = min64(next(rows) - row, kChunkRows);
      project.input       = terms_of(a.input, a.input_bf16, row, rows_terms, a.I, count);
      project.gates       = gates_again + row * G * H;
      step.h_prev         = terms_of(all_h_prev, nullptr, row, h_rows, P, count);
      step.prev           = (Cell::kHasCell ? c_prev : all_h_prev) + row * H;
      step.gates          = project.gates;
      step.extra          = layout.extra ? own_extra + row * H : nullptr;
      run_tiles<ProjectTiles<Cell, T, Terms>>(project, 0, count, 0, blocks, false);
      run_tiles<ForwardTiles<Cell, T, Terms>>(step, 0, count, 0, blocks, false);
    }
    direction_barrier.wait();
  }

  if constexpr (Cell::kHasCarry) {
    const T* const grad_c_n = Cell::kHasCell && a.grad_c_n ? a.grad_c_n + d * s.B * H : nullptr;
    copy_rows<T>(part_of_c(s.B), carry, H,
                 [&](int64_t row) { return grad_c_n ? grad_c_n + row * H : nullptr; });
    copy_rows<T>(part_of_c(s.B), initial_carry, H, [](int64_t) -> const T* { return nullptr; });
  }

  if (layout.recurrent) {
    as_stored<Terms>(a.weight_hh[d], a.weight_hh_bf16[d], [&](const auto* weight) {
      pack_backward<Cell, T, Terms>(recurrent, weight, H, P, h_blocks.begin, h_blocks.end);
    });
  }
  if (projects) {
    pack_backward<Projection, T>(projection, a.weight_hr[d], P, H, shard.block_begin,
                                 shard.block_end);
  }

  BackwardStep<T> step{};
  step.finish = backward_tile<Cell, T>;
  // Only where the gates outgrow L2: speedup on a Zen 5 core 1.01 to 1.03 in float32, 1.01 to 1.05 in
  // bfloat16, from (8, 100, 128) on.
  step.fetch = rows * (G + E) * H * int64_t(sizeof(T)) > l2_bytes() ? fetch_tile<Cell, T> : nullptr;
  step.H     = H;
  step.carry = carry;
  step.grad_cells_stride = a.D * H;
  ProjectedGradHStep<T> projected{};
  projected.finish     = store_grad_h<T>;
  GradH<T>& grad_h     = projects ? projected.grad_h : step.grad_h;
  grad_h.K             = G * lanes<Terms>(H);
  grad_h.stride        = layout.kConverts ? grad_h.K : E * H;
  grad_h.panels        = recurrent;
  grad_h.output_stride = a.D * P;
  grad_h.P             = P;

  Barrier barrier = scratch.step_barrier(d, shard);
  for (int64_t i = s.T - 1; i >= 0; --i) {
    const int64_t offset    = walk.offset(i);
    const int64_t count     = walk.count(i);
    const int64_t row_begin = min64(shard.row_begin, count);
    const int64_t row_end   = min64(shard.row_end, count);
    // The rows before this one go on at the next step, the others end here.
    const int64_t ending =
        i == s.T - 1 ? row_begin : max64(row_begin, min64(row_end, walk.count(i + 1)));
    const bool descending = i % 2 == 1;
    step.gates            = gates + offset * G * H;
    step.grad_cells       = a.grad_cells ? a.grad_cells + offset * a.D * H + d * H : nullptr;
    step.grad_gates       = grad_gates + offset * E * H;
    if constexpr (Cell::kHasExtra) step.extra = extra + offset * H;
    if constexpr (Cell::kPrevIsH) step.prev = h_prev(i);
    if constexpr (Cell::kHasCell) {
      if (again) {
        step.prev = c_prev + offset * H;
      } else if (walk.uniform(i, row_begin, row_end)) {
        step.prev = i == 0 ? c0 : extra + walk.offset(i - 1) * H;
      } else {
        copy_c_prev(i, c_prev);
        step.prev = c_prev;
      }
    }
    T* const grad_of_h = projects ? all_grad_h + offset * P : nullptr;
    grad_h.output      = a.grad_output ? a.grad_output + offset * a.D * P + d * P : nullptr;
    const auto run     = [&](int64_t begin, int64_t end) {
      if (projects) {
        projected.out = grad_of_h;
        run_tiles<GradHTiles<T>>(projected, begin, end, h_blocks.begin, h_blocks.end, descending);
      } else {
        run_tiles<GradHTiles<T, Terms>>(step, begin, end, shard.block_begin, shard.block_end,
                                        descending);
      }
    };
    if (row_begin < ending) {
      grad_h.terms = layout.kConverts ? step_terms + (i + 1) % 2 * s.B * grad_h.K
                                      : grad_gates + walk.offset(i + 1) * E * H;
      grad_h.cut   = walk.boundaries(i + 1);
      grad_h.h_n   = nullptr;
      step.h       = layout.h_prev && !hidden ? h_prev(i + 1) : nullptr;
      run(row_begin, ending);
    }
    grad_h.terms = nullptr;
    grad_h.cut   = nullptr;
    grad_h.h_n   = a.grad_h_n ? a.grad_h_n + d * s.B * P : nullptr;
    step.h       = nullptr;
    run(ending, row_end);
    if (projects) {
      barrier.wait();
      step.grad_h        = {};
      step.grad_h.terms  = grad_of_h;
      step.grad_h.K      = P;
      step.grad_h.stride = P;
      step.grad_h.panels = projection;
      step.h             = unprojected + offset * H;
      run_tiles<GradHTiles<T>>(step, row_begin, row_end, shard.block_begin, shard.block_end,
                               descending);
    }
    // What the cell passes on leaves the recurrence where a row begins.
    if (Cell::kHasCarry && !(i > 0 && walk.uniform(i, row_begin, row_end))) {
      const Part part = part_of_c(count);
      for (int64_t row = part.row_begin; row < part.row_end; ++row) {
        const Source source = walk.source(i, row);
        for (int64_t at = row * H + part.column; at < row * H + part.column + part.columns; ++at) {
          if (source == Source::kInitial) initial_carry[at] += carry[at];
          if (source != Source::kPrevious) carry[at] = 0;
        }
      }
    }
    if (layout.kConverts && i > 0) {
      const Part part = part_of_c(count);
      gates_to_terms<Terms>(part, H, step.grad_gates, E * H, step_terms + i % 2 * s.B * grad_h.K,
                            G);
    }
    barrier.wait();
  }

  // Once grad_gates and h_prev are whole, each thread takes a part of every gradient.
  direction_barrier.wait();
  if (layout.input_strips || layout.h_strips) {
    // This thread's part of the rows.
    const auto convert = [&](const auto* from, int64_t columns, T* strips) {
      const int64_t first  = mine(groups<Terms>(rows)) * Terms::kGroup;
      const int64_t end    = min64(rows, next(groups<Terms>(rows)) * Terms::kGroup);
      auto to              = in_strips(strips, lanes<Terms>(rows));
      to.data             += lanes<Terms>(first) * to.stride;
      to_strips<Terms>(from + first * columns, columns, end - first, 0, columns, to);
    };
    if (layout.input_strips) {
      as_stored<Terms>(a.input, a.input_bf16,
                       [&](const auto* input) { convert(input, a.I, input_strips); });
    }
    if (layout.h_strips) convert(all_h_prev, P, h_strips);
    direction_barrier.wait();
  }
  // This thread's part of a product of gates [all, E*H] and a weight [.., columns]. Each makes the
  // terms of its part of either: some rows, or, of fewer rows than columns, some columns.
  const auto part_of_product = [&](int64_t all, int64_t columns) -> Part {
    const int64_t strips = (columns + kStrip<T> - 1) / kStrip<T>;
    if (!layout.kConverts || all > columns || strips < shard.direction_threads) {
      return {mine(all), next(all), 0, columns};
    }
    const int64_t left = mine(strips) * kStrip<T>;
    return {0, all, left, min64(columns, next(strips) * kStrip<T>) - left};
  };
  if (T* const out = a.grad_input[d]) {  // = grad_gates_x weight_ih
    const T* const grad_gates_x = grad_gates + (E - G) * H;
    if (layout.kConverts) {
      as_stored<Terms>(a.weight_ih[d], a.weight_ih_bf16[d], [&](const auto* weight) {
        gates_product<Terms>(part_of_product(rows, a.I), GradGates<T>{grad_gates_x, E * H, H, G},
                             weight, 0, a.I, out, rows_terms, weight_terms);
      });
    } else {
      matrix_product<T>(
          {G * H, grad_gates_x, E * H, 1, in_rows(a.weight_ih[d], a.I), {out, a.I}, false},
          mine(rows), next(rows));
    }
  }
  const int64_t B_begin = mine(s.B), B_end = next(s.B);
  if (a.grad_h0) {  // = initial_gates_h weight_hh + initial_carry
    std::memset(initial_gates + B_begin * E * H, 0, sizeof(T) * size_t((B_end - B_begin) * E * H));
    for (int64_t i = 0; i < s.T; ++i) {
      const int64_t end = min64(B_end, walk.count(i));
      if (i > 0 && walk.uniform(i, B_begin, end)) continue;
      for (int64_t row = B_begin; row < end; ++row) {
        if (walk.source(i, row) != Source::kInitial) continue;
        const T* const from = grad_gates + (walk.offset(i) + row) * E * H;
        for (int64_t j = 0; j < E * H; ++j) initial_gates[row * E * H + j] += from[j];
      }
    }
    T* const out    = a.grad_h0 + d * s.B * P;
    const Part part = part_of_product(s.B, P);
    if (layout.kConverts) {
      direction_barrier.wait();
      as_stored<Terms>(a.weight_hh[d], a.weight_hh_bf16[d], [&](const auto* weight) {
        gates_product<Terms>(part, GradGates<T>{initial_gates, E * H, H, G}, weight,
                             Cell::kRecurrentRow, P, out, rows_terms, weight_terms);
      });
    } else {
      // The row blocks from kRecurrentRow on belong to the first columns, the ones before to the rest.
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
  // grad_weight_ih = grad_gates_x^T input, grad_weight_hh = grad_gates_h^T h_prev, the biases' are the
  // sums of grad_gates_x and _h, grad_weight_hr = grad_h^T unprojected. Of `count` rows, to the n-th
  // place of each gradient, for units [begin, end) and its rows of weight_hr.
  struct Factors {
    const T *grad_gates, *input, *h_prev, *grad_h, *unprojected;
    int64_t count;
  };
  const auto weight_grads = [&](const Factors& f, int64_t n, Blocks units, Blocks rows_of_hr) {
    for (int g = 0; g < G; ++g) {
      // The columns of grad_gates that belong to row block g of weight_ih, and of weight_hh.
      const int64_t of_ih = (E - G + g) * H;
      const int64_t of_hh = (g - Cell::kRecurrentRow + G) % G * H;
      const int64_t row   = (n * G + g) * H;
      // Computes a product, or returns it for `copied` if its second factor was copied.
      const auto product = [&](int64_t column, const T* b, const T* strips, int64_t columns,
                               const GradWeight<T>& grad, T* narrow_from) -> ColumnsProduct<T> {
        if (!grad) return {};
        const Product<T> out =
            grad.narrow ? Product<T>{narrow_from, columns, grad.narrow + row * columns, a.narrow}
                        : Product<T>{grad.numbers + row * columns, columns};
        if (strips) return {in_strips(strips, lanes<Terms>(f.count)), out};
        matrix_product<T>(
            {f.count, f.grad_gates + column, 1, E * H, in_rows(b, columns), out, false},
            units.begin, units.end);
        return {};
      };
      const auto copied = [&](int64_t column, const ColumnsProduct<T>(&products)[2]) {
        if (!products[0].out.numbers && !products[1].out.numbers) return;
        columns_products<T, Terms>(f.grad_gates + column, E * H, f.count, products, rows_terms,
                                   units.begin, units.end);
      };
      const ColumnsProduct<T> ih =
          product(of_ih, f.input, layout.input_strips ? input_strips : nullptr, a.I,
                  a.grad_weight_ih[d], grad_ih_rows);
      const ColumnsProduct<T> hh = product(of_hh, f.h_prev, layout.h_strips ? h_strips : nullptr, P,
                                           a.grad_weight_hh[d], grad_hh_rows);
      if (of_ih == of_hh) {
        copied(of_ih, {ih, hh});
      } else {
        copied(of_ih, {ih, {}});
        copied(of_hh, {hh, {}});
      }
      const auto sums = [&](int64_t column, T* out) {
        column_sums(out + row, f.grad_gates + column, E * H, f.count, units.begin, units.end);
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
          {f.count, f.grad_h, 1, P, in_rows(f.unprojected, H), {out + n * P * H, H}, false},
          rows_of_hr.begin, rows_of_hr.end);
    }
  };
  if (a.groups <= 1) {
    weight_grads({grad_gates, a.input, all_h_prev, all_grad_h, unprojected, rows}, 0,
                 {mine(H), next(H)}, {mine(P), next(P)});
    return;
  }
  // A sample's rows, one behind the other: steps apart, they would all fall into the same few sets of
  // the caches.
  const int64_t group_batch = s.B / a.groups;
  T* const group_rows = all_group_rows + layout.group_rows * (a.groups < shard.direction_threads
                                                                  ? mine(a.groups)
                                                                  : shard.direction_rank);
  for (int64_t n = mine(a.groups); n < next(a.groups); ++n) {
    T* to             = group_rows;
    const auto gather = [&](const T* from, int64_t columns) {
      T* const gathered = to;
      for (int64_t t = 0; from && t < s.T; ++t, to += group_batch * columns) {
        std::memcpy(to, from + (t * s.B + n * group_batch) * columns,
                    sizeof(T) * size_t(group_batch * columns));
      }
      return static_cast<const T*>(gathered);
    };
    const T* const own_gates = gather(grad_gates, E * H);
    weight_grads({own_gates, gather(a.input, a.I), gather(layout.h_prev ? all_h_prev : nullptr, P),
                  gather(projects ? all_grad_h : nullptr, P),
                  gather(projects ? unprojected : nullptr, H), s.T * group_batch},
                 n, {0, H}, {0, P});
  }
}

// With a projection or groups only of Numbers.
template <class Cell, class T, class Terms>
bool backward(const BackwardArgs<T>& a) {
  const BackwardLayout<Cell, T, Terms> layout(a);
  const int64_t panels = layout.recurrent + layout.projection;
  const int64_t bytes  = panels * int64_t(sizeof(T));
  const Shape shape    = shape_of<Cell, T>(a, bytes, bytes, Cell::kGates * a.H * int64_t(sizeof(T)),
                                           kShardRows<Terms, 1>);
  return run_call<T, Terms>(shape, layout.elements(), panels, a.num_threads,
                            [&](int64_t d, const Shard& shard, const Scratch<T>& scratch) {
                              backward_direction<Cell, T, Terms>(a, d, shard, scratch);
                            });
}

}  // namespace
}  // namespace fusedrnn
