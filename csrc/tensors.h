// Torch's tensors as the kernels take and make them. They come and go by DLPack's exchange API, so that
// nothing here links against torch.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <new>
#include <optional>
#include <type_traits>

namespace hiper_fast {
namespace {

namespace py = pybind11;

// DLPack 1, as far as it is used: https://github.com/dmlc/dlpack/blob/main/include/dlpack/dlpack.h
struct DType {
  uint8_t kind, bits;
  uint16_t lanes;

  bool operator==(const DType& other) const {
    return kind == other.kind && bits == other.bits && lanes == other.lanes;
  }
};

struct Tensor {
  void* data;
  int32_t device, device_index, dimensions;
  DType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct Managed {
  uint32_t major, minor;
  void* context;
  void (*deleter)(Managed*);
  uint64_t flags;
  Tensor tensor;
};

struct ExchangeAPI {
  uint32_t major, minor;
  void *previous, *allocate, *from_object;
  int (*to_object)(Managed*, void** object);
  int (*borrow)(void* object, Tensor*);
};

constexpr int32_t kCPU = 1;
constexpr size_t kAlignment = 64;  // as torch's own allocations have it

template <class T>
constexpr DType dtype_of() {
  constexpr uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBool = 6;
  constexpr uint8_t integer = std::is_signed_v<T> ? kInt : kUInt;
  return {std::is_same_v<T, bool> ? kBool : std::is_floating_point_v<T> ? kFloat : integer, 8 * sizeof(T), 1};
}

struct Torch {
  const ExchangeAPI* api;
  PyTypeObject *tensor, *parameter;
  PyObject* is_neg;  // the method's name
};

Torch torch;

void load_torch() {
  const py::object tensor = py::module_::import("torch").attr("Tensor");
  const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
  torch.api = static_cast<const ExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!torch.api || torch.api->major != 1 || !torch.api->borrow) {
    PyErr_Clear();
    throw py::import_error("this version of torch does not exchange tensors by DLPack 1.3");
  }
  const auto keep = [](py::object type) { return reinterpret_cast<PyTypeObject*>(type.release().ptr()); };
  torch.tensor = keep(tensor);
  torch.parameter = keep(py::module_::import("torch.nn").attr("Parameter"));
  torch.is_neg = py::str("is_neg").release().ptr();
}

// An argument is not as a kernel reads it.
struct Unfit {};

// The arguments of an op's schema. A kernel reads contiguous vectors on the CPU, of torch's own classes
// (others may mean something else by their memory), and Python's numbers; at everything else Unfit is thrown.
class Arguments {
 public:
  Arguments(int threads, const py::args& given) : threads(threads), given_(given) {}

  const int threads;

  template <class T>
  bool has(size_t place) const {
    Tensor tensor;
    return borrow(place, tensor) && tensor.dtype == dtype_of<T>();
  }

  int64_t length(size_t place) const {
    Tensor tensor;
    if (!borrow(place, tensor) || tensor.dimensions != 1) throw Unfit();
    return tensor.shape[0];
  }

  // Of an exclusive prefix sum.
  int64_t segments(size_t place) const {
    const int64_t found = length(place) - 1;
    if (found < 0) throw Unfit();
    return found;
  }

  template <class T>
  const T* vector(size_t place, int64_t length) const {
    constexpr DType dtype = dtype_of<T>();
    Tensor tensor;
    if (!borrow(place, tensor) || tensor.dimensions != 1 || !(tensor.dtype == dtype) ||
        tensor.shape[0] != length || (length > 1 && tensor.strides && tensor.strides[0] != 1) ||
        (std::is_floating_point_v<T> && is_negated(place))) {
      throw Unfit();
    }
    return reinterpret_cast<const T*>(static_cast<const char*>(tensor.data) + tensor.byte_offset);
  }

  template <class T>
  const T* optional_vector(size_t place, int64_t length) const {
    return is_none(place) ? nullptr : vector<T>(place, length);
  }

