// One call's threads and the scratch memory that they share; what each of them does in it is
// forward.h's and backward.h's.
#pragma once

#include "../cells/rnn.h"
#include "../memory.h"
#include "plan.h"

namespace fusedrnn {
namespace {

// The cell that weight_hr's tiles and packing are made for: only its one gate matters.
using Projection = Rnn<false>;

// A part of a direction's scratch: so many numbers, from the `at`-th on.
struct Piece {
  int64_t at = 0, size = 0;
};
// Lays pieces out behind each other, each on cache lines of its own.
class Pieces {
 public:
  // Of `count` owners, one piece behind the other's.
  Piece take(int64_t size, int64_t count = 1) {
    const Piece piece{size_, (size + 15) / 16 * 16};
    size_ += count * piece.size;
    return piece;
  }
  int64_t size() const { return size_; }

 private:
  int64_t size_ = 0;
};

// Scratch of one call: for each direction barrier counters, `elements` numbers that its threads share,
// and `panels` for each row shard. Both are whole Pieces, and begin on cache lines as these do.
template <class T>
class Scratch {
 public:
  Scratch(int64_t elements, int64_t panels, int64_t directions, int threads, int row_shards)
      : elements_(elements),
        panels_(panels),
        direction_(elements_ + row_shards * panels_),
        threads_(threads) {
    const size_t counters = sizeof(BarrierCounter) * size_t(directions * (threads + 1));
    const size_t numbers  = sizeof(T) * size_t(direction_ * directions);
    memory_               = Memory(counters + numbers);
    if (!ok()) return;
    std::memset(memory_.data(), 0, counters);
    numbers_ = reinterpret_cast<T*>(static_cast<char*>(memory_.data()) + counters);
  }

  bool ok() const { return memory_.data() != nullptr; }
  T* numbers(int64_t direction) const { return numbers_ + direction * direction_; }
  T* panels(int64_t direction, const Shard& s) const {
    return numbers(direction) + elements_ + s.row_shard * panels_;
  }

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
    return static_cast<BarrierCounter*>(memory_.data()) + direction * (threads_ + 1) + i;
  }

  int64_t elements_, panels_, direction_;
  int threads_;
  Memory memory_;
  T* numbers_ = nullptr;
};

// A thread's part of so many blocks of units; of H units they are shard.block_begin and so on.
struct Blocks {
  int64_t begin, end;
};
inline Blocks own_blocks(const Shard& s, int64_t blocks) {
  return {blocks * s.unit_shard / s.unit_shards, blocks * (s.unit_shard + 1) / s.unit_shards};
}

// Packs blocks [begin, end) of direction d's weight_hh, or weight_ih; panels begins with block `first`.
template <class Cell, class Terms, class Args, class T>
void pack_recurrent(const Args& a, int64_t d, T* panels, int64_t begin, int64_t end,
                    int64_t first = 0) {
  as_stored<Terms>(a.weight_hh[d], a.weight_hh_bf16[d], [&](const auto* weight) {
    pack_forward<Cell::kGates, T, Terms>(panels, weight, a.bias_hh[d], a.H, a.P, begin, end, first);
  });
}
template <class Cell, class Terms, class Args, class T>
void pack_input(const Args& a, int64_t d, T* panels, int64_t begin, int64_t end,
                int64_t first = 0) {
  as_stored<Terms>(a.weight_ih[d], a.weight_ih_bf16[d], [&](const auto* weight) {
    pack_forward<Cell::kGates, T, Terms>(panels, weight, a.bias_ih[d], a.H, a.I, begin, end, first);
  });
}

// A thread's rows at one step, and its columns of an array there.
struct Part {
  int64_t row_begin, row_end, column, columns;
};

// Of an array [count, columns].
template <class T>
Part own_part(const Shard& s, int64_t count, int64_t columns) {
  const Blocks own    = own_blocks(s, blocks_of<T>(columns));
  const int64_t first = own.begin * kLanes<T>;
  return {min64(s.row_begin, count), min64(s.row_end, count), first,
          max64(0, min64(own.end * kLanes<T>, columns) - first)};
}

// The part of `to` = from(row) of each row, or zeros where from gives null.
template <class T, class From>
void copy_rows(const Part& part, T* to, int64_t to_stride, const From& from) {
  const size_t bytes = sizeof(T) * size_t(part.columns);
  for (int64_t row = part.row_begin; row < part.row_end; ++row) {
    T* const out      = to + row * to_stride;
    const T* const in = from(row);
    if (!in) {
      std::memset(out + part.column, 0, bytes);
    } else if (in != out) {
      std::memcpy(out + part.column, in + part.column, bytes);
    }
  }
}

// A direction's h or c: `previous`, [B, size] as the step before left it, and `initial`.
template <class T>
struct States {
  const T* previous;
  int64_t stride;
  const T* initial;  // dense
  int64_t size;

  // The row before step i; null for zeros.
  const T* before(const Walk& walk, int64_t i, int64_t row) const {
    const Source source = walk.source(i, row);
    if (source == Source::kPrevious) return previous + row * stride;
    return source == Source::kInitial ? initial + row * size : nullptr;
  }
  // All of this thread's rows before step i, to a dense array.
  void copy_before(const Walk& walk, int64_t i, const Shard& shard, T* to) const {
    copy_rows<T>(own_part<T>(shard, walk.count(i), size), to, size,
                 [&](int64_t row) { return before(walk, i, row); });
  }
};

// Without what the layout of its scratch adds: the weights' bytes.
template <class Cell, class T, class Args>
Shape shape_of(const Args& a, int64_t row_bytes, int shard_rows) {
  return {a.sequences, rows_before(a.sequences, a.sequences.T),
          a.H,         a.P,
          a.D,         Cell::kGates,
          kLanes<T>,   0,
          0,           l2_bytes(),
          row_bytes,   shard_rows};
}

// body(direction, shard, scratch) for all of a call, in one parallel region of so many threads, with
// scratch of so many elements and panels; false, with nothing done, if there is no memory for it.
template <class T, class Terms, class Body>
bool run_call(const Shape& shape, int64_t elements, int64_t panels, int threads, const Body& body) {
  const int of_direction = int(threads_of_direction(threads, shape.D));
  const Scratch<T> scratch(elements, panels, shape.D, threads,
                           most_row_shards(shape, of_direction));
  if (!scratch.ok()) return false;
  parallel(threads, [&](int thread, int running) {
    const FlushDenormals<T> flush;
    [[maybe_unused]] const typename Terms::Scope scope{};
    const Shard shard = shard_of(shape, thread, running);
    for (int64_t d = shard.direction_begin; d < shard.direction_end; ++d) body(d, shard, scratch);
  });
  return true;
}

}  // namespace
}  // namespace fusedrnn
