// The emulation's own tests: kernels that are right and have to pass, and the same with one thing
// missing, which has to be reported, whatever the seed. What the project's kernels compute is
// tested elsewhere. It prints what is wrong, and exits with the number of such lines.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>
#include <vector>

#include <cuda/ptx.cuh>

#include "emulation.h"

using namespace fusedrnn;

namespace {

constexpr int kSeeds = 20;
int wrong            = 0;
bool quiet           = false;  // errors are expected

#define CHECK(...)                                                                   \
  do {                                                                               \
    if (!(__VA_ARGS__)) {                                                            \
      std::printf("%s:%d: %s\n", __func__, __LINE__, #__VA_ARGS__);                  \
      if (emulation_error()) std::printf("  the error is: %s\n", emulation_error()); \
      ++wrong;                                                                       \
    }                                                                                \
  } while (0)

// ---- Launching

struct Shape {
  unsigned ctas = 1, threads = 32;
  size_t shared     = 1024;
  bool programmatic = false, cooperative = false;
  unsigned cluster = 1;
};

template <class... P, class... A>
cudaError_t launch(Shape shape, void (*kernel)(P...), A... arguments) {
  cudaLaunchAttribute attributes[3];
  attributes[0].id              = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = shape.cooperative;
  attributes[1].id              = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim  = {shape.cluster, 1, 1};
  attributes[2].id              = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[2].val.programmaticStreamSerializationAllowed = shape.programmatic;
  cudaLaunchConfig_t config                                = {};
  config.gridDim                                           = shape.ctas;
  config.blockDim                                          = shape.threads;
  config.dynamicSmemBytes                                  = shape.shared;
  config.attrs                                             = attributes;
  config.numAttrs                                          = 3;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// The error of one run, or an empty string.
template <class... P, class... A>
std::string error_of(uint64_t seed, Shape shape, void (*kernel)(P...), A... arguments) {
  emulation_reset(seed);
  const cudaError_t e = launch(shape, kernel, arguments...);
  if (e != cudaSuccess) return cudaGetErrorName(e);
  const int failed = emulation_synchronize();
  const char* text = emulation_error();
  CHECK(failed == (text != nullptr));
  return text ? text : "";
}

template <class... A>
bool passes(Shape shape, A... kernel_and_arguments) {
  for (int seed = 0; seed < kSeeds; ++seed) {
    const std::string error = error_of(uint64_t(seed), shape, kernel_and_arguments...);
    if (!error.empty()) {
      if (!quiet) std::printf("  %s\n", error.c_str());
      return false;
    }
  }
  return true;
}

// Whether every seed reports an error with these words.
template <class... A>
bool reports(const char* words, Shape shape, A... kernel_and_arguments) {
  for (int seed = 0; seed < kSeeds; ++seed) {
    const std::string error = error_of(uint64_t(seed), shape, kernel_and_arguments...);
    if (error.find(words) == std::string::npos) {
      std::printf("  instead of '%s': '%s'\n", words, error.c_str());
      return false;
    }
  }
  return true;
}

// Whether `run`, which is right, goes wrong without any one of its barriers. `run` says whether
// all was right. It has `sites` barriers, and has not run before, or they would not be noticed.
template <class Run>
bool needs_all_its_barriers(int sites, const Run& run) {
  const int first = emulation_num_sites();
  if (!run()) return false;
  const int last = emulation_num_sites();
  bool all       = last - first == sites;
  if (!all) std::printf("  %d barriers\n", last - first);
  quiet = true;
  for (int i = first; i < last; ++i) {
    emulation_disable_site(emulation_site(i));
    if (run()) {
      std::printf("  not needed: %s\n", emulation_site(i));
      all = false;
    }
    emulation_disable_site(nullptr);
  }
  quiet = false;
  return all && run();
}

template <class T>
struct Array {
  std::vector<T> data;
  explicit Array(size_t n, T value = T()) : data(n, value) {
    emulation_register(data.data(), n * sizeof(T));
  }
  ~Array() { emulation_clear_regions(); }
  T* get() { return data.data(); }
  T operator[](size_t i) const { return data[i]; }
};

template <class T>
T* shared() {
  return reinterpret_cast<T*>(shared_memory());
}
int thread() { return int(threadIdx.x); }
int block() { return int(blockIdx.x); }

// ---- Barriers of a CTA

__global__ void reduce(const float* in, float* out, bool barriers) {
  float* const sums = shared<float>();
  store(sums + thread(), load(in + block() * int(blockDim.x) + thread()));
  for (int n = int(blockDim.x) / 2; n > 0; n /= 2) {
    if (barriers) sync_threads();
    if (thread() < n) store(sums + thread(), load(sums + thread()) + load(sums + thread() + n));
  }
  if (thread() == 0) store(out + block(), load(sums));
}

void test_reduction() {
  Array<float> in(7 * 256, 1), out(7);
  const Shape shape = {7, 256};
  CHECK(passes(shape, reduce, in.get(), out.get(), true));
  for (int i = 0; i < 7; ++i) CHECK(out[size_t(i)] == 256);
  for (int seed = 0; seed < kSeeds; ++seed) {
    CHECK(!error_of(uint64_t(seed), shape, reduce, in.get(), out.get(), false).empty());
  }
}

// Each step, every thread reads what its neighbour wrote.
__global__ void exchange(int* out, int steps, int buffers, bool barrier) {
  int value = thread();
  for (int t = 0; t < steps; ++t) {
    int* const buffer = shared<int>() + t % buffers * int(blockDim.x);
    store(buffer + thread(), value);
    if (barrier) sync_threads();
    value = load(buffer + (thread() + 1) % int(blockDim.x)) + 1;
  }
  store(out + thread(), value);
}

void test_double_buffer() {
  Array<int> out(96);
  const Shape shape = {1, 96};
  CHECK(needs_all_its_barriers(1, [&] { return passes(shape, exchange, out.get(), 10, 2, true); }));
  for (int i = 0; i < 96; ++i) CHECK(out[size_t(i)] == (i + 10) % 96 + 10);
  CHECK(reports("race", shape, exchange, out.get(), 10, 1, true));
  CHECK(!error_of(1, shape, exchange, out.get(), 10, 2, false).empty());
}

// Half words side by side are different places.
__global__ void halves(uint16_t* out) {
  store(shared<uint16_t>() + thread(), uint16_t(thread()));
  store(out + thread(), load(shared<uint16_t>() + thread()));
}

// Written once, read by all in two phases, then written by each in turn.
__global__ void broadcast(int* out, bool barrier) {
  if (thread() == 5) store(shared<int>(), 42);
  sync_threads();
  const int a = load(shared<int>());
  if (barrier) sync_threads();
  if (thread() == 77) store(shared<int>(), 43);
  sync_threads();
  store(out + thread(), a + load(shared<int>()));
}

void test_granularity_and_readers() {
  Array<uint16_t> words(64);
  Array<int> out(128);
  CHECK(passes({1, 64}, halves, words.get()));
  CHECK(passes({1, 128}, broadcast, out.get(), true));
  CHECK(out[3] == 85);
  CHECK(reports("race", {1, 128}, broadcast, out.get(), false));
}

// ---- Warps

enum Order { kNothing, kSyncWarp, kShuffle };
__global__ void reverse(int* out, Order order) {
  store(shared<int>() + thread(), thread());
  if (order == kSyncWarp) sync_warp();
  if (order == kShuffle) shuffle(1, 0);
  store(out + thread(), load(shared<int>() + (thread() ^ 31)));
}

__global__ void shuffles(double* out) {
  const double value  = thread() * 1e10;
  double sum          = shuffle(value, 3) + shuffle_xor(value, 5);
  sum                += shuffle(float(thread()), (thread() + 1) % 32) + shuffle_xor(thread(), 16);
  store(out + thread(), sum);
}

__global__ void leave_out(int lane, bool ends) {
  if (thread() != lane) {
    sync_warp();
  } else if (!ends) {
    shuffle(1, 0);
  }
}

void test_warps() {
  Array<int> out(64);
  CHECK(passes({1, 64}, reverse, out.get(), kSyncWarp));
  CHECK(out[40] == (40 ^ 31));
  CHECK(error_of(1, {1, 64}, reverse, out.get(), kNothing).find("shared memory") !=
        std::string::npos);
  CHECK(reports("race", {1, 64}, reverse, out.get(), kShuffle));
  emulation_set_collectives_order(1);
  CHECK(passes({1, 64}, reverse, out.get(), kShuffle));
  emulation_set_collectives_order(0);

  Array<double> sums(32);
  CHECK(passes({1, 32}, shuffles, sums.get()));
  for (int i = 0; i < 32; ++i) {
    CHECK(sums[size_t(i)] == 3e10 + (i ^ 5) * 1e10 + (i + 1) % 32 + (i ^ 16));
  }
  CHECK(reports("diverged", {1, 32}, leave_out, 7, false));
  CHECK(reports("sync_warp", {1, 32}, leave_out, 7, true));
  CHECK(reports("only 16 lanes", {1, 48}, leave_out, 50, true));
}

// ---- Copies

enum Copies { kRight, kNoWait, kNoBarrier, kNoCommit, kTooFew };

// A pipeline two groups deep: each step's vectors, copied by one thread, are read by the next.
__global__ void pipeline(const Vec16* in, uint32_t* out, int steps, Copies how) {
  Vec16* const stages = shared<Vec16>();
  const int n         = int(blockDim.x);
  const auto fetch    = [&](int t) {
    if (t < steps) copy_async(stages + t % 3 * n + thread(), in + t * n + thread());
    if (how != kNoCommit) commit_copies();
  };
  fetch(0);
  fetch(1);
  uint32_t sum = 0;
  for (int t = 0; t < steps; ++t) {
    if (how == kTooFew) {
      wait_copies<2>();
    } else if (how != kNoWait) {
      wait_copies<1>();
    }
    if (how != kNoBarrier) sync_threads();
    sum += load(stages + t % 3 * n + (thread() + 1) % n).word[2];
    fetch(t + 2);
  }
  store(out + thread(), sum);
}

void test_copies() {
  Array<Vec16> in(64 * 9);
  Array<uint32_t> out(64);
  for (size_t i = 0; i < in.data.size(); ++i) in.data[i] = {{0, 0, uint32_t(i), 0}};
  const Shape shape = {1, 64, 3 * 64 * 16};
  CHECK(needs_all_its_barriers(
      2, [&] { return passes(shape, pipeline, in.get(), out.get(), 9, kRight); }));
  for (uint32_t i = 0; i < 64; ++i) CHECK(out[i] == 9 * ((i + 1) % 64) + 64 * 36);
  CHECK(reports("copied", shape, pipeline, in.get(), out.get(), 9, kNoWait));
  CHECK(reports("copied", shape, pipeline, in.get(), out.get(), 9, kNoCommit));
  CHECK(reports("copied", shape, pipeline, in.get(), out.get(), 9, kTooFew));
  for (int seed = 0; seed < kSeeds; ++seed) {
    CHECK(!error_of(uint64_t(seed), shape, pipeline, in.get(), out.get(), 9, kNoBarrier).empty());
  }
}

// ---- Products

// One product of a [16, K] and b [K, 8] in global memory, loaded as the fragments are documented.
__global__ void product(emulation::Product type, const float* a, const float* b, float* d) {
  const int g = thread() / 4, i = thread() % 4;
  const auto pack = [&](float low, float high) {
    const auto bits = [&](float x) -> uint32_t {
      return type == emulation::kBf16 ? to_bfloat16(x).bits : to_float16(x).bits;
    };
    return bits(low) | bits(high) << 16;
  };
  float sums[4];
  uint32_t fa[4], fb[2];
  for (int r = 0; r < 4; ++r) sums[r] = load(d + (g + 8 * (r / 2)) * 8 + 2 * i + r % 2);
  if (type == emulation::kTf32) {
    for (int r = 0; r < 4; ++r) fa[r] = to_tf32(load(a + (g + 8 * (r & 1)) * 8 + i + 4 * (r / 2)));
    for (int r = 0; r < 2; ++r) fb[r] = to_tf32(load(b + (i + 4 * r) * 8 + g));
    mma_tf32(sums, fa, fb);
  } else {
    for (int r = 0; r < 4; ++r) {
      const float* p = a + (g + 8 * (r & 1)) * 16 + 2 * i + 8 * (r / 2);
      fa[r]          = pack(load(p), load(p + 1));
    }
    for (int r = 0; r < 2; ++r) {
      const float* p = b + (2 * i + 8 * r) * 8 + g;
      fb[r]          = pack(load(p), load(p + 8));
    }
    if (type == emulation::kBf16) mma_bf16(sums, fa, fb);
    if (type == emulation::kF16) mma_f16(sums, fa, fb);
  }
  sync_warp();
  for (int r = 0; r < 4; ++r) store(d + (g + 8 * (r / 2)) * 8 + 2 * i + r % 2, sums[r]);
}

void test_products() {
  for (const auto type : {emulation::kBf16, emulation::kF16, emulation::kTf32}) {
    const int k_size = type == emulation::kTf32 ? 8 : 16;
    Array<float> a(size_t(16 * k_size)), b(size_t(k_size * 8)), d(16 * 8);
    // Few bits, so that nothing is rounded and each element is seen.
    for (size_t i = 0; i < a.data.size(); ++i) a.data[i] = float(int(i * 37 % 101) - 50);
    for (size_t i = 0; i < b.data.size(); ++i) b.data[i] = float(int(i * 53 % 97) - 48) / 8;
    for (size_t i = 0; i < d.data.size(); ++i) d.data[i] = float(i);
    std::vector<float> expected = d.data;
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 8; ++n) {
        for (int k = 0; k < k_size; ++k) {
          expected[size_t(m * 8 + n)] += a[size_t(m * k_size + k)] * b[size_t(k * 8 + n)];
        }
      }
    }
    CHECK(error_of(1, {}, product, type, a.get(), b.get(), d.get()).empty());
    CHECK(d.data == expected);
  }
}

void test_numbers() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float h = to_float(float16{uint16_t(bits)}), b = to_float(bfloat16{uint16_t(bits)});
    CHECK(std::isnan(h) ? std::isnan(to_float(to_float16(h))) : to_float16(h).bits == bits);
    CHECK(std::isnan(b) ? std::isnan(to_float(to_bfloat16(b))) : to_bfloat16(b).bits == bits);
    // Half way to the next: to even. Beside it: to the nearer one.
    const float next = to_float(float16{uint16_t(bits + 1)});
    if (std::isfinite(h) && std::isfinite(next) && (bits & 0x7fff) != 0x7fff) {
      const float middle = (h + next) / 2;
      CHECK(to_float16(middle).bits == (bits & 1 ? bits + 1 : bits));
      CHECK(to_float16(std::nextafter(middle, h)).bits == bits);
      CHECK(to_float16(std::nextafter(middle, next)).bits == bits + 1);
    }
    const float upper = bit_cast<float>(bits << 16 | 0x8000u);
    if (!std::isnan(upper)) CHECK(to_bfloat16(upper).bits == (bits & 1 ? bits + 1 : bits));
  }
  CHECK(to_float(float16{1}) == 0x1p-24f && to_float(float16{0x7bff}) == 65504);
  CHECK(to_float16(65519.99f).bits == 0x7bff && to_float16(65520).bits == 0x7c00);
  CHECK(to_float16(-1e30f).bits == 0xfc00);
  CHECK(to_tf32(1 + 0x1p-11f) == bit_cast<uint32_t>(1 + 0x1p-10f));
  CHECK(to_tf32(-1 - 0x1p-11f) == bit_cast<uint32_t>(-1 - 0x1p-10f));
  CHECK(to_tf32(1 + 0x1.fp-12f) == bit_cast<uint32_t>(1.0f));
  CHECK(approximate_reciprocal(4) == 0.25f && approximate_reciprocal(1e38f) == 0);
  CHECK(std::isinf(approximate_reciprocal(1e-40f)));
}

