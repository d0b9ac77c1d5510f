// fusedrnn._C: one layer forward and backward, from torch tensors to torch tensors. Called by
// fusedrnn/ops.py alone. Here are the checks that keep the kernels inside their arrays, and the
// allocations; not autograd, and no error message: what does not fit is refused with None, and the
// caller says what is wrong or computes it otherwise. Releases the GIL while kernels run.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"
#if defined(FUSEDRNN_CUDA_ARCHS)
#include "cuda/bindings.h"
#endif
#include "memory.h"
#include "tensor.h"

// OpenMP 5.0's, in libgomp from gcc 9 on.
extern "C" __attribute__((weak)) int omp_pause_resource_all(int kind);

namespace fusedrnn {
namespace {

// Ends the calling thread's pool of OpenMP threads; the next parallel region makes a new one. Before
// a fork: the child would wait for threads that it has not got, in our kernels and in torch's.
void release_threads() {
  constexpr int kSoft = 1;  // omp_pause_soft
  if (omp_pause_resource_all) omp_pause_resource_all(kSoft);
}

const Kernels& kernels() {
  static const Kernels& selected = select_kernels(std::getenv("FUSEDRNN_ISA"));
  return selected;
}

class GilRelease {
 public:
  GilRelease() : state_(PyEval_SaveThread()) {}
  ~GilRelease() { PyEval_RestoreThread(state_); }
  GilRelease(const GilRelease&)            = delete;
  GilRelease& operator=(const GilRelease&) = delete;

 private:
  PyThreadState* state_;
};

// The items of a list or tuple, alive as long as this: others may change a list meanwhile.
class Items {
 public:
  explicit Items(PyObject* list_or_tuple)
      : tuple_(py::reinterpret_steal<py::object>(PySequence_Tuple(list_or_tuple))) {
    if (!tuple_) throw py::error_already_set();
  }
  PyObject* operator[](int64_t i) const { return PyTuple_GET_ITEM(tuple_.ptr(), i); }
  int64_t size() const { return PyTuple_GET_SIZE(tuple_.ptr()); }

 private:
  py::object tuple_;
};

bool is_narrow(Dtype dtype) { return dtype == Dtype::kFloat16 || dtype == Dtype::kBfloat16; }
Narrow narrow_of(Dtype dtype) { return dtype == Dtype::kFloat16 ? kFloat16 : kBfloat16; }

Memory allocate(size_t bytes) {
  Memory memory(bytes + 1);  // never 0 bytes, for which posix_memalign may give null
  if (!memory.data()) throw std::bad_alloc();
  return memory;
}

// A new tensor, and the memory that the kernels write: its own, or floats to be narrowed to it.
// as_is: its own, even if that is narrow.
struct NewTensor {
  void* data = nullptr;
  py::object object;

  NewTensor() = default;
  NewTensor(PyObject* like, Dtype type, std::initializer_list<int64_t> shape, bool as_like = true,
            bool as_is = false)
      : object(Torch::get().empty(like, type, as_like, shape, &data)), dtype_(type) {
    for (const int64_t size : shape) elements_ *= size;
    if (is_narrow(type) && !as_is) {
      narrow_ = static_cast<uint16_t*>(data);
      floats_ = allocate(size_t(elements_) * sizeof(float));
      data    = floats_.data();
    } else {
      const size_t size = is_narrow(type)           ? sizeof(uint16_t)
                          : type == Dtype::kFloat32 ? sizeof(float)
                                                    : sizeof(double);
      advise_large_pages(data, size_t(elements_) * size);
    }
  }

  // The tensor, or None if none was made.
  py::object finish(int num_threads) const {
    if (narrow_) {
      const GilRelease no_gil;
      kernels().narrow(narrow_of(dtype_), static_cast<const float*>(data), narrow_, elements_,
                       num_threads);
    }
    return object ? object : py::none();
  }

 private:
  Dtype dtype_      = Dtype::kFloat32;
  int64_t elements_ = 1;
  uint16_t* narrow_ = nullptr;
  Memory floats_;
};

// One layer's weights as the kernels read them, and what they were laid out from.
struct Panels {
  int cell_index;
  Dtype dtype;
  Precision products;
  int64_t I, H, P, D;
  std::vector<const void*> sources;  // the weights' memory: elsewhere are other weights
  Memory memory{};
  const void* directions[2]{};
  mutable int64_t calls = 0;  // that have used them
};

// One layer's inputs. A view's memory belongs to the object it was read from, to a copy in `copies`
// or to `memory`.
struct Layer {
  CellInfo cell{};
  int cell_index = 0;
  int64_t T = 0, B = 0, N = 0, I = 0, H = 0, P = 0, D = 0;
  bool one_step   = false;  // input [B, I], states [B, P]
  bool of_module  = false;  // one_step is given, and the batch dimension may be missing
  bool unbatched  = false;  // it is missing: B = 1
  bool swapped    = false;  // input [B, T, I]
  bool projects   = false;
  bool cells      = false;  // c of every step is a result too
  bool to_initial = false;
  bool again      = false;     // backward computes the gates again
  int64_t layers  = 1;         // whose states stand one behind the other in h0, c0, h_n and c_n,
  int64_t number  = 0;         // of which this is one
  Precision least = kHighest;  // that products of float32 must have
  TensorView input, states[2], reset;
  static constexpr int kWeights = 5;  // of each direction: weight_ih, weight_hh, biases, weight_hr
  TensorView weights[2][kWeights];
  std::vector<int64_t> offsets;  // empty: sequences of one length
  std::vector<py::object> copies;
  std::vector<Memory> memory;
  const uint16_t *input_bf16 = nullptr, *weight_ih_bf16[2]{}, *weight_hh_bf16[2]{};
  bool zero_states           = false;
  bool check_only            = false;    // nothing will be computed: no copies
  const Panels* panels       = nullptr;  // of these weights, if there are any

