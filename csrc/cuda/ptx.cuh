// The thin device layer: every PTX instruction of the project, one function each, and what must be
// the same on a host. It decides nothing: what is loaded, copied or multiplied, and which barriers
// stand between, is the kernels'. Without nvcc the functions come from emulated_ptx.h, which runs
// kernels on a CPU and checks them (tests/cuda_on_cpu); so kernels touch memory only through these.
//
// For sm_80 and later. What only sm_90 has is a no-op before it (order of kernels) or a trap
// (clusters).
#pragma once

#include <cstdint>

namespace fusedrnn {

struct alignas(16) Vec16 {
  uint32_t word[4];
};
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

}  // namespace fusedrnn

#ifndef __CUDACC__
#include <emulated_ptx.h>
#else
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstring>

#define FUSEDRNN_DEVICE __device__ __forceinline__
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define FUSEDRNN_SM90(...) asm volatile("trap;")
#else
#define FUSEDRNN_SM90(...) asm volatile(__VA_ARGS__)
#endif

namespace fusedrnn {

// ---- Memory. Addresses are aligned to the size of what they point to.

template <class To, class From>
FUSEDRNN_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// Global memory, or shared memory of this CTA.
template <class T>
FUSEDRNN_DEVICE T load(const T* address) {
  // One instruction also for a struct of 16 bytes.
  if constexpr (sizeof(T) == 16) return bit_cast<T>(*reinterpret_cast<const uint4*>(address));
  return *address;
}

// Global memory that the kernel before has written, for which this one has waited (see
// wait_for_previous_kernel) but beside which it may have begun: past L1, whose line may be from then,
// loaded for numbers that lie beside these.
template <class T>
FUSEDRNN_DEVICE T load_past_l1(const T* address) {
  const auto from = __cvta_generic_to_global(address);
  if constexpr (sizeof(T) == 2) {
    uint16_t bits;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(bits) : "l"(from) : "memory");
    return bit_cast<T>(bits);
  } else if constexpr (sizeof(T) == 4) {
    uint32_t bits;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(bits) : "l"(from) : "memory");
    return bit_cast<T>(bits);
  } else if constexpr (sizeof(T) == 8) {
    uint64_t bits;
    asm volatile("ld.global.cg.u64 %0, [%1];" : "=l"(bits) : "l"(from) : "memory");
    return bit_cast<T>(bits);
  } else {
    static_assert(sizeof(T) == 16);
    uint4 bits;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "l"(from)
                 : "memory");
    return bit_cast<T>(bits);
  }
}

template <class T>
FUSEDRNN_DEVICE void store(T* address, T value) {
  if constexpr (sizeof(T) == 16) {
    *reinterpret_cast<uint4*>(address) = bit_cast<uint4>(value);
  } else {
    *address = value;
  }
}

// Global memory that nobody writes while this kernel runs. The compiler may move this load across
// barriers, also up across wait_for_previous_kernel: what the kernel before writes is for load_past_l1.
template <class T>
FUSEDRNN_DEVICE T load_constant(const T* address) {
  static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 ||
                sizeof(T) == 16);
  if constexpr (sizeof(T) == 1) {
    return bit_cast<T>(__ldg(reinterpret_cast<const unsigned char*>(address)));
  } else if constexpr (sizeof(T) == 2) {
    return bit_cast<T>(__ldg(reinterpret_cast<const unsigned short*>(address)));
  } else if constexpr (sizeof(T) == 4) {
    return bit_cast<T>(__ldg(reinterpret_cast<const unsigned int*>(address)));
  } else if constexpr (sizeof(T) == 8) {
    return bit_cast<T>(__ldg(reinterpret_cast<const uint2*>(address)));
  } else {
    return bit_cast<T>(__ldg(reinterpret_cast<const uint4*>(address)));
  }
}

// The CTA's dynamic shared memory.
FUSEDRNN_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char fusedrnn_shared_memory[];
  return fusedrnn_shared_memory;
}

