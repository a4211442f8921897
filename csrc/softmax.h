// A row of logits: its softmax's statistics in one pass, over all of it or a part at a time, and the gradient
// of what is made of them in a second.
#pragma once

#include <algorithm>
#include <optional>

#include "simd.h"

namespace hiper_fast {
namespace {

// Below this e^x is 0, in either precision; the bound keeps 0 * -inf out of the entropy of rows with masked
// logits.
template <class T>
constexpr T kNothing = std::is_same_v<T, float> ? T(-104) : T(-746);

template <class T>
T largest(const T* x, int64_t count) {
  constexpr T kNone = -std::numeric_limits<T>::infinity();
  Vec<T> most = Vec<T>{} + kNone;
  each_vector<T>(count, [&](int64_t i, int64_t left) {
    const Vec<T> next = load(x + i, left, kNone);
    most = select(next > most, next, most);
  });
  T lanes[size_t(kLanes<T>)];
  store(lanes, kLanes<T>, most);
  return *std::max_element(lanes, lanes + kLanes<T>);
}

template <class T>
class Softmax {
 public:
  explicit Softmax(double temperature) : scale_(T(1 / temperature)) {}

  // Goes on from what `save` wrote to sums [3].
  Softmax(double temperature, const double* sums)
      : scale_(T(1 / temperature)),
        top_(T(sums[0])),
        sum_(sums[1]),
        weighted_(sums[2]),
        log_sum_(std::log(sums[1])) {}

  void save(double* sums) const {
    sums[0] = top_;
    sums[1] = sum_;
    sums[2] = weighted_;
  }

  // More of the row's logits. Sums of e^d and d e^d with d = (logit - top) / temperature, block by block, so
  // that memory is read once: where a block has a new top, the sums so far move to it.
  void add(const T* logits, int64_t size) {
    constexpr int64_t kBlock = 1024;
    for (int64_t begin = 0; begin < size; begin += kBlock) {
      const T* const block = logits + begin;
      const int64_t count = std::min(kBlock, size - begin);
      move_to(std::max(top_, largest(block, count)));
      Vec<T> sum{}, weighted{};
      each_vector<T>(count, [&](int64_t i, int64_t left) {
        const Vec<T> d = shifted(load(block + i, left, kLowest));
        const Vec<T> e = exponential(d);
        sum += e;
        weighted += e * d;
      });
      sum_ += total(sum);
      weighted_ += total(weighted);
    }
    log_sum_ = std::log(sum_);
  }

  // Rounding must not make a probability exceed 1: a positive log-prob can run away in PPO.
  double logprob(T logit) const {
    const double x = (double(logit) - top_) * scale_ - log_sum_;
    return x > 0 ? 0 : x;
  }

  double entropy() const { return log_sum_ - weighted_ / sum_; }

  // Given the gradients of the log-prob of a target, which may lie elsewhere, and of the entropy H, that of some of
  // the logits z: with p = softmax(z / temperature) it is (onehot - p) / temperature and -p (log p + H) /
  // temperature. Where z = softcap tanh(x / softcap) it is that of x: times dz / dx = 1 - (z / softcap)^2.
  void gradient(const T* logits, int64_t size, int64_t target, double of_logprob, double of_entropy,
                std::optional<double> softcap, T* out) const {
    const T constant = T(-(of_logprob + of_entropy * (entropy() - log_sum_)) * scale_ / sum_);
    const T linear = T(-of_entropy * scale_ / sum_);
    const bool capped = softcap.has_value();
    const T inverse = T(1 / softcap.value_or(1));
    const auto slope = [inverse](auto z) { return T(1) - (z * inverse) * (z * inverse); };
    each_vector<T>(size, [&](int64_t i, int64_t left) {
      const Vec<T> z = load(logits + i, left), d = shifted(z);
      const Vec<T> of_z = exponential(d) * (d * linear + constant);
      store<T>(out + i, left, capped ? of_z * slope(z) : of_z);
    });
    if (target < 0 || target >= size) return;
    out[target] += T(of_logprob) * scale_ * (capped ? slope(logits[target]) : T(1));
  }

 private:
  static constexpr T kLowest = std::numeric_limits<T>::lowest();

  void move_to(T top) {
    if (top > top_ && sum_ > 0) {
      const double shift = (double(top_) - top) * scale_, factor = std::exp(shift);
      weighted_ = factor > 0 ? factor * (weighted_ + shift * sum_) : 0;
      sum_ *= factor;
    }
    top_ = top;
  }

  Vec<T> shifted(Vec<T> logit) const {
    const Vec<T> d = (logit - top_) * scale_;
    return select(d < kNothing<T>, Vec<T>{} + kNothing<T>, d);
  }

  T scale_, top_ = kLowest;
  double sum_ = 0, weighted_ = 0, log_sum_ = 0;
};

}  // namespace
}  // namespace hiper_fast