  Dtype dtype() const { return input.dtype; }
  // Of what the kernels compute, and of what forward saves for backward.
  Dtype wide_dtype() const { return is_narrow(dtype()) ? Dtype::kFloat32 : dtype(); }
  size_t wide_size() const {
    return wide_dtype() == Dtype::kFloat32 ? sizeof(float) : sizeof(double);
  }
  int64_t weights_of_direction() const { return projects ? 5 : 4; }
  // Whether forward reads bfloat16 tensors as they are.
  bool reads_bf16() const { return dtype() == Dtype::kBfloat16 && products() == kMedium; }
  // What products are, where the weights are laid out for them. float16's 11 bits fit into the 8 and 8
  // of two bfloat16 parts.
  Precision products() const {
    const Precision enough = dtype() == Dtype::kBfloat16  ? kMedium
                             : dtype() == Dtype::kFloat16 ? kHigh
                             : dtype() == Dtype::kFloat32 ? least
                                                          : kHighest;
    return projects || !kernels().f32[enough] ? kHighest : enough;
  }

  // Reads a tensor, dense; false if it is not of this shape and dtype, or not ordinary.
  bool read_dense(PyObject* object, std::initializer_list<int64_t> shape, Dtype type,
                  TensorView* out) {
    return Torch::get().read(object, out) && make_dense(object, shape, type, out);
  }
  // The same of a tensor that was read.
  bool make_dense(PyObject* object, std::initializer_list<int64_t> shape, Dtype type,
                  TensorView* out) {
    if (out->dtype != type || !out->has_shape(shape)) return false;
    return out->is_dense() || copy(object, out);
  }
  bool read_dense(PyObject* object, std::initializer_list<int64_t> shape, TensorView* out) {
    return read_dense(object, shape, dtype(), out);
  }

  // initial: (), (h0,) or (h0, c0). weights: 4 for each direction, or 5 with a projection; biases may
  // be None. options: None, or the fields of ops.Options.
  bool read(int index, PyObject* input_object, const Items& initial, const Items& all_weights,
            PyObject* options, bool dense_input) {
    const Torch& torch    = Torch::get();
    cell_index            = index;
    cell                  = kCells[index];
    projects              = all_weights.size() % 5 == 0;
    const int64_t count   = weights_of_direction();
    D                     = all_weights.size() / count;
    TensorView& weight_hh = weights[0][1];  // says how large the others are
    if (D < 1 || D > 2 || all_weights.size() % count != 0 || (projects && !cell.has_cell_state) ||
        !torch.read(input_object, &input) || !is_floating(dtype()) ||
        !torch.read(all_weights[1], &weight_hh) || weight_hh.dims != 2) {
      return false;
    }
    P = weight_hh.shape[1];
    H = projects ? weight_hh.shape[0] / cell.gates : P;
    if (!read_sequences(options)) return false;
    if (T == 0 || H == 0 || P == 0) return false;
    dense_input |= is_narrow(dtype()) && !reads_bf16();  // it will be widened
    if (dense_input ? !input.is_dense() : I > 1 && input.strides[input.dims - 1] != 1) {
      if (!copy(input_object, &input)) return false;
    }

    const int64_t rows = cell.gates * H;
    for (int64_t d = 0; d < D; ++d) {
      TensorView* const w = weights[d];
      const auto object   = [&](int64_t i) { return all_weights[d * count + i]; };
      if (!read_dense(object(0), {rows, I}, &w[0]) || (d > 0 && !torch.read(object(1), &w[1])) ||
          !make_dense(object(1), {rows, P}, dtype(), &w[1]) ||
          (object(2) != Py_None && !read_dense(object(2), {rows}, &w[2])) ||
          (object(3) != Py_None && !read_dense(object(3), {rows}, &w[3])) ||
          (projects && !read_dense(object(4), {P, H}, &w[4]))) {
        return false;
      }
    }

    const int64_t num_states = 1 + cell.has_cell_state;
    zero_states              = initial.size() == 0;
    if (zero_states) return true;
    if (initial.size() != num_states) return false;
    for (int i = 0; i < num_states; ++i) {
      if (!read_state(initial[i], i, &states[i])) return false;
    }
    return true;
  }

  // Which sequences there are, from the input and the options.
  bool read_sequences(PyObject* object) {
    PyObject *batch_sizes = Py_None, *mask = Py_None;
    if (object != Py_None) {
      const Items options(object);
      if (options.size() != 6) throw py::type_error("expected ops.Options");
      batch_sizes = options[0];
      mask        = options[1];
      to_initial  = is_true(options[2]);
      cells       = is_true(options[3]);
      again       = is_true(options[4]) && cell.saved > 1;  // RNN saves h alone
      if (is_true(options[5])) least = kMedium;
    }
    if (cells && !cell.has_cell_state) return false;
    if (batch_sizes != Py_None) {
      if (input.dims != 2 || !read_batch_sizes(batch_sizes)) return false;
      N = input.shape[0];
      I = input.shape[1];
      if (offsets.back() != N) return false;
    } else {
      if (!of_module) one_step = input.dims == 2 && D == 1;
      const int dims = one_step ? 2 : 3;
      unbatched      = of_module && input.dims == dims - 1;
      if (input.dims != dims && !unbatched) return false;
      swapped &= !unbatched;
      T        = one_step ? 1 : input.shape[swapped];
      B        = unbatched ? 1 : input.shape[dims - 2 - swapped];
      I        = input.shape[input.dims - 1];
      N        = T * B;
    }
    if (one_step && (mask != Py_None || cells)) return false;
    return mask == Py_None || read_reset(mask);
  }

