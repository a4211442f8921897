// Python's view of the kernels: every pointer comes as the integer address of a contiguous CPU tensor.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <type_traits>

#include "ops.h"

namespace py = pybind11;
using namespace hiper_fast;

namespace {

template <class A>
using Given = std::conditional_t<std::is_pointer_v<A>, uintptr_t, A>;

template <class A>
A take(Given<A> argument) {
  if constexpr (std::is_pointer_v<A>) {
    return reinterpret_cast<A>(argument);
  } else {
    return argument;
  }
}

template <class Result, class... A>
void def(py::module_& module, const char* name, Result (*kernel)(A...)) {
  module.def(
      name, [kernel](Given<A>... arguments) { return kernel(take<A>(arguments)...); },
      py::call_guard<py::gil_scoped_release>());
}

// The kernels that are compiled for each instruction set.
template <class Isa>
void def_all(py::module_& module) {
  def(module, "gae_float32", &gae<Isa, float>);
  def(module, "gae_float64", &gae<Isa, double>);
  def(module, "scatter_advantages_float32", &scatter_advantages<Isa, float>);
  def(module, "scatter_advantages_float64", &scatter_advantages<Isa, double>);
  def(module, "normalize_and_scatter_float32", &normalize_and_scatter<Isa, float>);
  def(module, "normalize_and_scatter_float64", &normalize_and_scatter<Isa, double>);
  def(module, "linear_logprobs_float32", &linear_logprobs<Isa, float>);
  def(module, "linear_logprobs_float64", &linear_logprobs<Isa, double>);
  def(module, "linear_logprobs_backward_float32", &linear_logprobs_backward<Isa, float>);
  def(module, "linear_logprobs_backward_float64", &linear_logprobs_backward<Isa, double>);
  def(module, "linear_ppo_float32", &linear_ppo<Isa, float>);
  def(module, "linear_ppo_float64", &linear_ppo<Isa, double>);
  def(module, "ppo_loss_float32", &ppo_loss<Isa, float>);
  def(module, "ppo_loss_float64", &ppo_loss<Isa, double>);
  def(module, "value_loss_float32", &value_loss<Isa, float>);
  def(module, "value_loss_float64", &value_loss<Isa, double>);
  def(module, "exp", &hiper_fast::exp<Isa>);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  def(module, "hae_float32", &hae<float>);
  def(module, "hae_float64", &hae<double>);
  def(module, "normalize_float32", &normalize<float>);
  def(module, "normalize_float64", &normalize<double>);
  def(module, "find_roles_int32", &find_roles<int32_t>);
  def(module, "find_roles_int64", &find_roles<int64_t>);
  def(module, "check_targets", &check_targets);
  def(module, "bm25_search", &bm25_search);

  // The best there is for this processor under the plain names; all that run on it also by instruction set.
  py::module_ portable = module.def_submodule("portable");
  def_all<Portable>(portable);
#if HIPER_FAST_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    py::module_ avx2 = module.def_submodule("avx2");
    def_all<Avx2>(avx2);
    def_all<Avx2>(module);
    return;
  }
#endif
  def_all<Portable>(module);
}
