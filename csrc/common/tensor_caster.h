// How a Python array becomes a pyzoo::Tensor: the only place that knows Python arrays. Torch tensors come through the DLPack
// C exchange API of their type (borrowed, about 0.1 us); everything else through __dlpack__().
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

#include "dlpack.h"
#include "tensor.h"

namespace pyzoo {

namespace py = pybind11;

using ReleaseGil = py::call_guard<py::gil_scoped_release>;  // while a bound kernel runs

inline Tensor tensor_from_dlpack(const dlpack::DLTensor& t) {
  const auto fail = [](const std::string& what) { throw py::type_error("cannot use this array: " + what); };
  if (t.ndim > kMaxDims) fail("it has " + std::to_string(t.ndim) + " dimensions, at most " + std::to_string(kMaxDims) + " are allowed");
  Tensor out;
  const int code = t.dtype.code, bits = t.dtype.bits;
  if (t.dtype.lanes != 1) fail("vector element types are not allowed");
  if (code == dlpack::kFloat && bits == 32) out.dtype = DType::f32;
  else if (code == dlpack::kFloat && bits == 64) out.dtype = DType::f64;
  else if (code == dlpack::kFloat && bits == 16) out.dtype = DType::f16;
  else if (code == dlpack::kBfloat && bits == 16) out.dtype = DType::bf16;
  else if (code == dlpack::kInt && bits == 32) out.dtype = DType::i32;
  else if (code == dlpack::kInt && bits == 64) out.dtype = DType::i64;
  else if (code == dlpack::kUInt && bits == 8) out.dtype = DType::u8;
  else
    fail("its element type is none of float32, float64, float16, bfloat16, int32, int64, uint8 (DLPack code " + std::to_string(code) +
         ", " + std::to_string(bits) + " bits)");
  out.device_type = DeviceType(t.device.device_type);
  out.device_id = t.device.device_id;
  out.ndim = t.ndim;
  int64_t contiguous = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    out.shape[i] = t.shape[i];
    out.stride[i] = t.strides ? t.strides[i] : contiguous;
    contiguous *= t.shape[i];
  }
  // Fake, functional and wrapper-subclass tensors export a null pointer; a tensor of no elements may have one.
  if (!t.data && out.numel() > 0) fail("it has no memory of its own (a fake, functional or wrapped tensor)");
  out.data = static_cast<char*>(t.data) + (t.data ? t.byte_offset : 0);
  return out;
}

// What the exchange API exports without a word and would be wrong: a lazily negated view (raw memory), and a tensor whose
// gradient would be lost.
inline void check_torch_traps(PyObject* x) {
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
  const auto truth = [](PyObject* value) {
    if (!value) throw py::error_already_set();
    const bool yes = value == Py_True;
    Py_DECREF(value);
    return yes;
  };
  if (truth(PyObject_CallMethodNoArgs(x, is_neg)))
    throw py::type_error("cannot use this tensor: it is a lazily negated view; call .resolve_neg() first");
  if (truth(PyObject_GetAttr(x, requires_grad)) && py::module_::import("torch").attr("is_grad_enabled")().cast<bool>())
    throw py::type_error("cannot use this tensor: it requires grad and the compiled core would lose the gradient; use pyzoo.ops");
}

inline const dlpack::ExchangeAPI* exchange_api(PyTypeObject* type) {
  static thread_local PyTypeObject* last_type = nullptr;  // calls see the same tensor type again and again
  static thread_local const dlpack::ExchangeAPI* last_api = nullptr;
  if (type == last_type) return last_api;
  const dlpack::ExchangeAPI* api = nullptr;
  py::object capsule = py::getattr(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__", py::none());
  if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) {
    api = static_cast<const dlpack::ExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api->header.version.major != 1) api = nullptr;
  }
  if (PyType_HasFeature(type, Py_TPFLAGS_HEAPTYPE)) Py_INCREF(type);  // so that no other type takes its address
  last_type = type;
  return last_api = api;
}

