// fusedrnn._C: the kernels as Python functions over addresses. Called by fusedrnn/ops.py alone, which
// has checked every shape, dtype and device: nothing is checked here. Releases the GIL.
#include <pybind11/pybind11.h>

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
void forward(int cell, int64_t t, int64_t b, int64_t h, int64_t d, int num_threads, bool save,
             Address gates, Address extra, Address weight_hh, Address weight_hh_reverse,
             Address bias_hh, Address bias_hh_reverse, Address gates_h, Address h0, Address c0,
             Address output, Address h_n, Address c_n) {
  const ForwardArgs<T> args{t,
                            b,
                            h,
                            d,
                            num_threads,
                            pointer<T>(gates),
                            pointer<T>(extra),
                            save,
                            {pointer<T>(weight_hh), pointer<T>(weight_hh_reverse)},
                            {pointer<T>(bias_hh), pointer<T>(bias_hh_reverse)},
                            pointer<T>(gates_h),
                            pointer<T>(h0),
                            pointer<T>(c0),
                            pointer<T>(output),
                            pointer<T>(h_n),
                            pointer<T>(c_n)};
  if (!kernels_of<T>().forward[cell](args)) throw std::bad_alloc();
}

template <class T>
void backward(int cell, int64_t t, int64_t b, int64_t h, int64_t d, int num_threads, Address gates,
              Address extra, Address weight_hh, Address weight_hh_reverse, Address h0, Address c0,
              Address grad_output, Address grad_h_n, Address carry, Address grad_gates,
              Address h_prev) {
  const BackwardArgs<T> args{t,
                             b,
                             h,
                             d,
                             num_threads,
                             pointer<T>(gates),
                             pointer<T>(extra),
                             {pointer<T>(weight_hh), pointer<T>(weight_hh_reverse)},
                             pointer<T>(h0),
                             pointer<T>(c0),
                             pointer<T>(grad_output),
                             pointer<T>(grad_h_n),
                             pointer<T>(carry),
                             pointer<T>(grad_gates),
                             pointer<T>(h_prev)};
  if (!kernels_of<T>().backward[cell](args)) throw std::bad_alloc();
}

}  // namespace
}  // namespace fusedrnn

PYBIND11_MODULE(_C, m) {
  using namespace fusedrnn;
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.doc() = "fusedrnn's kernels over addresses; see csrc/sequence.h. Use fusedrnn.ops.";
  m.def(
      "isa", [] { return kernels().isa; },
      "Name of the instruction set whose kernels run; RuntimeError if FUSEDRNN_ISA can't be had.");
  m.def("forward_f32", forward<float>, NoGil());
  m.def("forward_f64", forward<double>, NoGil());
  m.def("backward_f32", backward<float>, NoGil());
  m.def("backward_f64", backward<double>, NoGil());
}
