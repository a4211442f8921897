// Generalised advantage estimation, one pass backwards over each trajectory; and the normalisation of
// advantages.
#include <cmath>

#include "ops.h"

namespace hiper_fast {

template <class T>
void gae(const T* rewards, const T* values, const bool* terminated, const int32_t* cu_turns,
         const T* bootstrap, int64_t turns, int64_t trajectories, double gamma, double lambda, T* out) {
  check_prefix_sum("cu_turns", cu_turns, trajectories, turns);
  T* advantages = out;
  T* returns = out + turns;
  for (int64_t n = 0; n < trajectories; ++n) {
    double next_value = terminated[n] || !bootstrap ? 0.0 : double(bootstrap[n]);
    double advantage = 0.0;
    for (int64_t t = cu_turns[n + 1] - 1; t >= cu_turns[n]; --t) {
      const double value = values[t];
      advantage = rewards[t] + gamma * next_value - value + gamma * lambda * advantage;
      advantages[t] = T(advantage);
      returns[t] = T(advantage + value);
      next_value = value;
    }
  }
}

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

template void gae(const float*, const float*, const bool*, const int32_t*, const float*, int64_t, int64_t,
                  double, double, float*);
template void gae(const double*, const double*, const bool*, const int32_t*, const double*, int64_t, int64_t,
                  double, double, double*);
template void normalize(const float*, const bool*, int64_t, double, float*);
template void normalize(const double*, const bool*, int64_t, double, double*);

}  // namespace hiper_fast