// The address of this CTA's shared memory as instructions of the shared space take it.
FUSEDRNN_DEVICE uint32_t shared_address(const void* shared) {
  return uint32_t(__cvta_generic_to_shared(shared));
}

// 16 bytes, past L1. The copy has arrived, for this thread, after a wait for its group; a barrier
// then makes it others'.
FUSEDRNN_DEVICE void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global))
               : "memory");
}

// Closes a group: this thread's copies since the last group.
FUSEDRNN_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until no more than the kPending youngest groups of this thread are under way.
template <int kPending>
FUSEDRNN_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Global words through which CTAs of one grid wait for each other.
FUSEDRNN_DEVICE uint32_t load_acquire(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(address))
               : "memory");
  return value;
}

FUSEDRNN_DEVICE void store_release(uint32_t* address, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(address)),
               "r"(value)
               : "memory");
}

// ---- Warp: all 32 lanes take part.

FUSEDRNN_DEVICE void sync_warp() { __syncwarp(); }

// The value of that lane. Orders no memory.
template <class T>
FUSEDRNN_DEVICE T shuffle(T value, int lane) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if constexpr (sizeof(T) == 4) {
    return bit_cast<T>(__shfl_sync(0xffffffffu, bit_cast<unsigned int>(value), lane));
  } else {
    return bit_cast<T>(__shfl_sync(0xffffffffu, bit_cast<unsigned long long>(value), lane));
  }
}

// The value of the lane whose number differs by these bits. Orders no memory.
template <class T>
FUSEDRNN_DEVICE T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if constexpr (sizeof(T) == 4) {
    return bit_cast<T>(__shfl_xor_sync(0xffffffffu, bit_cast<unsigned int>(value), mask));
  } else {
    return bit_cast<T>(__shfl_xor_sync(0xffffffffu, bit_cast<unsigned long long>(value), mask));
  }
}

// ---- CTA

FUSEDRNN_DEVICE void sync_threads() { __syncthreads(); }

// ---- Tensor cores: d += a b for a warp, with d [16, 8], a [16, k] and b [k, 8]. Which lane holds
// which elements, with g = lane / 4 and i = lane % 4:
//   d: (g, 2i) (g, 2i+1) (g+8, 2i) (g+8, 2i+1)
//   16-bit, k = 16, two elements a word, the first in the lower half:
//     a: (g, 2i..2i+1) (g+8, 2i..2i+1) (g, 2i+8..2i+9) (g+8, 2i+8..2i+9)
//     b: (2i..2i+1, g) (2i+8..2i+9, g)
//   tf32, k = 8:
//     a: (g, i) (g+8, i) (g, i+4) (g+8, i+4)
//     b: (i, g) (i+4, g)

#define FUSEDRNN_MMA(shape_and_types)                                             \
  asm volatile("mma.sync.aligned." shape_and_types                                \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

FUSEDRNN_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  FUSEDRNN_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}

FUSEDRNN_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  FUSEDRNN_MMA("m16n8k16.row.col.f32.f16.f16.f32");
}

// Reads the upper 19 bits of a float; to_tf32 rounds to these.
FUSEDRNN_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  FUSEDRNN_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef FUSEDRNN_MMA

// To nearest, ties away from zero.
FUSEDRNN_DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// ---- Numbers. To nearest, ties to even; denormals stay, a NaN stays one.

// As an instruction that the compiler does not see through: it would move a shift to where x is loaded,
// and wait there.
FUSEDRNN_DEVICE float to_float(bfloat16 x) {
  float result;
  asm("mov.b32 %0, {%1, %2};" : "=f"(result) : "h"(uint16_t(0)), "h"(x.bits));
  return result;
}

FUSEDRNN_DEVICE float to_float(float16 x) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
}

FUSEDRNN_DEVICE bfloat16 to_bfloat16(float x) {
  bfloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
}

