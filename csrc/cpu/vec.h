// One SIMD vector per translation unit's ISA, on GCC's and Clang's vector extensions: +, -, *, /
// and comparisons are the compiler's; here stand only the few operations that have no operator. Not
// a SIMD library: what the kernels do not use is not here.
//
// Everything lives in an unnamed namespace: each ISA file compiles its own copy, so that no
// function built with one file's flags can be linked into another's (a program's "illegal
// instruction").
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../sequence.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FUSEDRNN_LAMBDA __attribute__((always_inline))

namespace fusedrnn {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Accumulators of a register tile of M rows and N vectors. A term takes min(M, N) + 1 more registers
// (step.h, add_term), at most 5 of 32 and 4 of 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kAccumulators = 24;
#else
constexpr int kAccumulators = 12;
#endif

template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;

using Bits32 = Vec<int32_t>;
using Bits64 = Vec<int64_t>;

// f(0), f(1), ... f(N-1), the index a compile-time constant: unrolled whatever the optimizer
// thinks, so that arrays indexed by it live in registers.
template <class F, int... Is>
FUSEDRNN_INLINE void unroll_impl(std::integer_sequence<int, Is...>, F&& f) {
  (f(std::integral_constant<int, Is>{}), ...);
}
template <int N, class F>
FUSEDRNN_INLINE void unroll(F&& f) {
  unroll_impl(std::make_integer_sequence<int, N>{}, f);
}

template <class T>
FUSEDRNN_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
FUSEDRNN_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

// The first n lanes only, n < kLanes; the others load as zero and are not touched in memory.
#if defined(__AVX512F__)
FUSEDRNN_INLINE Vec<float> load_first(const float* p, int n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}
FUSEDRNN_INLINE Vec<double> load_first(const double* p, int n) {
  return (Vec<double>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
}
#if defined(__AVX512BF16__)
FUSEDRNN_INLINE Vec<uint16_t> load_first(const uint16_t* p, int n) {
  return (Vec<uint16_t>)_mm512_maskz_loadu_epi16(__mmask32((1u << n) - 1), p);
}
#endif
FUSEDRNN_INLINE void store_first(float* p, Vec<float> v, int n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
}
FUSEDRNN_INLINE void store_first(double* p, Vec<double> v, int n) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
}
#elif defined(__AVX2__)
FUSEDRNN_INLINE Vec<float> load_first(const float* p, int n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return (Vec<float>)_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
}
FUSEDRNN_INLINE Vec<double> load_first(const double* p, int n) {
  const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
  return (Vec<double>)_mm256_maskload_pd(p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), lane));
}
// By halves: a masked store takes AMD's CPUs up to 12 cycles.
FUSEDRNN_INLINE void store_first(float* p, Vec<float> v, int n) {
  __m128 half = _mm256_castps256_ps128((__m256)v);
  if (n & 4) {
    _mm_storeu_ps(p, half);
    half = _mm256_extractf128_ps((__m256)v, 1);
  }
  if (n & 2) {
    _mm_storel_pi((__m64*)(p + (n & 4)), half);
    half = _mm_movehl_ps(half, half);
  }
  if (n & 1) _mm_store_ss(p + (n & 6), half);
}
FUSEDRNN_INLINE void store_first(double* p, Vec<double> v, int n) {
  __m128d half = _mm256_castpd256_pd128((__m256d)v);
  if (n & 2) {
    _mm_storeu_pd(p, half);
    half = _mm256_extractf128_pd((__m256d)v, 1);
  }
  if (n & 1) _mm_store_sd(p + (n & 2), half);
}
#else
// By memcpy, as load and store are: memory that holds pairs is written as floats and read as
// bfloat16's bits.
template <class T>
FUSEDRNN_INLINE Vec<T> load_first(const T* p, int n) {
  Vec<T> v{};
  unroll<kLanes<T> - 1>([&](auto lane) FUSEDRNN_LAMBDA {
    constexpr int i = lane;
    if (i >= n) return;
    T x;
    std::memcpy(&x, p + i, sizeof x);
    v[i] = x;
  });
  return v;
}
template <class T>
FUSEDRNN_INLINE void store_first(T* p, Vec<T> v, int n) {
  unroll<kLanes<T> - 1>([&](auto lane) FUSEDRNN_LAMBDA {
    constexpr int i = lane;
    const T x       = v[i];
    if (i < n) std::memcpy(p + i, &x, sizeof x);
  });
}
#endif