  // Numbers, and tensors of any shape and dtype whose memory on the CPU says all there is to them.
  bool are_plain() const {
    for (size_t place = 0; place < given_.size(); ++place) {
      PyObject* const object = at(place);
      Tensor tensor;
      if (is_none(place) || PyFloat_Check(object) || PyLong_Check(object)) continue;
      if (!borrow(place, tensor) || is_negated(place)) return false;
    }
    return true;
  }

  bool is_none(size_t place) const { return at(place) == Py_None; }

  double number(size_t place) const {
    PyObject* const object = at(place);
    if (!PyFloat_Check(object) && !PyLong_Check(object)) throw Unfit();
    const double value = PyFloat_AsDouble(object);
    if (value == -1 && PyErr_Occurred()) {
      PyErr_Clear();
      throw Unfit();
    }
    return value;
  }

  std::optional<double> optional_number(size_t place) const {
    return is_none(place) ? std::nullopt : std::optional(number(place));
  }

  bool flag(size_t place) const {
    if (!PyBool_Check(at(place))) throw Unfit();
    return at(place) == Py_True;
  }

 private:
  PyObject* at(size_t place) const {
    if (place >= given_.size()) throw Unfit();
    return PyTuple_GET_ITEM(given_.ptr(), Py_ssize_t(place));
  }

  bool borrow(size_t place, Tensor& tensor) const {
    PyObject* const object = at(place);
    if (Py_TYPE(object) != torch.tensor && Py_TYPE(object) != torch.parameter) return false;
    if (torch.api->borrow(object, &tensor) != 0) {
      PyErr_Clear();  // it has no memory
      return false;
    }
    int64_t count = 1;
    for (int i = 0; i < tensor.dimensions; ++i) count *= tensor.shape[i];
    return tensor.device == kCPU && (tensor.data || count == 0);
  }

  // A view may keep its sign apart from its memory.
  bool is_negated(size_t place) const {
    PyObject* self = at(place);
    const auto result =
        py::reinterpret_steal<py::object>(PyObject_VectorcallMethod(torch.is_neg, &self, 1, nullptr));
    if (!result) throw py::error_already_set();
    return result.ptr() == Py_True;
  }

  const py::args& given_;
};

// A new tensor of at most two dimensions, for a kernel to fill; to it null where there is nothing to fill.
template <class T>
class Result {
 public:
  explicit Result(std::initializer_list<int64_t> shape) {
    size_t count = 1;
    for (const int64_t size : shape) count *= size_t(size);
    void* const memory = ::operator new(kHeader + count * sizeof(T), std::align_val_t(kAlignment));
    T* const data = reinterpret_cast<T*>(static_cast<char*>(memory) + kHeader);

    Owned* const owned = new (memory) Owned{};
    std::copy(shape.begin(), shape.end(), owned->shape);
    owned->strides[0] = shape.size() == 2 ? owned->shape[1] : 1;
    owned->strides[1] = 1;
    Managed& managed = owned->managed;
    managed.major = 1;
    managed.context = memory;
    managed.deleter = [](Managed* self) { ::operator delete(self->context, std::align_val_t(kAlignment)); };
    managed.tensor = {data, kCPU, 0, int32_t(shape.size()), dtype_of<T>(), owned->shape, owned->strides, 0};
    void* object;
    if (torch.api->to_object(&managed, &object) != 0) {
      managed.deleter(&managed);
      throw py::error_already_set();
    }
    tensor_ = py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
    data_ = count ? data : nullptr;
  }

  operator T*() const { return data_; }
  const py::object& tensor() const { return tensor_; }

 private:
  struct Owned {
    Managed managed;
    int64_t shape[2], strides[2];
  };
  static constexpr size_t kHeader = (sizeof(Owned) + kAlignment - 1) / kAlignment * kAlignment;

  T* data_;
  py::object tensor_;
};

template <class... T>
py::tuple tuple_of(const Result<T>&... results) {
  return py::make_tuple(results.tensor()...);
}

}  // namespace
}  // namespace hiper_fast
