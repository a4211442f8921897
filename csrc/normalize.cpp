// The normalisation of advantages, in two passes.
#include <cmath>

#include "ops.h"

namespace hiper_fast {

template <class T>
void normalize(const T* values, const bool* mask, int64_t turns, double eps, T* out) {
  int64_t count = 0;
  double sum = 0.0, squares = 0.0;
  for (int64_t t = 0; t < turns; ++t) {
    if (mask[t]) ++count, sum += values[t];
  }
  const double mean = count ? sum / double(count) : 0.0;
  for (int64_t t = 0; t < turns; ++t) {
    if (mask[t]) squares += (values[t] - mean) * (values[t] - mean);
  }
  const double scale = count ? 1.0 / (std::sqrt(squares / double(count)) + eps) : 0.0;
  for (int64_t t = 0; t < turns; ++t) out[t] = mask[t] ? T((values[t] - mean) * scale) : T(0);
}

template void normalize(const float*, const bool*, int64_t, double, float*);
template void normalize(const double*, const bool*, int64_t, double, double*);

}  // namespace hiper_fast
