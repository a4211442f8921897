// The CPU kernels: plain functions over contiguous raw buffers, so that one build serves every torch version.
// Shapes and dtypes are checked before; what only the data can tell (prefix sums, ids) is checked here and
// thrown as std::invalid_argument, which Python sees as a ValueError. Those with an Isa are compiled once for
// each instruction set; `threads` is the most a kernel may use, where its size pays for them.
#pragma once

#include <cstdint>
#include <optional>

namespace hiper_fast {

struct Portable;
struct Avx2;  // and FMA
struct Avx512;  // F, BW, DQ and VL

enum Role : uint8_t { kAction = 1, kSubgoal = 2, kSwitch = 4 };

// out: [6, turns], rows advantages_low, returns_low, advantages_high, returns_high, advantages_switch,
// returns_switch. values_switch, bootstrap_low and bootstrap_high may be null, which means 0.
template <class T>
void hae(const T* rewards, const T* values_low, const T* values_high, const T* values_switch,
         const bool* switches, const bool* terminated, const int32_t* cu_turns, const T* bootstrap_low,
         const T* bootstrap_high, int64_t turns, int64_t trajectories, double gamma, double lambda_turn,
         double lambda_segment, T* out, bool* boundary, int threads);

// out: [2, turns], rows advantages, returns. bootstrap may be null.
template <class Isa, class T>
void gae(const T* rewards, const T* values, const bool* terminated, const int32_t* cu_turns,
         const T* bootstrap, int64_t turns, int64_t trajectories, double gamma, double lambda, T* out,
         int threads);

// out: [turns], 0 off the mask.
template <class Isa, class T>
void normalize(const T* values, const bool* mask, int64_t turns, double eps, T* out);

enum PieceFlag : uint8_t { kHasAngle = 1, kHasHighByte = 2, kEmpty = 4 };

// piece_offsets: [vocabulary + 1] into piece_bytes; piece_flags: [vocabulary].
template <class Id>
void find_roles(const Id* token_ids, const int32_t* cu_tokens, const uint8_t* piece_bytes,
                const int32_t* piece_offsets, const uint8_t* piece_flags, int64_t tokens, int64_t turns,
                int64_t vocabulary, uint8_t* roles, bool* switches, int32_t* value_index, bool* valid,
                int threads);

template <class Isa, class T>
void scatter_advantages(const T* advantages_low, const T* advantages_high, const T* advantages_switch,
                        const bool* boundary, const uint8_t* roles, const int32_t* cu_tokens, int64_t tokens,
                        int64_t turns, T* advantages, bool* loss_mask, int threads);

// levels: [3, turns], rows low, high, switch, 0 at turns that do not train the level.
template <class Isa, class T>
void normalize_and_scatter(const T* advantages_low, const T* advantages_high, const T* advantages_switch,
                           const bool* boundary, const uint8_t* roles, const int32_t* cu_tokens,
                           int64_t tokens, int64_t turns, double eps, T* levels, T* advantages,
                           bool* loss_mask, int threads);

// Of each row its target's log-probability, at most 0, and the entropy (may be null), from the logits of a
// tile of the vocabulary at a time, [rows, columns] from the token `first` on. Tiles come in order; `sums`
// [rows, 4] and `logprobs` hold in between what is known so far; in the end the last of the sums is the
// log-probability in double.
template <class Isa, class T>
void linear_logprobs(const T* logits, const int64_t* targets, int64_t rows, int64_t columns, int64_t first,
                     int64_t vocabulary, double temperature, double* sums, T* logprobs, T* entropy,
                     int threads);

// From the same logits, and what is known of all of them, the gradient of these [rows, columns], given those of each
// row's log-probability and entropy (may be null). `live` [rows] tells which rows of the logits they are (null: all in
// order). Of logits that are soft-capped (softcap tanh(x / softcap)) it is the gradient of x.
template <class Isa, class T>
void linear_logprobs_backward(const T* logits, const int64_t* targets, const int64_t* live, int64_t rows,
                              int64_t columns, int64_t first, double temperature,
                              std::optional<double> softcap, const double* sums, const T* grad_logprobs,
                              const T* grad_entropy, T* gradient, int threads);

// loss: [1]; metrics: [6], policy, approx_kl, clip_fraction, dual_clip_fraction, kl, entropy. ref_logprobs,
// entropy and the gradients may be null; without a denominator it is the number of masked tokens.
template <class Isa, class T>
void ppo_loss(const T* logprobs, const T* old_logprobs, const T* advantages, const bool* loss_mask,
              const T* ref_logprobs, const T* entropy, int64_t tokens, double clip_low, double clip_high,
              double dual_clip, double kl_coef, double entropy_coef, std::optional<double> denominator,
              T* loss, T* metrics, T* gradient, T* gradient_entropy);

// loss: [1]; metrics: [2], value, clip_fraction. gradient may be null.
template <class Isa, class T>
void value_loss(const T* values, const T* old_values, const T* returns, const bool* mask, int64_t turns,
                double clip, std::optional<double> denominator, T* loss, T* metrics, T* gradient);

// Half precision, as it is stored.
struct Bfloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// query: [tokens, heads, d]; keys: [pool, block, kv_heads, d]; values: [pool, block, kv_heads, d_v];
// blocks: [sequences, most]; cu_query: [sequences + 1]; lengths: [sequences]; sinks: [heads] or null;
// out: [tokens, heads, d_v]. softcap: 0 where there is none; window: at most what a sequence's blocks hold.
template <class Stored>
struct PagedAttention {
  const float* query;
  const Stored *keys, *values;
  const int32_t *blocks, *cu_query, *lengths;
  const float* sinks;
  int64_t tokens, heads, d, pool, block, kv_heads, d_v, sequences, most, window;
  float scale, softcap;
  float* out;
};

template <class Isa, class Stored>
void paged_attention(const PagedAttention<Stored>& call, int threads);

// logits: [rows, vocabulary], rows `stride` apart; uniform, temperature, tokens, logprobs: [rows].
template <class Isa, class T>
void sample(const T* logits, const double* uniform, const float* temperature, int64_t rows,
            int64_t vocabulary, int64_t stride, int64_t* tokens, float* logprobs, int threads);

// x, out: [rows, width].
template <class Isa, class T>
void rms_norm(const T* x, const T* weight, int64_t rows, int64_t width, double eps, T* out, int threads);

// grad_x: [rows, width]; grad_weight: [width]. Either may be null.
template <class Isa, class T>
void rms_norm_backward(const T* grad, const T* x, const T* weight, int64_t rows, int64_t width, double eps,
                       T* grad_x, T* grad_weight, int threads);

template <class Isa, class T>
void swiglu(const T* gate, const T* up, int64_t count, T* out, int threads);

template <class Isa, class T>
void swiglu_backward(const T* grad, const T* gate, const T* up, int64_t count, T* grad_gate, T* grad_up,
                     int threads);

// x: [batch, heads, tokens, width] with the strides given, width even; cos, sin: [batch, tokens, width], or
// if shared [tokens, width]; out: [batch, tokens, heads, width]. back: the transpose, which the gradient
// takes.
template <class Isa, class T>
void rope(const T* x, const T* cos, const T* sin, int64_t batch, int64_t heads, int64_t tokens, int64_t width,
          int64_t batch_stride, int64_t head_stride, int64_t token_stride, bool shared, bool back, T* out,
          int threads);

// e^x as the float kernels have it.
template <class Isa>
void exp(const float* x, int64_t count, float* out);

// The k best documents of a query, best first; returns how many there are. documents, counts: all terms'
// postings; block_bounds: the largest count * inverse of each block of a term's postings; norms: [total] into
// inverse [256]. begins, ends, block_begins, weights: [terms], where the query's terms have their postings
// and bounds. out_*: [k].
int64_t bm25_search(const int32_t* documents, const uint16_t* counts, const float* block_bounds,
                    const uint8_t* norms, const float* inverse, const int64_t* begins, const int64_t* ends,
                    const int64_t* block_begins, const float* weights, int32_t* out_documents,
                    float* out_scores, int64_t terms, int64_t total, int64_t k, int64_t block);

// For what will be read soon, where a processor by itself looks no further than a page.
inline void prefetch([[maybe_unused]] const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address);
#endif
}

// cu must be an exclusive prefix sum: 0, then never falling, `total` at its end.
void check_prefix_sum(const char* name, const int32_t* cu, int64_t segments, int64_t total);

void check_targets(const int64_t* targets, int64_t count, int64_t vocabulary);

// Calls body(context, begin, end) on parts of [0, count), in up to `threads` threads if `elements`, all that
// is to be touched, are many.
void in_parallel(int64_t count, int64_t elements, int threads, void (*body)(void*, int64_t, int64_t),
                 void* context);

template <class Body>
void in_parallel(int64_t count, int64_t elements, int threads, Body body) {
  in_parallel(
      count, elements, threads,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); }, &body);
}

}  // namespace hiper_fast
