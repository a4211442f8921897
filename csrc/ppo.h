// One token's policy loss and its derivative, for as many tokens as V holds.
#pragma once

#include "ops.h"
#include "simd.h"

namespace hiper_fast {
namespace {

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
}  // namespace hiper_fast
