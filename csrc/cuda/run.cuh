// One layer's call on the host: packs the weights, launches the path's kernels. A .cu file for each
// kind of number includes it, so that they compile side by side.
#pragma once

#include "block.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "pack.cuh"
#include "previous.cuh"
#include "step.cuh"

namespace fusedrnn {
namespace {

inline unsigned ceil_div(int64_t a, int64_t b) { return unsigned((a + b - 1) / b); }

inline int64_t rows_of(const CudaCall& call) {
  return rows_before(call.sequences, call.sequences.T);
}

inline cudaStream_t stream_of(const CudaCall& call) {
  return static_cast<cudaStream_t>(call.stream);
}

// The sequences as kernels read them that walk over time themselves.
inline Sequences on_device(const CudaCall& call) {
  Sequences sequences = call.sequences;
  if (!sequences.offsets) return sequences;
  for (int64_t begin = 0; begin <= sequences.T; begin += kUploaded) {
    Upload part{};
    const int count = int(min64(kUploaded, sequences.T + 1 - begin));
    memcpy(part.number, sequences.offsets + begin, size_t(count) * sizeof(int64_t));
    launch(upload, dim3(1), kUploaded, 0, stream_of(call), false, part, call.device_offsets + begin,
           count);
  }
  sequences.offsets = call.device_offsets;
  return sequences;
}

// The launches for cell C and numbers N.
template <class N, class C>
struct Run {
  using scalar_t = typename N::scalar_t;
  using acc_t    = typename N::acc_t;

  static size_t workspace(int H, int P, int D, bool projected) {
    // Forward has H units and K = P, backward P units and K = H; each direction its own.
    const auto most = [](int64_t a, int64_t b) { return a > b ? a : b; };
    int64_t vectors = most(packed_vectors<N>(H, P, C::kGates), packed_vectors<N>(P, H, C::kGates));
    if (projected) vectors += most(packed_vectors<N>(H, P, 1), packed_vectors<N>(P, H, 1));
    return size_t(vectors * D) * sizeof(Vec16);
  }

  static void pack_weights(const Packing<scalar_t>& packing, cudaStream_t stream) {
    const int64_t vectors    = packed_vectors<N>(packing.units, packing.size, packing.segments);
    constexpr unsigned kMost = 1024;  // CTAs; more numbers are a thread's loop
    const unsigned ctas      = ceil_div(vectors, kPackThreads);
    launch(pack<N>, dim3(ctas < kMost ? ctas : kMost), kPackThreads, 0, stream, false, packing);
  }

  // Packs all directions' weights into the workspace.
  template <class Layer, class Args>
  static void pack_all(Layer& layer, const Args& args, bool backward) {
    auto* packed = static_cast<Vec16*>(args.workspace);
    const int H = args.H, P = args.P, G = C::kGates;
    for (int d = 0; d < args.D; ++d) {
      Packing<scalar_t> hh{
          static_cast<const scalar_t*>(args.weight_hh[d]), packed, H, P, G, {}, P, 1};
      for (int s = 0; s < G; ++s) hh.offset[s] = int64_t(s) * H * P;
      if (backward) {
        hh.units = P, hh.size = H, hh.unit_stride = 1, hh.k_stride = P;
        for (int s = 0; s < G; ++s) hh.offset[s] = int64_t((C::kRecurrentRow + s) % G) * H * P;
      }
      pack_weights(hh, stream_of(args));
      layer.weight_hh[d]  = packed;
      packed             += packed_vectors<N>(hh.units, hh.size, G);
      if (!args.weight_hr[d]) continue;
      Packing<scalar_t> hr{
          static_cast<const scalar_t*>(args.weight_hr[d]), packed, P, H, 1, {}, H, 1};
      if (backward) hr.units = H, hr.size = P, hr.unit_stride = 1, hr.k_stride = H;
      pack_weights(hr, stream_of(args));
      layer.weight_hr[d]  = packed;
      packed             += packed_vectors<N>(hr.units, hr.size, 1);
    }
  }