FUSEDRNN_DEVICE float16 to_float16(float x) {
  float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
}

// Within 1 ULP. Denormals, as argument and as result, count as zero.
FUSEDRNN_DEVICE float approximate_reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// ---- Order of kernels: launched programmatically, one may begin before the one before it ends.

// Until the kernel before has ended and its writes are visible.
FUSEDRNN_DEVICE void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// From here on the next kernel may begin, once every CTA has come here or ended. Orders no memory.
FUSEDRNN_DEVICE void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- Cooperative grids

FUSEDRNN_DEVICE void sync_grid() { cooperative_groups::this_grid().sync(); }

// ---- Clusters

FUSEDRNN_DEVICE int cluster_rank() {
  uint32_t rank = 0;
  FUSEDRNN_SM90("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}

FUSEDRNN_DEVICE int cluster_size() {
  uint32_t size = 0;
  FUSEDRNN_SM90("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return int(size);
}

// A barrier of all threads of the cluster, in two halves; not .aligned, so lanes may come apart.
FUSEDRNN_DEVICE void cluster_arrive() {
  FUSEDRNN_SM90("barrier.cluster.arrive.release;" :: : "memory");
}

FUSEDRNN_DEVICE void cluster_wait() {
  FUSEDRNN_SM90("barrier.cluster.wait.acquire;" :: : "memory");
}

// Where the CTA of that rank has what this CTA has at the address.
FUSEDRNN_DEVICE uint32_t remote_address(uint32_t shared_address, int rank) {
  uint32_t remote = 0;
  FUSEDRNN_SM90("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address),
                "r"(rank));
  return remote;
}

// Stores when it likes, then counts 4 bytes at the barrier, which lies in the same CTA as the word.
// Nothing else tells that it has stored.
FUSEDRNN_DEVICE void store_async(uint32_t remote, uint32_t value, uint32_t remote_barrier) {
  FUSEDRNN_SM90(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(remote),
      "r"(value), "r"(remote_barrier) : "memory");
}

// Barriers of their own, 8 bytes of shared memory. A phase ends when `count` have arrived and all
// bytes expected have come; the phases' parities are 0, 1, 0, ...
FUSEDRNN_DEVICE void barrier_init(uint64_t* barrier, int count) {
  FUSEDRNN_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                "r"(count) : "memory");
}

// Makes barrier_init visible to the cluster; a barrier of the cluster has to follow.
FUSEDRNN_DEVICE void fence_barrier_init() {
  FUSEDRNN_SM90("fence.mbarrier_init.release.cluster;" :: : "memory");
}

// Arrives, and adds to the bytes that this phase waits for.
FUSEDRNN_DEVICE void barrier_expect(uint64_t* barrier, int bytes) {
  FUSEDRNN_SM90("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                    shared_address(barrier)),
                "r"(bytes) : "memory");
}

FUSEDRNN_DEVICE void barrier_arrive(uint64_t* barrier) {
  FUSEDRNN_SM90("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(
      shared_address(barrier)) : "memory");
}

FUSEDRNN_DEVICE void barrier_arrive_remote(uint32_t remote_barrier) {
  FUSEDRNN_SM90("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
      remote_barrier) : "memory");
}

// Whether the phase of that parity has ended; may wait a while for it, so it belongs in a loop.
FUSEDRNN_DEVICE bool barrier_try_wait(uint64_t* barrier, int parity) {
  uint32_t ended = 0;
  FUSEDRNN_SM90(
      "{\n"
      ".reg .pred ended;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 ended, [%1], %2;\n"
      "selp.u32 %0, 1, 0, ended;\n"
      "}" : "=r"(ended) : "r"(shared_address(barrier)),
      "r"(parity) : "memory");
  return ended != 0;
}

}  // namespace fusedrnn

#undef FUSEDRNN_SM90
#undef FUSEDRNN_DEVICE
#endif  // __CUDACC__
