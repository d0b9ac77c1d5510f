// Who does what: how a call's directions, batch rows and hidden units are split over threads. Every
// threshold of that split stands here, with what was measured, on a Zen 4 (AVX-512, 1 MB of L2 a core)
// where no other is named.
#pragma once

#include <unistd.h>

#include "../walk.h"
#include "pack.h"
#include "step.h"
#include "threads.h"

namespace fusedrnn {
namespace {

// Where one thread works, for the whole call. Threads of one direction form a grid of row shards x
// unit shards: row shards never wait for each other, unit shards of the same rows meet in a barrier
// after every step.
struct Shard {
  int64_t direction_begin, direction_end;
  int64_t row_begin, row_end;
  int64_t block_begin, block_end;
  int unit_shards;        // threads at the step barrier
  int unit_shard;         // which of them this is
  int row_shard;          // which of its direction's row shards this is
  int direction_threads;  // threads of a direction that work
  int direction_rank;     // this one's number among them
};

inline int64_t l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);  // slow: it asks the CPU
  if (bytes > 0) return bytes;
#endif
  return 1 << 20;
}

// Rows of one product of the input projection: enough to read each panel of weight_ih seldom, few
// enough for their gates to stay in L2.
// 24 and 96 take 1.04 times as long at (1, 32), 24 also at (1, 128); at larger shapes all three are
// within a percent.
constexpr int64_t kChunkRows = 48;
// With weights beyond L2 all rows are one chunk if they are no more than this: then weight_ih's panels
// are read once, and packed where that is done (forward.h, Once). Speedup of an inference call, LSTM /
// GRU / RNN, at (B, T, H): (1, 100, 512) 1.04 / 1.02 / 1.0, (1, 100, 1024) 1.12 / 1.10 / 1.03, in
// bfloat16 1.02 / 1.0 / 1.0 and 1.15 / 1.09 / 1.01; 160 and 200 rows, at H = 512, 0.97 to 1.04.
constexpr int64_t kOnceRows = 128;

// Whether to copy the input of a chunk's steps where their rows are not one matrix (`batch_first`),
// so that weight_ih is read once a chunk and not once a step. Speedup of an inference call over
// chunks of one step, on a Zen 5 core (1 MB of L2) at T = 100, or 20 where B = 16, float32 LSTM / GRU
// / RNN: B = 2, H = 64, 1.15 / 1.14 / 1.07, H = 128 1.07 / 1.08 / 1.19; B = 4, H = 32, 0.94 / 1.02 /
// 1.01, H = 64 0.98 / 1.03 / 0.98; B = 8, H = 128, 0.98 / 0.99 / 0.97; beyond L2: B = 2, H = 512,
// 1.64 / 1.75 / 1.77, B = 16, H = 512, 1.0, H = 1024 1.22 / 1.27 / 0.99. On two threads, each with
// half of the units, B = 2, H = 512, 1.47 / 1.51 / 1.63 and, at B = 16, H = 1024, 1.22 / 1.27 / 1.0.
inline bool pays_to_join(int64_t B, int64_t weight_bytes, int64_t l2_bytes) {
  return B < 4 || weight_bytes > l2_bytes;
}

// Passes over the weights up to which a forward call reads them as they lie in memory instead of
// packing them. An LSTM's time packed over unpacked, on a Zen 5 core, 4 rows a pass, float32 / bfloat16
// (1 row a pass: much the same; on two threads 1.1 at H = 256 and 8 passes):
//   H        1 pass       2            4            5            6            8            16
//   32       1.03, 1.00   0.98, 0.94   0.91, 0.85   0.88, 0.82   0.87, 0.80   0.82, 0.75   0.74, 0.65
//   128      1.68, 1.33   1.39, 1.19   1.14, 1.02   1.08, 0.98   1.03, 0.96   0.97, 0.90   0.88, 0.83
//   256      2.04, 1.86   1.45, 1.36   1.11, 1.06   1.04, 1.03   0.98, 0.99   0.91, 0.91   0.86, 0.81
//   512      2.48, 2.28   1.65, 1.59   1.26, 1.16   1.20, 1.09   1.21, 1.03   1.10, 0.95   0.90, 0.85
//   1024     2.44, 1.59   1.23, 1.05   0.78, 1.17   0.63, 1.18   0.56, 0.99   0.48, 1.03   0.40, 0.87
inline int64_t max_unpacked_passes(int64_t weight_bytes, int64_t l2_bytes) {
  return weight_bytes <= l2_bytes / 4 ? 2 : 6;
}

// Rows that a thread gets at least where threads split rows, each reading all weights: a full tile;
// in products of one gate four, since there a barrier costs more than reading weights for less work.
// Speedup of four rows over full tiles on two threads, at (B, H), T = 100, LSTM / GRU / RNN: training
// (8, 64) 1.12 / 1.13 / 1.18, (8, 128) 1.10 / 1.11 / 1.22, (11, 128) 1.07 / 1.10 / 1.21, (8, 256)
// 1.04 / 1.01 / 1.0, in bfloat16 (8, 128) 1.06 / 1.08 / 1.13; an RNN's inference, in this order,
// 1.10, 1.07, 1.22, 1.01 and 1.18. Three rows: RNN (6, 128) 0.9, (6, 256) 0.8; four of several gates:
// LSTM (9, 128) 0.89 to 1.0, GRU 0.89 to 0.99. AMX's tiles have 16 rows in either case.
template <class Terms, int Q>
constexpr int kShardRows = Q == 1 && Terms::kTileRows == 0 ? 4 : kMaxRows<Terms, Q>;