// n lanes, where n is usually all of them: the masked form costs store forwarding.
template <class T>
FUSEDRNN_INLINE Vec<T> load(const T* p, int n) {
  return n == kLanes<T> ? load(p) : load_first(p, n);
}
template <class T>
FUSEDRNN_INLINE void store(T* p, Vec<T> v, int n) {
  n == kLanes<T> ? store(p, v) : store_first(p, v, n);
}

// a*b + c with one rounding where the ISA has it. Explicit, and contraction is off
// (CMakeLists.txt): the compiler must not choose, differently from one tile shape to the next,
// which product of a sum to fuse, or results would depend on how rows fall into tiles.
#if defined(__AVX512F__)
FUSEDRNN_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
FUSEDRNN_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(__AVX2__)
FUSEDRNN_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
FUSEDRNN_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#elif defined(__aarch64__)
FUSEDRNN_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
FUSEDRNN_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#else
template <class V>
FUSEDRNN_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}
#endif

// 1 / x to at least 14 bits, which math.h's quotient refines; exact for powers of two: a tiny tanh's
// denominator rounds to 2, and its correction is a denormal, flushed to zero.
#if defined(__AVX512F__)
FUSEDRNN_INLINE Vec<float> approximate_reciprocal(Vec<float> x) {
  // The masked form, all lanes: the plain one's header in gcc 12 warns of its own undefined value.
  return (Vec<float>)_mm512_maskz_rcp14_ps(__mmask16(0xffff), (__m512)x);
}
#else
FUSEDRNN_INLINE Vec<float> approximate_reciprocal(Vec<float> x) { return 1 / x; }
#endif
FUSEDRNN_INLINE Vec<double> approximate_reciprocal(Vec<double> x) { return 1 / x; }

// math.h's at_most and at_least as one instruction, where the compiler makes a comparison and a blend
// of it: a tenth of an LSTM cell's time. The operands' order lets NaN in x pass.
#if defined(__AVX512F__)
FUSEDRNN_INLINE Vec<float> at_most(Vec<float> x, float high) {
  return (Vec<float>)_mm512_maskz_min_ps(__mmask16(0xffff), _mm512_set1_ps(high), (__m512)x);
}
FUSEDRNN_INLINE Vec<double> at_most(Vec<double> x, double high) {
  return (Vec<double>)_mm512_maskz_min_pd(__mmask8(0xff), _mm512_set1_pd(high), (__m512d)x);
}
FUSEDRNN_INLINE Vec<float> at_least(Vec<float> x, float low) {
  return (Vec<float>)_mm512_maskz_max_ps(__mmask16(0xffff), _mm512_set1_ps(low), (__m512)x);
}
FUSEDRNN_INLINE Vec<double> at_least(Vec<double> x, double low) {
  return (Vec<double>)_mm512_maskz_max_pd(__mmask8(0xff), _mm512_set1_pd(low), (__m512d)x);
}
#elif defined(__AVX2__)
FUSEDRNN_INLINE Vec<float> at_most(Vec<float> x, float high) {
  return (Vec<float>)_mm256_min_ps(_mm256_set1_ps(high), (__m256)x);
}
FUSEDRNN_INLINE Vec<double> at_most(Vec<double> x, double high) {
  return (Vec<double>)_mm256_min_pd(_mm256_set1_pd(high), (__m256d)x);
}
FUSEDRNN_INLINE Vec<float> at_least(Vec<float> x, float low) {
  return (Vec<float>)_mm256_max_ps(_mm256_set1_ps(low), (__m256)x);
}
FUSEDRNN_INLINE Vec<double> at_least(Vec<double> x, double low) {
  return (Vec<double>)_mm256_max_pd(_mm256_set1_pd(low), (__m256d)x);
}
#endif

