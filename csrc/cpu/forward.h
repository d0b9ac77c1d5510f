// WHEN: a layer's forward pass over all time steps.
#pragma once

#include "ahead.h"
#include "call.h"
#include "step.h"
#include "unpacked.h"

namespace fusedrnn {
namespace {

// How a forward call lays out a direction's scratch, and how it walks time: the input of a chunk of
// steps is projected just before they run, so that gates_x is still in the cache when they read it.
template <class Cell, class T, class Terms>
struct ForwardLayout {
  static constexpr bool kConverts  = Terms::kGroup > 1;
  static constexpr bool kReadsBf16 = !std::is_same<typename Terms::Stored, T>::value;

  Pieces panels;
  Piece recurrent, input, projection;  // packed weight_hh, weight_ih and weight_hr
  Pieces numbers;
  Piece unprojected;  // [B, H]: what weight_hr is multiplied with
  Piece started;      // [2, B, P]: states before steps that some rows begin with
  Piece input_terms;  // of each thread: a chunk's input, if it is copied
  Piece h_terms;      // [2, B, lanes]: h before a step, where products take other than numbers
  Piece gates;        // gates_x of a chunk, unless it goes to the saved gates
  int64_t chunk_rows   = 0;  // at most
  int64_t ahead_rows   = 0;  // of a chunk that is projected ahead, beside the steps; 0: none may be
  int64_t ahead_blocks = 0;  // and of these units: whole tiles of panels that are not folded
  int64_t weight_bytes;      // of the weights as the steps read them
  bool one_matrix = true;    // rows of consecutive steps are evenly spaced
  bool copies     = false;   // a chunk's input
  bool given;                // the packed weights are the caller's
  bool stored;               // weights are bfloat16's bits, which unpacked products read too

  bool packed() const { return recurrent.size > 0; }
  int64_t own_panels() const { return given ? 0 : panels.size(); }

  void add_to(Shape& shape) const {
    shape.weight_bytes = weight_bytes;
    shape.packed_bytes = own_panels() * int64_t(sizeof(T));
  }

  // For so many threads at most.
  ForwardLayout(const ForwardArgs<T>& a, int64_t threads) : given(a.panels[0] != nullptr) {
    const Sequences& s = a.sequences;
    const int64_t rows = rows_before(s, s.T);
    if (!all_alike(s)) started = numbers.take(2 * s.B * a.P);
    stored                 = kReadsBf16 && a.weight_hh_bf16[0];
    const int64_t passes   = s.T * ((s.B + kUnpackedRows - 1) / kUnpackedRows);
    const int64_t as_given = Cell::kGates * a.H * (a.I + a.P) *
                             int64_t(stored ? sizeof(typename Terms::Stored) : sizeof(T));
    const bool unpacked =
        !given && !a.weight_hr[0] && passes <= max_unpacked_passes(as_given, l2_bytes());
    if (kConverts && (stored || !unpacked)) {
      h_terms = numbers.take(2 * s.B * lanes<Terms>(a.P));
    }
    if (unpacked) {
      weight_bytes = as_given;
      return;
    }
    const auto panels_of = [&](int64_t K) {
      return panels.take(blocks_of<T>(a.H) * forward_panel_size<Cell::kGates, T>(lanes<Terms>(K)));
    };
    recurrent = panels_of(a.P);
    input     = panels_of(a.I);
    if (a.weight_hr[0]) {
      projection  = panels.take(blocks_of<T>(a.P) * forward_panel_size<1, T>(a.H));
      unprojected = numbers.take(s.B * a.H);
    }
    weight_bytes = panels.size() * int64_t(sizeof(T));
    // A chunk is one product, of rows that lie as one matrix or are copied to be one.
    one_matrix         = s.offsets || s.B == 1 || a.input_stride_t == s.B * a.input_stride_b;
    const bool once    = rows <= kOnceRows && weight_bytes > l2_bytes();
    const int64_t most = once ? rows : min64(rows, kChunkRows);
    const bool joins =
        !one_matrix && 2 * s.B <= most && pays_to_join(s.B, weight_bytes, l2_bytes());
    copies                 = kConverts || joins;
    chunk_rows             = one_matrix || joins ? max64(s.B, most) : s.B;
    constexpr int64_t tile = kAheadTile<Cell>;
    const int64_t K        = max64(lanes<Terms>(a.I), lanes<Terms>(a.P));
    ahead_blocks           = blocks_of<T>(a.H);
    if (fold_of<Terms>(a.H, K, 0, ahead_blocks) > 1) --ahead_blocks;
    ahead_blocks -= ahead_blocks % kAheadPanels<Cell>;
    if (kCanGoAhead<Terms> && s.B == 1 && !s.offsets && s.T > 2 * tile && ahead_blocks > 0) {
      // The first chunk is projected before any step: one tile if T is small (1.06 times as fast at
      // T = 20).
      ahead_rows = s.T > 2 * kAheadTiles * tile ? kAheadTiles * tile : tile;
    }
    if (!a.gates) gates = numbers.take(max64(chunk_rows, 2 * ahead_rows) * Cell::kGates * a.H);
    if (copies) {
      input_terms =
          numbers.take(chunk_rows * lanes<Terms>(a.I), threads_of_direction(threads, a.D));
    }
  }
  // Rows of a chunk that this thread projects ahead; 0: none. Steps do not wait for the weights of
  // small layers, those beyond L2 come too slowly to be read more often, and threads that split units
  // wait for each other: the speedup of two is 0.91 to 1.07 (H = 64 to 128).
  int64_t ahead_of(const Shard& shard) const {
    const bool waits = weight_bytes > l2_bytes() / 8 && weight_bytes <= l2_bytes();
    return waits && shard.unit_shards == 1 ? ahead_rows : 0;
  }