  // A copy: all threads of a call must see the same, whatever others write there meanwhile.
  bool read_reset(PyObject* object) {
    if (!(offsets.empty() ? read_dense(object, {T, B}, Dtype::kBool, &reset)
                          : read_dense(object, {N}, Dtype::kBool, &reset))) {
      return false;
    }
    if (check_only) return true;
    memory.push_back(allocate(size_t(N)));
    if (N > 0) std::memcpy(memory.back().data(), reset.data, size_t(N));
    reset.data = memory.back().data();
    return true;
  }

  // batch_sizes [T]: positive and falling, as PackedSequence has them.
  bool read_batch_sizes(PyObject* object) {
    TensorView view;
    if (!Torch::get().read(object, &view) || view.dtype != Dtype::kInt64 || view.dims != 1 ||
        view.shape[0] == 0) {
      return false;
    }
    const auto* const sizes = static_cast<const int64_t*>(view.data);
    T                       = view.shape[0];
    B                       = sizes[0];
    offsets.assign(1, 0);
    for (int64_t t = 0; t < T; ++t) {
      const int64_t size = sizes[t * view.strides[0]];
      if (size <= 0 || size > (t ? offsets[size_t(t)] - offsets[size_t(t) - 1] : B)) return false;
      offsets.push_back(offsets.back() + size);
    }
    return true;
  }

  std::vector<const void*> sources() const {
    std::vector<const void*> all;
    for (int64_t d = 0; d < D; ++d) {
      for (const TensorView& weight : weights[d]) all.push_back(weight.data);
    }
    return all;
  }
  // Takes panels, or None, if they are of these weights and what is to be computed.
  void take(PyObject* object) {
    if (object == Py_None) return;
    const auto* const p = py::handle(object).cast<const Panels*>();
    if (p->cell_index == cell_index && p->dtype == dtype() && p->products == products() &&
        p->I == I && p->H == H && p->P == P && p->D == D && p->sources == sources()) {
      panels = p;
      ++p->calls;
    }
  }

  int64_t state_size(int64_t i) const { return i == 0 ? P : H; }
  // The i-th state (h, c), or the gradient of one.
  bool read_state(PyObject* object, int64_t i, TensorView* out) {
    const int64_t size = state_size(i);
    if (one_step) {
      return unbatched ? read_dense(object, {size}, out) : read_dense(object, {B, size}, out);
    }
    if (!(unbatched ? read_dense(object, {layers * D, size}, out)
                    : read_dense(object, {layers * D, B, size}, out))) {
      return false;
    }
    out->shape[0] = D;
    out->data     = own_state(out->data, i, is_narrow(dtype()) ? sizeof(uint16_t) : wide_size());
    return true;
  }
  // This layer's part of the i-th state of all of them; null if that is.
  void* own_state(void* all, int64_t i, size_t size_of_element) const {
    const auto before = size_t(number * D * B * state_size(i));
    return all ? static_cast<char*>(all) + before * size_of_element : nullptr;
  }
  // The result that has `size` numbers for each row, or the gradient of one.
  bool read_rows(PyObject* object, int64_t size, TensorView* out) {
    return one_step || !offsets.empty() ? read_dense(object, {N, size}, out)
                                        : read_dense(object, {T, B, size}, out);
  }