#if !defined(__AVX512F__) && !defined(__AVX2__) && !defined(__aarch64__)
// Without a fused multiply-add, math.h's quotient would correct with remainders that are themselves
// rounded: float divides in double instead, and double (bounded by 4 ULP, not 2) is not corrected.
FUSEDRNN_INLINE Vec<float> quotient(Vec<float> x, Vec<float> a, Vec<float> b) {
  typedef double Wide __attribute__((vector_size(2 * kVectorBytes)));
  const Wide exact_a = __builtin_convertvector(a, Wide);
  const Wide sum     = exact_a + __builtin_convertvector(b, Wide);
  return __builtin_convertvector(__builtin_convertvector(x, Wide) / sum, Vec<float>);
}
FUSEDRNN_INLINE Vec<double> quotient(Vec<double> x, Vec<double> a, Vec<double> b) {
  return x / (a + b);
}
#endif

// kBytes of lanes, 8 or 16, from p on, over and over: one load. A shuffle takes a unit that multiplies.
template <int kBytes, class T>
FUSEDRNN_INLINE Vec<T> repeat(const T* p) {
  static_assert(kBytes == 8 || (kBytes == 16 && kVectorBytes > 16));
  if constexpr (kBytes == 8) {
    int64_t lanes;
    std::memcpy(&lanes, p, sizeof lanes);
    return (Vec<T>)(lanes + Bits64{});
  }
#if defined(__AVX512F__)
  return (Vec<T>)_mm512_maskz_broadcast_f32x4(__mmask16(0xffff), _mm_loadu_ps((const float*)p));
#elif defined(__AVX2__)
  return (Vec<T>)_mm256_broadcast_ps((const __m128*)p);
#endif
}

// Lane i: v's lane kFold * i + kAt. What the last lanes have is of no use.
template <int kFold, int kAt, class T, int... Is>
FUSEDRNN_INLINE Vec<T> every(Vec<T> v, std::integer_sequence<int, Is...>) {
  return __builtin_shufflevector(v, v, ((kFold * Is + kAt) % kLanes<T>)...);
}
template <int kFold, int kAt, class T>
FUSEDRNN_INLINE Vec<T> every(Vec<T> v) {
  return every<kFold, kAt, T>(v, std::make_integer_sequence<int, kLanes<T>>{});
}
// Lane kFold * i: v's lane i; zeros between them.
template <int kFold, class T, int... Is>
FUSEDRNN_INLINE Vec<T> unfolded(Vec<T> v, std::integer_sequence<int, Is...>) {
  constexpr int V = kLanes<T>;
  return __builtin_shufflevector(v, Vec<T>{}, (Is % kFold == 0 ? Is / kFold : V)...);
}
template <int kFold, class T>
FUSEDRNN_INLINE Vec<T> unfolded(Vec<T> v) {
  return unfolded<kFold, T>(v, std::make_integer_sequence<int, kLanes<T>>{});
}
// Lane i: the sum of v's lanes [kFold * i, kFold * (i + 1)); the last lanes' are of no use.
template <int kFold, class T, int... Is>
FUSEDRNN_INLINE Vec<T> folded(Vec<T> v, std::integer_sequence<int, Is...>) {
  v = v + __builtin_shufflevector(v, v, (Is ^ 1)...);
  if constexpr (kFold == 4) v = v + __builtin_shufflevector(v, v, (Is ^ 2)...);
  return every<kFold, 0, T>(v);
}
template <int kFold, class T>
FUSEDRNN_INLINE Vec<T> folded(Vec<T> v) {
  return folded<kFold, T>(v, std::make_integer_sequence<int, kLanes<T>>{});
}

// The names that cells/math.h uses for "a number, or a vector of them".
FUSEDRNN_INLINE Bits32 to_bits(Vec<float> v) { return (Bits32)v; }
FUSEDRNN_INLINE Bits64 to_bits(Vec<double> v) { return (Bits64)v; }
FUSEDRNN_INLINE Vec<float> from_bits(Bits32 v) { return (Vec<float>)v; }
FUSEDRNN_INLINE Vec<double> from_bits(Bits64 v) { return (Vec<double>)v; }

// Of a product.
enum Factor { kFirst, kSecond };

