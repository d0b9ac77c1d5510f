// Which rows run at each step of a direction's walk over time, and where their states come from.
#pragma once

#include "sequence.h"

namespace fusedrnn {
namespace {

FUSEDRNN_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FUSEDRNN_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Rows before time t; at t = T, all.
FUSEDRNN_INLINE int64_t rows_before(const Sequences& s, int64_t t) {
  return s.offsets ? s.offsets[t] : t * s.B;
}

// The length of sequence `row`: the first time at which fewer run.
inline int64_t steps_of(const Sequences& s, int64_t row) {
  if (!s.offsets) return s.T;
  int64_t low = 0, high = s.T;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (s.offsets[middle + 1] - s.offsets[middle] > row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Whether all rows run at every step, each from the step before.
FUSEDRNN_INLINE bool all_alike(const Sequences& s) {
  return s.offsets == nullptr && s.reset == nullptr;
}

// What the state before a row's step is: that of the direction's step before, h0 and c0, or zeros.
enum class Source { kPrevious, kInitial, kZero };

// Of a row of a step: `first` if there is no step before, which ran the first `count_before`
// sequences; `cut` if a boundary lies between.
FUSEDRNN_INLINE Source source_of(bool first, int64_t count_before, int64_t row, bool cut,
                                 bool reset_to_initial) {
  if (!first && row >= count_before) return Source::kInitial;  // back, a shorter sequence begins
  if (cut) return reset_to_initial ? Source::kInitial : Source::kZero;
  return first ? Source::kInitial : Source::kPrevious;
}

class Walk {
 public:
  FUSEDRNN_INLINE Walk(const Sequences& sequences, int64_t direction)
      : s_(sequences), direction_(direction) {}

  FUSEDRNN_INLINE int64_t time(int64_t i) const {
    return direction_ == 0 ? i : s_.T - 1 - i;
  }  // of the i-th step
  FUSEDRNN_INLINE int64_t offset(int64_t i) const { return rows_before(s_, time(i)); }
  FUSEDRNN_INLINE int64_t count(int64_t i) const {
    return s_.offsets ? s_.offsets[time(i) + 1] - s_.offsets[time(i)] : s_.B;
  }

  // For each row that runs at this step and the one before (at i = 0, for all): whether a boundary lies
  // between; null: none does.
  FUSEDRNN_INLINE const bool* boundaries(int64_t i) const {
    if (!s_.reset || (i == 0 && direction_ == 1)) return nullptr;
    const int64_t later = direction_ == 0 ? time(i) : time(i - 1);
    return s_.reset + rows_before(s_, later);
  }

  FUSEDRNN_INLINE Source source(int64_t i, int64_t row) const {
    const bool* const cuts     = boundaries(i);
    const int64_t count_before = i > 0 ? count(i - 1) : 0;
    // No boundary is known for a row that the step before has not.
    const bool cut = cuts && (i == 0 || row < count_before) && cuts[row];
    return source_of(i == 0, count_before, row, cut, s_.reset_to_initial);
  }

  // Whether all rows of [begin, end) have the same source, as they have where nothing is special.
  FUSEDRNN_INLINE bool uniform(int64_t i, int64_t begin, int64_t end) const {
    return all_alike(s_) || all_as_usual(i, begin, end);
  }

 private:
  FUSEDRNN_INLINE bool all_as_usual(int64_t i, int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      if (source(i, row) != (i == 0 ? Source::kInitial : Source::kPrevious)) return false;
    }
    return true;
  }

  const Sequences s_;
  int64_t direction_;
};

}  // namespace
}  // namespace fusedrnn