// ---- Addresses

enum Fault { kNone, kBehind, kBefore, kMisaligned, kUnwritten, kPastShared, kLocal, kPoison };
__global__ void touch(char* global, Fault fault) {
  char local[16] = {};
  switch (fault) {
    case kNone:
      store(global + 60, 'x'), load(reinterpret_cast<int*>(global + 60));
      break;
    case kBehind:
      load(reinterpret_cast<int*>(global + 64));
      break;
    case kBefore:
      store(global - 1, 'x');
      break;
    case kMisaligned:
      load(reinterpret_cast<Vec16*>(global + 8));
      break;
    case kUnwritten:
      load(shared_memory() + 12);
      break;
    case kPastShared:
      store(reinterpret_cast<double*>(shared_memory() + 96), 1.0);
      break;
    case kLocal:
      load(local);
      break;
    case kPoison:
      if (reinterpret_cast<uint32_t*>(shared_memory())[3] != ~0u) load(local);
  }
}

void test_addresses() {
  Array<Vec16> memory(4);
  char* const p     = reinterpret_cast<char*>(memory.get());
  const Shape shape = {1, 1, 100};
  CHECK(passes(shape, touch, p, kNone));
  CHECK(passes(shape, touch, p, kPoison));
  CHECK(reports("0 bytes after the region of 64 bytes", shape, touch, p, kBehind));
  CHECK(reports("1 bytes before the region of 64 bytes", shape, touch, p, kBefore));
  CHECK(reports("misaligned for 16 bytes", shape, touch, p, kMisaligned));
  CHECK(reports("byte 12 of shared memory has never been written", shape, touch, p, kUnwritten));
  CHECK(reports("8 bytes are not within any memory: byte 96 of shared memory", shape, touch, p,
                kPastShared));
  CHECK(reports("1 bytes are not within any memory", shape, touch, p, kLocal));
  CHECK(reports("thread (0, 0, 0) of block (0, 0, 0)", shape, touch, p, kBehind));
}

