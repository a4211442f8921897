// From turns to tokens, each level first normalised over the turns that train it.
#include <memory>

#include "ops.h"

namespace hiper_fast {

template <class Isa, class T>
void normalize_and_scatter(const T* advantages_low, const T* advantages_high, const T* advantages_switch,
                           const bool* boundary, const uint8_t* roles, const int32_t* cu_tokens,
                           int64_t tokens, int64_t turns, double eps, T* levels, T* advantages,
                           bool* loss_mask, int threads) {
  check_prefix_sum("cu_tokens", cu_tokens, turns, tokens);
  const std::unique_ptr<bool[]> trains(new bool[size_t(3 * turns)]);  // [3, turns]: low, high, switch
  in_parallel(turns, tokens, threads, [=, trains = trains.get()](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      uint8_t carried = 0;
      for (int64_t i = cu_tokens[n]; i < cu_tokens[n + 1]; ++i) carried |= roles[i];
      trains[n] = carried & kAction;
      trains[turns + n] = boundary[n] && (carried & kSubgoal);
      trains[2 * turns + n] = carried & kSwitch;
    }
  });
  const T* const given[] = {advantages_low, advantages_high, advantages_switch};
  for (int k = 0; k < 3; ++k)
    normalize<Isa>(given[k], trains.get() + k * turns, turns, eps, levels + k * turns);
  scatter_advantages<Isa>(levels, levels + turns, levels + 2 * turns, boundary, roles, cu_tokens, tokens,
                          turns, advantages, loss_mask, threads);
}

template void normalize_and_scatter<HIPER_FAST_ISA>(const float*, const float*, const float*, const bool*,
                                                    const uint8_t*, const int32_t*, int64_t, int64_t, double,
                                                    float*, float*, bool*, int);
template void normalize_and_scatter<HIPER_FAST_ISA>(const double*, const double*, const double*, const bool*,
                                                    const uint8_t*, const int32_t*, int64_t, int64_t, double,
                                                    double*, double*, bool*, int);

}  // namespace hiper_fast
