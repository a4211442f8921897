// The policy loss and its gradient in one pass over the tokens.
#include <algorithm>

#include "ops.h"
#include "simd.h"

namespace hiper_fast {
namespace {

// One token's policy loss and its derivative, for as many tokens as V holds.
struct PPO {
  double clip_low, clip_high, dual_clip, kl_coef;
};

template <class V>
struct PPOTerms {
  V policy, log_ratio, clipped, dual_clipped, kl;
  V gradient;  // of policy + kl_coef kl, by the log-probability
};

// Comparisons are written so that NaN comes through. Beyond exp(20) every branch is clipped; the bound keeps
// infinities out of the gradient.
template <class T, class V>
PPOTerms<V> ppo_terms(V logprob, V old_logprob, V advantage, V ref_logprob, bool with_kl,
                      const PPO& options) {
  const V zero{}, one = zero + T(1), bound = zero + T(20);
  PPOTerms<V> out{};
  out.log_ratio = logprob - old_logprob;
  const auto too_far = out.log_ratio > bound;
  const V ratio = exponential(select(too_far, bound, out.log_ratio));
  const V low = zero + T(1 - options.clip_low), high = zero + T(1 + options.clip_high);
  const V near = select(ratio < low, low, select(ratio > high, high, ratio));
  const V plain = -advantage * ratio, clipped = -advantage * near, most = -advantage * T(options.dual_clip);
  const auto is_clipped = clipped > plain;
  const V single = select(is_clipped, clipped, plain);
  const auto is_dual = (advantage < zero) & (single > most);
  out.policy = select(is_dual, most, single);
  out.clipped = select(is_clipped, one, zero);
  out.dual_clipped = select(is_dual, one, zero);
  out.gradient = select(is_clipped | is_dual | too_far, zero, plain);
  if (with_kl) {
    const V d = ref_logprob - logprob;
    const auto far = d > bound;
    const V d_bounded = select(far, bound, d), e = exponential(d_bounded);
    const V kl = e - d_bounded - T(1), limit = zero + T(10);  // kl is never below 0
    const auto is_limited = kl > limit;
    out.kl = select(is_limited, limit, kl);
    out.gradient += select(is_limited | far, zero, one - e) * T(options.kl_coef);
  }
  return out;
}

}  // namespace

template <class Isa, class T>
void ppo_loss(const T* logprobs, const T* old_logprobs, const T* advantages, const bool* loss_mask,
              const T* ref_logprobs, const T* entropy, int64_t tokens, double clip_low, double clip_high,
              double dual_clip, double kl_coef, double entropy_coef, std::optional<double> denominator,
              T* loss, T* metrics, T* gradient, T* gradient_entropy) {
  using V = Vec<T>;
  const PPO options{clip_low, clip_high, dual_clip, kl_coef};
  const double divisor = denominator
                             ? *denominator
                             : double(std::max<int64_t>(std::count(loss_mask, loss_mask + tokens, true), 1));
  const T scale = T(1 / divisor);
  double policy = 0, approx_kl = 0, clipped = 0, dual_clipped = 0, kl = 0, mean_entropy = 0;
  constexpr int64_t kBlock = 1024;  // summed in T, then in double
  for (int64_t begin = 0; begin < tokens; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, tokens);
    V sums[6] = {};
    for (int64_t i = begin; i < end; i += kLanes<T>) {
      const int64_t left = end - i;
      const auto mask = load_mask<T>(loss_mask + i, left);
      const auto masked = [&](const T* x) { return x ? select(mask, load(x + i, left), V{}) : V{}; };
      const auto terms = ppo_terms<T, V>(masked(logprobs), masked(old_logprobs), masked(advantages),
                                         masked(ref_logprobs), ref_logprobs != nullptr, options);
      sums[0] += terms.policy;
      sums[1] -= terms.log_ratio;
      sums[2] += terms.clipped;
      sums[3] += terms.dual_clipped;
      sums[4] += terms.kl;
      sums[5] += masked(entropy);
      if (gradient) store(gradient + i, left, terms.gradient * scale);
      if (gradient_entropy) {
        store(gradient_entropy + i, left, select(mask, V{} - T(entropy_coef) * scale, V{}));
      }
    }
    policy += total(sums[0]);
    approx_kl += total(sums[1]);
    clipped += total(sums[2]);
    dual_clipped += total(sums[3]);
    kl += total(sums[4]);
    mean_entropy += total(sums[5]);
  }
  const double values[6] = {policy, approx_kl, clipped, dual_clipped, kl, mean_entropy};
  for (int i = 0; i < 6; ++i) metrics[i] = T(values[i] / divisor);
  *loss = T((policy + kl_coef * kl - (entropy ? entropy_coef * mean_entropy : 0)) / divisor);
}

template void ppo_loss<HIPER_FAST_ISA>(const float*, const float*, const float*, const bool*, const float*,
                                       const float*, int64_t, double, double, double, double, double,
                                       std::optional<double>, float*, float*, float*, float*);
template void ppo_loss<HIPER_FAST_ISA>(const double*, const double*, const double*, const bool*,
                                       const double*, const double*, int64_t, double, double, double, double,
                                       double, std::optional<double>, double*, double*, double*, double*);

}  // namespace hiper_fast
