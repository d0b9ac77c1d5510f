// The body of every isa_*.cpp: the whole of the CPU kernels under that file's compiler flags, and
// one function that hands them out; with FUSEDRNN_TERMS those of its products alone. Define
// FUSEDRNN_ISA_NAME (avx2, ...) before including it, and FUSEDRNN_TERMS (Pairs, ...) if not all.
//
// Rules for what this includes: only our headers, <c*>, type traits and intrinsics; every function in
// an unnamed namespace or always inlined; no STL containers, no torch, no exceptions. An inline
// function of anybody else's, compiled here with AVX-512, could be the copy that the linker keeps for
// the whole program.
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

template <class T, class Terms = Numbers<T>>
constexpr KernelsOf<T> kernels_of() {
  return {{forward<Lstm, T, Terms>, forward<Gru, T, Terms>, forward<Rnn<false>, T, Terms>,
           forward<Rnn<true>, T, Terms>},
          {backward<Lstm, T, Terms>, backward<Gru, T, Terms>, backward<Rnn<false>, T, Terms>,
           backward<Rnn<true>, T, Terms>},
          {plan<Lstm, T, Terms>, plan<Gru, T, Terms>, plan<Rnn<false>, T, Terms>,
           plan<Rnn<true>, T, Terms>},
          {pack<Lstm, T, Terms>, pack<Gru, T, Terms>, pack<Rnn<false>, T, Terms>,
           pack<Rnn<true>, T, Terms>}};
}

}  // namespace

#if defined(FUSEDRNN_TERMS)
const KernelsOf<float>& FUSEDRNN_KERNELS(FUSEDRNN_ISA_NAME)() {
  static constexpr KernelsOf<float> kernels = kernels_of<float, FUSEDRNN_TERMS>();
  return kernels;
}
#else
const Kernels& FUSEDRNN_KERNELS(FUSEDRNN_ISA_NAME)() {
  static constexpr KernelsOf<float> f32 = kernels_of<float>();
  static constexpr Kernels kernels      = {FUSEDRNN_NAME_STRING(FUSEDRNN_ISA_NAME),
                                           {&f32, nullptr, nullptr},
                                           kernels_of<double>(),
                                           widen,
                                           narrow};
  return kernels;
}
#endif

}  // namespace fusedrnn
