// The functions of csrc/cuda/ptx.cuh for a host: the same signatures, and behind them the place of
// the call, which errors and the list of barriers name. ptx.cuh includes it, and has the types.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "emulation.h"

namespace fusedrnn {

using emulation::Site;

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
inline T load_as(const T* address, emulation::Access access, Site site) {
  constexpr size_t n = sizeof(T);
  static_assert(std::is_trivially_copyable_v<T> &&
                (n == 1 || n == 2 || n == 4 || n == 8 || n == 16));
  T value;
  emulation::read(&value, address, n, access, site);
  return value;
}
template <class T>
inline T load(const T* address, Site site = Site::here()) {
  return load_as(address, emulation::kPlain, site);
}
template <class T>
inline T load_past_l1(const T* address, Site site = Site::here()) {
  return load_as(address, emulation::kPastL1, site);
}
template <class T>
inline T load_constant(const T* address, Site site = Site::here()) {
  return load_as(address, emulation::kConstant, site);
}
template <class T>
inline void store(T* address, T value, Site site = Site::here()) {
  constexpr size_t n = sizeof(T);
  static_assert(std::is_trivially_copyable_v<T> &&
                (n == 1 || n == 2 || n == 4 || n == 8 || n == 16));
  emulation::write(address, &value, n, emulation::kPlain, site);
}

inline unsigned char* shared_memory() { return emulation::shared_memory(); }
inline uint32_t shared_address(const void* shared, Site site = Site::here()) {
  return emulation::shared_address(shared, site);
}
inline void copy_async(void* shared, const void* global, Site site = Site::here()) {
  emulation::copy_async(shared, global, site);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int kPending>
inline void wait_copies(Site site = Site::here()) {
  emulation::wait_copies(kPending, site);
}
inline uint32_t load_acquire(const uint32_t* address, Site site = Site::here()) {
  return emulation::load_acquire(address, site);
}
inline void store_release(uint32_t* address, uint32_t value, Site site = Site::here()) {
  emulation::store_release(address, value, site);
}

inline void sync_warp(Site site = Site::here()) { emulation::sync_warp(site); }
template <class T>
inline T shuffle(T value, int lane, Site site = Site::here()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  emulation::shuffle(&value, sizeof(T), lane & 31, site);
  return value;
}
template <class T>
inline T shuffle_xor(T value, int mask, Site site = Site::here()) {
  return shuffle(value, emulation::lane() ^ mask, site);
}
inline void sync_threads(Site site = Site::here()) { emulation::sync_threads(site); }

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     Site site = Site::here()) {
  emulation::mma(emulation::kBf16, d, a, b, site);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    Site site = Site::here()) {
  emulation::mma(emulation::kF16, d, a, b, site);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     Site site = Site::here()) {
  emulation::mma(emulation::kTf32, d, a, b, site);
}

inline uint32_t to_tf32(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (std::isnan(x)) return 0x7fffffff;
  return std::isinf(x) ? bits : (bits + 0x1000) & ~0x1fffu;
}

inline float to_float(bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_float(float16 x) {
  const int exponent  = (x.bits >> 10) & 31;
  const int fraction  = x.bits & 1023;
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  if (exponent == 31) return bit_cast<float>(sign | 0x7f800000u | uint32_t(fraction) << 13);
  const float magnitude = exponent == 0 ? float(fraction) * 0x1p-24f
                                        : std::ldexp(float(1024 + fraction), exponent - 25);
  return sign ? -magnitude : magnitude;
}
inline bfloat16 to_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (std::isnan(x)) return {0x7fff};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float16 to_float16(float x) {
  const uint16_t sign   = uint16_t(std::signbit(x) ? 0x8000 : 0);
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return {0x7fff};
  if (magnitude >= 65520) return {uint16_t(sign | 0x7c00)};  // half a unit above the largest
  int exponent = -14;  // of the last bit's place, plus 10; the default rounding is to even
  if (magnitude >= 0x1p-14f) exponent = std::ilogb(magnitude);
  const int units = int(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return {uint16_t(sign | (((exponent + 14) << 10) + units))};
}
// The device's is approximate; this one is within the same bound.
inline float approximate_reciprocal(float x) {
  const auto flush = [](float y) {
    return std::fabs(y) < std::numeric_limits<float>::min() ? std::copysign(0.0f, y) : y;
  };
  return flush(1 / flush(x));
}

inline void wait_for_previous_kernel(Site site = Site::here()) {
  emulation::wait_for_previous_kernel(site);
}
inline void let_next_kernel_start() { emulation::let_next_kernel_start(); }

inline void sync_grid(Site site = Site::here()) { emulation::sync_grid(site); }

inline int cluster_rank() { return emulation::cluster_rank(); }
inline int cluster_size() { return emulation::cluster_size(); }
inline void cluster_arrive(Site site = Site::here()) { emulation::cluster_arrive(site); }
inline void cluster_wait(Site site = Site::here()) { emulation::cluster_wait(site); }
inline uint32_t remote_address(uint32_t shared_address, int rank, Site site = Site::here()) {
  return emulation::remote_address(shared_address, rank, site);
}
inline void store_async(uint32_t remote, uint32_t value, uint32_t remote_barrier,
                        Site site = Site::here()) {
  emulation::store_async(remote, value, remote_barrier, site);
}
inline void barrier_init(uint64_t* barrier, int count, Site site = Site::here()) {
  emulation::barrier_init(barrier, count, site);
}
inline void fence_barrier_init(Site site = Site::here()) { emulation::fence_barrier_init(site); }
inline void barrier_expect(uint64_t* barrier, int bytes, Site site = Site::here()) {
  emulation::barrier_expect(barrier, bytes, site);
}
inline void barrier_arrive(uint64_t* barrier, Site site = Site::here()) {
  emulation::barrier_arrive(barrier, site);
}
inline void barrier_arrive_remote(uint32_t remote_barrier, Site site = Site::here()) {
  emulation::barrier_arrive_remote(remote_barrier, site);
}
inline bool barrier_try_wait(uint64_t* barrier, int parity, Site site = Site::here()) {
  return emulation::barrier_try_wait(barrier, parity, site);
}

}  // namespace fusedrnn
