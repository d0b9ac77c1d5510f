// AMX without a CPU that has it: the functions that csrc/cpu/amx.h has one instruction each for, as
// Intel's Instruction Set Extensions Programming Reference defines these. What there is a fault or has
// no defined result ends the process. For `-include`, before everything else.
#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define FUSEDRNN_EMULATED_TILES

// To csrc/cpu/dispatch.cpp the CPU has everything, and Linux allows it.
#define __get_cpuid_count(leaf, subleaf, a, b, c, d) (*(d) = ~0u, 1)
#define syscall(...) 0

namespace emulated_tiles {

constexpr int kTiles = 8, kRows = 16, kLanes = 16;

struct State {
  bool configured = false;
  int rows[kTiles], lanes[kTiles];
  bool written[kTiles];  // since the configuration
  uint32_t bits[kTiles][kRows][kLanes];
};
inline thread_local State state;
inline long products = 0;  // of tiles, in all threads

inline void expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "emulated AMX: %s\n", what);
  std::abort();
}

__attribute__((always_inline)) inline float of_bfloat16(uint32_t bits) {
  bits <<= 16;
  bits  &= (bits & 0x7f800000) == 0 ? 0x80000000 : ~0u;  // denormals are zero
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace emulated_tiles

extern "C" __attribute__((visibility("default"), used)) inline long emulated_tile_products() {
  return emulated_tiles::products;
}

namespace fusedrnn {
namespace {

template <class Config>
void tiles_configure(const Config& config) {
  auto& state = emulated_tiles::state;
  emulated_tiles::expect(config.palette == 1 && config.start_row == 0, "another palette");
  for (int tile = 0; tile < emulated_tiles::kTiles; ++tile) {
    const int rows = config.rows[tile], bytes = config.row_bytes[tile];
    emulated_tiles::expect(rows <= 16 && bytes <= 64 && bytes % 4 == 0, "a tile's shape");
    emulated_tiles::expect((rows == 0) == (bytes == 0),
                           "rows without bytes, or bytes without rows");
    state.rows[tile]    = rows;
    state.lanes[tile]   = bytes / 4;
    state.written[tile] = false;
  }
  std::memset(state.bits, 0, sizeof state.bits);
  state.configured = true;
}
inline void tiles_release() { emulated_tiles::state.configured = false; }

inline void expect_tile(int tile, bool written) {
  const auto& state = emulated_tiles::state;
  emulated_tiles::expect(state.configured, "no configuration");
  emulated_tiles::expect(state.rows[tile] > 0, "a tile that is not configured");
  emulated_tiles::expect(!written || state.written[tile], "a tile that nothing was loaded into");
}

template <int kTile>
void tile_load(const void* from, int64_t stride_bytes) {
  auto& state = emulated_tiles::state;
  expect_tile(kTile, false);
  std::memset(state.bits[kTile], 0, sizeof state.bits[kTile]);
  for (int row = 0; row < state.rows[kTile]; ++row) {
    std::memcpy(state.bits[kTile][row], static_cast<const char*>(from) + row * stride_bytes,
                4 * size_t(state.lanes[kTile]));
  }
  state.written[kTile] = true;
}

template <int kTile>
void tile_store(void* to, int64_t stride_bytes) {
  const auto& state = emulated_tiles::state;
  expect_tile(kTile, true);
  for (int row = 0; row < state.rows[kTile]; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride_bytes, state.bits[kTile][row],
                4 * size_t(state.lanes[kTile]));
  }
}

// TDPBF16PS: sums of the even and of the odd numbers' products, then of both, then with what was there.
template <int kSums, int kA, int kB>
__attribute__((optimize("O3"))) void tile_multiply_add() {
  auto& state = emulated_tiles::state;
  for (const int tile : {kSums, kA, kB}) expect_tile(tile, true);
  emulated_tiles::expect(state.rows[kSums] == state.rows[kA] &&
                             state.lanes[kSums] == state.lanes[kB] &&
                             state.lanes[kA] == state.rows[kB],
                         "shapes that do not match");
  for (int m = 0; m < state.rows[kA]; ++m) {
    float even[emulated_tiles::kLanes] = {}, odd[emulated_tiles::kLanes] = {};
    for (int k = 0; k < state.lanes[kA]; ++k) {
      const uint32_t a   = state.bits[kA][m][k];
      const float a_even = emulated_tiles::of_bfloat16(a & 0xffff);
      const float a_odd  = emulated_tiles::of_bfloat16(a >> 16);
      for (int n = 0; n < emulated_tiles::kLanes; ++n) {
        const uint32_t b = state.bits[kB][k][n];
        even[n]          = std::fma(a_even, emulated_tiles::of_bfloat16(b & 0xffff), even[n]);
        odd[n]           = std::fma(a_odd, emulated_tiles::of_bfloat16(b >> 16), odd[n]);
      }
    }
    for (int n = 0; n < state.lanes[kSums]; ++n) {
      float sum;
      std::memcpy(&sum, &state.bits[kSums][m][n], sizeof sum);
      sum += even[n] + odd[n];
      std::memcpy(&state.bits[kSums][m][n], &sum, sizeof sum);
    }
  }
  __atomic_fetch_add(&emulated_tiles::products, 1, __ATOMIC_RELAXED);
}

}  // namespace
}  // namespace fusedrnn
