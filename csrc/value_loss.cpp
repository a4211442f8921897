// The value loss and its gradient in one pass over the turns.
#include <algorithm>

#include "ops.h"
#include "simd.h"

namespace hiper_fast {

template <class Isa, class T>
void value_loss(const T* values, const T* old_values, const T* returns, const bool* mask, int64_t turns,
                double clip, std::optional<double> denominator, T* loss, T* metrics, T* gradient) {
  using V = Vec<T>;
  const double divisor =
      denominator ? *denominator : double(std::max<int64_t>(std::count(mask, mask + turns, true), 1));
  const V zero{}, one = zero + T(1);
  double sum = 0, clipped = 0;
  for (int64_t i = 0; i < turns; i += kLanes<T>) {
    const auto masked = load_mask<T>(mask + i, turns - i);
    const auto take = [&](const T* x) { return select(masked, load(x + i, turns - i), zero); };
    const V value = take(values), old_value = take(old_values), error = value - take(returns);
    const V low = old_value - T(clip), high = old_value + T(clip);
    const V near = select(value < low, low, select(value > high, high, value)) - take(returns);
    const auto worse = near * near > error * error;  // there the clipped value counts, and that does not move
    sum += total(select(worse, near * near, error * error));
    clipped += total(select(worse, one, zero));
    if (gradient) store(gradient + i, turns - i, select(worse, zero, error * T(2 / divisor)));
  }
  *loss = metrics[0] = T(sum / divisor);
  metrics[1] = T(clipped / divisor);
}

template void value_loss<HIPER_FAST_ISA>(const float*, const float*, const float*, const bool*, int64_t,
                                         double, std::optional<double>, float*, float*, float*);
template void value_loss<HIPER_FAST_ISA>(const double*, const double*, const double*, const bool*, int64_t,
                                         double, std::optional<double>, double*, double*, double*);

}  // namespace hiper_fast
