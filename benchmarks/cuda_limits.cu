// What bounds a time step on a GPU, whatever is computed in it: barriers of a grid, of some of its
// CTAs and of a cluster, an exchange of states within a cluster, and the price of one more kernel.
// bench_cuda.py compiles and runs it:
//
//   nvcc -O3 -std=c++17 -arch=sm_90a -I csrc/cuda benchmarks/cuda_limits.cu -o cuda_limits
//
// Prints one JSON object a line. Times are microseconds, medians of kRounds; that of an iteration is
// the difference between many and half as many, so that the launch drops out.
#include <ptx.cuh>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

using namespace fusedrnn;

namespace {

constexpr int kRounds     = 7;
constexpr int kIterations = 10000;
constexpr int kKernels    = 2000;                  // of a chain
constexpr int kFlagStride = 32;                    // words: each flag has a cache line
constexpr int kStateBytes = 8192;                  // such as h of 8 rows and 512 units in bfloat16
constexpr int kWeights    = 200 << 10;             // bytes of shared memory that a CTA holds
constexpr int kExchange   = 2 * kStateBytes + 16;  // and two barriers

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  fprintf(stderr, "cuda_limits: %s: %s\n", what, cudaGetErrorString(error));
  exit(1);
}
#define CHECK(call) check(call, #call)

// ---- Kernels

__global__ void grid_barriers(int n) {
  for (int i = 0; i < n; ++i) sync_grid();
}

// The first of each `group` consecutive CTAs' flags is flags[first * kFlagStride]. A CTA publishes
// the number of its step, and waits until all of its group have.
__global__ void flag_barriers(uint32_t* flags, int group, uint32_t before, int n) {
  const int first = int(blockIdx.x) / group * group;
  for (int i = 1; i <= n; ++i) {
    const uint32_t now = before + uint32_t(i);
    sync_threads();
    if (threadIdx.x == 0) store_release(flags + blockIdx.x * kFlagStride, now);
    if (int(threadIdx.x) < group) {
      const uint32_t* flag = flags + (first + int(threadIdx.x)) * kFlagStride;
      while (int32_t(load_acquire(flag) - now) < 0) {
      }
    }
    sync_threads();
  }
}

__global__ void cluster_barriers(int n) {
  for (int i = 0; i < n; ++i) {
    cluster_arrive();
    cluster_wait();
  }
}

// All-gather of a state of kStateBytes: each CTA of a cluster has an equal part of it, and sends that
// to all others. Two buffers by turns, a barrier each. What arrives is checked at the end.
__global__ void cluster_exchange(uint32_t* wrong, int n) {
  const int rank = cluster_rank(), size = cluster_size();
  const int words    = kStateBytes / 4 / size;  // of one part
  auto* barriers     = reinterpret_cast<uint64_t*>(shared_memory() + 2 * kStateBytes);
  const auto state   = [](int buffer) { return shared_memory() + buffer * kStateBytes; };
  const auto content = [](int step, int from, int word) {
    return uint32_t(step * 7919 + from * 1024 + word);
  };
  if (threadIdx.x == 0) {
    barrier_init(&barriers[0], 1);
    barrier_init(&barriers[1], 1);
    fence_barrier_init();
  }
  cluster_arrive();
  cluster_wait();
  for (int i = 0; i < n; ++i) {
    const int buffer = i % 2;
    if (threadIdx.x == 0) barrier_expect(&barriers[buffer], (size - 1) * words * 4);
    for (int j = threadIdx.x; j < (size - 1) * words; j += blockDim.x) {
      const int peer = (rank + 1 + j / words) % size, word = j % words;
      const uint32_t to = shared_address(state(buffer)) + uint32_t(rank * words + word) * 4;
      store_async(remote_address(to, peer), content(i, rank, word),
                  remote_address(shared_address(&barriers[buffer]), peer));
    }
    while (!barrier_try_wait(&barriers[buffer], i / 2 % 2)) {
    }
    sync_threads();
  }
  const auto* last = reinterpret_cast<const uint32_t*>(state((n - 1) % 2));
  for (int j = threadIdx.x; j < size * words; j += blockDim.x) {
    const int from = j / words;
    if (from != rank && load(last + j) != content(n - 1, from, j % words)) store(wrong, 1u);
  }
  cluster_arrive();  // nobody ends while another may still send to it
  cluster_wait();
}

