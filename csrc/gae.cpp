// Generalised advantage estimation, backwards over each trajectory.
#include <cmath>

#include "ops.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace hiper_fast {
namespace {

// What stays the same.
struct Factors {
  double gamma, decay, decay8;  // decay: gamma lambda
  // What eight turns get from others: from the second of their pair, of their four, of both halves, from
  // those after.
  float from_pair[8] = {}, from_four[8] = {}, from_half[8] = {}, from_after[8];

  Factors(double gamma, double lambda) : gamma(gamma), decay(gamma * lambda), decay8(std::pow(decay, 8)) {
    for (int i = 0; i < 8; ++i) {
      if (i % 2 < 1) from_pair[i] = float(decay);
      if (i % 4 < 2) from_four[i] = float(std::pow(decay, 2 - i % 4));
      if (i < 4) from_half[i] = float(std::pow(decay, 4 - i));
      from_after[i] = float(std::pow(decay, 8 - i));
    }
  }
};

struct Carry {
  double value, advantage;  // of the turn after the one at hand
};

template <class T>
Carry one_turn(const T* rewards, const T* values, int64_t t, const Factors& f, Carry next, T* advantages,
               T* returns) {
  const double value = values[t];
  const double advantage = rewards[t] + f.gamma * next.value - value + f.decay * next.advantage;
  advantages[t] = T(advantage);
  returns[t] = T(advantage + value);
  return {value, advantage};
}

// The turns from `end` down to `begin` or a few more, which `end` tells after it.
template <class T>
Carry groups(const T*, const T*, int64_t, int64_t&, const Factors&, Carry next, T*, T*) {
  return next;
}

#if defined(__AVX2__)
// Eight turns at a time: first as if nothing followed the group, by a scan over pairs, fours, eight; then
// what follows, carried in double, is added to all eight at once.
template <>
Carry groups(const float* rewards, const float* values, int64_t begin, int64_t& end, const Factors& f,
             Carry next, float* advantages, float* returns) {
  const __m256 gamma = _mm256_set1_ps(float(f.gamma)), from_pair = _mm256_loadu_ps(f.from_pair),
               from_four = _mm256_loadu_ps(f.from_four), from_half = _mm256_loadu_ps(f.from_half),
               from_after = _mm256_loadu_ps(f.from_after);
  __m256 after = _mm256_set1_ps(float(next.value));
  for (; end - 8 >= begin; end -= 8) {
    const int64_t t = end - 8;
    const __m256 value = _mm256_loadu_ps(values + t), straddling = _mm256_permute2f128_ps(value, after, 0x21);
    const __m256 next_value = _mm256_castsi256_ps(
        _mm256_alignr_epi8(_mm256_castps_si256(straddling), _mm256_castps_si256(value), sizeof(float)));
    __m256 a = _mm256_fmadd_ps(gamma, next_value, _mm256_sub_ps(_mm256_loadu_ps(rewards + t), value));
    a = _mm256_fmadd_ps(from_pair, _mm256_permute_ps(a, 0b10110001), a);
    a = _mm256_fmadd_ps(from_four, _mm256_permute_ps(a, 0b10101010), a);
    a = _mm256_fmadd_ps(from_half, _mm256_permute_ps(_mm256_permute2f128_ps(a, a, 0x81), 0), a);
    const __m256 advantage = _mm256_fmadd_ps(from_after, _mm256_set1_ps(float(next.advantage)), a);
    _mm256_storeu_ps(advantages + t, advantage);
    _mm256_storeu_ps(returns + t, _mm256_add_ps(advantage, value));
    next.advantage = double(_mm256_cvtss_f32(a)) + f.decay8 * next.advantage;
    after = value;
  }
  next.value = _mm256_cvtss_f32(after);
  return next;
}
#endif

}  // namespace

template <class Isa, class T>
void gae(const T* rewards, const T* values, const bool* terminated, const int32_t* cu_turns,
         const T* bootstrap, int64_t turns, int64_t trajectories, double gamma, double lambda, T* out,
         int threads) {
  check_prefix_sum("cu_turns", cu_turns, trajectories, turns);
  const Factors f(gamma, lambda);
  T* returns = out + turns;
  in_parallel(trajectories, turns, threads, [=, &f](int64_t first, int64_t last) {
    // Backwards throughout: memory is then one stream, which the processor fetches ahead.
    for (int64_t n = last - 1; n >= first; --n) {
      Carry next{terminated[n] || !bootstrap ? 0.0 : double(bootstrap[n]), 0.0};
      int64_t t = cu_turns[n + 1];
      next = groups(rewards, values, cu_turns[n], t, f, next, out, returns);
      while (t > cu_turns[n]) next = one_turn(rewards, values, --t, f, next, out, returns);
    }
  });
}

template void gae<HIPER_FAST_ISA>(const float*, const float*, const bool*, const int32_t*, const float*,
                                  int64_t, int64_t, double, double, float*, int);
template void gae<HIPER_FAST_ISA>(const double*, const double*, const bool*, const int32_t*, const double*,
                                  int64_t, int64_t, double, double, double*, int);

}  // namespace hiper_fast
