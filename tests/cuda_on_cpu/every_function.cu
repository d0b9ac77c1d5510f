// Every function of ptx.cuh once, for nvcc to compile and ptxas to assemble. It is not run.
#include <cuda/ptx.cuh>

using namespace fusedrnn;

namespace {

template <class T>
__device__ void memory(T* global) {
  T* shared = reinterpret_cast<T*>(shared_memory());
  store(shared + threadIdx.x, load_constant(global));
  sync_threads();
  store(global + 1, load(shared));
}

}  // namespace

extern "C" __global__ void every_function(unsigned char* bytes, uint16_t* halves, uint32_t* words,
                                          double* doubles, Vec16* vectors, float* floats) {
  wait_for_previous_kernel();
  memory(bytes);
  memory(halves);
  memory(words);
  memory(doubles);
  memory(vectors);

  copy_async(shared_memory(), vectors);
  commit_copies();
  wait_copies<1>();
  wait_copies<0>();
  store_release(words, load_acquire(words + 1));
  store(halves, load_past_l1(halves + 1));
  store(words, load_past_l1(words + 1));
  store(doubles, load_past_l1(doubles + 1));
  store(vectors, load_past_l1(vectors + 1));

  sync_warp();
  floats[0]  += shuffle(floats[1], 3) + shuffle_xor(floats[2], 1);
  doubles[0] += shuffle(doubles[1], 3) + shuffle_xor(doubles[2], 1);

  float d[4]          = {};
  const uint32_t a[4] = {to_tf32(floats[3]), to_tf32(floats[4]), words[2], words[3]};
  const uint32_t b[2] = {words[4], words[5]};
  mma_bf16(d, a, b);
  mma_f16(d, a, b);
  mma_tf32(d, a, b);
  floats[5] = d[0] + d[1] + d[2] + d[3];
  floats[6] = to_float(to_bfloat16(floats[7])) + to_float(to_float16(floats[8]));
  floats[9] = approximate_reciprocal(floats[10]);
  let_next_kernel_start();

  uint64_t* barrier = reinterpret_cast<uint64_t*>(shared_memory());
  barrier_init(barrier, 3);
  fence_barrier_init();
  cluster_arrive();
  cluster_wait();
  const int peer        = (cluster_rank() + 1) % cluster_size();
  const uint32_t remote = remote_address(shared_address(barrier), peer);
  barrier_expect(barrier, 4);
  store_async(remote + 8, 7, remote);
  barrier_arrive(barrier);
  barrier_arrive_remote(remote);
  while (!barrier_try_wait(barrier, 0)) {
  }
  sync_grid();
}
