// Python's view of the kernels. Most ops come whole: they take the arguments of their schema, tensors among
// them, and return its results. What runs inside an op or beside them takes every pointer as the integer
// address of a contiguous CPU tensor.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
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

template <class Kernel>
void run(Kernel kernel) {
  const py::gil_scoped_release released;
  kernel();
}

// The ops. Each takes (threads, the arguments of its schema) and returns its results.
template <class Isa, class T>
py::object run_gae(int threads, Vector<T> rewards, Vector<T> values, Vector<bool> terminated,
                   Vector<int32_t> cu_turns, std::optional<Vector<T>> bootstrap, double gamma,
                   double lambda) {
  const int64_t turns = rewards.length, trajectories = count_segments(cu_turns);
  const Result<T> out({2, turns});
  run([&] {
    gae<Isa, T>(rewards.data, values.expect(turns), terminated.expect(trajectories), cu_turns.data,
                expect(bootstrap, trajectories), turns, trajectories, gamma, lambda, out, threads);
  });
  return out.tensor();
}

template <class Isa, class T>
py::object run_normalize(int, Vector<T> values, Vector<bool> mask, double eps) {
  const int64_t turns = values.length;
  const Result<T> out({turns});
  run([&] { normalize<Isa, T>(values.data, mask.expect(turns), turns, eps, out); });
  return out.tensor();
}

template <class Isa, class T>
py::tuple run_scatter_advantages(int threads, Vector<T> low, Vector<T> high, Vector<T> switches,
                                 Vector<bool> boundary, Vector<uint8_t> roles, Vector<int32_t> cu_tokens) {
  const int64_t tokens = roles.length, turns = count_segments(cu_tokens);
  const Result<T> advantages({tokens});
  const Result<bool> loss_mask({tokens});
  run([&] {
    scatter_advantages<Isa, T>(low.expect(turns), high.expect(turns), switches.expect(turns),
                               boundary.expect(turns), roles.data, cu_tokens.data, tokens, turns, advantages,
                               loss_mask, threads);
  });
  return pack(advantages, loss_mask);
}

template <class Isa, class T>
py::tuple run_normalize_and_scatter(int threads, Vector<T> low, Vector<T> high, Vector<T> switches,
                                    Vector<bool> boundary, Vector<uint8_t> roles, Vector<int32_t> cu_tokens,
                                    double eps) {
  const int64_t tokens = roles.length, turns = count_segments(cu_tokens);
  const Result<T> advantages({tokens}), levels({3, turns});
  const Result<bool> loss_mask({tokens});
  run([&] {
    normalize_and_scatter<Isa, T>(low.expect(turns), high.expect(turns), switches.expect(turns),
                                  boundary.expect(turns), roles.data, cu_tokens.data, tokens, turns, eps,
                                  levels, advantages, loss_mask, threads);
  });
  return pack(advantages, loss_mask, levels);
}

template <class Isa, class T>
py::tuple run_ppo_loss(int, Vector<T> logprobs, Vector<T> old_logprobs, Vector<T> advantages,
                       Vector<bool> loss_mask, std::optional<Vector<T>> ref_logprobs,
                       std::optional<Vector<T>> entropy, double clip_low, double clip_high, double dual_clip,
                       double kl_coef, double entropy_coef, std::optional<double> denominator,
                       bool want_gradient) {
  const int64_t tokens = logprobs.length, wanted = want_gradient ? tokens : 0;
  const Result<T> loss({}), metrics({6}), gradient({wanted}), gradient_entropy({entropy ? wanted : 0});
  run([&] {
    ppo_loss<Isa, T>(logprobs.data, old_logprobs.expect(tokens), advantages.expect(tokens),
                     loss_mask.expect(tokens), expect(ref_logprobs, tokens), expect(entropy, tokens), tokens,
                     clip_low, clip_high, dual_clip, kl_coef, entropy_coef, denominator, loss, metrics,
                     gradient, gradient_entropy);
  });
  return pack(loss, metrics, gradient, gradient_entropy);
}

template <class Isa, class T>
py::tuple run_value_loss(int, Vector<T> values, Vector<T> old_values, Vector<T> returns, Vector<bool> mask,
                         double clip, std::optional<double> denominator, bool want_gradient) {
  const int64_t turns = values.length;
  const Result<T> loss({}), metrics({2}), gradient({want_gradient ? turns : 0});
  run([&] {
    value_loss<Isa, T>(values.data, old_values.expect(turns), returns.expect(turns), mask.expect(turns),
                       turns, clip, denominator, loss, metrics, gradient);
  });
  return pack(loss, metrics, gradient);
}

template <class Isa, class Stored>
py::object run_paged_attention(int threads, Array<float, 3> query, Array<Stored, 4> keys,
                               Array<Stored, 4> values, Array<int32_t, 2> blocks, Vector<int32_t> cu_query,
                               Vector<int32_t> lengths, std::optional<double> scale,
                               std::optional<int64_t> window, std::optional<double> softcap,
                               std::optional<Vector<float>> sinks) {
  const int64_t sequences = count_segments(cu_query);
  const auto [tokens, heads, d] = query.shape;
  const auto [pool, block, kv_heads, _] = keys.shape;
  const int64_t most = blocks.shape[1], all = most * block, d_v = values.shape[3];
  if (d == 0 || kv_heads == 0 || heads % kv_heads != 0 || block == 0) {
    throw std::invalid_argument("keys must have a block, a d and kv_heads that divide query's heads");
  }
  const Result<float> out({tokens, heads, d_v});
  const PagedAttention<Stored> call{query.data,
                                    keys.expect({pool, block, kv_heads, d}),
                                    values.expect({pool, block, kv_heads, d_v}),
                                    blocks.expect({sequences, most}),
                                    cu_query.data,
                                    lengths.expect(sequences),
                                    expect(sinks, heads),
                                    tokens,
                                    heads,
                                    d,
                                    pool,
                                    block,
                                    kv_heads,
                                    d_v,
                                    sequences,
                                    most,
                                    std::min(window.value_or(all), all),
                                    float(scale.value_or(1 / std::sqrt(double(d)))),
                                    float(softcap.value_or(0)),
                                    out};
  run([&] { paged_attention<Isa>(call, threads); });
  return out.tensor();
}

