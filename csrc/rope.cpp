// Rotary position embeddings: the halves of each head turned against each other.
#include "ops.h"
#include "simd.h"

namespace hiper_fast {
namespace {

// out = x cos + (-second, first) sin, the halves of x being first and second; or the transpose of that, which turns
// back.
template <class T>
void turn(const T* x, const T* cos, const T* sin, int64_t width, bool back, T* out) {
  const int64_t half = width / 2;
  const T* const sin_first = back ? sin + half : sin;
  const T* const sin_second = back ? sin : sin + half;
  const T sign = back ? T(-1) : T(1);
  each_vector<T>(half, [=](int64_t i, int64_t left) {
    const Vec<T> first = load(x + i, left), second = load(x + half + i, left);
    const Vec<T> to_first = second * (load(sin_first + i, left) * sign);
    const Vec<T> to_second = first * (load(sin_second + i, left) * sign);
    store(out + i, left, first * load(cos + i, left) - to_first);
    store(out + half + i, left, second * load(cos + half + i, left) + to_second);
  });
}

}  // namespace

template <class Isa, class T>
void rope(const T* x, const T* cos, const T* sin, int64_t batch, int64_t heads, int64_t tokens, int64_t width,
          int64_t batch_stride, int64_t head_stride, int64_t token_stride, bool shared, bool back, T* out,
          int threads) {
  const int64_t places = batch * tokens;
  in_parallel(places, places * heads * width, threads, [=](int64_t begin, int64_t end) {
    for (int64_t place = begin; place < end; ++place) {
      const int64_t sequence = place / tokens, token = place % tokens;
      const int64_t angles = (shared ? token : place) * width;
      const T* const from = x + sequence * batch_stride + token * token_stride;
      for (int64_t head = 0; head < heads; ++head) {
        turn(from + head * head_stride, cos + angles, sin + angles, width, back,
             out + (place * heads + head) * width);
      }
    }
  });
}

template void rope<HIPER_FAST_ISA>(const float*, const float*, const float*, int64_t, int64_t, int64_t,
                                   int64_t, int64_t, int64_t, int64_t, bool, bool, float*, int);
template void rope<HIPER_FAST_ISA>(const double*, const double*, const double*, int64_t, int64_t, int64_t,
                                   int64_t, int64_t, int64_t, int64_t, bool, bool, double*, int);

}  // namespace hiper_fast