  static StepPair pair_of(const CudaCall& call, int64_t t, bool goes_on) {
    StepPair pair{{}, goes_on};
    for (int d = 0; d < call.D; ++d) pair.of[d] = step_of(call.sequences, d, t);
    return pair;
  }

  // One step, of `rows` rows at most, of each direction.
  template <int kSegments, int kTiles, class... Parameters>
  static void launch_step(void (*kernel)(Parameters...), const CudaCall& call, int units,
                          int64_t rows, bool overlaps,
                          const std::decay_t<Parameters>&... arguments) {
    const dim3 grid(ceil_div(rows, kTiles * kRowTile), ceil_div(units, kUnitTile),
                    unsigned(call.D));
    launch(kernel, grid, kStepThreads, kStepShared<N, kSegments, kTiles>, stream_of(call), overlaps,
           arguments...);
  }

  // For the first of a step's kernels, which goes on with a second one, or does not.
  static StepPair first_of(StepPair steps, bool second) {
    steps.goes_on |= second;
    return steps;
  }

  template <int kTiles>
  static void launch_forward(const CudaForwardArgs& args, const ForwardLayer<N>& layer,
                             const StepPair& steps, int64_t rows, bool overlaps, bool is_first) {
    // The first begins when the weights are packed; so the others can load them before they wait.
    launch_step<C::kGates, kTiles>(forward_step<N, C, kTiles>, args, args.H, rows,
                                   overlaps && !is_first, layer, first_of(steps, args.unprojected));
    if constexpr (C::kHasCell) {
      if (!args.unprojected) return;
      launch_step<1, kTiles>(forward_projection<N, kTiles>, args, args.P, rows, overlaps, layer,
                             steps);
    }
  }

  template <int kTiles>
  static void launch_backward(const CudaBackwardArgs& args, const BackwardLayer<N>& layer,
                              const StepPair& steps, const StepPair& afters, int64_t rows,
                              bool overlaps, bool is_first) {
    const bool waits = overlaps && !is_first;
    if constexpr (C::kHasCell) {
      if (args.grad_hidden) {
        launch_step<C::kGates, kTiles>(backward_step<N, C, kTiles, true>, args, args.P, rows, waits,
                                       layer, first_of(steps, true), afters);
        launch_step<1, kTiles>(backward_projection<N, C, kTiles>, args, args.H, rows, overlaps,
                               layer, steps, afters);
        return;
      }
    }
    launch_step<C::kGates, kTiles>(backward_step<N, C, kTiles, false>, args, args.P, rows, waits,
                                   layer, steps, afters);
  }

  // Tiles of so many times kRowTile rows at most: as registers allow.
  static constexpr int kWidest = sizeof(scalar_t) == 8 ? 1 : sizeof(scalar_t) == 4 ? 2 : 4;

  // launch(kTiles) with the narrowest tiles of which the GPU runs all at once, one a multiprocessor,
  // or the widest. A wide tile's multiprocessor reads no fewer weights than a narrow one's, and its
  // threads compute more cells, one behind the other: an LSTM's of 16 bits some 1400 instructions
  // after the product, where 400 are a narrow one's. An estimate, measured on no GPU.
  template <int kTiles = 1, class Launch>
  static void with_tiles(const CudaCall& call, int64_t rows, int multiprocessors,
                         const Launch& launch) {
    if constexpr (kTiles < kWidest) {
      const int64_t row_tiles = ceil_div(rows, kTiles * kRowTile);
      if (row_tiles > 1 && row_tiles * tiles_of(call.H) * call.D > multiprocessors) {
        return with_tiles<2 * kTiles>(call, rows, multiprocessors, launch);
      }
    }
    launch(std::integral_constant<int, kTiles>{});
  }