  // Steps of the chunk that begins with the i-th.
  int64_t chunk(const Walk& walk, int64_t i, int64_t T_) const {
    int64_t steps = 1, rows = walk.count(i);
    while (i + steps < T_ && rows + walk.count(i + steps) <= chunk_rows) {
      rows += walk.count(i + steps++);
    }
    return steps;
  }
};

// Which panels a call uses once: they are packed piece by piece, just before use, and stay in L2 if a
// piece fits. Speedup of an inference call over packing all first, on a Zen 4 core at (B, T, H), LSTM
// / GRU / RNN: (1, 20, 512) 1.11 / 1.06 / 1.01, (1, 20, 1024) 1.12 / 1.12 / 1.09, cells (32, 1, 512)
// 1.2 / 1.1 / 1.02, (32, 1, 1024) 1.27 / 1.25 / 1.15, (256, 1, 1024) 1.04 each; bfloat16 (1, 20,
// 1024) 1.19 / 1.23 / 1.06, (32, 1, 1024) 1.43 / 1.31 / 1.08; AVX2 (40, 1, 512) 1.22 / 1.13 / 1.04; H
// = 128 and 256 0.98 to 1.03.
struct Once {
  bool recurrent = false, input = false;
};

// Direction d's weights but for those of `once` to `panels`: weight_hh, weight_ih, weight_hr.
// share(blocks, pack) calls pack(begin, end) so that all blocks are packed.
template <class Cell, class T, class Terms, class Share>
void pack_direction(const ForwardArgs<T>& a, int64_t d, const ForwardLayout<Cell, T, Terms>& layout,
                    const Once& once, T* panels, const Share& share) {
  T* const recurrent  = panels + layout.recurrent.at;
  T* const input      = panels + layout.input.at;
  T* const projection = panels + layout.projection.at;
  share(blocks_of<T>(a.H), [&](int64_t begin, int64_t end) {
    if (!once.recurrent) pack_recurrent<Cell, Terms>(a, d, recurrent, begin, end);
    if (!once.input) pack_input<Cell, Terms>(a, d, input, begin, end);
  });
  if (a.weight_hr[d]) {
    share(blocks_of<T>(a.P), [&](int64_t begin, int64_t end) {
      pack_forward<1, T>(projection, a.weight_hr[d], nullptr, a.P, a.H, begin, end);
    });
  }
}

// run_tiles for all of a thread's units. pack(to, begin, end) packs each tile's panels just before,
// over the last one's, in the thread's part of `panels`.
template <class Tiles, class T, class Pack>
void run_packing(typename Tiles::Step step, int64_t row_begin, int64_t row_end, const Shard& shard,
                 T* panels, const Pack& pack) {
  using Terms              = typename Tiles::Terms;
  constexpr int Q          = Tiles::Q;
  constexpr int64_t kPiece = max_panels<Terms, Q>(kMaxRows<Terms, Q>);
  T* const own             = panels + shard.block_begin * forward_panel_size<Q, T>(step.K);
  for (int64_t block = shard.block_begin; block < shard.block_end; block += kPiece) {
    const int64_t end = min64(block + kPiece, shard.block_end);
    pack(own, block, end);
    step.panels = {own, block};
    run_tiles<Tiles>(step, row_begin, row_end, block, end, false);
  }
}

// One thread's part of a direction's forward pass.
template <class Cell, class T, class Terms>
struct ForwardDirection {
  using Layout = ForwardLayout<Cell, T, Terms>;

