// What cells/math.h needs of a number, for one float or double of one thread.
#pragma once

#include <cstdint>
#include <cstring>

#include "../sequence.h"
#include "ptx.cuh"

namespace fusedrnn {
namespace {

__device__ __forceinline__ int32_t to_bits(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
__device__ __forceinline__ int64_t to_bits(double x) {
  int64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
__device__ __forceinline__ float from_bits(int32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
__device__ __forceinline__ double from_bits(int64_t bits) {
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
__device__ __forceinline__ float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
__device__ __forceinline__ double fma(double a, double b, double c) { return ::fma(a, b, c); }

// Those of ptx.cuh, which the ones below would hide from the cells.
using fusedrnn::approximate_reciprocal;
using fusedrnn::to_float;

// Not approximate: there is no instruction for it, and float64 is not what a GPU is bought for.
__device__ __forceinline__ double approximate_reciprocal(double x) { return 1 / x; }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ double to_float(double x) { return x; }

// The number of a storage type, rounded to nearest.
template <class To>
struct Rounded;
template <>
struct Rounded<float> {
  static __device__ __forceinline__ float of(float x) { return x; }
};
template <>
struct Rounded<double> {
  static __device__ __forceinline__ double of(double x) { return x; }
};
template <>
struct Rounded<bfloat16> {
  static __device__ __forceinline__ bfloat16 of(float x) { return to_bfloat16(x); }
};
template <>
struct Rounded<float16> {
  static __device__ __forceinline__ float16 of(float x) { return to_float16(x); }
};

}  // namespace
}  // namespace fusedrnn