  static void forward(const CudaForwardArgs& args) {
    const CurrentDevice guard(args.device);
    ForwardLayer<N> layer{};
    layer.sequences = args.path == Path::kBlock ? on_device(args) : args.sequences;
    layer.H = args.H, layer.P = args.P, layer.D = args.D;
    layer.rows = rows_of(args);
    for (int d = 0; d < args.D; ++d) {
      layer.gates_x[d] = static_cast<const scalar_t*>(args.gates_x[d]);
      layer.bias_hh[d] = static_cast<const scalar_t*>(args.bias_hh[d]);
    }
    layer.h0          = static_cast<const scalar_t*>(args.h0);
    layer.c0          = static_cast<const scalar_t*>(args.c0);
    layer.gates       = static_cast<scalar_t*>(args.gates);
    layer.extra       = static_cast<acc_t*>(args.extra);
    layer.every_cell  = args.every_cell;
    layer.unprojected = static_cast<scalar_t*>(args.unprojected);
    layer.hidden      = static_cast<scalar_t*>(args.hidden);
    layer.output      = static_cast<scalar_t*>(args.output);
    layer.h_n         = static_cast<scalar_t*>(args.h_n);
    layer.c_n         = static_cast<scalar_t*>(args.c_n);
    pack_all(layer, args, false);
    if (args.path == Path::kBlock) {
      if constexpr (sizeof(acc_t) == 4) launch_block(forward_block<N, C>, args, layer, false);
      return;
    }
    const bool overlaps       = can_overlap(forward_step<N, C, 1>);
    const int multiprocessors = multiprocessors_of(args.device);
    const int64_t T           = args.sequences.T;
    for (int64_t t = 0; t < T; ++t) {
      const StepPair steps = pair_of(args, t, t + 1 < T);
      const int64_t rows   = max64(steps.of[0].count, steps.of[1].count);
      with_tiles(args, rows, multiprocessors, [&](auto tiles) {
        launch_forward<tiles>(args, layer, steps, rows, overlaps, t == 0);
      });
    }
  }

  static void backward(const CudaBackwardArgs& args) {
    const CurrentDevice guard(args.device);
    BackwardLayer<N> layer{};
    layer.sequences = args.path == Path::kBlock ? on_device(args) : args.sequences;
    layer.H = args.H, layer.P = args.P, layer.D = args.D;
    layer.rows        = rows_of(args);
    layer.gates       = static_cast<const scalar_t*>(args.gates);
    layer.extra       = static_cast<const acc_t*>(args.extra);
    layer.previous    = static_cast<const scalar_t*>(args.previous);
    layer.c0          = static_cast<const scalar_t*>(args.c0);
    layer.grad_output = static_cast<const scalar_t*>(args.grad_output);
    layer.grad_h_n    = static_cast<const scalar_t*>(args.grad_h_n);
    layer.grad_c_n    = static_cast<const scalar_t*>(args.grad_c_n);
    layer.grad_cells  = static_cast<const scalar_t*>(args.grad_cells);
    layer.grad_gates  = static_cast<scalar_t*>(args.grad_gates);
    layer.grad_hidden = static_cast<scalar_t*>(args.grad_hidden);
    layer.carry       = static_cast<acc_t*>(args.carry);
    layer.grad_h0     = static_cast<acc_t*>(args.grad_h0);
    layer.grad_c0     = static_cast<acc_t*>(args.grad_c0);
    pack_all(layer, args, true);
    if (args.path == Path::kBlock) {
      if constexpr (sizeof(acc_t) == 4) launch_block(backward_block<N, C>, args, layer, true);
      return;
    }
    const bool overlaps       = can_overlap(backward_step<N, C, 1, false>);
    const int multiprocessors = multiprocessors_of(args.device);
    StepPair afters{};
    // t = -1 computes no step: it passes gradients on to the initial states.
    const int64_t last = args.grad_h0 || args.grad_c0 ? -1 : 0;
    for (int64_t t = args.sequences.T - 1; t >= last; --t) {
      const StepPair steps = pair_of(args, t, t > last);
      const int64_t rows   = max64(max64(steps.of[0].count, steps.of[1].count),
                                   max64(afters.of[0].count, afters.of[1].count));
      const bool is_first  = t == args.sequences.T - 1;
      with_tiles(args, rows, multiprocessors, [&](auto tiles) {
        launch_backward<tiles>(args, layer, steps, afters, rows, overlaps, is_first);
      });
      afters = steps;
    }
  }