// ---- Global memory

__global__ void to_neighbour(int* words, bool same_block) {
  const int i = block() * int(blockDim.x) + thread();
  store(words + i, i);
  if (same_block) sync_threads();
  const int neighbour = same_block ? i ^ 1 : i ^ int(blockDim.x);
  store(words + 128 + i, load(words + neighbour));
}

__global__ void with_grid(int* words, int steps) {
  const int n = int(gridDim.x * blockDim.x);
  const int i = block() * int(blockDim.x) + thread();
  int value   = i;
  for (int t = 0; t < steps; ++t) {
    store(words + t % 2 * n + i, value);
    sync_grid();
    value = load(words + t % 2 * n + (i + int(blockDim.x)) % n) + 1;
  }
  store(words + 2 * n + i, value);
}

// Hands a value from CTA to CTA.
__global__ void chain(uint32_t* flags, int* words) {
  if (thread() == 0) {
    if (block() > 0) {
      while (load_acquire(flags + block()) == 0) {
      }
    }
    store(words + block(), block() ? load(words + block() - 1) + 1 : 7);
    store_release(flags + block() + 1, 1u);
  }
}

__global__ void constant(int* words, bool writes) {
  const int value = load_constant(words + thread());
  if (writes && thread() == 0) store(words + 40, value);
}

