// fusedrnn._C: the kernels as Python functions over addresses. Called by fusedrnn/ops.py alone,
// which has checked every shape, dtype and device: nothing is checked here. Releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "cpu/dispatch.h"

namespace py = pybind11;

namespace fusedrnn {
namespace {

const Kernels& kernels() {
  static const Kernels& selected = select_kernels(std::getenv("FUSEDRNN_ISA"));
  return selected;
}

template <class T>
const KernelsOf<T>& kernels_of();
template <>
const KernelsOf<float>& kernels_of<float>() {
  return kernels().f32;
}
template <>
const KernelsOf<double>& kernels_of<double>() {
  return kernels().f64;
}

using Address = std::uintptr_t;  // of a tensor's first element; 0 where sequence.h allows null

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);  // NOLINT(performance-no-int-to-ptr)
}

template <class T>
void forward(int cell, int64_t t, int64_t b, int64_t i, int64_t h, int64_t d, int num_threads,
             bool save, Address input, int64_t input_stride_t, int64_t input_stride_b,
             std::array<Address, 8> weights, Address gates_h, Address gates, Address extra,
             Address h0, Address c0, Address output, Address h_n, Address c_n) {
  ForwardArgs<T> args{};
  args.T              = t;
  args.B              = b;
  args.I              = i;
  args.H              = h;
  args.D              = d;
  args.num_threads    = num_threads;
  args.save           = save;
  args.input          = pointer<T>(input);
  args.input_stride_t = input_stride_t;
  args.input_stride_b = input_stride_b;
  for (size_t direction = 0; direction < 2; ++direction) {
    const Address* of_direction = &weights[4 * direction];
    args.weight_ih[direction]   = pointer<T>(of_direction[0]);
    args.weight_hh[direction]   = pointer<T>(of_direction[1]);
    args.bias_ih[direction]     = pointer<T>(of_direction[2]);
    args.bias_hh[direction]     = pointer<T>(of_direction[3]);
  }
  args.gates_h = pointer<T>(gates_h);
  args.gates   = pointer<T>(gates);
  args.extra   = pointer<T>(extra);
  args.h0      = pointer<T>(h0);
  args.c0      = pointer<T>(c0);
  args.output  = pointer<T>(output);
  args.h_n     = pointer<T>(h_n);
  args.c_n     = pointer<T>(c_n);
  const py::gil_scoped_release no_gil;
  if (!kernels_of<T>().forward[cell](args)) throw std::bad_alloc();
}

template <class T>
void backward(int cell, int64_t t, int64_t b, int64_t i, int64_t h, int64_t d, int num_threads,
              Address gates, Address extra, Address input, std::array<Address, 8> weights,
              Address h0, Address c0, Address grad_output, Address grad_h_n, Address carry,
              Address grad_gates, Address grad_input, std::array<Address, 8> grad_weights) {
  BackwardArgs<T> args{};
  args.T           = t;
  args.B           = b;
  args.I           = i;
  args.H           = h;
  args.D           = d;
  args.num_threads = num_threads;
  args.gates       = pointer<T>(gates);
  args.extra       = pointer<T>(extra);
  args.input       = pointer<T>(input);
  args.h0          = pointer<T>(h0);
  args.c0          = pointer<T>(c0);
  args.grad_output = pointer<T>(grad_output);
  args.grad_h_n    = pointer<T>(grad_h_n);
  args.carry       = pointer<T>(carry);
  args.grad_gates  = pointer<T>(grad_gates);
  args.grad_input  = pointer<T>(grad_input);
  for (size_t direction = 0; direction < 2; ++direction) {
    const Address* of_direction    = &grad_weights[4 * direction];
    args.weight_ih[direction]      = pointer<T>(weights[4 * direction]);
    args.weight_hh[direction]      = pointer<T>(weights[4 * direction + 1]);
    args.grad_weight_ih[direction] = pointer<T>(of_direction[0]);
    args.grad_weight_hh[direction] = pointer<T>(of_direction[1]);
    args.grad_bias_ih[direction]   = pointer<T>(of_direction[2]);
    args.grad_bias_hh[direction]   = pointer<T>(of_direction[3]);
  }
  const py::gil_scoped_release no_gil;
  if (!kernels_of<T>().backward[cell](args)) throw std::bad_alloc();
}

}  // namespace
}  // namespace fusedrnn

PYBIND11_MODULE(_C, m) {
  using namespace fusedrnn;
  m.doc() = "fusedrnn's kernels over addresses; see csrc/sequence.h. Use fusedrnn.ops.";
  m.def(
      "isa", [] { return kernels().isa; },
      "Name of the instruction set whose kernels run; RuntimeError if FUSEDRNN_ISA can't be had.");
  m.def("forward_f32", forward<float>);
  m.def("forward_f64", forward<double>);
  m.def("backward_f32", backward<float>);
  m.def("backward_f64", backward<double>);
}