// The least that a time step of the step path does.
__global__ void step(float* x) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  float* mine = x + blockIdx.x * blockDim.x + threadIdx.x;
  store(mine, load(mine) + 1);
}

// For its occupancy alone.
__global__ void holds_weights(unsigned char* x) {
  if (x) store(shared_memory(), load(x));
}

// ---- Launches

struct Shape {
  int ctas, threads, shared = 0, cluster = 1;
  bool cooperative = false, overlaps = false;
};

struct Launch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[3]{};

  explicit Launch(const Shape& shape, cudaStream_t stream = nullptr) {
    config.gridDim          = dim3(unsigned(shape.ctas));
    config.blockDim         = dim3(unsigned(shape.threads));
    config.dynamicSmemBytes = size_t(shape.shared);
    config.stream           = stream;
    config.attrs            = attributes;
    if (shape.cluster > 1) {
      auto& attribute          = attributes[config.numAttrs++];
      attribute.id             = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {unsigned(shape.cluster), 1, 1};
    }
    if (shape.cooperative) {
      auto& attribute           = attributes[config.numAttrs++];
      attribute.id              = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
    if (shape.overlaps) {
      auto& attribute = attributes[config.numAttrs++];
      attribute.id    = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
  }
  Launch(const Launch&)            = delete;
  Launch& operator=(const Launch&) = delete;
};

template <class Kernel>
void allow(Kernel* kernel, int shared) {
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
}

// How many clusters of the shape the card runs at once; 0 where none.
template <class Kernel>
int resident_clusters(Kernel* kernel, const Shape& shape) {
  int count = 0;
  const Launch launch(shape);
  if (cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

// ---- Times

using Work = std::function<void(int n)>;

double microseconds(const Work& work, int n) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int round = 0; round <= kRounds; ++round) {
    CHECK(cudaEventRecord(begin));
    work(n);
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float milliseconds = 0;
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    if (round > 0) times.push_back(milliseconds);  // the first warms up
  }
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2] * 1e3;
}

double of_one(const Work& work, int n) {
  return (microseconds(work, n) - microseconds(work, n / 2)) / (n - n / 2);
}

void print(const char* what, const Shape& shape, const char* more, double us) {
  printf("{\"what\": \"%s\", \"ctas\": %d, \"threads\": %d, %s\"us\": %.4f}\n", what, shape.ctas,
         shape.threads, more, us);
  fflush(stdout);
}

std::string number(const char* name, int value) {
  return "\"" + std::string(name) + "\": " + std::to_string(value) + ", ";
}

void grids(int multiprocessors) {
  for (const int threads : {128, 256, 512}) {
    const Shape shape{multiprocessors, threads, 0, 1, true};
    print("grid.sync", shape, "",
          of_one(
              [&](int n) {
                const Launch launch(shape);
                CHECK(cudaLaunchKernelEx(&launch.config, grid_barriers, n));
              },
              kIterations));
  }
}

void groups(int multiprocessors) {
  uint32_t* flags = nullptr;
  CHECK(cudaMalloc(&flags, sizeof *flags * kFlagStride * size_t(multiprocessors)));
  for (const int group : {16, 32, 64, 128}) {
    // One group alone, then as many as there is room for.
    for (int count = 1; group * count <= multiprocessors; count = multiprocessors / group) {
      const Shape shape{group * count, 256, 0, 1, true};
      CHECK(cudaMemset(flags, 0, sizeof *flags * kFlagStride * size_t(multiprocessors)));
      uint32_t before = 0;
      print("barrier by flags", shape, number("group", group).c_str(),
            of_one(
                [&](int n) {
                  const Launch launch(shape);
                  CHECK(cudaLaunchKernelEx(&launch.config, flag_barriers, flags, group, before, n));
                  before += uint32_t(n);
                },
                kIterations));
      if (count == multiprocessors / group) break;
    }
  }
  CHECK(cudaFree(flags));
}

