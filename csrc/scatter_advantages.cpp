// From turns to tokens.
#include "ops.h"

namespace hiper_fast {

template <class Isa, class T>
void scatter_advantages(const T* advantages_low, const T* advantages_high, const T* advantages_switch,
                        const bool* boundary, const uint8_t* roles, const int32_t* cu_tokens, int64_t tokens,
                        int64_t turns, T* advantages, bool* loss_mask, int threads) {
  check_prefix_sum("cu_tokens", cu_tokens, turns, tokens);
  in_parallel(turns, tokens, threads, [=](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      const int trained = kAction | kSwitch | (boundary[n] ? kSubgoal : 0);
      const T low = advantages_low[n], high = boundary[n] ? advantages_high[n] : T(0),
              decision = advantages_switch[n];
      for (int64_t i = cu_tokens[n]; i < cu_tokens[n + 1]; ++i) {
        const int role = roles[i];
        advantages[i] = (role & kAction ? low : T(0)) + (role & kSubgoal ? high : T(0)) +
                        (role & kSwitch ? decision : T(0));
        loss_mask[i] = (role & trained) != 0;
      }
    }
  });
}

template void scatter_advantages<HIPER_FAST_ISA>(const float*, const float*, const float*, const bool*,
                                                 const uint8_t*, const int32_t*, int64_t, int64_t, float*,
                                                 bool*, int);
template void scatter_advantages<HIPER_FAST_ISA>(const double*, const double*, const double*, const bool*,
                                                 const uint8_t*, const int32_t*, int64_t, int64_t, double*,
                                                 bool*, int);

}  // namespace hiper_fast