struct Shape {
  Sequences sequences;
  int64_t rows;  // N
  int64_t H, P, D;
  int64_t gates;         // G
  int64_t lanes;         // V
  int64_t weight_bytes;  // of one direction, as the steps read them
  int64_t packed_bytes;  // of these, what the call packs
  int64_t l2_bytes;      // asked once: all threads of a call must plan alike
  int64_t row_bytes;     // of a row at a step, that unit shards write for each other
  int shard_rows;        // at least, of a thread where threads split rows
};

// On average: sequences may end at different steps.
inline int64_t rows_of_step(const Shape& s) { return s.rows / s.sequences.T; }

// Whether it pays for two threads with so many rows to split them. Then each packs all weights; if
// they split units, each packs a half, but at every step it waits at a barrier and reads half of what
// is written from the other's cache. The barrier counts as 2 KB of that, and to read a byte as to
// pack four. Speedup of an inference call by splitting units on a Zen 4 core, LSTM / GRU / RNN: (16,
// 2, 128) 1.10 / 1.11 / 1.02, (64, 2, 64) 0.93 / 0.98 / 0.91, (16, 60, 128) 0.97 / 1.07 / 0.92, (64,
// 60, 64) 1.02 / 0.83 / 0.93.
inline bool pays_to_split_rows(const Shape& s, int64_t rows) {
  return s.sequences.T * (rows * s.row_bytes + 2048) > s.packed_bytes / 4;
}

// Row shards of one direction's threads at most: each reads all weights, which fit its L2. At steps
// that not all sequences reach they have fewer rows: an RNN's inference with 12 rows at first and 6.6
// on average takes two threads that split them 0.7 to 0.9 of the time that units take.
inline int most_row_shards(const Shape& s, int threads) {
  const int64_t by_rows = s.weight_bytes <= s.l2_bytes ? s.sequences.B / s.shard_rows : 1;
  return int(max64(1, min64(threads, by_rows)));
}

// How many row shards; the threads of each split units.
FUSEDRNN_INLINE int row_shards_of(const Shape& s, int threads) {
  const int most    = most_row_shards(s, threads);
  const auto blocks = int((s.H + s.lanes - 1) / s.lanes);
  int unit_shards   = int(min64((threads + most - 1) / most, blocks));
  // Splitting units too would put no more threads to work.
  if (threads / unit_shards * unit_shards <= most) unit_shards = 1;
  if (unit_shards == 1 && threads > 1 && blocks > 1 &&
      !pays_to_split_rows(s, rows_of_step(s) * 2 / threads)) {
    unit_shards = 2;
  }
  return int(min64(most, threads / unit_shards));
}

// The first row of the k-th of n row shards: the rows before it have k / n of all steps.
inline int64_t first_row(const Shape& s, int64_t k, int64_t n) {
  const int64_t B = s.sequences.B;
  if (!s.sequences.offsets || k == 0 || k == n) return B * k / n;
  int64_t row = 0;
  for (int64_t steps = 0; row < B && steps < s.rows * k / n; ++row) {
    steps += steps_of(s.sequences, row);
  }
  return row;
}

// Threads that pay for themselves, of at most `wanted`.
FUSEDRNN_INLINE int useful_threads(const Shape& s, int wanted) {
  // Multiply-adds of one step per thread under which a step barrier costs more than it saves. Two
  // threads against one at B=1, by multiply-adds a thread: 0.8 to 0.9x at 2K (LSTM H=32, RNN H=64),
  // 1.0 to 1.1x at 4.5K, 1.6x at 8K (LSTM H=64, RNN H=128), 1.7x at 18K.
  constexpr int64_t kMinStep = 8 * 1024;
  // The same for a whole call without barriers: what starting a parallel region costs. Two threads
  // against one: 1.2x at 32K a thread (one step, H=128), 1.5x at 200K, 1.7x at 128K to 1M.
  constexpr int64_t kMinCall = 64 * 1024;
  const int64_t row          = s.P * s.H * s.gates;
  const int64_t call         = s.D * s.rows * row;
  const int64_t per_step =
      s.D * max64(s.sequences.B / s.shard_rows, max64(1, rows_of_step(s) * row / kMinStep));
  return int(max64(1, available_threads(min64(wanted, min64(per_step, call / kMinCall)))));
}

// Threads that work on a direction at most.
inline int64_t threads_of_direction(int64_t threads, int64_t D) { return (threads + D - 1) / D; }

FUSEDRNN_INLINE Shard shard_of(const Shape& s, int thread, int threads) {
  Shard shard{};
  shard.direction_end = s.D;
  int rank = thread, size = threads;
  if (s.D == 2 && threads > 1) {  // the directions never wait for each other
    const int first       = (threads + 1) / 2;
    const bool second     = thread >= first;
    shard.direction_begin = second;
    shard.direction_end   = second + 1;
    rank                  = second ? thread - first : thread;
    size                  = second ? threads - first : first;
  }
  const int64_t blocks    = (s.H + s.lanes - 1) / s.lanes;
  const int row_shards    = row_shards_of(s, size);
  shard.unit_shards       = int(min64(size / row_shards, blocks));
  shard.direction_threads = row_shards * shard.unit_shards;
  shard.direction_rank    = rank;
  if (rank >= shard.direction_threads) {  // left over: nothing to do
    shard.direction_end = shard.direction_begin;
    return shard;
  }
  shard.unit_shard  = rank % shard.unit_shards;
  shard.row_shard   = rank / shard.unit_shards;
  shard.row_begin   = first_row(s, shard.row_shard, row_shards);
  shard.row_end     = first_row(s, shard.row_shard + 1, row_shards);
  shard.block_begin = blocks * shard.unit_shard / shard.unit_shards;
  shard.block_end   = blocks * (shard.unit_shard + 1) / shard.unit_shards;
  return shard;
}

}  // namespace
}  // namespace fusedrnn
