// Python's view of the kernels. Most ops come whole: they take the arguments of their schema, tensors among
// them, and return its results. What runs inside an op or beside them takes every pointer as the integer
// address of a contiguous CPU tensor.
#include <pybind11/pybind11.h>

#include <type_traits>

#include "ops.h"
#include "tensors.h"

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

template <class A>
struct Same {
  using type = A;
};

template <class... A>
void run(void (*kernel)(A...), typename Same<A>::type... arguments) {
  const py::gil_scoped_release released;
  kernel(arguments...);
}

// The op takes (threads, the arguments of its schema), T the dtype of the first, and returns its results, or
// NotImplemented where an argument is not as its kernel reads it.
template <class... T, class Op>
void def_op(py::module_& module, const char* name, Op op) {
  module.def(name, [op](int threads, const py::args& given) {
    const Arguments a(threads, given);
    auto results = py::reinterpret_borrow<py::object>(Py_NotImplemented);
    try {
      (void)((a.has<T>(0) && (results = op(T{}, a), true)) || ...);
    } catch (const Unfit&) {
    }
    return results;
  });
}

// The ops whose kernels are compiled for each instruction set.
template <class Isa>
void def_all(py::module_& module) {
  def_op<float, double>(module, "gae", [](auto type, const Arguments& a) {
    using T = decltype(type);
    const int64_t turns = a.length(0), trajectories = a.segments(3);
    const Result<T> out({2, turns});
    run(&gae<Isa, T>, a.vector<T>(0, turns), a.vector<T>(1, turns), a.vector<bool>(2, trajectories),
        a.vector<int32_t>(3, trajectories + 1), a.optional_vector<T>(4, trajectories), turns, trajectories,
        a.number(5), a.number(6), out, a.threads);
    return out.tensor();
  });
  def_op<float, double>(module, "normalize", [](auto type, const Arguments& a) {
    using T = decltype(type);
    const int64_t turns = a.length(0);
    const Result<T> out({turns});
    run(&normalize<Isa, T>, a.vector<T>(0, turns), a.vector<bool>(1, turns), turns, a.number(2), out);
    return out.tensor();
  });
  def_op<float, double>(module, "scatter_advantages", [](auto type, const Arguments& a) {
    using T = decltype(type);
    const int64_t tokens = a.length(4), turns = a.segments(5);
    const Result<T> advantages({tokens});
    const Result<bool> loss_mask({tokens});
    run(&scatter_advantages<Isa, T>, a.vector<T>(0, turns), a.vector<T>(1, turns), a.vector<T>(2, turns),
        a.vector<bool>(3, turns), a.vector<uint8_t>(4, tokens), a.vector<int32_t>(5, turns + 1), tokens,
        turns, advantages, loss_mask, a.threads);
    return tuple_of(advantages, loss_mask);
  });
  def_op<float, double>(module, "normalize_and_scatter", [](auto type, const Arguments& a) {
    using T = decltype(type);
    const int64_t tokens = a.length(4), turns = a.segments(5);
    const Result<T> advantages({tokens}), levels({3, turns});
    const Result<bool> loss_mask({tokens});
    run(&normalize_and_scatter<Isa, T>, a.vector<T>(0, turns), a.vector<T>(1, turns), a.vector<T>(2, turns),
        a.vector<bool>(3, turns), a.vector<uint8_t>(4, tokens), a.vector<int32_t>(5, turns + 1), tokens,
        turns, a.number(6), levels, advantages, loss_mask, a.threads);
    return tuple_of(advantages, loss_mask, levels);
  });
  def_op<float, double>(module, "ppo_loss", [](auto type, const Arguments& a) {
    using T = decltype(type);
    const int64_t tokens = a.length(0), wanted = a.flag(12) ? tokens : 0;
    const Result<T> loss({}), metrics({6}), gradient({wanted}), gradient_entropy({a.is_none(5) ? 0 : wanted});
    run(&ppo_loss<Isa, T>, a.vector<T>(0, tokens), a.vector<T>(1, tokens), a.vector<T>(2, tokens),
        a.vector<bool>(3, tokens), a.optional_vector<T>(4, tokens), a.optional_vector<T>(5, tokens), tokens,
        a.number(6), a.number(7), a.number(8), a.number(9), a.number(10), a.optional_number(11), loss,
        metrics, gradient, gradient_entropy);
    return tuple_of(loss, metrics, gradient, gradient_entropy);
  });
  def_op<float, double>(module, "value_loss", [](auto type, const Arguments& a) {
    using T = decltype(type);
    const int64_t turns = a.length(0);
    const Result<T> loss({}), metrics({2}), gradient({a.flag(6) ? turns : 0});
    run(&value_loss<Isa, T>, a.vector<T>(0, turns), a.vector<T>(1, turns), a.vector<T>(2, turns),
        a.vector<bool>(3, turns), turns, a.number(4), a.optional_number(5), loss, metrics, gradient);
    return tuple_of(loss, metrics, gradient);
  });
  def(module, "linear_logprobs_float32", &linear_logprobs<Isa, float>);
  def(module, "linear_logprobs_float64", &linear_logprobs<Isa, double>);
  def(module, "linear_logprobs_backward_float32", &linear_logprobs_backward<Isa, float>);
  def(module, "linear_logprobs_backward_float64", &linear_logprobs_backward<Isa, double>);
  def(module, "linear_ppo_float32", &linear_ppo<Isa, float>);
  def(module, "linear_ppo_float64", &linear_ppo<Isa, double>);
  def(module, "exp", &hiper_fast::exp<Isa>);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  load_torch();
  def_op<float, double>(module, "hae", [](auto type, const Arguments& a) {
    using T = decltype(type);
    const int64_t turns = a.length(0), trajectories = a.segments(6);
    const Result<T> out({6, turns});
    const Result<bool> boundary({turns});
    run(&hae<T>, a.vector<T>(0, turns), a.vector<T>(1, turns), a.vector<T>(2, turns),
        a.optional_vector<T>(3, turns), a.vector<bool>(4, turns), a.vector<bool>(5, trajectories),
        a.vector<int32_t>(6, trajectories + 1), a.optional_vector<T>(7, trajectories),
        a.optional_vector<T>(8, trajectories), turns, trajectories, a.number(9), a.number(10), a.number(11),
        out, boundary, a.threads);
    return tuple_of(out, boundary);
  });
  def_op<int64_t, int32_t>(module, "find_roles", [](auto type, const Arguments& a) {
    using Id = decltype(type);
    const int64_t tokens = a.length(0), turns = a.segments(1), vocabulary = a.length(4);
    const Result<uint8_t> roles({tokens});
    const Result<bool> switches({turns}), valid({turns});
    const Result<int32_t> value_index({turns, 3});
    run(&find_roles<Id>, a.vector<Id>(0, tokens), a.vector<int32_t>(1, turns + 1),
        a.vector<uint8_t>(2, a.length(2)), a.vector<int32_t>(3, vocabulary + 1),
        a.vector<uint8_t>(4, vocabulary), tokens, turns, vocabulary, roles, switches, value_index, valid,
        a.threads);
    return tuple_of(roles, switches, value_index, valid);
  });
  module.def("are_plain", [](const py::args& given) { return Arguments(1, given).are_plain(); });
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