void test_global() {
  Array<int> words(3 * 4 * 64);
  CHECK(passes({2, 64}, to_neighbour, words.get(), true));
  CHECK(reports("race", {2, 64}, to_neighbour, words.get(), false));

  Shape grid       = {4, 64};
  grid.cooperative = true;
  CHECK(needs_all_its_barriers(1, [&] {
    if (!passes(grid, with_grid, words.get(), 5)) return false;
    for (int i = 0; i < 256; ++i) CHECK(words[size_t(512 + i)] == (i + 5 * 64) % 256 + 5);
    return true;
  }));
  CHECK(reports("not cooperative", {4, 64}, with_grid, words.get(), 5));

  Array<uint32_t> flags(9);
  CHECK(needs_all_its_barriers(2, [&] {
    for (int seed = 0; seed < 5; ++seed) {
      flags.data.assign(9, 0);
      Shape shape       = {8, 32};
      shape.cooperative = true;
      if (!error_of(uint64_t(seed), shape, chain, flags.get(), words.get()).empty()) return false;
      CHECK(words[7] == 14);
    }
    return true;
  }));

  CHECK(passes({1, 64}, constant, words.get(), false));
  CHECK(reports("load_constant", {1, 64}, constant, words.get(), true));
}

// ---- Order of kernels