  ForwardDirection(const ForwardArgs<T>& args, const Layout& of_call, int64_t direction,
                   const Shard& own_shard, const Scratch<T>& scratch)
      : a(args),
        s(args.sequences),
        d(direction),
        H(args.H),
        P(args.P),
        DP(args.D * args.P),
        first(direction * rows_before(args.sequences, args.sequences.T)),
        input_stride(s.B == 1 && !s.offsets ? args.input_stride_t : args.input_stride_b),
        shard(own_shard),
        layout(of_call),
        ahead_rows(of_call.ahead_of(own_shard)),
        walk(args.sequences, direction),
        barrier(scratch.step_barrier(direction, own_shard)),
        ahead(own_shard.block_begin, of_call.ahead_blocks) {
    const auto at = [&](const Piece& piece) { return scratch.numbers(d) + piece.at; };
    unprojected   = at(layout.unprojected);
    started       = at(layout.started);
    h_terms       = at(layout.h_terms);
    input_terms   = at(layout.input_terms) + shard.direction_rank * layout.input_terms.size;
    chunk_gates   = at(layout.gates);
    panels        = scratch.panels(d, shard);

    h0  = a.h0 + d * s.B * P;
    c0  = Cell::kHasCell ? a.c0 + d * s.B * H : nullptr;
    c_n = Cell::kHasCell ? a.c_n + d * s.B * H : nullptr;

    step.H               = H;
    step.K               = lanes<Terms>(P);
    step.save            = a.gates != nullptr;
    project.K            = lanes<Terms>(a.I);
    project.H            = H;
    project.input_stride = layout.copies ? project.K : input_stride;
    project.gates_stride = G * H;
    project_h            = {H, P, unprojected, H, nullptr, DP, {}};
  }

  void run() {
    if (layout.packed()) prepare_panels();
    if (!start(0)) barrier.wait();
    for (int64_t i = 0; i < s.T; ++i) {
      if (ahead_rows > 0) {
        keep_ahead(i);
      } else if (layout.packed() && i == chunk_end) {
        project_chunk();
      }
      place_results(i);
      run_step(i);
      if (projects()) {
        barrier.wait();
        project_state(i);
      }
      keep_states(i);
      if (i + 1 < s.T) start(i + 1);
      barrier.wait();
    }
  }

  static constexpr int G = Cell::kGates;

  bool projects() const { return a.weight_hr[d] != nullptr; }
  bool has_all_rows() const { return shard.row_begin == 0 && shard.row_end == s.B; }

  Part part_of_h(int64_t count) const { return own_part<T>(shard, count, P); }
  Part part_of_c(int64_t count) const { return own_part<T>(shard, count, H); }
  // This thread's rows of step i, [row_begin, row_end).
  int64_t row_begin(int64_t i) const { return min64(shard.row_begin, walk.count(i)); }
  int64_t row_end(int64_t i) const { return min64(shard.row_end, walk.count(i)); }
  // Of row 0, in elements.
  int64_t input_at(int64_t i) const {
    return s.offsets ? walk.offset(i) * a.input_stride_b : walk.time(i) * a.input_stride_t;
  }
  T* output_of(int64_t i) const { return a.output + walk.offset(i) * DP + d * P; }
  // gates_x of a row of [N]: of the chunk being run, or the saved gates.
  T* gates_of(int64_t row) const {
    return layout.gates.size ? chunk_gates + (row - chunk_first) * G * H
                             : a.gates + (first + row) * G * H;
  }
  // gates_x of step i, where projected ahead: in scratch, two chunks in turns, or the saved gates.
  T* ahead_gates(int64_t i) const {
    return layout.gates.size ? chunk_gates + i % (2 * ahead_rows) * G * H
                             : a.gates + (first + walk.offset(i)) * G * H;
  }

  void prepare_panels() {
    if (!layout.given) {
      const bool all_rows = shard.direction_threads == shard.unit_shards;
      once.recurrent      = s.T == 1;
      once.input          = ahead_rows == 0 && all_rows && layout.chunk(walk, 0, s.T) == s.T;
      pack_direction(a, d, layout, once, panels, [&](int64_t blocks, const auto& pack_blocks) {
        const Blocks own = own_blocks(shard, blocks);
        pack_blocks(own.begin, own.end);
      });
    }
    const T* const all = layout.given ? a.panels[d] : panels;
    step.panels        = {all + layout.recurrent.at};
    project.panels     = {all + layout.input.at};
    project_h.panels   = {all + layout.projection.at};
  }

