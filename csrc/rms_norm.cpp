// Root mean square normalisation and its gradients, a row at a time.
#include <algorithm>
#include <vector>

#include "ops.h"
#include "simd.h"

namespace hiper_fast {
namespace {

// 1 / sqrt(mean(x^2) + eps) of a row.
template <class T>
T invert_size(Vec<T> squares, int64_t width, double eps) {
  return T(1 / std::sqrt(total(squares) / double(width) + eps));
}

// The row's gradient, given that of its result; the weight's is added to `sum`. Either may be null.
// With n = x * inverse and g = grad * weight they are inverse * (g - n mean(g n)) and grad * n.
template <class T>
void differentiate(const T* grad, const T* x, const T* weight, int64_t width, double eps, T* grad_x, T* sum) {
  Vec<T> squares{}, products{};
  each_vector<T>(width, [&](int64_t i, int64_t left) {
    const Vec<T> v = load(x + i, left);
    squares += v * v;
    products += v * (load(grad + i, left) * load(weight + i, left));
  });
  const T inverse = invert_size<T>(squares, width, eps);
  const T shared = T(total(products) / double(width)) * inverse * inverse * inverse;
  each_vector<T>(width, [&](int64_t i, int64_t left) {
    const Vec<T> v = load(x + i, left), g = load(grad + i, left);
    if (grad_x) store(grad_x + i, left, g * load(weight + i, left) * inverse - v * shared);
    if (sum) store(sum + i, left, load(sum + i, left) + g * v * inverse);
  });
}

}  // namespace

template <class Isa, class T>
void rms_norm(const T* x, const T* weight, int64_t rows, int64_t width, double eps, T* out, int threads) {
  in_parallel(rows, rows * width, threads, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* const from = x + row * width;
      T* const to = out + row * width;
      Vec<T> squares{};
      each_vector<T>(width, [&](int64_t i, int64_t left) {
        const Vec<T> v = load(from + i, left);
        squares += v * v;
      });
      const T inverse = invert_size<T>(squares, width, eps);
      each_vector<T>(width, [&](int64_t i, int64_t left) {
        store(to + i, left, load(from + i, left) * inverse * load(weight + i, left));
      });
    }
  });
}

// The weight's gradient is summed over blocks of rows first, so that it does not depend on the threads.
template <class Isa, class T>
void rms_norm_backward(const T* grad, const T* x, const T* weight, int64_t rows, int64_t width, double eps,
                       T* grad_x, T* grad_weight, int threads) {
  constexpr int64_t kBlock = 256;
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  std::vector<T> sums(grad_weight ? size_t(blocks * width) : 0);
  T* const block_sums = grad_weight ? sums.data() : nullptr;
  in_parallel(blocks, rows * width, threads, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin * kBlock; row < std::min(end * kBlock, rows); ++row) {
      const int64_t at = row * width;
      differentiate(grad + at, x + at, weight, width, eps, grad_x ? grad_x + at : nullptr,
                    block_sums ? block_sums + row / kBlock * width : nullptr);
    }
  });
  if (!grad_weight) return;
  std::fill(grad_weight, grad_weight + width, T(0));
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t i = 0; i < width; ++i) grad_weight[i] += block_sums[block * width + i];
  }
}

template void rms_norm<HIPER_FAST_ISA>(const float*, const float*, int64_t, int64_t, double, float*, int);
template void rms_norm<HIPER_FAST_ISA>(const double*, const double*, int64_t, int64_t, double, double*, int);
template void rms_norm_backward<HIPER_FAST_ISA>(const float*, const float*, const float*, int64_t, int64_t,
                                                double, float*, float*, int);
template void rms_norm_backward<HIPER_FAST_ISA>(const double*, const double*, const double*, int64_t, int64_t,
                                                double, double*, double*, int);

}  // namespace hiper_fast