  // Whether the output of a swapped input is made as one: the same memory as [T, B, ...], but for
  // strides of a dimension of 1.
  bool swaps_output() const { return swapped && (T == 1 || B == 1); }
  NewTensor new_state(PyObject* like, int64_t i) const {
    const int64_t size = state_size(i);
    if (one_step) return new_rows(like, size);
    return unbatched ? NewTensor(like, dtype(), {layers * D, size})
                     : NewTensor(like, dtype(), {layers * D, B, size});
  }
  NewTensor new_rows(PyObject* like, int64_t size) const {
    if (swaps_output()) return {like, dtype(), {B, T, size}};
    if (one_step && unbatched) return {like, dtype(), {size}};
    return one_step || unbatched || !offsets.empty() ? NewTensor(like, dtype(), {N, size})
                                                     : NewTensor(like, dtype(), {T, B, size});
  }
  // The gradient of the i-th weight of a direction, or one for each of `groups`.
  NewTensor new_weight(PyObject* like, int64_t i, int64_t groups) const {
    const int64_t rows    = i == 4 ? P : cell.gates * H;
    const int64_t columns = i == 0 ? I : i == 1 ? P : H;
    if (i == 2 || i == 3) {
      return groups ? NewTensor(like, dtype(), {groups, rows}) : NewTensor(like, dtype(), {rows});
    }
    const bool as_is = i < 2;  // GradWeight
    return groups ? NewTensor(like, dtype(), {groups, rows, columns}, true, as_is)
                  : NewTensor(like, dtype(), {rows, columns}, true, as_is);
  }
  // For kernels that read bfloat16's input and weights: nothing that widen_all would widen.
  void give_bits() {
    const auto bits = [](const TensorView& view) {
      return static_cast<const uint16_t*>(view.data);
    };
    input_bf16 = bits(input);
    input.data = nullptr;
    for (int64_t d = 0; d < D; ++d) {
      weight_ih_bf16[d]  = bits(weights[d][0]);
      weight_hh_bf16[d]  = bits(weights[d][1]);
      weights[d][0].data = nullptr;
      weights[d][1].data = nullptr;
    }
  }
  // Gives the kernels arrays that they can compute on: floats for narrow tensors, and zeros for
  // states that were not given.
  void widen_all(int num_threads) {
    widen(&input, num_threads);
    for (auto& of_direction : weights) {
      if (panels) break;  // instead of them
      for (TensorView& weight : of_direction) widen(&weight, num_threads);
    }
    if (zero_states) {
      const size_t bytes = wide_size() * size_t(D * B * std::max(H, P));
      memory.push_back(allocate(bytes));
      std::memset(memory.back().data(), 0, bytes);
      for (TensorView& state : states) state.data = memory.back().data();
    } else {
      for (TensorView& state : states) widen(&state, num_threads);
    }
  }
  void widen(TensorView* view, int num_threads) {
    if (!view->data || !is_narrow(view->dtype)) return;
    const int64_t n = view->elements();
    memory.push_back(allocate(size_t(n) * sizeof(float)));
    auto* const floats = static_cast<float*>(memory.back().data());
    const GilRelease no_gil;
    kernels().widen(narrow_of(view->dtype), static_cast<const uint16_t*>(view->data), floats, n,
                    num_threads);
    view->data = floats;
  }

  // What forward saves: gates, extra, hidden, each [D, N, ...] or nothing.
  bool saves_gates() const { return !again; }
  bool saves_extra() const { return again ? cell.has_cell_state : cell.saved > cell.gates; }
  bool saves_hidden() const { return again || projects; }
  int64_t saved_size() const {
    return D * N * (H * (saves_gates() * cell.gates + saves_extra()) + saves_hidden() * P);
  }
  // Puts them in their places in `saved`, if it is there.
  template <class Args, class T>
  void place_saved(Args* args, T* saved) const {
    if (!saved) return;
    const auto place = [&](bool wanted, int64_t numbers) {
      T* const at  = wanted ? saved : nullptr;
      saved       += wanted * D * N * numbers;
      return at;
    };
    args->gates  = place(saves_gates(), H * cell.gates);
    args->extra  = place(saves_extra(), H);
    args->hidden = place(saves_hidden(), P);
  }

  template <class Args>
  void fill(Args* args) const {
    using T_        = std::remove_const_t<std::remove_pointer_t<decltype(args->h0)>>;
    const auto of   = [](const TensorView& view) { return static_cast<const T_*>(view.data); };
    args->sequences = {T, B, offsets.empty() ? nullptr : offsets.data(),
                       static_cast<const bool*>(reset.data), to_initial};
    args->I         = I;
    args->H         = H;
    args->P         = P;
    args->D         = D;
    args->input     = of(input);
    args->h0        = of(states[0]);
    args->c0        = of(states[1]);
    for (int64_t d = 0; d < D; ++d) {
      args->weight_ih[d]      = of(weights[d][0]);
      args->weight_hh[d]      = of(weights[d][1]);
      args->bias_ih[d]        = of(weights[d][2]);
      args->bias_hh[d]        = of(weights[d][3]);
      args->weight_hr[d]      = of(weights[d][4]);
      args->weight_ih_bf16[d] = weight_ih_bf16[d];
      args->weight_hh_bf16[d] = weight_hh_bf16[d];
    }
    args->input_bf16 = input_bf16;
  }

 private:
  bool copy(PyObject* object, TensorView* out) {
    if (check_only) {
      for (int64_t i = out->dims - 1, stride = 1; i >= 0; stride *= out->shape[i--]) {
        out->strides[i] = stride;
      }
      return true;
    }
    copies.push_back(Torch::get().contiguous(object));
    return Torch::get().read(copies.back().ptr(), out);
  }
};

template <class T>
const KernelsOf<T>& kernels_for(const Layer& layer) {
  if constexpr (std::is_same_v<T, double>) {
    return kernels().f64;
  } else {
    return *kernels().f32[layer.products()];
  }
}

// What forward and plan are asked with: the layer, and nothing to write to.
template <class T>
ForwardArgs<T> forward_args(const Layer& layer, int num_threads) {
  ForwardArgs<T> args{};
  layer.fill(&args);
  args.num_threads    = num_threads;
  args.input_stride_t = layer.one_step ? 0 : layer.input.strides[layer.swapped];
  args.input_stride_b =
      layer.unbatched ? 0 : layer.input.strides[layer.input.dims - 2 - layer.swapped];
  for (int64_t d = 0; layer.panels && d < layer.D; ++d) {
    args.panels[d] = static_cast<const T*>(layer.panels->directions[d]);
  }
  return args;
}

// What forward writes; null: not wanted.
struct Results {
  void *output, *h_n, *c_n, *cells, *saved;
};

template <class T>
void run_forward(Layer& layer, int num_threads, const Results& results) {
  auto args = forward_args<T>(layer, num_threads);
  layer.place_saved(&args, static_cast<T*>(results.saved));
  args.output     = static_cast<T*>(results.output);
  args.h_n        = static_cast<T*>(results.h_n);
  args.c_n        = static_cast<T*>(results.c_n);
  const int64_t H = layer.H, N = layer.N, D = layer.D;
  if (results.cells && !results.saved) {
    layer.memory.push_back(allocate(sizeof(T) * size_t(D * N * H)));
    args.extra = static_cast<T*>(layer.memory.back().data());
  }
  const GilRelease no_gil;
  if (!kernels_for<T>(layer).forward[layer.cell_index](args)) throw std::bad_alloc();
  if (results.cells) {  // [N, D*H] of extra [D, N, H]
    for (int64_t row = 0; row < N; ++row) {
      for (int64_t d = 0; d < D; ++d) {
        std::memcpy(static_cast<T*>(results.cells) + (row * D + d) * H,
                    args.extra + (d * N + row) * H, sizeof(T) * size_t(H));
      }
    }
  }
}

// The states that a module's layers end with. Of a step h is the output.
struct FinalStates {
  NewTensor h, c;