bool previous_has_ended;  // seen by the emulated threads, unchecked
bool overlapped;

__global__ void step(const int* in, int* out, bool waits, emulation::Access access) {
  previous_has_ended = false;
  let_next_kernel_start();
  if (waits) wait_for_previous_kernel();
  const int i = block() * int(blockDim.x) + thread();
  store(out + i, load_as(in + i, access, emulation::Site::here()) + 1);
}

__global__ void observe() {
  if (!previous_has_ended) overlapped = true;
}
__global__ void linger(int* out) {
  previous_has_ended = false;
  let_next_kernel_start();
  for (int i = 0; i < 100; ++i) store(out, i);
  previous_has_ended = true;
}

// The second of three kernels, of which the first writes what the third reads before it waits:
// right if the second lets it start only when the first has ended.
__global__ void between(bool waits_first) {
  if (waits_first) wait_for_previous_kernel();
  let_next_kernel_start();
  if (!waits_first) wait_for_previous_kernel();
}

std::string run_steps(uint64_t seed, int* words, int steps, int without_wait,
                      emulation::Access access = emulation::kPastL1) {
  emulation_reset(seed);
  for (int t = 0; t < steps; ++t) {
    Shape shape        = {6, 32};
    shape.programmatic = true;
    launch(shape, step, words + t % 2 * 192, words + (t + 1) % 2 * 192, t != without_wait, access);
  }
  emulation_synchronize();
  return emulation_error() ? emulation_error() : "";
}

void test_order_of_kernels() {
  Array<int> words(2 * 192);
  CHECK(needs_all_its_barriers(1, [&] { return run_steps(1, words.get(), 4, -1).empty(); }));
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    words.data.assign(2 * 192, 0);
    CHECK(run_steps(seed, words.get(), 10, -1).empty());
    for (size_t i = 0; i < 192; ++i) CHECK(words[i] == 10);
    const std::string error = run_steps(seed, words.get(), 10, 5);
    CHECK(error.find("race") != std::string::npos);
    CHECK(error.find("the kernel") != std::string::npos);
    for (const emulation::Access access : {emulation::kPlain, emulation::kConstant}) {
      CHECK(run_steps(seed, words.get(), 3, -1, access).find("may overlap") != std::string::npos);
    }
  }

  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    for (const bool waits_first : {false, true}) {
      emulation_reset(seed);
      Shape shape = {6, 32};
      launch(shape, step, words.get(), words.get() + 192, false, emulation::kPlain);
      shape.programmatic = true;
      launch(shape, between, waits_first);
      launch(shape, step, words.get() + 192, words.get(), false, emulation::kConstant);
      CHECK(emulation_synchronize() == (waits_first ? 0 : 1));
    }
  }

  // They do overlap, but only with the attribute, and not on devices that cannot.
  const auto overlap = [&](bool programmatic) {
    overlapped = false;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
      emulation_reset(seed);
      Shape shape = {1, 1};
      launch(shape, linger, words.get());
      shape.programmatic = programmatic;
      launch(shape, observe);
      CHECK(emulation_synchronize() == 0);
    }
    return overlapped;
  };
  CHECK(overlap(true));
  CHECK(!overlap(false));
  emulation_set_device(8, 0, 108, 163 * 1024);
  CHECK(!overlap(true));
  emulation_set_device(9, 0, 132, 227 * 1024);

  // A launch without the attribute, or a memset, is behind all before.
  emulation_reset(1);
  launch({6, 32}, step, words.get(), words.get() + 192, true, emulation::kPlain);
  launch({6, 32}, step, words.get() + 192, words.get(), false, emulation::kConstant);
  CHECK(cudaMemsetAsync(words.get(), 0, 4) == cudaSuccess && words[0] == 0);
  Shape shape        = {6, 32};
  shape.programmatic = true;
  launch(shape, step, words.get(), words.get() + 192, false, emulation::kPlain);
  CHECK(cudaStreamSynchronize(nullptr) == cudaSuccess && words[192] == 1);
}

