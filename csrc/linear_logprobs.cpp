// The rows of linear_logprobs: logits to log-probability and entropy, and to their own gradient.
#include "ops.h"
#include "softmax.h"

namespace hiper_fast {

constexpr int64_t kSums = 4;  // Softmax's, and the log-probability

template <class Isa, class T>
void linear_logprobs(const T* logits, const int64_t* targets, int64_t rows, int64_t columns, int64_t first,
                     int64_t vocabulary, double temperature, double* sums, T* logprobs, T* entropy,
                     int threads) {
  in_parallel(rows, rows * columns, threads, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* z = logits + row * columns;
      double* const so_far = sums + row * kSums;
      Softmax<T> softmax = first > 0 ? Softmax<T>(temperature, so_far) : Softmax<T>(temperature);
      softmax.add(z, columns);
      softmax.save(so_far);
      const int64_t target = targets[row] - first;
      if (target >= 0 && target < columns) logprobs[row] = z[target];  // its logit, until the sums are whole
      if (first + columns < vocabulary) continue;
      so_far[kSums - 1] = softmax.logprob(logprobs[row]);
      logprobs[row] = T(so_far[kSums - 1]);
      if (entropy) entropy[row] = T(softmax.entropy());
    }
  });
}

template <class Isa, class T>
void linear_logprobs_backward(const T* logits, const int64_t* targets, const int64_t* live, int64_t rows,
                              int64_t columns, int64_t first, double temperature,
                              std::optional<double> softcap, const double* sums, const T* grad_logprobs,
                              const T* grad_entropy, T* gradient, int threads) {
  in_parallel(rows, rows * columns, threads, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = live ? live[i] : i;
      const Softmax<T> softmax(temperature, sums + row * kSums);
      softmax.gradient(logits + row * columns, columns, targets[row] - first, grad_logprobs[row],
                       grad_entropy ? double(grad_entropy[row]) : 0.0, softcap, gradient + i * columns);
    }
  });
}

template void linear_logprobs<HIPER_FAST_ISA>(const float*, const int64_t*, int64_t, int64_t, int64_t,
                                              int64_t, double, double*, float*, float*, int);
template void linear_logprobs<HIPER_FAST_ISA>(const double*, const int64_t*, int64_t, int64_t, int64_t,
                                              int64_t, double, double*, double*, double*, int);
template void linear_logprobs_backward<HIPER_FAST_ISA>(const float*, const int64_t*, const int64_t*, int64_t,
                                                       int64_t, int64_t, double, std::optional<double>,
                                                       const double*, const float*, const float*, float*, int);
template void linear_logprobs_backward<HIPER_FAST_ISA>(const double*, const int64_t*, const int64_t*, int64_t,
                                                       int64_t, int64_t, double, std::optional<double>,
                                                       const double*, const double*, const double*, double*,
                                                       int);

template <class Isa>
void exp(const float* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kLanes<float>) {
    store(out + i, count - i, exponential(load(x + i, count - i)));
  }
}

template void exp<HIPER_FAST_ISA>(const float*, int64_t, float*);

}  // namespace hiper_fast
