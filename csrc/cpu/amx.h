// Products of pairs on AMX: eight tiles of up to 16 rows of 64 bytes, and an instruction that adds
// the product of two to a third (Intel, Instruction Set Extensions Programming Reference, chapter 3).
// A tile of float32 sums is 16 rows of a register tile of step.h and one vector of its columns; the
// panels (pack.h) and rows of terms are laid out as the instruction wants them already.
#pragma once

#include "vec.h"

#if defined(__AMX_BF16__)

namespace fusedrnn {
namespace {

// ldtilecfg's operand: each tile's rows, and bytes of a row.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14]{};
  uint16_t row_bytes[16]{};
  uint8_t rows[16]{};
};

#if !defined(FUSEDRNN_EMULATED_TILES)  // tests/amx_on_cpu.h has functions of these names
FUSEDRNN_INLINE void tiles_configure(const TileConfig& config) {
  asm volatile("ldtilecfg %0" ::"m"(config));
}
FUSEDRNN_INLINE void tiles_release() { asm volatile("tilerelease"); }
template <int kTile>
FUSEDRNN_INLINE void tile_load(const void* from, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(kTile)
               : "memory");
}
template <int kTile>
FUSEDRNN_INLINE void tile_store(void* to, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(kTile)
               : "memory");
}
// sums[m][n] += sum_k a[m][k] b[k][n], k counting pairs.
template <int kSums, int kA, int kB>
FUSEDRNN_INLINE void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kA), "i"(kB));
}
#endif

struct TilePairs : Pairs {
  static constexpr int kTileRows = 16;

  // Around a thread's work: what other libraries leave in the tiles is not relied on, and nothing is
  // left behind, which the operating system would save at every switch.
  class Scope {
   public:
    Scope() { configured() = 0; }
    ~Scope() {
      if (configured()) tiles_release();
    }
    Scope(const Scope&)            = delete;
    Scope& operator=(const Scope&) = delete;
  };

  // The tiles: sums, then a and b of 16 lanes of terms, then of the last ones.
  static constexpr int kSums = 4, kWhole = 4, kRest = 6;

  // For products of so many rows and K lanes of terms.
  static void configure(int rows, int64_t K) {
    const int rest = int(K % kLanes<float>), wanted = rows * kLanes<float> + rest;
    if (configured() == wanted) return;
    configured() = wanted;
    TileConfig config;
    const auto set = [&](int tile, int n, int lanes) {
      config.rows[tile]      = uint8_t(n);
      config.row_bytes[tile] = uint16_t(lanes * int(sizeof(float)));
    };
    for (int tile = 0; tile < kSums; ++tile) set(tile, rows, kLanes<float>);
    set(kWhole, rows, kLanes<float>);
    set(kWhole + 1, kLanes<float>, kLanes<float>);
    if (rest) {
      set(kRest, rows, rest);
      set(kRest + 1, rest, kLanes<float>);
    }
    tiles_configure(config);
  }

  template <int kTile>
  static FUSEDRNN_INLINE void load_tile(const void* from, int64_t stride_bytes) {
    tile_load<kTile>(from, stride_bytes);
  }

  // acc[m][n] += sum_k a(m, k) b(k, n) for the first `rows` rows and N vectors of columns.
  // load_a(tile, k) and load_b(tile, k, n) load_tile the lanes of terms from the k-th on, b's of vector
  // n.
  template <int M, int N, class LoadA, class LoadB>
  static FUSEDRNN_INLINE void add_product(Vec<float> (&acc)[M][N], int rows, int64_t K,
                                          const LoadA& load_a, const LoadB& load_b) {
    static_assert(M == kTileRows && N <= kSums);
    configure(rows, K);
    unroll<N>([&](auto n) FUSEDRNN_LAMBDA { tile_load<n>(&acc[0][n], int64_t(sizeof acc[0])); });
    const auto add = [&](auto tile, int64_t k) FUSEDRNN_LAMBDA {
      load_a(tile, k);
      unroll<N>([&](auto n) FUSEDRNN_LAMBDA {
        load_b(std::integral_constant<int, tile + 1>{}, k, n);
        tile_multiply_add<n, tile, tile + 1>();
      });
    };
    int64_t k = 0;
    for (; k + kLanes<float> <= K; k += kLanes<float>) {
      add(std::integral_constant<int, kWhole>{}, k);
    }
    if (k < K) add(std::integral_constant<int, kRest>{}, k);
    unroll<N>([&](auto n) FUSEDRNN_LAMBDA { tile_store<n>(&acc[0][n], int64_t(sizeof acc[0])); });
  }

 private:
  static int& configured() {
    static thread_local int rows_and_rest;
    return rows_and_rest;
  }
};

// Numbers as sums of two bfloat16's, high and low, and a product of two as three: high high, high low
// and low high. Left out, and rounded away in low, are 2^-15 of a product at most, if low is no
// denormal. A product that overflows may be NaN.
struct TileSplitPairs : TilePairs {
  using Stored                     = float;
  static constexpr int kGroupLanes = 3;

  template <Factor kFactor, int kPart>
  static FUSEDRNN_INLINE Vec<float> load(const float* row, int64_t n) {
    return rounded(part<kFactor, kPart>(load_up_to(row, n)),
                   part<kFactor, kPart>(load_up_to(row + kLanes<float>, n - kLanes<float>)));
  }
  template <Factor kFactor, int kPart>
  static FUSEDRNN_INLINE Vec<float> interleave_rows(const float* a, const float* b, int n) {
    return interleave(part<kFactor, kPart>(fusedrnn::load(a, n)),
                      part<kFactor, kPart>(b ? fusedrnn::load(b, n) : Vec<float>{}));
  }

 private:
  // What is rounded to a factor's part: high, high, low of the first; high, low, high of the second.
  // An infinity or NaN is in the first part alone: with the other's low 0 it would make a NaN.
  template <Factor kFactor, int kPart>
  static FUSEDRNN_INLINE Vec<float> part(Vec<float> x) {
    if constexpr (kPart == 0) return x;
    typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
    const auto high           = (Halves)_mm512_cvtneps_pbh((__m512)x);
    const Vec<float> low      = x - from_bits(__builtin_convertvector(high, Bits32) << 16);
    constexpr int kNotFinite  = 0x99;
    const __mmask16 is_finite = _mm512_knot(_mm512_fpclass_ps_mask((__m512)low, kNotFinite));
    constexpr bool kLow       = kPart == (kFactor == kFirst ? 2 : 1);
    return (Vec<float>)_mm512_maskz_mov_ps(is_finite, (__m512)(kLow ? low : x));
  }
};

}  // namespace
}  // namespace fusedrnn

#endif