// ---- Clusters

uint64_t* barriers() { return reinterpret_cast<uint64_t*>(shared_memory()); }
constexpr int kBehindBarriers = 64;

// Every step, all threads of all CTAs send their value to each CTA. Two buffers: whoever has all
// of a step's values knows that all have read those of the step before.
__global__ void all_to_all(int* out, int steps, bool fence) {
  const int n = int(blockDim.x), size = cluster_size(), rank = cluster_rank();
  uint32_t* const buffers = reinterpret_cast<uint32_t*>(shared_memory() + kBehindBarriers);
  if (thread() == 0) {
    barrier_init(barriers(), 1);
    barrier_init(barriers() + 1, 1);
    if (fence) fence_barrier_init();
  }
  cluster_arrive();
  cluster_wait();
  uint32_t value = uint32_t(rank * n + thread());
  for (int t = 0; t < steps; ++t) {
    uint64_t* const barrier = barriers() + t % 2;
    uint32_t* const buffer  = buffers + t % 2 * size * n;
    if (thread() == 0) barrier_expect(barrier, size * n * 4);
    for (int peer = 0; peer < size; ++peer) {
      const uint32_t to = remote_address(shared_address(buffer + rank * n + thread()), peer);
      store_async(to, value, remote_address(shared_address(barrier), peer));
    }
    while (!barrier_try_wait(barrier, t / 2 % 2)) {
    }
    value = 0;
    for (int i = 0; i < size * n; ++i) value += load(buffer + i) * uint32_t(i + rank);
  }
  store(out + block() * n + thread(), int(value));
}

void test_all_to_all() {
  Array<int> out(4 * 32);
  Shape shape    = {4, 32};
  shape.cluster  = 2;
  const auto run = [&] {
    for (uint64_t seed = 0; seed < 5; ++seed) {
      if (!error_of(seed, shape, all_to_all, out.get(), 9, true).empty()) return false;
    }
    return true;
  };
  CHECK(needs_all_its_barriers(7, run));
  std::vector<uint32_t> values(64);
  for (uint32_t i = 0; i < 64; ++i) values[i] = i;
  for (int t = 0; t < 9; ++t) {
    uint32_t sums[2] = {};
    for (uint32_t i = 0; i < 64; ++i) {
      sums[0] += values[i] * i;
      sums[1] += values[i] * (i + 1);
    }
    for (uint32_t i = 0; i < 64; ++i) values[i] = sums[i / 32];
  }
  for (size_t i = 0; i < 128; ++i) CHECK(uint32_t(out[i]) == values[i % 64]);
  CHECK(reports("fence_barrier_init", shape, all_to_all, out.get(), 3, false));
}

enum Hand { kHandRight, kNoEmpty, kNoWaitAtEnd, kEndEarly };

// The first CTA sends, one buffer; the second says when it has read.
__global__ void hand_over(int* out, int steps, Hand how) {
  uint64_t* const full   = barriers();
  uint64_t* const empty  = barriers() + 1;
  uint32_t* const buffer = reinterpret_cast<uint32_t*>(shared_memory() + kBehindBarriers);
  const int n            = int(blockDim.x);
  if (thread() == 0) {
    barrier_init(full, 1);
    barrier_init(empty, n);
    fence_barrier_init();
  }
  cluster_arrive();
  cluster_wait();
  const uint32_t remote_full  = remote_address(shared_address(full), 1);
  const uint32_t remote_empty = remote_address(shared_address(empty), 0);
  if (how == kEndEarly && cluster_rank() == 1) return;
  int sum = 0;
  for (int t = 0; t < steps; ++t) {
    if (cluster_rank() == 0) {
      if (t > 0 && how != kNoEmpty) {
        while (!barrier_try_wait(empty, (t - 1) % 2)) {
        }
      }
      store_async(remote_address(shared_address(buffer + thread()), 1), uint32_t(t), remote_full);
    } else {
      if (thread() == 0) barrier_expect(full, 4 * n);
      while (!barrier_try_wait(full, t % 2)) {
      }
      sum += int(load(buffer + (thread() + 1) % n));
      barrier_arrive_remote(remote_empty);
    }
  }
  if (cluster_rank() == 0 && how != kNoWaitAtEnd) {
    while (!barrier_try_wait(empty, (steps - 1) % 2)) {
    }
  }
  if (cluster_rank() == 1) store(out + thread(), sum);
}