void clusters() {
  allow(cluster_barriers, 0);
  allow(cluster_exchange, kExchange);
  uint32_t* wrong = nullptr;
  CHECK(cudaMalloc(&wrong, sizeof *wrong));
  CHECK(cudaMemset(wrong, 0, sizeof *wrong));
  for (const int size : {2, 8, 16}) {
    Shape shape{size, 256, 0, size};
    const int most = resident_clusters(cluster_barriers, shape);
    for (const int count : {1, 8}) {
      if (count > most) continue;
      shape.ctas = size * count;
      print("cluster barrier", shape, number("cluster", size).c_str(),
            of_one(
                [&](int n) {
                  const Launch launch(shape);
                  CHECK(cudaLaunchKernelEx(&launch.config, cluster_barriers, n));
                },
                kIterations));
    }
  }
  for (const int size : {8, 16}) {
    Shape shape{size, 256, kExchange, size};
    const int most = resident_clusters(cluster_exchange, shape);
    for (const int count : {1, 8}) {
      if (count > most) continue;
      shape.ctas       = size * count;
      const auto sizes = number("cluster", size) + number("bytes", kStateBytes);
      print("cluster exchange", shape, sizes.c_str(),
            of_one(
                [&](int n) {
                  const Launch launch(shape);
                  CHECK(cudaLaunchKernelEx(&launch.config, cluster_exchange, wrong, n));
                },
                kIterations));
    }
  }
  uint32_t found = 0;
  CHECK(cudaMemcpy(&found, wrong, sizeof found, cudaMemcpyDeviceToHost));
  CHECK(cudaFree(wrong));
  if (found) {
    fprintf(stderr, "cuda_limits: cluster_exchange received other words than were sent\n");
    exit(1);
  }
  int most_shared = 0;
  CHECK(cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
  if (most_shared < kWeights) return;  // none, then
  allow(holds_weights, kWeights);
  for (const int size : {8, 16}) {
    const Shape shape{size, 256, kWeights, size};
    printf("{\"what\": \"resident clusters\", \"cluster\": %d, \"shared\": %d, \"count\": %d}\n",
           size, kWeights, resident_clusters(holds_weights, shape));
  }
}

void chains(int multiprocessors) {
  float* x            = nullptr;
  cudaStream_t stream = nullptr;
  CHECK(cudaMalloc(&x, sizeof *x * 128 * size_t(multiprocessors)));
  CHECK(cudaMemset(x, 0, sizeof *x * 128 * size_t(multiprocessors)));
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  for (const int ctas : {1, multiprocessors}) {
    for (const bool overlaps : {false, true}) {
      Shape shape{ctas, 128};
      shape.overlaps  = overlaps;
      const auto* how = overlaps ? "\"programmatic\": true, " : "\"programmatic\": false, ";
      const auto go   = [&](int n, cudaStream_t on) {
        const Launch launch(shape, on);
        for (int i = 0; i < n; ++i) CHECK(cudaLaunchKernelEx(&launch.config, step, x));
      };
      print("kernel launched", shape, how, of_one([&](int n) { go(n, nullptr); }, kKernels));
      cudaGraphExec_t graphs[2]{};  // of half as many, and of all
      for (const int half : {1, 0}) {
        cudaGraph_t graph = nullptr;
        CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        go(half ? kKernels / 2 : kKernels, stream);
        CHECK(cudaStreamEndCapture(stream, &graph));
        CHECK(cudaGraphInstantiate(&graphs[1 - half], graph, 0));
        CHECK(cudaGraphDestroy(graph));
      }
      print(
          "kernel of a graph", shape, how,
          of_one([&](int n) { CHECK(cudaGraphLaunch(graphs[n == kKernels], nullptr)); }, kKernels));
      for (const auto graph : graphs) CHECK(cudaGraphExecDestroy(graph));
    }
  }
  CHECK(cudaStreamDestroy(stream));
  CHECK(cudaFree(x));
}

}  // namespace

int main() {
  int major = 0, minor = 0, multiprocessors = 0;
  CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0));
  CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  if (major < 9) {
    fprintf(stderr, "cuda_limits: clusters need compute capability 9.0, this GPU has %d.%d\n",
            major, minor);
    return 1;
  }
  grids(multiprocessors);
  groups(multiprocessors);
  clusters();
  chains(multiprocessors);
  CHECK(cudaDeviceSynchronize());
  return 0;
}
