// The recurrent product on one warp: 16 units of the weights times 8 rows of states, for each kind
// of number. HOW, in registers; where the operands come from is step.cuh's and block.cuh's.
//
// Both operands are read as vectors of 16 bytes along K, the dimension that is summed over, which
// is contiguous in both. A fragment is one warp's share of kBlock numbers of K:
//
//   weights  Vec16[2] a lane: of unit lane / 4 and of unit lane / 4 + 8, one each or (tensor cores) both
//            in turns, as an instruction wants them: four words that lie together
//   states   Vec16[kStateVectors] a lane, of the rows that state_row names
//   sums     4 a lane: units lane / 4 and lane / 4 + 8 (upper bit) times rows 2 * (lane % 4) and
//            that + 1 (lower bit), whatever the kind of number, as the mma instructions have it
//
// Which k a lane holds is free as long as both operands agree; so each lane takes 16 bytes that lie
// together, where the instructions' own order would take 4.
#pragma once

#include "scalar.cuh"

namespace fusedrnn {
namespace {

constexpr int kWarp     = 32;
constexpr int kUnitTile = 16;  // units of a warp's product
constexpr int kRowTile  = 8;   // rows of one
constexpr int kSums     = 4;   // numbers of the product in a lane

// Where in a tile a lane's i-th sum lies.
__device__ __forceinline__ int sum_unit(int lane, int i) { return lane / 4 + 8 * (i / 2); }
__device__ __forceinline__ int sum_row(int lane, int i) { return 2 * (lane % 4) + i % 2; }

template <class T>
__device__ __forceinline__ T element(const Vec16& v, int i) {
  T x;
  memcpy(&x, reinterpret_cast<const char*>(&v) + i * sizeof(T), sizeof x);
  return x;
}

// Exact products: multiply-adds in the type itself. kVector numbers of K at a time, the four lanes
// that share a unit reading the same.
template <class T>
struct Exact {
  using scalar_t                     = T;               // storage
  using acc_t                        = T;               // arithmetic
  static constexpr int kVector       = 16 / sizeof(T);  // numbers in a Vec16
  static constexpr int kBlock        = kVector;
  static constexpr int kWeightLanes  = 8;  // different vectors in one half of a weight fragment
  static constexpr int kStateVectors = 2;

  static __device__ __forceinline__ int weight_lane(int lane) { return lane / 4; }
  // Of number i in vector `half` of those that are lane's: its unit, and its k in the block.
  static __device__ __forceinline__ int weight_unit(int lane, int half, int) {
    return lane + 8 * half;
  }
  static __device__ __forceinline__ int weight_k(int, int, int i) { return i; }
  static __device__ __forceinline__ int state_row(int lane, int i) { return sum_row(lane, i); }
  static __device__ __forceinline__ int state_k(int) { return 0; }
  static __device__ __forceinline__ Vec16 prepared(const Vec16& v) { return v; }

  static __device__ __forceinline__ void multiply(acc_t (&sums)[kSums], const Vec16 (&weights)[2],
                                                  const Vec16 (&states)[kStateVectors]) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        sums[i] = fma(element<T>(weights[i / 2], k), element<T>(states[i % 2], k), sums[i]);
      }
    }
  }
};

// Tensor cores, float32 accumulation: two mma instructions take the words of the vectors in pairs.
template <class T>
struct TensorCore {
  using scalar_t                     = T;
  using acc_t                        = float;
  static constexpr int kVector       = 16 / sizeof(T);
  static constexpr int kOfWord       = 4 / sizeof(T);
  static constexpr int kBlock        = 4 * kVector;
  static constexpr int kWeightLanes  = kWarp;
  static constexpr int kStateVectors = 1;

  static __device__ __forceinline__ int weight_lane(int lane) { return lane; }
  static __device__ __forceinline__ int weight_unit(int lane, int, int i) {
    return lane / 4 + i / kOfWord % 2 * 8;
  }
  static __device__ __forceinline__ int weight_k(int lane, int half, int i) {
    return state_k(lane) + (2 * half + i / kOfWord / 2) * kOfWord + i % kOfWord;
  }
  static __device__ __forceinline__ int state_row(int lane, int) { return lane / 4; }
  static __device__ __forceinline__ int state_k(int lane) { return lane % 4 * kVector; }

  static __device__ __forceinline__ Vec16 prepared(Vec16 v) {
    if constexpr (sizeof(T) == 4) {  // TF32: float32 numbers, rounded
#pragma unroll
      for (uint32_t& word : v.word) word = to_tf32(from_bits(int32_t(word)));
    }
    return v;
  }

  static __device__ __forceinline__ void mma(float (&d)[kSums], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    if constexpr (sizeof(T) == 4) {
      mma_tf32(d, a, b);
    } else if constexpr (std::is_same_v<T, bfloat16>) {
      mma_bf16(d, a, b);
    } else {
      mma_f16(d, a, b);
    }
  }

  static __device__ __forceinline__ void multiply(acc_t (&sums)[kSums], const Vec16 (&weights)[2],
                                                  const Vec16 (&states)[kStateVectors]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t b[2] = {states[0].word[2 * half], states[0].word[2 * half + 1]};
      mma(sums, weights[half].word, b);
    }
  }
};

using Float64  = Exact<double>;
using Float32  = Exact<float>;
using Tf32     = TensorCore<float>;
using Bfloat16 = TensorCore<bfloat16>;
using Float16  = TensorCore<float16>;

// Weights in fragment order, [tiles of units][blocks of K][segments][2 halves][kWeightLanes]: what a
// warp reads for one block lies together, and there are no edges: units and k that a matrix has not
// are zero. A segment is a gate, forward; backward, the part of K that belongs to a gate.
template <class N>
FUSEDRNN_INLINE constexpr int blocks_of(int size) {
  return (size + N::kBlock - 1) / N::kBlock;
}
FUSEDRNN_INLINE constexpr int tiles_of(int units) { return (units + kUnitTile - 1) / kUnitTile; }

template <class N>
constexpr int kFragment = 2 * N::kWeightLanes;  // Vec16 of one (tile, block, segment)

template <class N>
FUSEDRNN_INLINE int64_t packed_vectors(int units, int size, int segments) {
  return int64_t(tiles_of(units)) * blocks_of<N>(size) * segments * kFragment<N>;
}

template <class N>
__device__ __forceinline__ void load_weights(Vec16 (&weights)[2], const Vec16* fragment, int lane) {
  weights[0] = load(fragment + N::weight_lane(lane));
  weights[1] = load(fragment + N::kWeightLanes + N::weight_lane(lane));
}

}  // namespace
}  // namespace fusedrnn