// What a lane of a product's operands holds: a number, or two bfloat16 numbers that are adjacent along
// K. The tiles multiply either; only operands' layout differs. kGroup numbers along K take kGroupLanes
// lanes, their parts, which may differ between a product's factors; n numbers take lanes(n).
// load(row, n): one part of the first V groups of a row of n numbers, zeros behind these.
// interleave_rows(a, b, n): the same where K runs down, of n columns of row a and of b, the row below.
// spread(a): *a in all lanes, as multiply_add takes its first factor (Folded: kFold lanes from a on, over
// and over). Stored: what needs no conversion. kTileRows: rows of an AMX tile, else 0 (amx.h). Scope:
// lives in each thread while it works.
template <class T>
struct Numbers {
  using Lane                       = T;
  using Stored                     = T;
  static constexpr int kGroup      = 1;
  static constexpr int kGroupLanes = 1;
  static constexpr int kTileRows   = 0;
  static constexpr int kFold       = 1;
  struct Scope {};
  static FUSEDRNN_INLINE Vec<T> multiply_add(Vec<T> a, Vec<T> b, Vec<T> c) { return fma(a, b, c); }
  static FUSEDRNN_INLINE Vec<T> spread(const T* a) { return *a - Vec<T>{}; }  // math.h's splat
  template <Factor = kFirst, int = 0>
  static FUSEDRNN_INLINE Vec<T> load(const T* row, int64_t n) {
    return fusedrnn::load(row, int(n < kLanes<T> ? n : kLanes<T>));
  }
  template <Factor = kFirst, int = 0>
  static FUSEDRNN_INLINE Vec<T> interleave_rows(const T* a, const T*, int n) {
    return fusedrnn::load(a, n);
  }
};

// Of bfloat16: add_pairs is c plus, in each lane, both products of a's pair and b's; spread_pair is a
// pair for all lanes; rounded has low's numbers as bfloat16, then high's.
#if defined(__AVX512BF16__)
#define FUSEDRNN_HAS_PAIRS
FUSEDRNN_INLINE Vec<float> add_pairs(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}
FUSEDRNN_INLINE Vec<float> spread_pair(const float* a) { return Numbers<float>::spread(a); }
FUSEDRNN_INLINE Vec<float> rounded(Vec<float> low, Vec<float> high) {
  return (Vec<float>)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define FUSEDRNN_HAS_PAIRS
FUSEDRNN_INLINE Vec<float> add_pairs(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)vbfdotq_f32((float32x4_t)c, (bfloat16x8_t)a, (bfloat16x8_t)b);
}
// In one lane, as bfdot takes it: a copy to all lanes would occupy a unit that multiplies.
FUSEDRNN_INLINE bfloat16x4_t spread_pair(const float* a) {
  const float pair = *a;
  uint32_t bits    = 0;
  std::memcpy(&bits, &pair, sizeof bits);
  return vcreate_bf16(bits);
}
FUSEDRNN_INLINE Vec<float> add_pairs(bfloat16x4_t a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)vbfdotq_lane_f32((float32x4_t)c, (bfloat16x8_t)b, a, 0);
}
FUSEDRNN_INLINE Vec<float> rounded(Vec<float> low, Vec<float> high) {
  return (Vec<float>)vcvtq_high_bf16_f32(vcvtq_low_bf16_f32((float32x4_t)low), (float32x4_t)high);
}
#endif

#if defined(FUSEDRNN_HAS_PAIRS)
struct Pairs {
  using Lane                       = float;
  using Stored                     = uint16_t;  // a bfloat16's bits
  static constexpr int kGroup      = 2;
  static constexpr int kGroupLanes = 1;
  static constexpr int kTileRows   = 0;
  static constexpr int kFold       = 1;
  struct Scope {};
  template <class First>
  static FUSEDRNN_INLINE Vec<float> multiply_add(First a, Vec<float> b, Vec<float> c) {
    return add_pairs(a, b, c);
  }
  static FUSEDRNN_INLINE auto spread(const float* a) { return spread_pair(a); }
  template <Factor = kFirst, int = 0>
  static FUSEDRNN_INLINE Vec<float> load(const float* row, int64_t n) {
    return rounded(load_up_to(row, n), load_up_to(row + kLanes<float>, n - kLanes<float>));
  }
  template <Factor = kFirst, int = 0>
  static FUSEDRNN_INLINE Vec<float> load(const uint16_t* row, int64_t n) {
    return (Vec<float>)load_up_to(row, n);
  }
  template <Factor = kFirst, int = 0>
  static FUSEDRNN_INLINE Vec<float> interleave_rows(const float* a, const float* b, int n) {
    return interleave(fusedrnn::load(a, n), b ? fusedrnn::load(b, n) : Vec<float>{});
  }
  template <Factor = kFirst, int = 0>
  static FUSEDRNN_INLINE Vec<float> interleave_rows(const uint16_t* a, const uint16_t* b, int n) {
    return interleave<kLanes<uint16_t>>(fusedrnn::load(a, n),
                                        b ? fusedrnn::load(b, n) : Vec<uint16_t>{}, Numbered{});
  }

