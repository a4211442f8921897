// The normalisation of advantages: their mean, then their spread around it, both summed in double.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "ops.h"

namespace hiper_fast {
namespace {

constexpr int64_t kBlock = 512, kSums = 8;  // a block stays in the cache between loops that become vectors

// The sum of of(value) over the mask.
template <class T, class Of>
double masked_sum(const T* values, const uint8_t* mask, int64_t turns, Of of) {
  double sums[kSums] = {}, block[kBlock];
  for (int64_t begin = 0; begin < turns; begin += kBlock) {
    const int64_t n = std::min(kBlock, turns - begin);
    for (int64_t i = 0; i < n; ++i) block[i] = of(values[begin + i]);
    for (int64_t i = 0; i < n; ++i) block[i] = mask[begin + i] ? block[i] : 0.0;
    std::fill(block + n, block + (n + kSums - 1) / kSums * kSums, 0.0);
    for (int64_t i = 0; i < n; i += kSums)
      for (int64_t j = 0; j < kSums; ++j) sums[j] += block[i + j];
  }
  return std::accumulate(sums, sums + kSums, 0.0);
}

}  // namespace

template <class Isa, class T>
void normalize(const T* values, const bool* flags, int64_t turns, double eps, T* out) {
  const auto* mask = reinterpret_cast<const uint8_t*>(flags);  // gcc makes no vectors of bool
  int64_t count = 0;
  for (int64_t t = 0; t < turns; ++t) count += mask[t];
  const double n = double(std::max(count, int64_t(1)));
  const double mean = masked_sum(values, mask, turns, [](double x) { return x; }) / n;
  const double squares = masked_sum(values, mask, turns, [=](double x) { return (x - mean) * (x - mean); });
  const double scale = 1.0 / (std::sqrt(squares / n) + eps);
  for (int64_t t = 0; t < turns; ++t) out[t] = T((values[t] - mean) * scale);
  for (int64_t t = 0; t < turns; ++t) out[t] = mask[t] ? out[t] : T(0);
}

template void normalize<HIPER_FAST_ISA>(const float*, const bool*, int64_t, double, float*);
template void normalize<HIPER_FAST_ISA>(const double*, const bool*, int64_t, double, double*);

}  // namespace hiper_fast