template <class T>
py::tuple run_hae(int threads, Vector<T> rewards, Vector<T> values_low, Vector<T> values_high,
                  std::optional<Vector<T>> values_switch, Vector<bool> switches, Vector<bool> terminated,
                  Vector<int32_t> cu_turns, std::optional<Vector<T>> bootstrap_low,
                  std::optional<Vector<T>> bootstrap_high, double gamma, double lambda_turn,
                  double lambda_segment) {
  const int64_t turns = rewards.length, trajectories = count_segments(cu_turns);
  const Result<T> out({6, turns});
  const Result<bool> boundary({turns});
  run([&] {
    hae<T>(rewards.data, values_low.expect(turns), values_high.expect(turns), expect(values_switch, turns),
           switches.expect(turns), terminated.expect(trajectories), cu_turns.data,
           expect(bootstrap_low, trajectories), expect(bootstrap_high, trajectories), turns, trajectories,
           gamma, lambda_turn, lambda_segment, out, boundary, threads);
  });
  return pack(out, boundary);
}

template <class Id>
py::tuple run_find_roles(int threads, Vector<Id> token_ids, Vector<int32_t> cu_tokens,
                         Vector<uint8_t> piece_bytes, Vector<int32_t> piece_offsets,
                         Vector<uint8_t> piece_flags) {
  const int64_t tokens = token_ids.length, turns = count_segments(cu_tokens), vocabulary = piece_flags.length;
  const Result<uint8_t> roles({tokens});
  const Result<bool> switches({turns}), valid({turns});
  const Result<int32_t> value_index({turns, 3});
  run([&] {
    find_roles<Id>(token_ids.data, cu_tokens.data, piece_bytes.data, piece_offsets.expect(vocabulary + 1),
                   piece_flags.data, tokens, turns, vocabulary, roles, switches, value_index, valid, threads);
  });
  return pack(roles, switches, value_index, valid);
}

template <class Isa, class T>
void def_ops(py::module_& module) {
  module.def("gae", &run_gae<Isa, T>);
  module.def("normalize", &run_normalize<Isa, T>);
  module.def("scatter_advantages", &run_scatter_advantages<Isa, T>);
  module.def("normalize_and_scatter", &run_normalize_and_scatter<Isa, T>);
  module.def("ppo_loss", &run_ppo_loss<Isa, T>);
  module.def("value_loss", &run_value_loss<Isa, T>);
}

// What is compiled for each instruction set.
template <class Isa>
void def_all(py::module_& module) {
  def_ops<Isa, float>(module);
  def_ops<Isa, double>(module);
  module.def("paged_attention", &run_paged_attention<Isa, float>);
  module.def("paged_attention", &run_paged_attention<Isa, Bfloat16>);
  module.def("paged_attention", &run_paged_attention<Isa, Half>);
  def(module, "linear_logprobs_float32", &linear_logprobs<Isa, float>);
  def(module, "linear_logprobs_float64", &linear_logprobs<Isa, double>);
  def(module, "linear_logprobs_backward_float32", &linear_logprobs_backward<Isa, float>);
  def(module, "linear_logprobs_backward_float64", &linear_logprobs_backward<Isa, double>);
  def(module, "rms_norm_float32", &rms_norm<Isa, float>);
  def(module, "rms_norm_float64", &rms_norm<Isa, double>);
  def(module, "rms_norm_backward_float32", &rms_norm_backward<Isa, float>);
  def(module, "rms_norm_backward_float64", &rms_norm_backward<Isa, double>);
  def(module, "sample_float32", &sample<Isa, float>);
  def(module, "sample_float64", &sample<Isa, double>);
  def(module, "swiglu_float32", &swiglu<Isa, float>);
  def(module, "swiglu_float64", &swiglu<Isa, double>);
  def(module, "swiglu_backward_float32", &swiglu_backward<Isa, float>);
  def(module, "swiglu_backward_float64", &swiglu_backward<Isa, double>);
  def(module, "rope_float32", &rope<Isa, float>);
  def(module, "rope_float64", &rope<Isa, double>);
  def(module, "exp", &hiper_fast::exp<Isa>);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  load_torch();
  module.attr("sources") = HIPER_FAST_SOURCES;
  module.def("hae", &run_hae<float>);
  module.def("hae", &run_hae<double>);
  module.def("find_roles", &run_find_roles<int64_t>);
  module.def("find_roles", &run_find_roles<int32_t>);
  def(module, "check_targets", &check_targets);
  def(module, "bm25_search", &bm25_search);

  // By instruction set all that run on this processor, and under the plain names the best of them.
  py::module_ portable = module.def_submodule("portable");
  def_all<Portable>(portable);
#if HIPER_FAST_X86
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx2) {
    py::module_ avx2 = module.def_submodule("avx2");
    def_all<Avx2>(avx2);
  }
  if (has_avx512) {
    py::module_ avx512 = module.def_submodule("avx512");
    def_all<Avx512>(avx512);
    def_all<Avx512>(module);
    return;
  }
  if (has_avx2) {
    def_all<Avx2>(module);
    return;
  }
#endif
  def_all<Portable>(module);
}
