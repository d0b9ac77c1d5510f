// What the bindings read of torch: a tensor's memory, and a thread's settings. Memory through DLPack's
// C exchange API where torch has it (2.10 and newer; 0.05 us a tensor), else from the tensor's Python
// attributes. Not a tensor library, and no torch header: the structs below are DLPack's published C
// interface.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <exception>
#include <vector>

#include "sequence.h"

namespace fusedrnn {

namespace py = pybind11;

namespace dlpack {

struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct ExchangeApi {
  uint32_t major, minor;
  void* previous;
  void* managed[3];  // functions that are not used here
  int (*read)(void* py_object, Tensor* out);
  void* current_stream;
};

constexpr int32_t kCpu    = 1;
constexpr uint8_t kInt    = 0;
constexpr uint8_t kFloat  = 2;
constexpr uint8_t kBfloat = 4;
constexpr uint8_t kBool   = 6;

}  // namespace dlpack

enum class Dtype { kFloat32, kFloat64, kFloat16, kBfloat16, kInt64, kBool };
inline bool is_floating(Dtype dtype) { return dtype <= Dtype::kBfloat16; }

constexpr int kMaxDims = 3;

// The memory of an ordinary CPU tensor of up to three dimensions.
struct TensorView {
  void* data  = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int dims    = 0;
  int64_t shape[kMaxDims]{}, strides[kMaxDims]{};

  bool has_shape(std::initializer_list<int64_t> expected) const {
    if (int64_t(expected.size()) != dims) return false;
    const int64_t* size = shape;
    for (const int64_t e : expected) {
      if (*size++ != e) return false;
    }
    return true;
  }

  int64_t elements() const {
    int64_t n = 1;
    for (int i = 0; i < dims; ++i) n *= shape[i];
    return n;
  }

  bool is_dense() const {  // row-major, without gaps
    int64_t stride = 1;
    for (int i = dims - 1; i >= 0; --i) {
      if (shape[i] == 0) return true;
      if (shape[i] != 1 && strides[i] != stride) return false;
      stride *= shape[i];
    }
    return true;
  }
};

inline bool is_true(PyObject* object) {
  const int truth = PyObject_IsTrue(object);
  if (truth < 0) throw py::error_already_set();
  return truth == 1;
}

// By Precision, torch.set_float32_matmul_precision's words.
constexpr const char* kPrecisions[] = {"highest", "high", "medium"};
inline bool is_word(PyObject* object, const char* word) {
  return PyUnicode_Check(object) && PyUnicode_CompareWithASCIIString(object, word) == 0;
}
inline Precision precision_of(PyObject* word) {
  for (const Precision p : {kHighest, kHigh, kMedium}) {
    if (is_word(word, kPrecisions[p])) return p;
  }
  throw py::value_error("expected a word of torch.set_float32_matmul_precision");
}

// Torch gave us a tensor that we cannot use (a TorchFunctionMode can wrap them).
struct NotOrdinary : std::exception {};

// torch, as far as the bindings need it; looked up once.
class Torch {
 public:
  static const Torch& get() {
    // No guard of C++'s: one thread would wait in it with the GIL that the other needs. Never
    // destroyed: Python may be gone by then.
    static const Torch* torch = nullptr;
    if (!torch) torch = new Torch;
    return *torch;
  }

  // False, with no Python error set, unless `object` is a torch.Tensor or Parameter (not a
  // subclass), strided, on the CPU, of one of the Dtypes, with storage. is_new: its negative bit cannot
  // be set.
  bool read(PyObject* object, TensorView* out, bool is_new = false) const {
    if (Py_TYPE(object) != tensor_type_ && Py_TYPE(object) != parameter_type_) return false;
    bool ok = false;
    try {
      ok = (api_ ? read_dlpack(object, out) : read_attributes(object, out)) &&
           (is_new || is_false(PyObject_CallMethodNoArgs(object, is_neg_.ptr())));
    } catch (const py::error_already_set&) {  // a kind of tensor that has no such attribute
      ok = false;
    } catch (const py::builtin_exception&) {  // or a symbolic one
      ok = false;
    }
    if (!ok) PyErr_Clear();
    return ok && (out->data || out->elements() == 0);  // null: memory given up, or never had
  }