  FinalStates() = default;
  FinalStates(const Layer& layer, PyObject* like) {
    if (!layer.one_step) h = layer.new_state(like, 0);
    if (layer.cell.has_cell_state) c = layer.new_state(like, 1);
  }
};

// A layer's other results; None: not wanted.
struct LayerResults {
  py::object output, cells, saved;
};

LayerResults compute(Layer& layer, PyObject* like, int num_threads, const FinalStates& final,
                     bool save) {
  if (layer.reads_bf16()) layer.give_bits();
  layer.widen_all(num_threads);
  const NewTensor output = layer.new_rows(like, layer.D * layer.P);
  const NewTensor cells  = layer.cells ? layer.new_rows(like, layer.D * layer.H) : NewTensor();
  const NewTensor saved =
      save ? NewTensor(like, layer.wide_dtype(), {layer.saved_size()}, !is_narrow(layer.dtype()))
           : NewTensor();
  (layer.wide_dtype() == Dtype::kFloat32
       ? run_forward<float>
       : run_forward<double>)(layer, num_threads,
                              {output.data, layer.own_state(final.h.data, 0, layer.wide_size()),
                               layer.own_state(final.c.data, 1, layer.wide_size()), cells.data,
                               saved.data});
  return {output.finish(num_threads), cells.finish(num_threads), saved.finish(num_threads)};
}

// (h,) or (h, c) of a step, otherwise (output, h_n), or with c_n, and with cells.
py::tuple results_of(const LayerResults& last, const FinalStates& final, int num_threads) {
  const py::object all[] = {last.output, final.h.finish(num_threads), final.c.finish(num_threads),
                            last.cells};
  const auto wanted      = [](const py::object& result) { return !result.is_none(); };
  py::tuple results(size_t(std::count_if(std::begin(all), std::end(all), wanted)));
  size_t i = 0;
  for (const py::object& result : all) {
    if (wanted(result)) results[i++] = result;
  }
  return results;
}

// forward(cell, save, num_threads, precision, input, initial, weights, options, panels) ->
// (results, saved), or None, or NotImplemented if torch made no ordinary tensor.
py::object forward(PyObject* const* arguments) {
  Layer layer;
  const bool save       = arguments[1] == Py_True;
  const int num_threads = int(PyLong_AsLong(arguments[2]));
  layer.least           = precision_of(arguments[3]);
  PyObject* const like  = arguments[4];
  const Items initial(arguments[5]), weights(arguments[6]);
  if (!layer.read(int(PyLong_AsLong(arguments[0])), like, initial, weights, arguments[7], false)) {
    return py::none();
  }
  layer.take(arguments[8]);
  const FinalStates final(layer, like);
  const LayerResults results = compute(layer, like, num_threads, final, save);
  return py::make_tuple(results_of(results, final, num_threads), results.saved);
}

// `object` as an integer; -1 if it is not one, or too large.
int64_t integer(PyObject* object) {
  const int64_t value = PyLong_Check(object) ? PyLong_AsLongLong(object) : -1;
  PyErr_Clear();
  return value;
}

// plain(cell, one_step, batch_first, (I, H, layers, kinds), parameters, names, flat, input, hx, panels)
// -> the results of a module's call in the plainest case: no gradients, nobody watching, the weights of
// `names`, so many kinds of each direction, among its `parameters`, and in its list `flat` of weights
// if it has one. None for any other. Python would need longer to find that out than the kernels for a
// step.
py::object plain(PyObject* const* arguments) {
  const Torch& torch         = Torch::get();
  const int cell             = int(PyLong_AsLong(arguments[0]));
  const bool one_step        = arguments[1] == Py_True;
  PyObject* const parameters = arguments[4];
  PyObject* const like       = arguments[7];
  PyObject* const hx         = arguments[8];
  PyObject* const panels_of  = arguments[9];
  const int64_t states       = 1 + kCells[cell].has_cell_state;
  if (torch.grad_enabled() || torch.watched() || torch.profiled() || !PyDict_Check(parameters)) {
    return py::none();
  }
  const bool tuple = PyTuple_Check(hx);
  const auto given = hx == Py_None ? py::tuple()
                     : tuple       ? py::reinterpret_borrow<py::tuple>(hx)
                                   : py::reinterpret_steal<py::tuple>(PyTuple_Pack(1, hx));
  const Items initial(given.ptr());
  if (hx != Py_None && (tuple != (states == 2) || initial.size() != states)) return py::none();

  const Items sizes(arguments[3]), names(arguments[5]);
  const int64_t layers = integer(sizes[2]), kinds = integer(sizes[3]);
  if (layers < 1 || kinds < 2 || names.size() % (layers * kinds) != 0) return py::none();
  // Without biases None stands for them: weight_ih, weight_hh, bias_ih, bias_hh, weight_hr.
  const bool biases   = kinds > 3;
  const int64_t count = 4 + kinds % 2, of_layer = names.size() / (layers * kinds) * count;
  // A step is one layer's, in one direction.
  const bool batch_first = is_true(arguments[2]);
  if (one_step && (layers != 1 || of_layer != count || batch_first)) return py::none();
  // Held: others may change the module while the kernels run.
  const Items flat(one_step ? py::tuple().ptr() : arguments[6]);
  std::vector<py::tuple> weights;  // of each layer
  for (int64_t number = 0, i = 0; number < layers; ++number) {
    weights.emplace_back(size_t(of_layer));
    for (int64_t k = 0; k < of_layer; ++k) {
      if (!biases && (k % count == 2 || k % count == 3)) {
        weights.back()[size_t(k)] = py::none();
        continue;
      }
      PyObject* const weight = PyDict_GetItemWithError(parameters, names[i]);
      if (PyErr_Occurred()) throw py::error_already_set();
      if (!weight) return py::none();  // parametrized, pruned, ...
      if (!one_step && (weight == Py_None || i >= flat.size() || weight != flat[i])) {
        return py::none();
      }
      weights.back()[size_t(k)] = py::reinterpret_borrow<py::object>(weight);
      ++i;
    }
  }
  const int num_threads = torch.num_threads();
  FinalStates final;
  int64_t size_of_h = 0;
  bool transposes   = false;  // [T, B, ...] to [B, T, ...] in the end
  LayerResults results{py::reinterpret_borrow<py::object>(like), py::none(), py::none()};
  for (int64_t number = 0; number < layers; ++number) {
    const py::object input = results.output;
    Layer layer;
    layer.of_module = true;
    layer.one_step  = one_step;
    layer.swapped   = batch_first && !transposes;
    layer.layers    = layers;
    layer.number    = number;
    if (!layer.read(cell, input.ptr(), initial, Items(weights[size_t(number)].ptr()), Py_None,
                    false) ||
        (number == 0 && integer(sizes[0]) != layer.I) || integer(sizes[1]) != layer.H ||
        (number > 0 && layer.P != size_of_h)) {
      return py::none();
    }
    size_of_h  = layer.P;  // of all layers: h_n has one size
    transposes = transposes || (layer.swapped && !layer.swaps_output());
    // No difference to one row without panels: that is not packed (plan.h), so its products are of
    // float32.
    if (layer.N > 1 || panels_of != Py_None) layer.least = torch.float32_precision();
    py::object panels = py::none();
    if (panels_of != Py_None) panels = py::handle(panels_of)(number, weights[size_t(number)]);
    layer.take(panels.ptr());
    try {
      if (number == 0) final = FinalStates(layer, like);
      results = compute(layer, like, num_threads, final, false);
    } catch (const NotOrdinary&) {
      return py::none();
    }
  }
  if (transposes) results.output = torch.transposed(results.output);
  return results_of(results, final, num_threads);
}

// watched(): ops.watched.
py::object watched(PyObject* const*) { return py::bool_(Torch::get().watched()); }

// The gradients that backward takes and gives; null: zero, and not wanted.
struct Gradients {
  TensorView output, h_n, c_n, cells;
  void *input[2]{}, *states[2]{}, *weights[2][Layer::kWeights]{};
};

template <class T>
void run_backward(const Layer& layer, const KernelsOf<T>& kernels, int num_threads, int64_t groups,
                  const void* saved, const Gradients& grads) {
  BackwardArgs<T> args{};
  layer.fill(&args);
  args.num_threads = num_threads;
  args.groups      = groups;
  layer.place_saved(&args, static_cast<const T*>(saved));
  args.grad_output       = static_cast<const T*>(grads.output.data);
  args.grad_h_n          = static_cast<const T*>(grads.h_n.data);
  args.grad_c_n          = static_cast<const T*>(grads.c_n.data);
  args.grad_cells        = static_cast<const T*>(grads.cells.data);
  args.grad_h0           = static_cast<T*>(grads.states[0]);
  args.grad_c0           = static_cast<T*>(grads.states[1]);
  args.narrow            = narrow_of(layer.dtype());
  const auto grad_weight = [&](void* data) -> GradWeight<T> {
    if (is_narrow(layer.dtype())) return {nullptr, static_cast<uint16_t*>(data)};
    return {static_cast<T*>(data), nullptr};
  };
  for (int64_t d = 0; d < layer.D; ++d) {
    args.grad_input[d]     = static_cast<T*>(grads.input[d]);
    args.grad_weight_ih[d] = grad_weight(grads.weights[d][0]);
    args.grad_weight_hh[d] = grad_weight(grads.weights[d][1]);
    args.grad_bias_ih[d]   = static_cast<T*>(grads.weights[d][2]);
    args.grad_bias_hh[d]   = static_cast<T*>(grads.weights[d][3]);
    args.grad_weight_hr[d] = static_cast<T*>(grads.weights[d][4]);
  }
  const GilRelease no_gil;
  if (!kernels.backward[layer.cell_index](args)) throw std::bad_alloc();
  if (args.grad_input[1]) {
    const int64_t n = layer.N * layer.I;
    for (int64_t i = 0; i < n; ++i) args.grad_input[0][i] += args.grad_input[1][i];
  }
}

// backward(cell, num_threads, precision, input, initial, weights, options, saved, grads, needed,
// groups) -> gradients, or None, or NotImplemented if it is one of grads that is not ordinary.
py::object backward(PyObject* const* arguments) {
  Layer layer;
  const int num_threads = int(PyLong_AsLong(arguments[1]));
  layer.least           = precision_of(arguments[2]);
  PyObject* const like  = arguments[3];
  const Items initial(arguments[4]), weights(arguments[5]), grads(arguments[8]),
      needed(arguments[9]);
  const int64_t groups = PyLong_AsLong(arguments[10]);
  TensorView saved;
  if (!layer.read(int(PyLong_AsLong(arguments[0])), like, initial, weights, arguments[6], true) ||
      !layer.read_dense(arguments[7], {layer.saved_size()}, layer.wide_dtype(), &saved)) {
    return py::none();
  }
  const int64_t D = layer.D, H = layer.H, N = layer.N;
  const bool cell_state = layer.cell.has_cell_state;
  if (needed.size() != 1 + initial.size() + weights.size() ||
      grads.size() != 1 + !layer.one_step + cell_state + layer.cells) {
    throw py::type_error("expected a gradient for each result and a bool for each input");
  }
  if (groups < 0 || (groups > 0 && (layer.B % groups != 0 || !layer.offsets.empty()))) {
    throw py::value_error("groups must divide a batch of sequences of one length");
  }

  // grads: of output, h_n, c_n and cells; of a step, of h and c.
  Gradients gradients;
  int64_t given       = 0;
  const auto is_given = [&](bool result) { return result && grads[given++] != Py_None; };
  if ((is_given(true) && !layer.read_rows(grads[given - 1], D * layer.P, &gradients.output)) ||
      (is_given(!layer.one_step) && !layer.read_state(grads[given - 1], 0, &gradients.h_n)) ||
      (is_given(cell_state) && !layer.read_state(grads[given - 1], 1, &gradients.c_n)) ||
      (is_given(layer.cells) && !layer.read_rows(grads[given - 1], D * H, &gradients.cells))) {
    return py::reinterpret_borrow<py::object>(Py_NotImplemented);
  }

  const auto wanted    = [&](int64_t i) { return needed[i] == Py_True; };
  const int64_t states = initial.size();
  // The precision of forward's products, so that gates computed again have its bits (but for
  // groups'): a short call multiplies float32 numbers as they are.
  const bool as_forward =
      layer.products() != kHighest && groups == 0 &&
      (layer.reads_bf16() || kernels_for<float>(layer)
                                 .plan[layer.cell_index](forward_args<float>(layer, num_threads))
                                 .packed);
  if (as_forward && layer.reads_bf16()) layer.give_bits();
  layer.widen_all(num_threads);
  for (TensorView* grad : {&gradients.output, &gradients.h_n, &gradients.c_n, &gradients.cells}) {
    layer.widen(grad, num_threads);
  }

  py::tuple results(size_t(1 + states + weights.size()));
  std::vector<NewTensor> made(results.size());  // as the results
  if (wanted(0)) {
    made[0]            = layer.new_rows(like, layer.I);
    gradients.input[0] = made[0].data;
    if (D == 2) {
      layer.memory.push_back(allocate(layer.wide_size() * size_t(N * layer.I)));
      gradients.input[1] = layer.memory.back().data();
    }
  }
  for (int64_t i = 0; i < states; ++i) {
    if (!wanted(1 + i)) continue;
    made[size_t(1 + i)] = layer.new_state(like, i);
    gradients.states[i] = made[size_t(1 + i)].data;
  }
  // One tensor each, also where two are equal (LSTM's biases): autograd may keep them as .grad.
  const int64_t of_direction = layer.weights_of_direction();
  for (int64_t i = 0; i < weights.size(); ++i) {
    if (!wanted(1 + states + i)) continue;
    NewTensor& weight = made[size_t(1 + states + i)];
    weight            = layer.new_weight(like, i % of_direction, groups);
    gradients.weights[i / of_direction][i % of_direction] = weight.data;
  }
  if (layer.wide_dtype() == Dtype::kFloat32) {
    run_backward<float>(layer, *kernels().f32[as_forward ? layer.products() : kHighest],
                        num_threads, groups, saved.data, gradients);
  } else {
    run_backward<double>(layer, kernels().f64, num_threads, groups, saved.data, gradients);
  }
  for (size_t i = 0; i < made.size(); ++i) results[i] = made[i].finish(num_threads);
  return std::move(results);
}

// takes(cell, input, initial, weights, options): whether forward would take them.
py::object takes(PyObject* const* arguments) {
  Layer layer;
  layer.check_only = true;
  return py::bool_(layer.read(int(PyLong_AsLong(arguments[0])), arguments[1], Items(arguments[2]),
                              Items(arguments[3]), arguments[4], false));
}

template <class T>
void pack_weights(const Layer& layer, Panels* panels) {
  const auto args     = forward_args<T>(layer, 1);
  const auto pack     = kernels_for<T>(layer).pack[layer.cell_index];
  const auto size     = size_t(pack(args, 0, nullptr)) * sizeof(T);
  const size_t stride = (size + 63) / 64 * 64;
  panels->memory      = allocate(stride * size_t(layer.D));
  const GilRelease no_gil;
  for (int64_t d = 0; d < layer.D; ++d) {
    char* const at        = static_cast<char*>(panels->memory.data()) + size_t(d) * stride;
    panels->directions[d] = at;
    pack(args, d, reinterpret_cast<T*>(at));
  }
}

// pack(cell, precision, input, weights) -> Panels for calls of forward with these weights, or None. Of
// the input [1, 1, I] the numbers are not read.
py::object pack(PyObject* const* arguments) {
  Layer layer;
  layer.least = precision_of(arguments[1]);
  if (!layer.read(int(PyLong_AsLong(arguments[0])), arguments[2], Items(py::tuple().ptr()),
                  Items(arguments[3]), Py_None, false)) {
    return py::none();
  }
  // A weight's copy will be gone, and another one may come to lie where it was.
  if (!layer.copies.empty()) return py::none();
  auto panels =
      std::make_unique<Panels>(Panels{layer.cell_index, layer.dtype(), layer.products(), layer.I,
                                      layer.H, layer.P, layer.D, layer.sources()});
  if (layer.reads_bf16()) layer.give_bits();
  layer.widen_all(1);
  (layer.wide_dtype() == Dtype::kFloat32 ? pack_weights<float>
                                         : pack_weights<double>)(layer, panels.get());
  return py::cast(std::move(panels));
}

// plan(cell, num_threads, precision, given, input, initial, weights, options) -> (threads, row_shards,
// unit_shards, packed, chunk, the products' precision) or None. given: with panels.
py::object plan(PyObject* const* arguments) {
  Layer layer;
  layer.check_only = true;
  layer.least      = precision_of(arguments[2]);
  const bool given = arguments[3] == Py_True;
  if (!layer.read(int(PyLong_AsLong(arguments[0])), arguments[4], Items(arguments[5]),
                  Items(arguments[6]), arguments[7], false)) {
    return py::none();
  }
  const int num_threads = int(PyLong_AsLong(arguments[1]));
  if (layer.reads_bf16()) layer.give_bits();
  const auto planned = [&](auto any) {
    using T   = decltype(any);
    auto args = forward_args<T>(layer, num_threads);
    if (given) args.panels[0] = &any;
    return kernels_for<T>(layer).plan[layer.cell_index](args);
  };
  const Plan made = layer.wide_dtype() == Dtype::kFloat32 ? planned(0.0f) : planned(0.0);
  return py::make_tuple(
      made.threads, made.row_shards, made.unit_shards, made.packed, made.chunk,
      kPrecisions[layer.reads_bf16() || made.packed ? layer.products() : kHighest]);
}

// As a Python function of n positional arguments. pybind11's own would convert each argument with a
// search for an overload, which costs as much as all of the above.
template <py::object (*function)(PyObject* const*), int n>
PyObject* method(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
  if (given != n) {
    PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", n, given);
    return nullptr;
  }
  try {
    return function(arguments).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const NotOrdinary&) {
    Py_RETURN_NOTIMPLEMENTED;
  } catch (const std::bad_alloc&) {
    // torch's error, which programs look for.
    PyErr_SetString(PyExc_RuntimeError,
                    "DefaultCPUAllocator: can't allocate memory (for fusedrnn's kernels)");
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <py::object (*function)(PyObject* const*), int n>
PyMethodDef definition(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(method<function, n>)),
          METH_FASTCALL, nullptr};
}

}  // namespace
}  // namespace fusedrnn

