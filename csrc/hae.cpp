// Hierarchical advantage estimation: one pass backwards over each trajectory.
#include "ops.h"

namespace hiper_fast {

template <class T>
void hae(const T* rewards, const T* values_low, const T* values_high, const T* values_switch,
         const bool* switches, const bool* terminated, const int32_t* cu_turns, const T* bootstrap_low,
         const T* bootstrap_high, int64_t turns, int64_t trajectories, double gamma, double lambda_turn,
         double lambda_segment, T* out, bool* boundary, int threads) {
  check_prefix_sum("cu_turns", cu_turns, trajectories, turns);
  T* advantages_low = out;
  T* returns_low = out + turns;
  T* advantages_high = out + 2 * turns;
  T* returns_high = out + 3 * turns;
  T* advantages_switch = out + 4 * turns;
  T* returns_switch = out + 5 * turns;

  in_parallel(trajectories, turns, threads, [=](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      const int64_t begin = cu_turns[n], end = cu_turns[n + 1];
      // What follows the turn at hand: the low level's value and advantage, and the discounted return of the
      // segment.
      double next_value = terminated[n] || !bootstrap_low ? 0.0 : double(bootstrap_low[n]);
      double next_advantage = 0.0;
      double next_return = terminated[n] || !bootstrap_high ? 0.0 : double(bootstrap_high[n]);
      double next_advantage_high = 0.0;
      double discount = 1.0;  // gamma^d of the segment so far

      for (int64_t t = end - 1; t >= begin; --t) {
        const double advantage =
            rewards[t] + gamma * next_value - values_low[t] + gamma * lambda_turn * next_advantage;
        advantages_low[t] = T(advantage);
        returns_low[t] = T(advantage + values_low[t]);

        next_return = rewards[t] + gamma * next_return;
        advantages_switch[t] = T(next_return - (values_switch ? double(values_switch[t]) : 0.0));
        returns_switch[t] = T(next_return);
        discount *= gamma;

        boundary[t] = t == begin || switches[t];
        if (boundary[t]) {
          // Here next_return = R_k + gamma^d V_high(b_{k+1}), so delta_k needs no sum of its own.
          const double value = values_high[t];
          next_advantage_high = next_return - value + discount * lambda_segment * next_advantage_high;
          advantages_high[t] = T(next_advantage_high);
          returns_high[t] = T(next_advantage_high + value);
          next_value = next_return = value;
          next_advantage = 0.0;
          discount = 1.0;
        } else {
          advantages_high[t] = returns_high[t] = T(0);
          next_value = values_low[t];
          next_advantage = advantage;
        }
      }
    }
  });
}

template void hae(const float*, const float*, const float*, const float*, const bool*, const bool*,
                  const int32_t*, const float*, const float*, int64_t, int64_t, double, double, double,
                  float*, bool*, int);
template void hae(const double*, const double*, const double*, const double*, const bool*, const bool*,
                  const int32_t*, const double*, const double*, int64_t, int64_t, double, double, double,
                  double*, bool*, int);

}  // namespace hiper_fast