// An uninitialised tensor beside another, from the allocator of the library that owns that.
inline dlpack::ManagedTensorVersioned* allocate_like(const Tensor& like, dlpack::DataType dtype, int ndim, const int64_t* shape) {
  const auto* api = static_cast<const dlpack::ExchangeAPI*>(like.exporter);
  dlpack::DLTensor prototype{nullptr, {int32_t(like.device_type), like.device_id}, ndim, dtype, const_cast<int64_t*>(shape), nullptr, 0};
  dlpack::ManagedTensorVersioned* made = nullptr;
  std::string why = "no reason given";
  const auto set_error = [](void* to, const char*, const char* message) { *static_cast<std::string*>(to) = message; };
  if (api->managed_tensor_allocator(&prototype, &made, &why, set_error) != 0) throw std::runtime_error("a kernel got no memory: " + why);
  return made;
}

inline std::shared_ptr<void> allocate_scratch(const Tensor& like, int64_t bytes) {
  auto* made = allocate_like(like, {dlpack::kUInt, 8, 1}, 1, &bytes);
  return std::shared_ptr<void>(made->tensor.data, [made](void*) { made->deleter(made); });
}

// For results that are made here: the Python object, and the view to write it through.
inline std::pair<py::object, Tensor> new_tensor(const Tensor& like, dlpack::DataType dtype, int ndim, const int64_t* shape) {
  if (!like.exporter) throw py::type_error("cannot make a tensor beside this array: use torch tensors");
  auto* made = allocate_like(like, dtype, ndim, shape);
  const Tensor view = tensor_from_dlpack(made->tensor);
  void* object = nullptr;
  if (static_cast<const dlpack::ExchangeAPI*>(like.exporter)->managed_tensor_to_py_object_no_sync(made, &object) != 0)
    throw py::error_already_set();
  return {py::reinterpret_steal<py::object>(static_cast<PyObject*>(object)), view};
}

inline Tensor tensor_from_python(PyObject* x) {
  if (const auto* api = exchange_api(Py_TYPE(x))) {
    dlpack::DLTensor t;
    if (api->dltensor_from_py_object_no_sync(x, &t) != 0) throw py::error_already_set();
    check_torch_traps(x);
    Tensor out = tensor_from_dlpack(t);
    out.exporter = api, out.allocate = &allocate_scratch;
    if (out.device_type == DeviceType::cuda && api->current_work_stream(dlpack::kCUDA, out.device_id, &out.stream) != 0)
      throw py::error_already_set();
    return out;
  }
  py::object array = py::reinterpret_borrow<py::object>(x), capsule;
  try {  // max_version lets read-only arrays through; older exporters do not know it
    capsule = array.attr("__dlpack__")(py::arg("max_version") = py::make_tuple(1, 1));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    capsule = array.attr("__dlpack__")();
  }
  Tensor out;
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    const auto* managed = static_cast<dlpack::ManagedTensorVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    if (managed->version.major != 1) throw py::type_error("cannot use this array: it exports an unknown DLPack version");
    out = tensor_from_dlpack(managed->tensor);
  } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
    out = tensor_from_dlpack(static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"))->tensor);
  } else {
    throw py::type_error("cannot use this array: __dlpack__() did not return a DLPack capsule");
  }
  // The capsule is never marked as used, so its own destructor frees the export.
  out.owner = std::shared_ptr<void>(capsule.release().ptr(), [](void* p) {
    py::gil_scoped_acquire gil;
    Py_DECREF(static_cast<PyObject*>(p));
  });
  return out;
}

}  // namespace pyzoo

namespace pybind11::detail {

template <>
struct type_caster<pyzoo::Tensor> {
  PYBIND11_TYPE_CASTER(pyzoo::Tensor, const_name("Tensor"));

  bool load(handle source, bool) {
    if (source.is_none() || (!pyzoo::exchange_api(Py_TYPE(source.ptr())) && !hasattr(type::handle_of(source), "__dlpack__"))) return false;
    value = pyzoo::tensor_from_python(source.ptr());
    return true;
  }
};

}  // namespace pybind11::detail