  static void previous(const CudaPreviousArgs& args) {
    const CurrentDevice guard(args.device);
    PreviousLayer<N> layer{};
    layer.sequences = on_device(args);
    layer.H = args.H, layer.P = args.P, layer.D = args.D;
    layer.rows     = rows_of(args);
    layer.gates    = static_cast<const scalar_t*>(args.gates);
    layer.hidden   = static_cast<const scalar_t*>(args.hidden);
    layer.extra    = static_cast<const acc_t*>(args.extra);
    layer.h0       = static_cast<const scalar_t*>(args.h0);
    layer.previous = static_cast<scalar_t*>(args.previous);
    // GRU's h follow from each other. Else chunks of steps side by side, as many as a grid can have.
    constexpr int64_t kChunk = 2 * kPreviousAtOnce - 1, kMostChunks = 65535;  // and one before
    const int64_t T  = args.sequences.T;
    const bool chain = C::kPrevIsH && !args.hidden;
    layer.chunk      = chain ? T : max64(kChunk, ceil_div(T, kMostChunks));
    const dim3 grid(ceil_div(args.sequences.B * args.P, kPreviousThreads), unsigned(args.D),
                    ceil_div(T, layer.chunk));
    launch(previous_states<N, C>, grid, kPreviousThreads, 0, stream_of(args), false, layer);
  }

  template <class Layer>
  static void launch_block(void (*kernel)(Layer), const CudaCall& call, const Layer& layer,
                           bool backward) {
    const int64_t shared = block_shared<N>(call.H, C::kGates, backward);
    if (!allow_shared(kernel, shared)) {
      throw std::runtime_error("the block path has no room for this layer on this GPU");
    }
    const dim3 grid(ceil_div(call.sequences.B, kRowTile), unsigned(call.D));
    launch(kernel, grid, tiles_of(call.H) * kWarp, shared, stream_of(call), false, layer);
  }

  static int block_ctas(int H, bool backward, int device) {
    if constexpr (sizeof(acc_t) == 8)
      return 0;
    else {
      if (H > kBlockUnits) return 0;
      const CurrentDevice guard(device);
      return backward ? ctas_of(backward_block<N, C>, H, true, device)
                      : ctas_of(forward_block<N, C>, H, false, device);
    }
  }

  template <class Kernel>
  static int ctas_of(Kernel* kernel, int H, bool backward, int device) {
    const int64_t shared = block_shared<N>(H, C::kGates, backward);
    if (!allow_shared(kernel, shared)) return 0;
    int each = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, tiles_of(H) * kWarp,
                                                        size_t(shared)));
    return each * multiprocessors_of(device);
  }
};

template <class N>
constexpr CudaKernels kKernelsOf = {
    {Run<N, Lstm>::forward, Run<N, Gru>::forward, Run<N, Rnn<false>>::forward,
     Run<N, Rnn<true>>::forward},
    {Run<N, Lstm>::backward, Run<N, Gru>::backward, Run<N, Rnn<false>>::backward,
     Run<N, Rnn<true>>::backward},
    {Run<N, Lstm>::previous, Run<N, Gru>::previous, Run<N, Rnn<false>>::previous,
     Run<N, Rnn<true>>::previous},
    {Run<N, Lstm>::workspace, Run<N, Gru>::workspace, Run<N, Rnn<false>>::workspace,
     Run<N, Rnn<true>>::workspace},
    {Run<N, Lstm>::block_ctas, Run<N, Gru>::block_ctas, Run<N, Rnn<false>>::block_ctas,
     Run<N, Rnn<true>>::block_ctas}};

}  // namespace
}  // namespace fusedrnn
