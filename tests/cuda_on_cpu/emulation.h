// CUDA's programming model on a host, to find what a kernel gets wrong without a GPU: accesses out
// of bounds, reads of what was never written, and above all missing barriers. Here stands what
// emulated_ptx.h and a test call. It is no simulator of a GPU: it knows nothing of time or caches.
//
// - Each thread is a fiber, all on one OS thread. Which one runs next is drawn anew at every
//   barrier, and now and then at a load or store, from a seeded generator: same seed, same run.
// - Whether two accesses are ordered does not depend on how the draws fall out: vector clocks say
//   which accesses of others a thread is behind. Conflicting accesses that no barrier orders are an
//   error. A shuffle or a product makes lanes wait for each other but orders no memory, as CUDA's
//   model has it; sync_warp does.
// - Launches are queued, and run at the latest at a synchronization. Only with the programmatic
//   attribute do kernels overlap; what the one before has written is then for load_past_l1 alone.
// - Granularity: two bytes. Two threads that write neighbouring single bytes are reported. Of a
//   place in global memory that many warps have read, a few are remembered, drawn at random: a race
//   of a write with such reads may need another seed to be seen.
// - The first error is kept as a message; the launch is given up and nothing runs until a reset.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

extern "C" {

// The first error since the last reset, or null.
const char* emulation_error();
// Forgets errors and queued launches, and draws from this seed on.
void emulation_reset(uint64_t seed);
// Runs all that is queued; 0 if without an error since the reset.
int emulation_synchronize();

// Global memory, which must live until the kernels that use it have run: before it is freed,
// synchronize. To clear does so too.
void emulation_register(void* address, size_t bytes);
void emulation_clear_regions();

// The device: by default one of compute capability 9.0 with 132 multiprocessors and 227 KB.
void emulation_set_device(int major, int minor, int multiprocessors, int shared_bytes);
void emulation_set_device_count(int count);

// How it is run: the probability that a load or store lets others run; how many CTAs of a kernel
// run at once, unless they have to; after how many switches of threads in one run to give up.
void emulation_set_switch_probability(double probability);
void emulation_set_ctas_in_flight(int ctas);
void emulation_set_switch_limit(uint64_t switches);
// Whether shuffles and products order a warp's memory accesses too. By default they do not.
void emulation_set_collectives_order(int yes);

// The places where a barrier or fence has been met so far, "file:line function", and one of them to
// do nothing from now on, or null. A reset keeps both.
int emulation_num_sites();
const char* emulation_site(int index);
void emulation_disable_site(const char* site);

// Since the last reset.
uint64_t emulation_num_switches();
uint64_t emulation_num_ctas();

}  // extern "C"

namespace emulation {

// Where in the source a function is called.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// What emulated_ptx.h is made of; the functions there say what each does.
enum Access { kPlain = 0, kConstant = 1, kAtomic = 2, kPastL1 = 3 };
void read(void* value, const void* address, size_t bytes, Access, Site);
void write(void* address, const void* value, size_t bytes, Access, Site);
unsigned char* shared_memory();
void copy_async(void* shared, const void* global, Site);
void commit_copies();
void wait_copies(int pending, Site);
uint32_t load_acquire(const uint32_t*, Site);
void store_release(uint32_t*, uint32_t, Site);

void sync_warp(Site);
void shuffle(void* value, size_t bytes, int lane, Site);
enum Product { kBf16, kF16, kTf32 };
void mma(Product, float* d, const uint32_t* a, const uint32_t* b, Site);
void sync_threads(Site);
void sync_grid(Site);

void wait_for_previous_kernel(Site);
void let_next_kernel_start();

int lane();
int cluster_rank();
int cluster_size();
void cluster_arrive(Site);
void cluster_wait(Site);
uint32_t shared_address(const void*, Site);
uint32_t remote_address(uint32_t address, int rank, Site);
void store_async(uint32_t remote, uint32_t value, uint32_t remote_barrier, Site);
void barrier_init(uint64_t*, int count, Site);
void fence_barrier_init(Site);
void barrier_expect(uint64_t*, int bytes, Site);
void barrier_arrive(uint64_t*, Site);
void barrier_arrive_remote(uint32_t, Site);
bool barrier_try_wait(uint64_t*, int parity, Site);

}  // namespace emulation