  // A new tensor of the shape given, of the device of `like`, and its memory. `as_like`: `dtype` is
  // like's, and torch need not be told (0.3 us).
  py::object empty(PyObject* like, Dtype dtype, bool as_like, std::initializer_list<int64_t> shape,
                   void** data) const {
    PyObject* args[1 + kMaxDims + 1] = {like};
    py::object sizes[kMaxDims];
    size_t n = 0;
    for (const int64_t size : shape) {
      sizes[n]    = py::int_(size);
      args[1 + n] = sizes[n].ptr();
      ++n;
    }
    args[1 + n]       = dtypes_[int(dtype)].ptr();
    py::object tensor = owned(PyObject_VectorcallMethod(new_empty_.ptr(), args, 1 + n,
                                                        as_like ? nullptr : dtype_keyword_.ptr()));
    TensorView view;
    if (!read(tensor.ptr(), &view, true)) throw NotOrdinary();
    *data = view.data;
    return tensor;
  }

  // What torch is set to in the calling thread.
  bool grad_enabled() const { return returns_true(grad_enabled_); }
  int num_threads() const {
    return int(PyLong_AsLong(owned(PyObject_CallNoArgs(num_threads_.ptr())).ptr()));
  }
  // Of products on the CPU: torch.backends.mkldnn.rnn.fp32_precision, or if that is not set, of
  // mkldnn.matmul, which torch.set_float32_matmul_precision sets too. Its own getter raises after
  // any use of these settings.
  Precision float32_precision() const {
    if (!precision_.is_none())
      return precision_of(owned(PyObject_CallNoArgs(precision_.ptr())).ptr());
    for (const py::str* operation : {&rnn_, &matmul_}) {
      PyObject* const args[] = {mkldnn_.ptr(), operation->ptr()};
      const py::object word  = owned(PyObject_Vectorcall(fp32_precision_.ptr(), args, 2, nullptr));
      if (is_word(word.ptr(), "bf16")) return kMedium;
      if (is_word(word.ptr(), "tf32")) return kHigh;
      if (is_word(word.ptr(), "ieee")) return kHighest;
    }
    return kHighest;
  }
  // Whether somebody transforms, rewrites or records torch's operations: functorch, autocast,
  // torch.jit.trace, dispatch modes and those before dispatch (of make_fx), forward-mode AD.
  bool watched() const {
    for (const py::object& watches : watchers_) {
      if (returns_true(watches)) return true;
    }
    PyObject* const key[] = {pre_dispatch_.ptr()};
    if (is_true(owned(PyObject_Vectorcall(includes_key_.ptr(), key, 1, nullptr)).ptr()))
      return true;
    return PyLong_AsLong(attribute(forward_ad_, current_level_).ptr()) >= 0;
  }
  bool profiled() const { return attribute(profiler_, is_enabled_).is(py::bool_(true)); }

  py::object contiguous(PyObject* tensor) const {
    return owned(PyObject_CallMethodNoArgs(tensor, contiguous_.ptr()));
  }
  // The view with the first two dimensions exchanged.
  py::object transposed(const py::object& tensor) const {
    PyObject* const args[] = {tensor.ptr(), zero_.ptr(), one_.ptr()};
    return owned(PyObject_VectorcallMethod(transpose_.ptr(), args, 3, nullptr));
  }

 private:
  Torch() {
    const py::module_ torch = py::module_::import("torch");
    const auto type = [](const py::object& o) { return reinterpret_cast<PyTypeObject*>(o.ptr()); };
    const py::object tensor = torch.attr("Tensor");
    tensor_type_            = type(tensor);
    parameter_type_         = type(torch.attr("nn").attr("Parameter"));
    for (const char* name : {"float32", "float64", "float16", "bfloat16", "int64", "bool"}) {
      dtypes_.push_back(torch.attr(name));
    }
    strided_           = torch.attr("strided");
    const py::object c = torch.attr("_C");
    has_storage_       = c.attr("_has_storage");
    grad_enabled_      = c.attr("is_grad_enabled");
    num_threads_       = c.attr("get_num_threads");
    fp32_precision_    = py::getattr(c, "_get_fp32_precision_getter", py::none());
    if (fp32_precision_.is_none()) precision_ = c.attr("_get_float32_matmul_precision");  // < 2.9
    forward_ad_ = py::module_::import("torch.autograd.forward_ad");
    profiler_   = py::module_::import("torch.autograd.profiler");
    for (const char* name : {"_are_functorch_transforms_active", "_is_any_autocast_enabled",
                             "_get_tracing_state", "_len_torch_dispatch_stack"}) {
      watchers_.push_back(c.attr(name));
    }
    includes_key_            = c.attr("_dispatch_tls_is_dispatch_key_included");
    pre_dispatch_            = c.attr("DispatchKey").attr("PreDispatch");
    const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
    if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) {
      const auto* api = static_cast<const dlpack::ExchangeApi*>(
          PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
      if (api->major == 1) api_ = api;
    }
  }