// Two warps of one CTA, the one writing, the other reading.
__global__ void producer_and_consumer(int* out, int steps) {
  uint64_t* const full  = barriers();
  uint64_t* const empty = barriers() + 1;
  int* const buffer     = reinterpret_cast<int*>(shared_memory() + kBehindBarriers);
  if (thread() == 0) {
    barrier_init(full, 32);
    barrier_init(empty, 32);
  }
  sync_threads();
  const int lane = thread() % 32;
  int sum        = 0;
  for (int t = 0; t < steps; ++t) {
    if (thread() < 32) {
      if (t > 0) {
        while (!barrier_try_wait(empty, (t - 1) % 2)) {
        }
      }
      store(buffer + lane, t);
      barrier_arrive(full);
    } else {
      while (!barrier_try_wait(full, t % 2)) {
      }
      sum += load(buffer + (lane ^ 1));
      barrier_arrive(empty);
    }
  }
  if (thread() >= 32) store(out + lane, sum);
}

__global__ void end_with_store_under_way() {
  if (thread() == 0) {
    barrier_init(barriers(), 1);
    fence_barrier_init();
  }
  cluster_arrive();
  cluster_wait();
  if (cluster_rank() == 0 && thread() == 0) {
    const uint32_t barrier = remote_address(shared_address(barriers()), 1);
    store_async(remote_address(shared_address(barriers() + 8), 1), 1, barrier);
  }
}

void test_barriers_in_shared_memory() {
  Array<int> out(64);
  Shape shape   = {2, 32};
  shape.cluster = 2;
  CHECK(needs_all_its_barriers(10, [&] {
    if (!passes(shape, hand_over, out.get(), 6, kHandRight)) return false;
    for (size_t i = 0; i < 32; ++i) CHECK(out[i] == 15);
    return true;
  }));
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    CHECK(!error_of(seed, shape, hand_over, out.get(), 6, kNoEmpty).empty());
  }
  CHECK(
      reports(" end", shape, hand_over, out.get(), 1, kEndEarly));  // has ended, or ends too early
  CHECK(reports("barrier_arrive_remote", shape, hand_over, out.get(), 1, kNoWaitAtEnd));
  CHECK(reports("store_async", shape, end_with_store_under_way));

  CHECK(needs_all_its_barriers(7, [&] {
    if (!passes({1, 64}, producer_and_consumer, out.get(), 6)) return false;
    for (size_t i = 0; i < 32; ++i) CHECK(out[i] == 15);
    return true;
  }));

  emulation_set_device(8, 0, 108, 163 * 1024);
  CHECK(error_of(1, shape, end_with_store_under_way) == "cudaErrorInvalidConfiguration");
  shape.cluster = 1;
  CHECK(reports("no clusters", shape, end_with_store_under_way));
  emulation_set_device(9, 0, 132, 227 * 1024);
}

// A peer's shared memory is only there between barriers of the cluster.
__global__ void before_the_barrier(bool barrier) {
  if (thread() == 0) {
    barrier_init(barriers(), 1);
    fence_barrier_init();
  }
  if (barrier) {
    cluster_arrive();
    cluster_wait();
  }
  if (thread() == 0) {
    barrier_arrive_remote(remote_address(shared_address(barriers()), 1 - cluster_rank()));
    while (!barrier_try_wait(barriers(), 0)) {
    }
  }
}

void test_start_of_cluster() {
  Shape shape   = {6, 32};
  shape.cluster = 2;
  CHECK(passes(shape, before_the_barrier, true));
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    CHECK(!error_of(seed, shape, before_the_barrier, false).empty());
  }
}

// ---- What does not end

enum Hang { kTwoSites, kNobodyArrives, kSpin, kPartOfWarp, kGridEnded };
__global__ void hang(uint32_t* flag, Hang how) {
  switch (how) {
    case kTwoSites:
      if (thread() < 32) {
        sync_threads();
      } else {
        sync_threads();
      }
      break;
    case kNobodyArrives:
      if (thread() == 0) {
        barrier_init(barriers(), 1);
        while (!barrier_try_wait(barriers(), 0)) {
        }
      }
      sync_threads();
      break;
    case kSpin:
      while (load_acquire(flag) == 0) {
      }
      break;
    case kPartOfWarp:
      if (thread() % 2) {
        sync_threads();
      } else {
        sync_warp();
      }
      break;
    case kGridEnded:
      if (thread() != 3) sync_grid();
  }
}

void test_deadlocks() {
  Array<uint32_t> flag(1);
  Shape shape       = {2, 64};
  shape.cooperative = true;
  CHECK(reports("others wait at", shape, hang, flag.get(), kTwoSites));
  CHECK(reports("deadlock", shape, hang, flag.get(), kNobodyArrives));
  CHECK(reports("barrier_try_wait", shape, hang, flag.get(), kNobodyArrives));
  CHECK(reports("deadlock", shape, hang, flag.get(), kSpin));
  CHECK(reports("deadlock", shape, hang, flag.get(), kPartOfWarp));
  CHECK(reports("at sync_grid", shape, hang, flag.get(), kGridEnded));
  emulation_set_switch_limit(100);
  Array<int> out(96);
  CHECK(reports("too many switches", {1, 96}, exchange, out.get(), 10, 2, true));
  emulation_set_switch_limit(200000000);
  CHECK(passes({1, 96}, exchange, out.get(), 10, 2, true));  // nothing is left of all that
}

