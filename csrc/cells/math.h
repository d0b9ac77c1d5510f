// The nonlinearities of the cells, once for every kind of number: V is float, double, or a SIMD
// vector of either. Needs, of V: the arithmetic operators, ?: on a comparison, and to_bits,
// from_bits, fma and approximate_reciprocal (cpu/vec.h has them for vectors). Not a math library:
// two functions and what they share.
//
// Maximum error, over all inputs whose result is a normal number: float 2 ULP, double 4 ULP (tested
// in tests/test_nonlinearities.py). NaN gives NaN, infinities give the limits.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__CUDACC__)
#define FUSEDRNN_CELL __device__ __forceinline__
#define FUSEDRNN_UNROLL _Pragma("unroll")
#else
#define FUSEDRNN_CELL inline __attribute__((always_inline))
#define FUSEDRNN_UNROLL _Pragma("GCC unroll 16")
#endif

namespace fusedrnn {
namespace {

template <class V>
struct ElementOf {
  using type = std::decay_t<decltype(std::declval<V&>()[0])>;
};
template <>
struct ElementOf<float> {
  using type = float;
};
template <>
struct ElementOf<double> {
  using type = double;
};
template <class V>
using Element = typename ElementOf<V>::type;

// x in every lane: x - 0 is x for every x, -0 and NaN included.
template <class V>
FUSEDRNN_CELL V splat(Element<V> x) {
  return x - V{};
}

// kBase^n, without a loop: compilers leave one to run time.
template <int kBase>
FUSEDRNN_CELL constexpr int power(int n) {
  static_assert(kBase == 2 || kBase == -1, "no other is needed");
  return kBase == 2 ? 1 << n : 1 - n % 2 * 2;
}

// expm1(r) = r + r^2 P(r) for |r| <= ln(2)/2: P is the minimax polynomial for the relative error of
// expm1 (Lawson's reweighted least squares at 40 digits); lowest degree first.
template <class T>
struct Exp;

template <>
struct Exp<float> {  // relative error 1.3e-8, 0.11 ULP
  static constexpr int kTerms = 5;
  static FUSEDRNN_CELL constexpr float p(int i) {
    constexpr float kP[kTerms] = {0.49999998153818844534f, 0.16666543617692724903f,
                                  0.041667199942543189813f, 0.0083665208943056078172f,
                                  0.0013882515775329425903f};
    return kP[i];
  }
  static constexpr float kLog2E   = 1.44269504088896340736f;
  static constexpr float kLn2Hi   = 0.693145751953125f;  // 16 bits: n * kLn2Hi is exact
  static constexpr float kLn2Lo   = 1.42860682030941723e-6f;
  static constexpr float kRound   = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int kMantissa  = 23;
  static constexpr int32_t kBias  = 127;
  static constexpr int32_t kSign  = INT32_MIN;
  static constexpr float kExpZero = 88.0f;  // exp(-x) counts as 0 from here on: n is -127
  static constexpr float kTanhOne = 9.1f;   // tanh(x) rounds to 1 above
};

template <>
struct Exp<double> {  // relative error 2.6e-19
  static constexpr int kTerms = 11;
  static FUSEDRNN_CELL constexpr double p(int i) {
    constexpr double kP[kTerms] = {
        0.50000000000000000085,     0.16666666666666676508,   0.041666666666666508766,
        0.008333333333321691057,    0.0013888888888962377374, 0.00019841269885967032584,
        0.000024801587172526841437, 2.7557244373150889153e-6, 2.755740265210362174e-7,
        2.5108979223420803152e-8,   2.0875327238943049427e-9};
    return kP[i];
  }
  static constexpr double kLog2E   = 1.44269504088896340736;
  static constexpr double kLn2Hi   = 0.69314718055989033;  // 33 bits
  static constexpr double kLn2Lo   = 5.4979230187083711552e-14;
  static constexpr double kRound   = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kMantissa   = 52;
  static constexpr int64_t kBias   = 1023;
  static constexpr int64_t kSign   = INT64_MIN;
  static constexpr double kExpZero = 709.0;  // n is -1023
  static constexpr double kTanhOne = 19.1;
};

// exp(kTimes x) = 2^n (1 + expm1_r), n the integer nearest to kTimes x / ln(2), scale = 2^n.
template <class V>
struct ExpParts {
  V scale, expm1_r;
};

// kTimes: 2 or -1. The constants take it up, exactly, so that no instruction has to.
template <int kTimes, class V>
FUSEDRNN_CELL ExpParts<V> exp_parts(V x) {
  using C         = Exp<Element<V>>;
  const V rounded = fma(x, splat<V>(kTimes * C::kLog2E), splat<V>(C::kRound));
  const V n       = rounded - C::kRound;
  const V r       = fma(n, splat<V>(-C::kLn2Lo / kTimes), fma(n, splat<V>(-C::kLn2Hi / kTimes), x));
  const V r2      = r * r;
  // (kTimes r)^2 P(kTimes r) = r^2 p, by pairs of terms: a shorter wait than one by one.
  const auto term = [](int i) { return splat<V>(C::p(i) * power<kTimes>(i + 2)); };
  V p             = term(C::kTerms - 1);
  static_assert(C::kTerms % 2 == 1, "the last term stands alone");
  FUSEDRNN_UNROLL
  for (int i = C::kTerms - 3; i >= 0; i -= 2) p = fma(p, r2, fma(r, term(i + 1), term(i)));
  // The low bits of `rounded` hold n: moved into the exponent field, biased, they are 2^n; n =
  // -kBias gives 0.
  const V scale = from_bits((to_bits(rounded) + C::kBias) << C::kMantissa);
  return {scale, fma(r2, p, kTimes * r)};
}

// The smaller of x and `high`, and the larger of x and `low`; NaN passes through.
template <class V>
FUSEDRNN_CELL V at_most(V x, Element<V> high) {
  return x > high ? splat<V>(high) : x;
}
template <class V>
FUSEDRNN_CELL V at_least(V x, Element<V> low) {
  return x < low ? splat<V>(low) : x;
}

// x / (a + b). The remainder of a first quotient corrects it, and since that is of a and b apart, the
// rounding of a + b as well. a: the larger one where the quotient is small.
template <class V>
FUSEDRNN_CELL V quotient(V x, V a, V b) {
  const V reciprocal = approximate_reciprocal(a + b);
  const V first      = x * reciprocal;
  const V remainder  = fma(first, -b, fma(first, -a, x));
  return fma(remainder, reciprocal, first);
}

// 1 / (e + 1), e = exp(-x).
template <class V>
FUSEDRNN_CELL V sigmoid(V x) {
  using C          = Exp<Element<V>>;
  const auto parts = exp_parts<-1>(at_most(at_least(x, -C::kExpZero), C::kExpZero));
  const V e        = fma(parts.scale, parts.expm1_r, parts.scale);
  const V result   = quotient(splat<V>(1), e, splat<V>(1));
  // A denormal there; float kernels flush it.
  if constexpr (std::is_same<Element<V>, double>::value) return x <= -C::kExpZero ? V{} : result;
  return result;
}

// sign(x) e / (2 + e), e = expm1(2|x|): accurate relative to the result for small x too, which
// 2 sigmoid(2x) - 1 is not.
template <class V>
FUSEDRNN_CELL V tanh(V x) {
  using C           = Exp<Element<V>>;
  const V magnitude = from_bits(to_bits(x) & ~C::kSign);
  const auto parts  = exp_parts<2>(at_most(magnitude, C::kTanhOne));
  const V e         = fma(parts.scale, parts.expm1_r, parts.scale - 1);
  return from_bits(to_bits(quotient(e, splat<V>(2), e)) | (to_bits(x) & C::kSign));
}

template <class V>
FUSEDRNN_CELL V relu(V x) {
  return x < 0 ? V{} : x;
}

// Derivatives, as functions of the function's own result.
template <class V>
FUSEDRNN_CELL V d_sigmoid(V sigmoid_output) {
  return sigmoid_output * (1 - sigmoid_output);
}
template <class V>
FUSEDRNN_CELL V d_tanh(V tanh_output) {
  return fma(-tanh_output, tanh_output, splat<V>(1));
}

}  // namespace
}  // namespace fusedrnn