  // h and c before step i, gathered where its rows' sources differ: h where the returned pointer says,
  // c in c_n.
  __attribute__((noinline)) T* gather(int64_t i, const T* h_from, const T* c_from) {
    T* const h_started = started + i % 2 * s.B * P;
    States<T>{h_from, DP, h0, P}.copy_before(walk, i, shard, h_started);
    if constexpr (Cell::kHasCell) States<T>{c_from, H, c0, H}.copy_before(walk, i, shard, c_n);
    return h_started;
  }
  // Sets step's h_prev and prev for step i; false if h_prev was written anew: other unit shards read
  // it, behind the barrier that precedes the step.
  bool start(int64_t i) {
    const T* const h_from = i == 0 ? h0 : output_of(i - 1);
    const T* const c_from = i == 0 ? c0 : step.extra;
    const bool uniform    = walk.uniform(i, row_begin(i), row_end(i));
    step.h_prev           = uniform ? h_from : gather(i, h_from, c_from);
    step.h_prev_stride    = uniform && i > 0 ? DP : P;
    step.prev             = Cell::kPrevIsH ? step.h_prev : uniform ? c_from : c_n;
    step.prev_stride      = Cell::kPrevIsH ? step.h_prev_stride : H;
    if (!layout.h_terms.size) return uniform;
    T* const terms  = h_terms + i % 2 * s.B * step.K;
    const Part part = part_of_h(walk.count(i));
    to_terms<Terms>(step.h_prev + part.row_begin * step.h_prev_stride + part.column,
                    step.h_prev_stride, terms + part.row_begin * step.K + lanes<Terms>(part.column),
                    step.K, part.row_end - part.row_begin, part.columns);
    step.h_prev        = terms;
    step.h_prev_stride = step.K;
    return false;
  }

  // The input of rows [begin, end) from step i's first row on, for `project`.
  const T* project_input(int64_t i, int64_t begin, int64_t end) const {
    if (!layout.copies) return a.input + input_at(i);
    const int64_t even = layout.one_matrix ? end : s.B;  // so many rows are evenly spaced
    as_stored<Terms>(a.input, a.input_bf16, [&](const auto* input) {
      for (int64_t row = begin, next = 0; row < end; row = next) {
        next = min64(end, row - row % even + even);
        to_terms<Terms>(
            input + input_at(i) + row / even * a.input_stride_t + row % even * input_stride,
            input_stride, input_terms + row * project.K, project.K, next - row, a.I);
      }
    });
    return input_terms;
  }
  // Projects the input of the chunk that begins with step chunk_end.
  void project_chunk() {
    using Tiles         = ProjectTiles<Cell, T, Terms>;
    const int64_t begin = chunk_end;
    // Row shards may be in different chunks of one gates_x memory, so a row needs a fixed place in
    // it: with offsets, where steps differ in rows, a chunk is then one step.
    chunk_end += has_all_rows() || !s.offsets ? layout.chunk(walk, begin, s.T) : 1;
    const int64_t in_memory_first = d == 0 ? begin : chunk_end - 1;
    const int64_t in_memory_last  = d == 0 ? chunk_end - 1 : begin;
    chunk_first                   = walk.offset(in_memory_first);
    if (!has_all_rows()) {
      for (int64_t i = begin; i < chunk_end; ++i) {
        project.input = project_input(i, row_begin(i), row_end(i));
        project.gates = gates_of(walk.offset(i));
        run_tiles<Tiles>(project, row_begin(i), row_end(i), shard.block_begin, shard.block_end,
                         false);
      }
      return;
    }
    const int64_t rows = walk.offset(in_memory_last) + walk.count(in_memory_last) - chunk_first;
    project.input      = project_input(in_memory_first, 0, rows);
    project.gates      = gates_of(chunk_first);
    if (once.input) {
      run_packing<Tiles>(project, 0, rows, shard, panels + layout.input.at,
                         [&](T* to, int64_t from, int64_t until) {
                           pack_input<Cell, Terms>(a, d, to, from, until, from);
                         });
    } else {
      run_tiles<Tiles>(project, 0, rows, shard.block_begin, shard.block_end, false);
    }
  }

