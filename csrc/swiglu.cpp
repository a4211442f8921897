// silu(gate) * up and its gradients, element by element.
#include "ops.h"
#include "simd.h"

namespace hiper_fast {
namespace {

template <class T>
Vec<T> sigmoid(Vec<T> x) {
  return T(1) / (T(1) + exponential(-x));
}

}  // namespace

template <class Isa, class T>
void swiglu(const T* gate, const T* up, int64_t count, T* out, int threads) {
  in_parallel(count, count, threads, [=](int64_t begin, int64_t end) {
    each_vector<T>(end - begin, [=](int64_t offset, int64_t left) {
      const int64_t i = begin + offset;
      const Vec<T> x = load(gate + i, left);
      store(out + i, left, x * sigmoid<T>(x) * load(up + i, left));
    });
  });
}

// With s = sigmoid(gate): silu' = s (1 + gate (1 - s)).
template <class Isa, class T>
void swiglu_backward(const T* grad, const T* gate, const T* up, int64_t count, T* grad_gate, T* grad_up,
                     int threads) {
  in_parallel(count, count, threads, [=](int64_t begin, int64_t end) {
    each_vector<T>(end - begin, [=](int64_t offset, int64_t left) {
      const int64_t i = begin + offset;
      const Vec<T> x = load(gate + i, left), s = sigmoid<T>(x), g = load(grad + i, left);
      store(grad_up + i, left, g * x * s);
      store(grad_gate + i, left, g * load(up + i, left) * s * (x * (T(1) - s) + T(1)));
    });
  });
}

template void swiglu<HIPER_FAST_ISA>(const float*, const float*, int64_t, float*, int);
template void swiglu<HIPER_FAST_ISA>(const double*, const double*, int64_t, double*, int);
template void swiglu_backward<HIPER_FAST_ISA>(const float*, const float*, const float*, int64_t, float*,
                                              float*, int);
template void swiglu_backward<HIPER_FAST_ISA>(const double*, const double*, const double*, int64_t, double*,
                                              double*, int);

}  // namespace hiper_fast
