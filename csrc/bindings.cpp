// Python's view of the kernels: buffers come as the integer addresses of contiguous CPU tensors.
#include <pybind11/pybind11.h>

#include "ops.h"

namespace py = pybind11;
using Address = uintptr_t;

namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
void hae(Address rewards, Address values_low, Address values_high, Address values_switch, Address switches,
         Address terminated, Address cu_turns, Address bootstrap_low, Address bootstrap_high, int64_t turns,
         int64_t trajectories, double gamma, double lambda_turn, double lambda_segment, Address out,
         Address boundary) {
  hiper_fast::hae<T>(at<T>(rewards), at<T>(values_low), at<T>(values_high), at<T>(values_switch),
                     at<bool>(switches), at<bool>(terminated), at<int32_t>(cu_turns), at<T>(bootstrap_low),
                     at<T>(bootstrap_high), turns, trajectories, gamma, lambda_turn, lambda_segment,
                     at<T>(out), at<bool>(boundary));
}

template <class T>
void gae(Address rewards, Address values, Address terminated, Address cu_turns, Address bootstrap,
         int64_t turns, int64_t trajectories, double gamma, double lambda, Address out) {
  hiper_fast::gae<T>(at<T>(rewards), at<T>(values), at<bool>(terminated), at<int32_t>(cu_turns),
                     at<T>(bootstrap), turns, trajectories, gamma, lambda, at<T>(out));
}

template <class T>
void normalize(Address values, Address mask, int64_t turns, double eps, Address out) {
  hiper_fast::normalize<T>(at<T>(values), at<bool>(mask), turns, eps, at<T>(out));
}

template <class Id>
void find_roles(Address token_ids, Address cu_tokens, Address piece_bytes, Address piece_offsets,
                Address piece_flags, int64_t tokens, int64_t turns, int64_t vocabulary, Address roles,
                Address switches, Address value_index, Address valid) {
  hiper_fast::find_roles<Id>(at<Id>(token_ids), at<int32_t>(cu_tokens), at<uint8_t>(piece_bytes),
                             at<int32_t>(piece_offsets), at<uint8_t>(piece_flags), tokens, turns, vocabulary,
                             at<uint8_t>(roles), at<bool>(switches), at<int32_t>(value_index),
                             at<bool>(valid));
}

template <class T>
void scatter_advantages(Address advantages_low, Address advantages_high, Address advantages_switch,
                        Address boundary, Address roles, Address cu_tokens, int64_t tokens, int64_t turns,
                        Address advantages, Address loss_mask) {
  hiper_fast::scatter_advantages<T>(at<T>(advantages_low), at<T>(advantages_high), at<T>(advantages_switch),
                                    at<bool>(boundary), at<uint8_t>(roles), at<int32_t>(cu_tokens), tokens,
                                    turns, at<T>(advantages), at<bool>(loss_mask));
}

int64_t bm25_search(Address documents, Address counts, Address block_bounds, Address norms, Address inverse,
                    Address begins, Address ends, Address block_begins, Address weights, Address out_documents,
                    Address out_scores, int64_t terms, int64_t total, int64_t k, int64_t block) {
  return hiper_fast::bm25_search(at<int32_t>(documents), at<uint16_t>(counts), at<float>(block_bounds),
                                 at<uint8_t>(norms), at<float>(inverse), at<int64_t>(begins), at<int64_t>(ends),
                                 at<int64_t>(block_begins), at<float>(weights), at<int32_t>(out_documents),
                                 at<float>(out_scores), terms, total, k, block);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  using Release = py::call_guard<py::gil_scoped_release>;
  module.def("hae_float32", &hae<float>, Release());
  module.def("hae_float64", &hae<double>, Release());
  module.def("gae_float32", &gae<float>, Release());
  module.def("gae_float64", &gae<double>, Release());
  module.def("normalize_float32", &normalize<float>, Release());
  module.def("normalize_float64", &normalize<double>, Release());
  module.def("find_roles_int32", &find_roles<int32_t>, Release());
  module.def("find_roles_int64", &find_roles<int64_t>, Release());
  module.def("scatter_advantages_float32", &scatter_advantages<float>, Release());
  module.def("scatter_advantages_float64", &scatter_advantages<double>, Release());
  module.def("bm25_search", &bm25_search, Release());
}
