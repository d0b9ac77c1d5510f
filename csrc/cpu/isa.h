// The body of every isa_*.cpp: the whole of the CPU kernels under that file's compiler flags, and
// one function that hands them out. Define FUSEDRNN_ISA_NAME (avx2, ...) before including it.
//
// Rules for what this includes: only our headers, <c*> headers and intrinsics; everything in an
// unnamed namespace; no STL containers, no torch, no exceptions. An inline function of anybody
// else's, compiled here with AVX-512, could be the copy that the linker keeps for the whole
// program.
#pragma once

#include "vec.h"  // first: the numbers that the cells are written over

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "backward.h"
#include "dispatch.h"
#include "forward.h"
#include "narrow.h"

#define FUSEDRNN_STRING(x) #x
#define FUSEDRNN_NAME_STRING(x) FUSEDRNN_STRING(x)
#define FUSEDRNN_JOIN(a, b) a##b
#define FUSEDRNN_KERNELS(name) FUSEDRNN_JOIN(kernels_, name)

namespace fusedrnn {
namespace {

template <class T>
constexpr KernelsOf<T> kernels_of() {
  return {{forward<Lstm, T>, forward<Gru, T>, forward<Rnn<false>, T>, forward<Rnn<true>, T>},
          {backward<Lstm, T>, backward<Gru, T>, backward<Rnn<false>, T>, backward<Rnn<true>, T>},
          {plan<Lstm, T>, plan<Gru, T>, plan<Rnn<false>, T>, plan<Rnn<true>, T>}};
}

}  // namespace

const Kernels& FUSEDRNN_KERNELS(FUSEDRNN_ISA_NAME)() {
  static constexpr Kernels kernels = {FUSEDRNN_NAME_STRING(FUSEDRNN_ISA_NAME), kernels_of<float>(),
                                      kernels_of<double>(), widen, narrow};
  return kernels;
}

}  // namespace fusedrnn