 protected:
  using Numbered = std::make_integer_sequence<int, kLanes<uint16_t>>;

  // a's lanes, rounded, interleaved with b's.
  static FUSEDRNN_INLINE Vec<float> interleave(Vec<float> a, Vec<float> b) {
    const auto both = (Vec<uint16_t>)rounded(a, b);
    return interleave<kLanes<float>>(both, both, Numbered{});
  }
  // The lanes of [a b] from 0 on, interleaved with those from kSecond on.
  template <int kSecond, int... Is>
  static FUSEDRNN_INLINE Vec<float> interleave(Vec<uint16_t> a, Vec<uint16_t> b,
                                               std::integer_sequence<int, Is...>) {
    return (Vec<float>)__builtin_shufflevector(a, b, (Is % 2 * kSecond + Is / 2)...);
  }
  template <class From>
  static FUSEDRNN_INLINE Vec<From> load_up_to(const From* p, int64_t n) {
    return n <= 0 ? Vec<From>{} : fusedrnn::load(p, int(n < kLanes<From> ? n : kLanes<From>));
  }
};
#endif

template <class Terms>
FUSEDRNN_INLINE int64_t groups(int64_t n) {
  return (n + Terms::kGroup - 1) / Terms::kGroup;
}
template <class Terms>
FUSEDRNN_INLINE int64_t lanes(int64_t n) {
  return groups<Terms>(n) * Terms::kGroupLanes;
}

// Terms of a panel of few units, which leave most lanes of a vector empty: each unit has kFold lanes,
// for so many terms at once, which are added up in the end. What is left of K when it is divided by
// kFold is multiplied as Single.
template <class Terms, int kFold_>
struct Folded : Terms {
  using Single                = Terms;
  using Lane                  = typename Terms::Lane;
  static constexpr int kFold  = kFold_;
  static constexpr int kBytes = kFold * int(sizeof(Lane));
  static FUSEDRNN_INLINE Vec<Lane> spread(const Lane* a) { return repeat<kBytes>(a); }
};

// Whether a last panel may be folded: not of 16-byte vectors nor of double, which have few lanes to save.
template <class Terms>
constexpr bool kFolds =
    kVectorBytes > 16 &&
    sizeof(typename Terms::Lane) == 4 && Terms::kTileRows == 0 && Terms::kFold == 1;

// How many lanes each unit takes in the last of the panels [begin, end): more than one if it is the last
// of so many units, they fill half of the lanes at most, and its products have K >= 16 lanes of terms.
// Less do not pay: with 10 (bfloat16, H = 20) a call of 64 rows is 1.06 times as fast, of one 0.9.
template <class Terms>
FUSEDRNN_INLINE int fold_of(int64_t units, int64_t K, int64_t begin, int64_t end) {
  constexpr int V    = kLanes<typename Terms::Lane>;
  const int64_t last = units % V;
  if (!kFolds<Terms> || begin == end || end * V <= units || 2 * last > V || K < 16) return 1;
  return 4 * last > V ? 2 : 4;
}
// f(fold) with a fold_of above 1 as a constant.
template <class Terms, class F>
FUSEDRNN_INLINE void with_fold([[maybe_unused]] int fold, [[maybe_unused]] const F& f) {
  if constexpr (kFolds<Terms>) {
    if (fold == 2) {
      f(std::integral_constant<int, 2>{});
    } else {
      f(std::integral_constant<int, 4>{});
    }
  }
}

// Denormal operands and results count as zero while this lives, in this thread: a state that decays
// would otherwise run the recurrence many times slower. Only for float: double is for checking.
template <class T>
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) {
    if (std::is_same<T, float>::value) _mm_setcsr(saved_ | 0x8040);  // FTZ and DAZ
  }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    if (std::is_same<T, float>::value) asm volatile("msr fpcr, %0" ::"r"(saved_ | (1ull << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#else
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
  FlushDenormals(const FlushDenormals&)            = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;
};

}  // namespace
}  // namespace fusedrnn
