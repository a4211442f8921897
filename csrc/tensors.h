// Torch's tensors as the kernels take and make them. They come and go by DLPack's exchange API, so that
// nothing here links against torch.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "ops.h"

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
  constexpr uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6;
  if constexpr (std::is_same_v<T, Bfloat16>) return {kBfloat, 16, 1};
  if constexpr (std::is_same_v<T, Half>) return {kFloat, 16, 1};
  constexpr uint8_t integer = std::is_signed_v<T> ? kInt : kUInt;
  return {std::is_same_v<T, bool> ? kBool : std::is_floating_point_v<T> ? kFloat : integer, 8 * sizeof(T), 1};
}

struct Torch {
  const ExchangeAPI* api;
  PyTypeObject* tensor;
};

Torch torch;

void load_torch() {
  py::object tensor = py::module_::import("torch").attr("Tensor");
  const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
  torch.api = static_cast<const ExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!torch.api || torch.api->major != 1 || !torch.api->borrow) {
    PyErr_Clear();
    throw py::import_error("this version of torch does not exchange tensors by DLPack 1.3");
  }
  torch.tensor = reinterpret_cast<PyTypeObject*>(tensor.release().ptr());
}

// A contiguous vector on the CPU, as the kernels read it; it does not own its memory.
template <class T>
struct Vector {
  const T* data;
  int64_t length;

  const T* expect(int64_t wanted) const {
    if (length != wanted) {
      throw std::invalid_argument("a vector must have " + std::to_string(wanted) +
                                  " elements to go with the others, got " + std::to_string(length));
    }
    return data;
  }
};

template <class T>
const T* expect(const std::optional<Vector<T>>& vector, int64_t wanted) {
  return vector ? vector->expect(wanted) : nullptr;
}

// The same of N dimensions.
template <class T, size_t N>
struct Array {
  const T* data;
  std::array<int64_t, N> shape;

  const T* expect(const std::array<int64_t, N>& wanted) const {
    if (shape != wanted) throw std::invalid_argument("the tensors' shapes must go with each other");
    return data;
  }
};

int64_t count_segments(const Vector<int32_t>& prefix_sum) {
  if (prefix_sum.length == 0) throw std::invalid_argument("a prefix sum must have its leading 0");
  return prefix_sum.length - 1;
}

// False where the object is no such tensor. One whose memory says not all there is to it (a negated view, a
// wrapper) does not come this far: torch's dispatcher takes care of it.
template <class T, size_t N>
bool borrow(PyObject* object, Array<T, N>& array) {
  Tensor tensor;
  if (!PyObject_TypeCheck(object, torch.tensor)) return false;
  if (torch.api->borrow(object, &tensor) != 0) {
    PyErr_Clear();  // it has no memory
    return false;
  }
  if (tensor.device != kCPU || tensor.dimensions != N || !(tensor.dtype == dtype_of<T>())) return false;
  std::copy_n(tensor.shape, N, array.shape.begin());
  const bool empty = std::count(array.shape.begin(), array.shape.end(), 0) > 0;
  int64_t stride = 1;
  for (size_t i = N; i-- > 0 && !empty; stride *= array.shape[i]) {
    if (array.shape[i] > 1 && tensor.strides && tensor.strides[i] != stride) return false;
  }
  if (!empty && !tensor.data) return false;
  array.data = reinterpret_cast<const T*>(static_cast<const char*>(tensor.data) + tensor.byte_offset);
  return true;
}

template <class T>
bool borrow(PyObject* object, Vector<T>& vector) {
  Array<T, 1> array;
  if (!borrow(object, array)) return false;
  vector = {array.data, array.shape[0]};
  return true;
}

// A new tensor of at most three dimensions, for a kernel to fill; to it null where there is nothing to fill.
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
    int64_t stride = 1;
    for (size_t i = shape.size(); i-- > 0; stride *= owned->shape[i]) owned->strides[i] = stride;
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
    int64_t shape[3], strides[3];
  };
  static constexpr size_t kHeader = (sizeof(Owned) + kAlignment - 1) / kAlignment * kAlignment;

  T* data_;
  py::object tensor_;
};

template <class... T>
py::tuple pack(const Result<T>&... results) {
  return py::make_tuple(results.tensor()...);
}

}  // namespace
}  // namespace hiper_fast

namespace pybind11::detail {

template <class T>
constexpr auto name_dtype() {
  constexpr auto kInteger = const_name<std::is_signed_v<T>>(const_name("int"), const_name("uint"));
  constexpr auto kNumber = const_name<std::is_floating_point_v<T>>(const_name("float"), kInteger);
  constexpr auto kWhole =
      const_name<std::is_same_v<T, bool>>(const_name("bool"), kNumber + const_name<8 * sizeof(T)>());
  constexpr auto kHalf =
      const_name<std::is_same_v<T, hiper_fast::Half>>(const_name("float16"), const_name("bfloat16"));
  return const_name<std::is_arithmetic_v<T>>(kWhole, kHalf);
}

// A parameter that is a Vector or an Array takes a tensor that can be borrowed as one; of anything else
// pybind11 makes a TypeError, which tells what is taken.
template <class T>
struct type_caster<hiper_fast::Vector<T>> {
  PYBIND11_TYPE_CASTER(hiper_fast::Vector<T>, const_name("contiguous CPU vector of ") + name_dtype<T>());

  bool load(handle source, bool) { return hiper_fast::borrow(source.ptr(), value); }
};

template <class T, size_t N>
struct type_caster<hiper_fast::Array<T, N>> {
  using Array = hiper_fast::Array<T, N>;
  PYBIND11_TYPE_CASTER(Array, const_name("contiguous CPU tensor of ") + name_dtype<T>() + const_name(", ") +
                                  const_name<N>() + const_name(" dimensions"));

  bool load(handle source, bool) { return hiper_fast::borrow(source.ptr(), value); }
};

}  // namespace pybind11::detail