  // Before step i: what it needs is projected, and the projection of what comes after that begun.
  void keep_ahead(int64_t i) {
    if constexpr (kCanGoAhead<Terms>) {
      if (i % ahead_rows != 0) return;
      if (i == 0) start_ahead(0);
      ahead.finish();
      if (i + ahead_rows < s.T) start_ahead(i + ahead_rows);
    }
  }
  // Begins the projection of the steps from i on; the last ones, less than a tile, are done at once.
  void start_ahead(int64_t i) {
    const int64_t time_sign = d == 0 ? 1 : -1;
    ProjectStep<T> tile     = project;
    const int64_t count     = min64(ahead_rows, s.T - i);
    const int tiles         = int(count) / kAheadTile<Cell>;
    tile.input              = a.input + input_at(i);
    tile.input_stride       = time_sign * input_stride;
    tile.gates              = ahead_gates(i);
    tile.gates_stride       = (layout.gates.size ? 1 : time_sign) * G * H;
    run_tiles<ProjectTiles<Cell, T, Terms>>(tile, tiles * kAheadTile<Cell>, count,
                                            shard.block_begin, layout.ahead_blocks, false);
    run_tiles<ProjectTiles<Cell, T, Terms>>(tile, 0, count, layout.ahead_blocks, shard.block_end,
                                            false);
    if (tiles > 0) ahead.start(tile, tiles);
  }
  // A step, and as much of the projection as fits beside it. Back and forth, as run_tiles goes:
  // speedup 1.0 to 1.21 (RNN, H = 96 to 320), 1.03 to 1.04 (GRU, 96 to 160), 1.0 to 1.05 (LSTM, 56 to
  // 128).
  void run_beside([[maybe_unused]] bool back) {
    if constexpr (kCanGoAhead<Terms>) {
      constexpr int kPanels = kAheadPanels<Cell>;
      const int64_t turns   = (layout.ahead_blocks - shard.block_begin) / kPanels;
      for (int64_t turn = 0; turn < turns; ++turn) {
        const int64_t at = back ? turns - 1 - turn : turn;
        forward_beside<Cell, T>(step, shard.block_begin + at * kPanels, ahead);
      }
      run_tiles<ForwardTiles<Cell, T, Terms>>(step, 0, 1, layout.ahead_blocks, shard.block_end,
                                              false);
    }
  }

  // Where step i finds gates_x, and leaves h, what it saves and c.
  void place_results(int64_t i) {
    const int64_t offset = walk.offset(i);
    step.h               = projects() ? unprojected : output_of(i);
    step.h_stride        = projects() ? H : DP;
    step.gates           = ahead_rows > 0                 ? ahead_gates(i)
                           : a.gates || layout.gates.size ? gates_of(offset)
                                                          : nullptr;
    if constexpr (Cell::kHasCell) {  // c passes through extra if there is one, else in place in c_n
      step.extra = a.extra ? a.extra + (first + offset) * H : c_n;
    } else if constexpr (Cell::kHasExtra) {
      step.extra = a.extra ? a.extra + (first + offset) * H : nullptr;
    }
  }
  void run_step(int64_t i) {
    using Tiles     = ForwardTiles<Cell, T, Terms>;
    const bool back = i % 2 == 1;
    if (ahead_rows > 0) {
      run_beside(back);
    } else if (once.recurrent) {
      run_packing<Tiles>(step, row_begin(i), row_end(i), shard, panels + layout.recurrent.at,
                         [&](T* to, int64_t from, int64_t until) {
                           pack_recurrent<Cell, Terms>(a, d, to, from, until, from);
                         });
    } else if (layout.packed()) {
      run_tiles<Tiles>(step, row_begin(i), row_end(i), shard.block_begin, shard.block_end, back);
    } else if (layout.stored) {
      if constexpr (Layout::kReadsBf16) {
        run_short<Terms>(i, a.input_bf16, a.weight_ih_bf16[d], a.weight_hh_bf16[d]);
      }
    } else {
      run_short<Numbers<T>>(i, a.input, a.weight_ih[d], a.weight_hh[d]);
    }
  }
  // With unpacked weights, as Terms_ take them.
  template <class Terms_, class Stored>
  void run_short(int64_t i, const Stored* input, const Stored* weight_ih, const Stored* weight_hh) {
    run_unpacked<Cell, T, Terms_>({step, a.I, P, input + input_at(i), a.input_stride_b, weight_ih,
                                   weight_hh, a.bias_ih[d], a.bias_hh[d]},
                                  row_begin(i), row_end(i), shard.block_begin, shard.block_end);
  }
  void project_state(int64_t i) {
    const Blocks own = own_blocks(shard, blocks_of<T>(P));
    project_h.gates  = output_of(i);
    run_tiles<ProjectTiles<Projection, T>>(project_h, row_begin(i), row_end(i), own.begin, own.end,
                                           i % 2 == 1);
  }

