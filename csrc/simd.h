// Vec<T>: as many T as a kernel handles at a time, and the few functions it needs of them. Four to sixteen
// floats where the compiler has vectors; else, and for double, a single number with the same functions, exp being that of
// libm. All of it is local to the file that includes it, because such files are compiled once for each
// instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace hiper_fast {
namespace {

template <class T>
struct Lanes {
  using Vec = T;
};

template <class T>
T select(bool which, T yes, T no) {
  return which ? yes : no;
}
inline double total(double x) { return x; }
inline double total(float x) { return x; }
inline double exponential(double x) { return std::exp(x); }
inline float exponential(float x) { return std::exp(x); }
template <class T>
bool as_mask(const bool* from, T) {
  return *from;
}

#if defined(__GNUC__)  // and clang
#if defined(__AVX512F__)
constexpr int kFloats = 16;
#elif defined(__AVX2__)
constexpr int kFloats = 8;
#else
constexpr int kFloats = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * kFloats)));
typedef int32_t Ints __attribute__((vector_size(4 * kFloats)));
typedef uint8_t Bytes __attribute__((vector_size(kFloats)));

template <>
struct Lanes<float> {
  using Vec = Floats;
};

inline Floats select(Ints which, Floats yes, Floats no) { return which ? yes : no; }

inline double total(Floats x) {
  double sum = 0;
  for (int i = 0; i < kFloats; ++i) sum += x[i];
  return sum;
}

inline Ints as_mask(const bool* from, Floats) {
  Bytes bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, Ints) != 0;
}

// e^x = 2^n e^r with n = round(x / ln 2), |r| <= ln 2 / 2, and e^r by the polynomial of Cephes' expf. Within
// 2 units in the last place for x <= 88; 0 below -87.3, where results would be denormal; NaN stays NaN.
inline Floats exponential(Floats x) {
  constexpr float kSmallest = -87.33654f, kLargest = 88.37626f, kRound = 12582912.0f;  // 1.5 * 2^23
  Floats y = select(x < kSmallest, Floats{} + kSmallest, x);
  y = select(y > kLargest, Floats{} + kLargest, y);
  const Floats shifted = y * 1.44269504088896341f + kRound;
  const Floats n = shifted - kRound;
  const Floats r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Ints power = ((Ints)shifted + 127) << 23;  // the bits of 2^n: those of kRound are shifted out
  return select(x < kSmallest, Floats{}, p * (Floats)power);
}
#endif

template <class T>
using Vec = typename Lanes<T>::Vec;

template <class T>
constexpr int64_t kLanes = int64_t(sizeof(Vec<T>) / sizeof(T));

// Copies a whole vector, or the `left` elements that remain; sizes known to the compiler make the first a single move.
template <class T, class To, class From>
void copy(To* to, const From* from, int64_t left) {
  if (left >= kLanes<T>) {
    std::memcpy(to, from, sizeof(T) * size_t(kLanes<T>));
  } else {
    std::memcpy(to, from, sizeof(T) * size_t(left));
  }
}

// The vector at `from`, of which only `left` elements may remain: the others are then `fill`.
template <class T>
Vec<T> load(const T* from, int64_t left, T fill = T(0)) {
  Vec<T> x = Vec<T>{} + fill;
  copy<T>(&x, from, left);
  return x;
}

template <class T>
auto load_mask(const bool* from, int64_t left) {
  bool mask[size_t(kLanes<T>)] = {};
  if (left >= kLanes<T>) return as_mask(from, Vec<T>{});
  std::memcpy(mask, from, size_t(left));
  return as_mask(mask, Vec<T>{});
}

template <class T>
void store(T* to, int64_t left, Vec<T> x) {
  copy<T>(to, &x, left);
}

// Calls body(i, left) for each vector of `count` elements: `left` tells load and store how many remain, and is a
// constant but for the last, so that they are single moves.
template <class T, class Body>
void each_vector(int64_t count, Body body) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) body(i, kLanes<T>);
  if (i < count) body(i, count - i);
}

}  // namespace
}  // namespace hiper_fast
