// A token drawn of each row of logits, which is read once, in blocks: of each block its peak and the sum of
// e^((logit - peak) / temperature). They tell in which block the draw lies, and only that one is read again.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "ops.h"
#include "softmax.h"

namespace hiper_fast {
namespace {

constexpr int64_t kBlock = 1024, kPiece = 128;

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

struct Place {
  int64_t index;
  double before;  // the weights' sum up to it
};

// Where the weights' sum first exceeds `target`, which is at least 0; where rounding keeps it below, the last
// place of any weight.
template <class Weight>
Place find(const Weight* weights, int64_t count, double target) {
  Place found{0, 0};
  double sum = 0;
  for (int64_t i = 0; i < count && sum <= target; ++i) {
    if (weights[i] > 0) found = {i, sum};
    sum += double(weights[i]);
  }
  return found;
}

// Of one row at a time; it keeps the room for what is known of the blocks.
template <class T>
class Sampler {
 public:
  explicit Sampler(int64_t vocabulary)
      : vocabulary_(vocabulary),
        peaks_(size_t((vocabulary + kBlock - 1) / kBlock)),
        weights_(peaks_.size()) {}

  void draw(const T* logits, double uniform, double temperature, int64_t& token, float& logprob) {
    logits_ = logits;
    const bool greedy = temperature == 0;
    sharpness_ = T(greedy ? 1 : std::clamp(1 / temperature, kLeast, kMost));
    const double total = weigh_blocks();
    token = 0;
    logprob = std::numeric_limits<float>::quiet_NaN();
    if (!(total > 0)) return;
    token = greedy ? find_top() : find_drawn(uniform * total);
    logprob = float(std::min((double(logits[token]) - top_) * sharpness_ - std::log(total), 0.0));
  }

 private:
  // Each block's part of the sum of e^((logit - top) / temperature), and that sum: 0 or NaN where there is no
  // distribution.
  double weigh_blocks() {
    top_ = -kInfinity<T>;
    for (size_t i = 0; i < peaks_.size(); ++i) {
      const T* const block = logits_ + int64_t(i) * kBlock;
      peaks_[i] = largest(block, size_of(i));
      top_ = std::max(top_, peaks_[i]);
      weights_[i] = weigh(block, size_of(i), peaks_[i]);
    }
    double total = 0;
    for (size_t i = 0; i < peaks_.size(); ++i) {
      weights_[i] *= std::exp((double(peaks_[i]) - top_) * sharpness_);
      total += weights_[i];
    }
    return total;
  }

  // e^((logit - peak) / temperature) of some of a block's logits, a vector at a time.
  template <class Body>
  void each_weight(const T* logits, int64_t count, T peak, Body body) const {
    const T shift = std::max(peak, std::numeric_limits<T>::lowest());  // else -inf - -inf
    each_vector<T>(count, [&](int64_t i, int64_t left) {
      body(i, left, exponential((load(logits + i, left, -kInfinity<T>) - shift) * sharpness_));
    });
  }

  double weigh(const T* logits, int64_t count, T peak) const {
    Vec<T> sum{};
    each_weight(logits, count, peak, [&](int64_t i, int64_t, Vec<T> weight) {
      prefetch(logits + kBlock + i);
      sum += weight;
    });
    return total(sum);
  }

  // By block, then by piece of the block, then in the piece.
  int64_t find_drawn(double target) const {
    const Place block = find(weights_.data(), int64_t(weights_.size()), target);
    const size_t number = size_t(block.index);
    const T peak = peaks_[number];
    const T* const logits = logits_ + block.index * kBlock;
    const int64_t count = size_of(number), pieces = (count + kPiece - 1) / kPiece;
    double piece_weights[kBlock / kPiece], sum = 0;
    for (int64_t i = 0; i < pieces; ++i) {
      piece_weights[i] = weigh(logits + i * kPiece, std::min(kPiece, count - i * kPiece), peak);
      sum += piece_weights[i];
    }
    const double inside = (target - block.before) / weights_[number] * sum;
    const Place piece = find(piece_weights, pieces, inside);
    const int64_t first = piece.index * kPiece;
    T weights[kPiece];
    each_weight(logits + first, std::min(kPiece, count - first), peak,
                [&](int64_t i, int64_t left, Vec<T> weight) { store(weights + i, left, weight); });
    const Place token = find(weights, std::min(kPiece, count - first), inside - piece.before);
    return block.index * kBlock + first + token.index;
  }

  int64_t find_top() const {
    const int64_t block = std::find(peaks_.begin(), peaks_.end(), top_) - peaks_.begin();
    const T* const first = logits_ + block * kBlock;
    return std::find(first, logits_ + vocabulary_, top_) - logits_;
  }

  int64_t size_of(size_t block) const { return std::min(kBlock, vocabulary_ - int64_t(block) * kBlock); }

  // Of the sharpness: no infinity is multiplied by 0, nor 0 by infinity.
  static constexpr double kLeast = std::numeric_limits<T>::min(), kMost = std::numeric_limits<T>::max();

  int64_t vocabulary_;
  const T* logits_ = nullptr;
  T sharpness_ = 1, top_ = 0;
  std::vector<T> peaks_;
  std::vector<double> weights_;
};

[[noreturn]] void refuse(const char* rule, double number, int64_t row) {
  throw std::invalid_argument(std::string(rule) + ", got " + std::to_string(number) + " at index " +
                              std::to_string(row));
}

void check(double uniform, float temperature, int64_t row) {
  if (!(uniform >= 0 && uniform < 1)) refuse("uniform must lie in [0, 1)", uniform, row);
  if (!(temperature >= 0 && temperature < kInfinity<float>)) {
    refuse("temperature must be at least 0 and finite", temperature, row);
  }
}

}  // namespace

template <class Isa, class T>
void sample(const T* logits, const double* uniform, const float* temperature, int64_t rows,
            int64_t vocabulary, int64_t stride, int64_t* tokens, float* logprobs, int threads) {
  in_parallel(rows, rows * vocabulary, threads, [=](int64_t begin, int64_t end) {
    Sampler<T> sampler(vocabulary);
    for (int64_t row = begin; row < end; ++row) {
      check(uniform[row], temperature[row], row);
      sampler.draw(logits + row * stride, uniform[row], temperature[row], tokens[row], logprobs[row]);
    }
  });
}

template void sample<HIPER_FAST_ISA>(const float*, const double*, const float*, int64_t, int64_t, int64_t,
                                     int64_t*, float*, int);
template void sample<HIPER_FAST_ISA>(const double*, const double*, const float*, int64_t, int64_t, int64_t,
                                     int64_t*, float*, int);

}  // namespace hiper_fast