  // Copies of h after step i, and of c where its rows end.
  void keep_states(int64_t i) {
    const int64_t count = walk.count(i);
    const auto h_of     = [h = output_of(i), this](int64_t row) { return h + row * DP; };
    if (a.hidden) {
      copy_rows<T>(part_of_h(count), a.hidden + (first + walk.offset(i)) * P, P, h_of);
    }
    // The sequences of rows from going_on on end here.
    const int64_t going_on = i + 1 < s.T ? min64(count, walk.count(i + 1)) : 0;
    if (going_on == count) return;
    const auto ended = [&](Part part) {
      part.row_begin = max64(part.row_begin, going_on);
      return part;
    };
    if (a.h_n) copy_rows<T>(ended(part_of_h(count)), a.h_n + d * s.B * P, P, h_of);
    if (Cell::kHasCell && a.extra) {
      copy_rows<T>(ended(part_of_c(count)), c_n, H,
                   [&](int64_t row) { return step.extra + row * H; });
    }
  }

  const ForwardArgs<T>& a;
  const Sequences& s;
  const int64_t d, H, P, DP;
  const int64_t first;         // row of this direction, in arrays [D, N, ..]
  const int64_t input_stride;  // of the rows that are projected
  const Shard& shard;
  const Layout& layout;
  const int64_t ahead_rows;
  const Walk walk;
  Barrier barrier;
  Ahead<Cell, T> ahead;  // of all units: the thread has them

  const T *h0, *c0;  // the direction's
  T* c_n;
  T *panels, *unprojected, *started, *h_terms, *input_terms,
      *chunk_gates;  // ForwardLayout's scratch
  ForwardStep<T> step{};
  ProjectStep<T> project{};
  ProjectStep<T> project_h{};
  Once once;
  int64_t chunk_end   = 0;  // steps
  int64_t chunk_first = 0;  // row
};

template <class Cell, class T, class Terms>
Shape forward_shape(const ForwardArgs<T>& a) {
  return shape_of<Cell, T>(a, a.P * int64_t(sizeof(T)), kShardRows<Terms, Cell::kGates>);
}

// With a projection only of Numbers.
template <class Cell, class T, class Terms>
bool forward(const ForwardArgs<T>& a) {
  Shape shape       = forward_shape<Cell, T, Terms>(a);
  const int threads = useful_threads(shape, a.num_threads);
  const ForwardLayout<Cell, T, Terms> layout(a, threads);
  layout.add_to(shape);
  return run_call<T, Terms>(shape, layout.numbers.size(), layout.own_panels(), threads,
                            [&](int64_t d, const Shard& shard, const Scratch<T>& scratch) {
                              ForwardDirection<Cell, T, Terms>(a, layout, d, shard, scratch).run();
                            });
}

template <class Cell, class T, class Terms>
int64_t pack(const ForwardArgs<T>& a, int64_t d, T* panels) {
  ForwardArgs<T> args = a;
  const T any{};
  args.panels[0] = &any;  // of a call that is given its panels
  const ForwardLayout<Cell, T, Terms> layout(args, 1);
  if (panels) {
    pack_direction(a, d, layout, Once{}, panels,
                   [](int64_t blocks, const auto& pack_blocks) { pack_blocks(0, blocks); });
  }
  return layout.panels.size();
}

template <class Cell, class T, class Terms>
Plan plan(const ForwardArgs<T>& a) {
  Shape shape       = forward_shape<Cell, T, Terms>(a);
  const int threads = useful_threads(shape, a.num_threads);
  const ForwardLayout<Cell, T, Terms> layout(a, threads);
  layout.add_to(shape);
  const Shard shard        = shard_of(shape, 0, threads);
  const int64_t ahead_rows = layout.ahead_of(shard);
  return {threads, shard.direction_threads / shard.unit_shards, shard.unit_shards, layout.packed(),
          ahead_rows > 0    ? ahead_rows
          : layout.packed() ? layout.chunk(Walk(a.sequences, 0), 0, a.sequences.T)
                            : 1};
}

}  // namespace
}  // namespace fusedrnn
