// From turns to tokens: a turn has only eight different tokens, one for each set of roles.
#include "ops.h"

namespace hiper_fast {

template <class T>
void scatter_advantages(const T* advantages_low, const T* advantages_high, const T* advantages_switch,
                        const bool* boundary, const uint8_t* roles, const int32_t* cu_tokens, int64_t tokens,
                        int64_t turns, T* advantages, bool* loss_mask) {
  check_prefix_sum("cu_tokens", cu_tokens, turns, tokens);
  for (int64_t n = 0; n < turns; ++n) {
    const uint8_t trained = uint8_t(kAction | kSwitch | (boundary[n] ? kSubgoal : 0));
    T advantage_of[8];
    for (int role = 0; role < 8; ++role) {
      T sum = T(0);
      if (role & trained & kAction) sum += advantages_low[n];
      if (role & trained & kSubgoal) sum += advantages_high[n];
      if (role & trained & kSwitch) sum += advantages_switch[n];
      advantage_of[role] = sum;
    }
    for (int64_t i = cu_tokens[n]; i < cu_tokens[n + 1]; ++i) {
      advantages[i] = advantage_of[roles[i] & 7];
      loss_mask[i] = (roles[i] & trained) != 0;
    }
  }
}

template void scatter_advantages(const float*, const float*, const float*, const bool*, const uint8_t*,
                                 const int32_t*, int64_t, int64_t, float*, bool*);
template void scatter_advantages(const double*, const double*, const double*, const bool*, const uint8_t*,
                                 const int32_t*, int64_t, int64_t, double*, bool*);

}  // namespace hiper_fast
