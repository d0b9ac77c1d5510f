// float16 and bfloat16 to float and back: the kernels compute in float32. Plain loops, which the
// compiler vectorizes.
#pragma once

#include "../sequence.h"
#include "threads.h"

namespace fusedrnn {
namespace {

FUSEDRNN_INLINE float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
FUSEDRNN_INLINE uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

FUSEDRNN_INLINE float bfloat16_to_float(uint16_t x) { return as_float(uint32_t(x) << 16); }

// The upper half of the bits, rounded to nearest, ties to even; a NaN stays one.
FUSEDRNN_INLINE uint16_t float_to_bfloat16(float x) {
  const uint32_t bits    = as_bits(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t quieted = (bits >> 16) | 0x40;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? quieted : rounded);
}

// float16's exponent has the bias 15, float's 127; infinity and NaN need the exponent's remaining bits.
// A denormal is given the leading 1 that it lacks, which is then taken away: exact, and no denormal
// float, which the caller may have flushed, comes in between.
FUSEDRNN_INLINE float float16_to_float(uint16_t x) {
  constexpr uint32_t kLeastNormal = 113u << 23;  // 2^-14
  const uint32_t magnitude        = uint32_t(x & 0x7fff) << 13;
  const uint32_t infinite         = magnitude >= 0x0f800000 ? 0x7f800000u : 0u;
  const uint32_t normal           = (magnitude + (112u << 23)) | infinite;
  const uint32_t denormal = as_bits(as_float(magnitude | kLeastNormal) - as_float(kLeastNormal));
  const uint32_t sign     = uint32_t(x & 0x8000) << 16;
  return as_float((magnitude < (1u << 23) ? denormal : normal) | sign);
}

FUSEDRNN_INLINE uint16_t float_to_float16(float x) {
  const uint32_t bits      = as_bits(x);
  const uint32_t magnitude = bits & 0x7fffffff;
  // Normal: the exponent's bias taken down by 112, 13 bits rounded to nearest, ties to even.
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Denormal, below 2^-14: adding 0.5, whose last bit is worth 2^-24, rounds to float16's last bit.
  const uint32_t denormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
  const uint32_t special  = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;  // NaN, infinity
  const uint32_t finite   = magnitude < (113u << 23) ? denormal : normal;
  // From 65520 on, half a unit above the largest, to infinity.
  return uint16_t((magnitude >= 0x477ff000 ? special : finite) | ((bits >> 16) & 0x8000));
}

// Calls convert(begin, end) for shares of [0, n), in threads where it pays.
template <class Convert>
void in_shares(int64_t n, int num_threads, const Convert& convert) {
  // Two threads against one on a Zen 4, by numbers a thread: 0.7x at 8K, 1.05x at 16K, 1.4x at 32K,
  // 1.7x at 64K, 1.9x at 128K.
  constexpr int64_t kMinShare = 32 * 1024;
  const int64_t useful        = n / kMinShare;
  const int64_t most          = useful < num_threads ? useful : num_threads;
  parallel(int(available_threads(most)), [&](int thread, int threads) {
    convert(n * thread / threads, n * (thread + 1) / threads);
  });
}

inline void widen(Narrow kind, const uint16_t* from, float* to, int64_t n, int num_threads) {
  in_shares(n, num_threads, [&](int64_t begin, int64_t end) {
    if (kind == kBfloat16) {
      for (int64_t i = begin; i < end; ++i) to[i] = bfloat16_to_float(from[i]);
    } else {
      for (int64_t i = begin; i < end; ++i) to[i] = float16_to_float(from[i]);
    }
  });
}

// By the calling thread.
inline void narrow(Narrow kind, const float* from, uint16_t* to, int64_t n) {
  if (kind == kBfloat16) {
    for (int64_t i = 0; i < n; ++i) to[i] = float_to_bfloat16(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = float_to_float16(from[i]);
  }
}
inline void narrow(Narrow kind, const float* from, uint16_t* to, int64_t n, int num_threads) {
  in_shares(n, num_threads, [&](int64_t begin, int64_t end) {
    narrow(kind, from + begin, to + begin, end - begin);
  });
}

}  // namespace
}  // namespace fusedrnn