  static py::object owned(PyObject* object) {
    if (!object) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(object);
  }
  static bool returns_true(const py::object& function) {
    return is_true(owned(PyObject_CallNoArgs(function.ptr())).ptr());
  }
  static py::object attribute(const py::object& object, const py::str& name) {
    return owned(PyObject_GetAttr(object.ptr(), name.ptr()));
  }
  static bool is_false(PyObject* object) {
    Py_XDECREF(object);
    return object == Py_False;
  }

  static bool dtype_of(const dlpack::DataType& type, Dtype* out) {
    if (type.lanes != 1) return false;
    if (type.code == dlpack::kFloat && type.bits == 32) {
      *out = Dtype::kFloat32;
    } else if (type.code == dlpack::kFloat && type.bits == 64) {
      *out = Dtype::kFloat64;
    } else if (type.code == dlpack::kFloat && type.bits == 16) {
      *out = Dtype::kFloat16;
    } else if (type.code == dlpack::kBfloat && type.bits == 16) {
      *out = Dtype::kBfloat16;
    } else if (type.code == dlpack::kInt && type.bits == 64) {
      *out = Dtype::kInt64;
    } else if (type.code == dlpack::kBool && type.bits == 8) {
      *out = Dtype::kBool;
    } else {
      return false;
    }
    return true;
  }

  bool read_dlpack(PyObject* object, TensorView* out) const {
    dlpack::Tensor t{};
    // An error: no memory of its own (sparse, meta, inside vmap), or no strides.
    if (api_->read(object, &t) != 0) return false;
    if (t.device.type != dlpack::kCpu || t.ndim > kMaxDims || !dtype_of(t.dtype, &out->dtype)) {
      return false;
    }
    out->data = static_cast<char*>(t.data) + t.byte_offset;
    out->dims = t.ndim;
    for (int i = 0; i < t.ndim; ++i) {
      out->shape[i]   = t.shape[i];
      out->strides[i] = t.strides[i];
    }
    return true;
  }

  bool read_attributes(PyObject* object, TensorView* out) const {
    const py::handle t(object);
    const py::object layout = t.attr("layout"), dtype = t.attr("dtype");
    if (!t.attr("is_cpu").cast<bool>() || !layout.is(strided_) || !has_storage_(t).cast<bool>()) {
      return false;
    }
    int kind = 0;
    while (kind < int(dtypes_.size()) && !dtype.is(dtypes_[kind])) ++kind;
    if (kind == int(dtypes_.size())) return false;
    out->dtype = Dtype(kind);
    const py::tuple shape(t.attr("shape")), strides(t.attr("stride")());
    if (shape.size() > kMaxDims) return false;
    out->data = reinterpret_cast<void*>(  // NOLINT(performance-no-int-to-ptr)
        t.attr("data_ptr")().cast<std::uintptr_t>());
    out->dims = int(shape.size());
    for (size_t i = 0; i < shape.size(); ++i) {
      out->shape[i]   = shape[i].cast<int64_t>();
      out->strides[i] = strides[i].cast<int64_t>();
    }
    return true;
  }

  PyTypeObject *tensor_type_, *parameter_type_;
  std::vector<py::object> dtypes_;  // in the order of Dtype
  py::object strided_, has_storage_, grad_enabled_, num_threads_, fp32_precision_, forward_ad_,
      profiler_;
  py::object precision_ = py::none();
  py::object includes_key_, pre_dispatch_;
  std::vector<py::object> watchers_;
  const dlpack::ExchangeApi* api_ = nullptr;
  py::str is_neg_{"is_neg"}, new_empty_{"new_empty"}, contiguous_{"contiguous"},
      transpose_{"transpose"};
  py::int_ zero_{0}, one_{1};
  py::tuple dtype_keyword_ = py::make_tuple("dtype");
  py::str mkldnn_{"mkldnn"}, rnn_{"rnn"}, matmul_{"matmul"};
  py::str current_level_{"_current_level"}, is_enabled_{"_is_profiler_enabled"};
};

}  // namespace fusedrnn