// ---- The runtime API and the seeds

__global__ void nothing() {}
__global__ void where(int* out) {
  const unsigned cta = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned t   = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  store(out + cta * 24 + t, int(cta * 24 + t));
}

void test_api() {
  emulation_reset(1);
  Shape shape = {1, 32, 48 * 1024};
  CHECK(launch(shape, nothing) == cudaSuccess);
  shape.shared += 1;
  CHECK(launch(shape, nothing) == cudaErrorInvalidValue);
  CHECK(cudaPeekAtLastError() == cudaErrorInvalidValue);
  CHECK(cudaGetLastError() == cudaErrorInvalidValue && cudaGetLastError() == cudaSuccess);
  const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
  CHECK(cudaFuncSetAttribute(nothing, most, 227 * 1024 + 1) == cudaErrorInvalidValue);
  CHECK(cudaFuncSetAttribute(nothing, most, 227 * 1024) == cudaSuccess);
  shape.shared = 227 * 1024;
  CHECK(launch(shape, nothing) == cudaSuccess);
  cudaFuncAttributes attributes;
  CHECK(cudaFuncGetAttributes(&attributes, nothing) == cudaSuccess);
  CHECK(attributes.maxDynamicSharedSizeBytes == 227 * 1024);
  int value = 0;
  CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&value, nothing, 256, 100 * 1024) ==
        cudaSuccess);
  CHECK(value == 2);
  CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0) == cudaSuccess);
  CHECK(value == 132);
  CHECK(launch({1, 1025}, nothing) == cudaErrorInvalidConfiguration);
  CHECK(launch({0, 32}, nothing) == cudaErrorInvalidConfiguration);
  shape             = {133 * 32, 64, 0};
  shape.cooperative = true;
  CHECK(launch(shape, nothing) == cudaErrorCooperativeLaunchTooLarge);
  shape         = {6, 32};
  shape.cluster = 4;
  CHECK(launch(shape, nothing) == cudaErrorInvalidConfiguration);
  CHECK(emulation_synchronize() == 0);
  emulation_set_device_count(0);
  CHECK(cudaGetDeviceCount(&value) == cudaErrorNoDevice && value == 0);
  emulation_set_device_count(1);
  CHECK(std::string(cudaGetErrorName(cudaErrorLaunchFailure)) == "cudaErrorLaunchFailure");

  // After an error nothing runs until a reset.
  CHECK(!error_of(1, {1, 1, 100}, touch, nullptr, kLocal).empty());
  CHECK(launch({}, nothing) == cudaErrorLaunchFailure);
  emulation_reset(1);
  CHECK(launch({}, nothing) == cudaSuccess && emulation_synchronize() == 0);

  Array<int> out(24 * 24, -1);
  cudaLaunchAttribute cluster;
  cluster.id                = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim    = {1, 3, 2};
  cudaLaunchConfig_t config = {};
  config.gridDim            = {2, 3, 4};
  config.blockDim           = {4, 3, 2};
  config.attrs              = &cluster;
  config.numAttrs           = 1;
  CHECK(cudaLaunchKernelEx(&config, where, out.get()) == cudaSuccess);
  CHECK(emulation_synchronize() == 0);
  for (int i = 0; i < 24 * 24; ++i) CHECK(out[size_t(i)] == i);
}

unsigned order_of_threads;
__global__ void note_order() {
  sync_threads();
  order_of_threads = order_of_threads * 31 + unsigned(thread());
}

void test_seeds() {
  std::set<unsigned> orders;
  for (uint64_t seed = 0; seed < 10; ++seed) {
    unsigned first = 0;
    for (int repeat = 0; repeat < 2; ++repeat) {
      order_of_threads = 0;
      CHECK(error_of(seed, {3, 64}, note_order).empty());
      CHECK(repeat == 0 || order_of_threads == first);
      first = order_of_threads;
    }
    orders.insert(first);
  }
  CHECK(orders.size() == 10);
}

void test_sites() {
  // sync_threads of `reduce` is in the list once, by its place.
  int found = 0;
  for (int i = 0; i < emulation_num_sites(); ++i) {
    const std::string site  = emulation_site(i);
    found                  += site.find("test_emulation.cpp:") != std::string::npos &&
                              site.find(" sync_threads") != std::string::npos;
  }
  CHECK(found > 3);
}

}  // namespace

int main() {
  test_double_buffer();
  test_reduction();
  test_granularity_and_readers();
  test_warps();
  test_copies();
  test_products();
  test_numbers();
  test_addresses();
  test_global();
  test_order_of_kernels();
  test_all_to_all();
  test_barriers_in_shared_memory();
  test_start_of_cluster();
  test_deadlocks();
  test_api();
  test_seeds();
  test_sites();
  std::printf("%d wrong\n", wrong);
  return wrong > 255 ? 255 : wrong;
}
