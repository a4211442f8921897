// The rows of linear_ppo: a row of logits gives its log-probability, entropy and loss, and becomes its own
// gradient.
#include "ppo.h"
#include "softmax.h"

namespace hiper_fast {

template <class Isa, class T>
int64_t linear_ppo(T* logits, const int64_t* targets, const T* old_logprobs, const T* advantages,
                   const T* ref_logprobs, int64_t rows, int64_t vocabulary, double temperature,
                   std::optional<double> softcap, double clip_low, double clip_high, double dual_clip,
                   double kl_coef, double entropy_coef, double denominator, bool want_gradient, double* sums,
                   T* logprobs, int64_t* live, int threads) {
  const PPO options{clip_low, clip_high, dual_clip, kl_coef};
  const bool with_entropy = entropy_coef != 0;
  const double of_entropy = -entropy_coef / denominator;
  constexpr int kSums = 7;
  double* each = new double[size_t(rows * kSums)];  // summed in order below, whatever the threads
  in_parallel(rows, rows * vocabulary, threads, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* z = logits + row * vocabulary;
      Softmax<T> softmax(temperature);
      softmax.add(z, vocabulary);
      const double logprob = softmax.logprob(z[targets[row]]);
      logprobs[row] = T(logprob);
      const double ref_logprob = ref_logprobs ? double(ref_logprobs[row]) : 0.0;
      const PPOTerms<double> terms = ppo_terms<double, double>(logprob, old_logprobs[row], advantages[row],
                                                               ref_logprob, ref_logprobs != nullptr, options);
      const double entropy = with_entropy ? softmax.entropy() : 0.0;
      const double loss = terms.policy + kl_coef * terms.kl - entropy_coef * entropy;
      const double values[kSums] = {
          loss, terms.policy, -terms.log_ratio, terms.clipped, terms.dual_clipped, terms.kl, entropy};
      std::memcpy(each + row * kSums, values, sizeof values);
      live[row] = !want_gradient || terms.gradient != 0 || with_entropy;
      if (want_gradient && live[row]) {
        softmax.gradient(z, vocabulary, targets[row], terms.gradient / denominator, of_entropy, softcap, z);
      }
    }
  });
  for (int64_t i = 0; i < rows * kSums; ++i) sums[i % kSums] += each[i] / denominator;
  delete[] each;
  return keep_live(logits, rows, vocabulary, live);
}

template int64_t linear_ppo<HIPER_FAST_ISA>(float*, const int64_t*, const float*, const float*, const float*,
                                            int64_t, int64_t, double, std::optional<double>, double, double,
                                            double, double, double, double, bool, double*, float*, int64_t*,
                                            int);
template int64_t linear_ppo<HIPER_FAST_ISA>(double*, const int64_t*, const double*, const double*,
                                            const double*, int64_t, int64_t, double, std::optional<double>,
                                            double, double, double, double, double, double, bool, double*,
                                            double*, int64_t*, int);

}  // namespace hiper_fast
