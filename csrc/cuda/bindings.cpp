// The Python functions of the CUDA kernels. Not a check of anything: fusedrnn/cuda.py is their only
// caller, allocates through torch and passes addresses.
#include "bindings.h"

#include <pybind11/stl.h>

#include <array>

#include "kernels.h"

namespace fusedrnn {
namespace {

namespace py = pybind11;

using Address = std::uintptr_t;
using Pair    = std::array<Address, 2>;  // of each direction

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);  // NOLINT(performance-no-int-to-ptr)
}

// One layer's shape, sequences, device and stream: what all calls have in common.
struct Layer {
  CudaCall call{};
  Cell cell;
  Number number;
  Layer(int cell, int number, int64_t T, int64_t B, int H, int P, int D, Address offsets,
        Address device_offsets, Address reset, bool reset_to_initial, int device, Address stream)
      : cell(Cell(cell)), number(Number(number)) {
    if (cell < 0 || cell >= kNumCells || number < 0 || number >= kNumNumbers || T < 1 || D < 1 ||
        D > 2) {
      throw std::invalid_argument("no such layer");
    }
    call.sequences = {T, B, at<const int64_t>(offsets), at<const bool>(reset), reset_to_initial};
    call.device_offsets = at<int64_t>(device_offsets);
    call.H = H, call.P = P, call.D = D;
    call.device = device;
    call.stream = at(stream);
  }

  // `args` with what all calls have in common.
  template <class Args>
  Args with(Args args) const {
    static_cast<CudaCall&>(args) = call;
    return args;
  }
  const CudaKernels& kernels() const { return cuda_kernels(number); }
};

void forward(const Layer& layer, bool block, Address workspace, Pair gates_x, Pair weight_hh,
             Pair bias_hh, Pair weight_hr, Address h0, Address c0, Address gates, Address extra,
             bool every_cell, Address unprojected, Address hidden, Address output, Address h_n,
             Address c_n) {
  CudaForwardArgs args{};
  args.path      = block ? Path::kBlock : Path::kStep;
  args.workspace = at(workspace);
  for (int d = 0; d < 2; ++d) {
    args.gates_x[d] = at(gates_x[d]), args.weight_hh[d] = at(weight_hh[d]);
    args.bias_hh[d] = at(bias_hh[d]), args.weight_hr[d] = at(weight_hr[d]);
  }
  args.h0 = at(h0), args.c0 = at(c0);
  args.gates = at(gates), args.extra = at(extra), args.every_cell = every_cell;
  args.unprojected = at(unprojected), args.hidden = at(hidden);
  args.output = at(output), args.h_n = at(h_n), args.c_n = at(c_n);
  args = layer.with(args);
  const py::gil_scoped_release release;
  layer.kernels().forward[layer.cell](args);
}

void backward(const Layer& layer, bool block, Address workspace, Pair weight_hh, Pair weight_hr,
              Address gates, Address extra, Address previous, Address c0, Address grad_output,
              Address grad_h_n, Address grad_c_n, Address grad_cells, Address grad_gates,
              Address grad_hidden, Address carry, Address grad_h0, Address grad_c0) {
  CudaBackwardArgs args{};
  args.path      = block ? Path::kBlock : Path::kStep;
  args.workspace = at(workspace);
  for (int d = 0; d < 2; ++d) {
    args.weight_hh[d] = at(weight_hh[d]), args.weight_hr[d] = at(weight_hr[d]);
  }
  args.gates = at(gates), args.extra = at(extra), args.previous = at(previous), args.c0 = at(c0);
  args.grad_output = at(grad_output), args.grad_h_n = at(grad_h_n);
  args.grad_c_n = at(grad_c_n), args.grad_cells = at(grad_cells);
  args.grad_gates = at(grad_gates), args.grad_hidden = at(grad_hidden), args.carry = at(carry);
  args.grad_h0 = at(grad_h0), args.grad_c0 = at(grad_c0);
  args = layer.with(args);
  const py::gil_scoped_release release;
  layer.kernels().backward[layer.cell](args);
}

void previous(const Layer& layer, Address gates, Address extra, Address hidden, Address h0,
              Address previous) {
  CudaPreviousArgs args{};
  args.gates = at(gates), args.extra = at(extra), args.hidden = at(hidden), args.h0 = at(h0);
  args.previous = at(previous);
  args          = layer.with(args);
  const py::gil_scoped_release release;
  layer.kernels().previous[layer.cell](args);
}

}  // namespace

void add_cuda(py::module_& m) {
  py::class_<Layer>(m, "CudaLayer")
      .def(py::init<int, int, int64_t, int64_t, int, int, int, Address, Address, Address, bool, int,
                    Address>(),
           py::kw_only(), py::arg("cell"), py::arg("number"), py::arg("T"), py::arg("B"),
           py::arg("H"), py::arg("P"), py::arg("D"), py::arg("offsets"), py::arg("device_offsets"),
           py::arg("reset"), py::arg("reset_to_initial"), py::arg("device"), py::arg("stream"))
      .def("forward", forward, py::kw_only(), py::arg("block"), py::arg("workspace"),
           py::arg("gates_x"), py::arg("weight_hh"), py::arg("bias_hh"), py::arg("weight_hr"),
           py::arg("h0"), py::arg("c0"), py::arg("gates"), py::arg("extra"), py::arg("every_cell"),
           py::arg("unprojected"), py::arg("hidden"), py::arg("output"), py::arg("h_n"),
           py::arg("c_n"))
      .def("backward", backward, py::kw_only(), py::arg("block"), py::arg("workspace"),
           py::arg("weight_hh"), py::arg("weight_hr"), py::arg("gates"), py::arg("extra"),
           py::arg("previous"), py::arg("c0"), py::arg("grad_output"), py::arg("grad_h_n"),
           py::arg("grad_c_n"), py::arg("grad_cells"), py::arg("grad_gates"),
           py::arg("grad_hidden"), py::arg("carry"), py::arg("grad_h0"), py::arg("grad_c0"))
      .def("previous", previous, py::kw_only(), py::arg("gates"), py::arg("extra"),
           py::arg("hidden"), py::arg("h0"), py::arg("previous"))
      .def("workspace_bytes",
           [](const Layer& layer, bool projected) {
             return layer.kernels().workspace[layer.cell](layer.call.H, layer.call.P, layer.call.D,
                                                          projected);
           })
      .def("block_ctas", [](const Layer& layer, bool backward) {
        return layer.kernels().block_ctas[layer.cell](layer.call.H, backward, layer.call.device);
      });
}

}  // namespace fusedrnn