PYBIND11_MODULE(_C, m) {
  using namespace fusedrnn;
  m.doc() = "fusedrnn's kernels on torch tensors; see csrc/bindings.cpp. Use fusedrnn.ops.";
  m.def(
      "isa", [] { return kernels().isa; },
      "Name of the instruction set whose kernels run; RuntimeError if FUSEDRNN_ISA can't be had.");
  // How this file was built, for `python -m fusedrnn`.
#if defined(__clang__)
  m.attr("compiler") = __VERSION__;
#else
  m.attr("compiler") = "gcc " __VERSION__;
#endif
  m.attr("isas") = isa_names();
  m.def(
      "float32_precision", [] { return kPrecisions[Torch::get().float32_precision()]; },
      "What torch lets float32's products be: a word of torch.set_float32_matmul_precision.");
  m.def(
      "has_precision",
      [](py::handle word) { return kernels().f32[precision_of(word.ptr())] != nullptr; },
      "Whether the kernels that run have products of this Precision (csrc/sequence.h).");
#if defined(FUSEDRNN_CUDA_ARCHS)
  m.attr("cuda")         = FUSEDRNN_CUDA_ARCHS;
  m.attr("cuda_version") = FUSEDRNN_CUDA_VERSION;
  add_cuda(m);
#else
  m.attr("cuda") = "";
#endif
  py::class_<Panels>(m, "Panels", "One layer's weights as the kernels read them.")
      .def_readonly("calls", &Panels::calls, "How many calls have used them.");
  m.def("release_memory", release_memory, "Frees what this thread keeps for its next calls.");
  m.def("release_threads", release_threads, "Ends this thread's idle OpenMP threads.");
  static PyMethodDef methods[] = {
      definition<forward, 9>("forward"), definition<backward, 11>("backward"),
      definition<takes, 5>("takes"),     definition<pack, 4>("pack"),
      definition<plan, 8>("plan"),       definition<plain, 10>("plain"),
      definition<watched, 0>("watched"), {nullptr, nullptr, 0, nullptr}};
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}
