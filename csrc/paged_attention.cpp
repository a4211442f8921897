// Attention to keys and values in blocks of a pool, with an online softmax over tiles of keys (Milakov and
// Gimelshein, arXiv 1805.02867). A unit of work is some queries of one sequence; its rows are those queries
// in each of the heads that share a head of keys, so that whatever is read of the pool serves all of them:
//
//     scores = rows @ keys.T                 8 sums at a time: 1 row by 8 keys, or 2 rows by 4
//     weights = exp(scores - top)            row by row; where there is a new top, sum and out move to it
//     out += weights @ values                8 vectors at a time: 1 row by 8, or 2 rows by 4
//
// Both products leave out what a row does not see, but for the keys that fill up the 8 sums.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "ops.h"
#include "simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace hiper_fast {
namespace {

constexpr int kSums = 8;           // in registers at once: enough to hide how long a multiply-add takes
constexpr int64_t kTile = 64;      // keys
constexpr int64_t kMostRows = 32;  // of a unit with more than one query
constexpr float kLowest = std::numeric_limits<float>::lowest();

using Vector = Vec<float>;
constexpr int64_t kWidth = kLanes<float>;

int64_t round_up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

float widen(float x) { return x; }

float widen(Bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

float widen(Half x) {
  constexpr float kBias = 5.192296858534828e33f;  // 2^112: float's exponents begin so much lower
  const uint32_t bits = uint32_t(x.bits & 0x7fff) << 13;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  wide *= kBias;
  uint32_t signed_bits;
  std::memcpy(&signed_bits, &wide, sizeof wide);
  signed_bits |= (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;  // infinite or not a number
  signed_bits |= uint32_t(x.bits & 0x8000) << 16;
  std::memcpy(&wide, &signed_bits, sizeof wide);
  return wide;
}

// totals[i] = the sum of sums[i]'s lanes.
void add_lanes(const Vector (&sums)[kSums], float* totals) {
#if defined(__AVX2__)
  const auto add_four = [&](int i) {
    return _mm256_hadd_ps(_mm256_hadd_ps(sums[i], sums[i + 1]), _mm256_hadd_ps(sums[i + 2], sums[i + 3]));
  };
  const __m256 a = add_four(0), b = add_four(4);
  const __m256 low = _mm256_permute2f128_ps(a, b, 0x20), high = _mm256_permute2f128_ps(a, b, 0x31);
  _mm256_storeu_ps(totals, _mm256_add_ps(low, high));
#else
  for (int i = 0; i < kSums; ++i) totals[i] = float(total(sums[i]));
#endif
}

// scores [kRows, kTile] of rows [kRows, size] and kSums / kRows keys.
template <int kRows>
void multiply(const float* rows, const float* const* keys, int64_t size, float* scores) {
  constexpr int kKeys = kSums / kRows;
  Vector sums[kSums] = {};
  for (int64_t i = 0; i < size; i += kWidth) {
    Vector row[kRows];
    for (int r = 0; r < kRows; ++r) row[r] = load(rows + r * size + i, kWidth);
    for (int k = 0; k < kKeys; ++k) {
      const Vector key = load(keys[k] + i, kWidth);
      for (int r = 0; r < kRows; ++r) sums[r * kKeys + k] += row[r] * key;
    }
  }
  float totals[kSums];
  add_lanes(sums, totals);
  for (int r = 0; r < kRows; ++r) std::copy_n(totals + r * kKeys, kKeys, scores + r * kTile);
}

// Adds to kVectors vectors of out [kRows, size], from `column` on, values [begin, end) by weights [kRows, kTile].
template <int kRows, int kVectors>
void add_values(const float* weights, const float* const* values, int64_t begin, int64_t end, int64_t column,
                float* out, int64_t size) {
  Vector sums[kRows][kVectors];
  out += column;
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r][v] = load(out + r * size + v * kWidth, kWidth);
  }
  for (int64_t k = begin; k < end; ++k) {
    const float* const value = values[k] + column;
    for (int v = 0; v < kVectors; ++v) {
      const Vector x = load(value + v * kWidth, kWidth);
      for (int r = 0; r < kRows; ++r) sums[r][v] += weights[r * kTile + k] * x;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) store(out + r * size + v * kWidth, kWidth, sums[r][v]);
  }
}

// tanh from e^-2|x|, which loses its digits near 0; there by Lambert's continued fraction.
Vector tanh(Vector x) {
  const Vector size = select(x < 0.0f, -x, x), e = exponential(-2.0f * size);
  const Vector far = (1.0f - e) / (1.0f + e), s = x * x;
  const Vector near = x * (135135.0f + s * (17325.0f + s * (378.0f + s))) /
                      (135135.0f + s * (62370.0f + s * (3150.0f + s * 28.0f)));
  return select(size < 0.5f, near, select(x < 0.0f, -far, far));
}

struct Unit {
  int64_t sequence, row;      // the sequence, and which row of the queries is the first
  int64_t queries, position;  // how many, and where in its sequence the first stands
  int64_t head, heads;        // heads of keys: the first, and how many
};

struct Seen {
  int64_t begin, end;  // keys of the tile
};

// What a thread needs to work on units, one after another.
template <class Stored>
class Worker {
 public:
  Worker(const PagedAttention<Stored>& call, int64_t most_rows)
      : call_(call),
        shared_(call.heads / call.kv_heads),
        d_(round_up(call.d, kWidth)),
        d_v_(round_up(call.d_v, kWidth)),
        queries_(most_rows * d_),
        out_(most_rows * d_v_),
        scores_(most_rows * kTile),
        wide_keys_(copies(call.d) ? kTile * d_ : 0),
        wide_values_(copies(call.d_v) ? kTile * d_v_ : 0),
        top_(size_t(most_rows)),
        sum_(size_t(most_rows)) {}

  void attend(const Unit& unit) {
    unit_ = &unit;
    rows_ = count_rows(unit.queries * shared_);
    for (int64_t head = 0; head < unit.heads; ++head) begin(head);
    const int64_t end = unit.position + unit.queries;
    for (tile_ = first_seen(unit.position); tile_ < end; tile_ += kTile) {
      keys_seen_ = std::min(kTile, end - tile_);
      find_slots();
      for (int64_t head = 0; head < unit.heads; ++head) add_tile(head);
    }
    for (int64_t head = 0; head < unit.heads; ++head) finish(head);
  }

  static int64_t count_rows(int64_t rows) { return rows == 1 ? 1 : round_up(rows, 2); }

 private:
  static bool copies(int64_t size) { return !std::is_same_v<Stored, float> || size % kWidth != 0; }

  int64_t first_seen(int64_t position) const { return std::max<int64_t>(0, position - call_.window + 1); }

  // A row that fills up a pair is one more of the last query.
  int64_t position_of(int64_t row) const {
    return unit_->position + std::min(row / shared_, unit_->queries - 1);
  }

  Seen seen_by(int64_t row) const {
    const int64_t position = position_of(row);
    return {std::max<int64_t>(0, first_seen(position) - tile_), std::min(keys_seen_, position + 1 - tile_)};
  }

  // Calls use(row, its place in query and out by heads) for the rows of a head.
  template <class Use>
  void each_row(int64_t head, Use use) const {
    for (int64_t row = 0; row < unit_->queries * shared_; ++row) {
      const int64_t its_head = (unit_->head + head) * shared_ + row % shared_;
      use(head * rows_ + row, its_head, (unit_->row + row / shared_) * call_.heads + its_head);
    }
  }

  void begin(int64_t head) {
    const int64_t first = head * rows_;
    std::fill_n(queries_.data() + first * d_, rows_ * d_, 0.0f);
    std::fill_n(out_.data() + first * d_v_, rows_ * d_v_, 0.0f);
    std::fill_n(top_.data() + first, rows_, kLowest);
    std::fill_n(sum_.data() + first, rows_, 0.0);
    each_row(head, [this](int64_t row, int64_t its_head, int64_t place) {
      const float* const from = call_.query + place * call_.d;
      std::transform(from, from + call_.d, queries_.data() + row * d_, [this](float x) { return x * call_.scale; });
      if (!call_.sinks) return;
      top_[size_t(row)] = call_.sinks[its_head];
      sum_[size_t(row)] = 1;
    });
  }

  void finish(int64_t head) {
    each_row(head, [this](int64_t row, int64_t, int64_t place) {
      const float* const from = out_.data() + row * d_v_;
      const float share = float(1 / sum_[size_t(row)]);
      std::transform(from, from + call_.d_v, call_.out + place * call_.d_v, [=](float x) { return x * share; });
    });
  }

  // Where in the pool the tile's keys lie; the last one stands also for those that fill up the sums.
  void find_slots() {
    const int32_t* const blocks = call_.blocks + unit_->sequence * call_.most;
    for (int64_t k = 0, at = tile_; k < keys_seen_;) {
      const int64_t block = blocks[at / call_.block], first = at % call_.block;
      if (block < 0 || block >= call_.pool) {
        throw std::invalid_argument("blocks must lie in [0, " + std::to_string(call_.pool) + "), got " +
                                    std::to_string(block) + " at index " + std::to_string(unit_->sequence));
      }
      const int64_t count = std::min(call_.block - first, keys_seen_ - k);
      for (int64_t i = 0; i < count; ++i) slots_[k + i] = block * call_.block + first + i;
      k += count;
      at += count;
    }
    std::fill(slots_ + keys_seen_, slots_ + round_up(keys_seen_, kSums), slots_[keys_seen_ - 1]);
  }

  // The vectors of a head in the slots, where they lie or as a copy in float32 and whole vectors.
  void find_vectors(const Stored* pool, int64_t head, int64_t size, int64_t padded, float* copy,
                    const float** vectors) const {
    const int64_t count = round_up(keys_seen_, kSums);
    for (int64_t k = 0; k < count; ++k) {
      const Stored* const from = pool + (slots_[k] * call_.kv_heads + head) * size;
      if constexpr (std::is_same_v<Stored, float>) vectors[k] = from;
      if (!copies(size)) continue;
      float* const to = copy + k * padded;
      for (int64_t i = 0; i < size; ++i) to[i] = widen(from[i]);
      vectors[k] = to;
    }
  }

  void add_tile(int64_t head) {
    find_vectors(call_.keys, unit_->head + head, call_.d, d_, wide_keys_.data(), keys_);
    find_vectors(call_.values, unit_->head + head, call_.d_v, d_v_, wide_values_.data(), values_);
    const int64_t first = head * rows_;
    rows_ == 1 ? add_tile<1>(first) : add_tile<2>(first);
  }

  template <int kRows>
  void add_tile(int64_t first) {
    make_scores<kRows>(queries_.data() + first * d_, scores_.data() + first * kTile);
    for (int64_t row = 0; row < rows_; ++row) soften(first + row, seen_by(row));
    for (int64_t row = 0; row < rows_; row += kRows) {
      const Seen seen{seen_by(row).begin, seen_by(row + kRows - 1).end};
      add_all_values<kRows>(seen, scores_.data() + (first + row) * kTile, out_.data() + (first + row) * d_v_);
    }
  }

  // From the first row that sees the keys at hand to the last one.
  template <int kRows>
  void make_scores(const float* queries, float* scores) const {
    constexpr int64_t kKeys = kSums / kRows;
    for (int64_t k = 0; k < keys_seen_; k += kKeys) {
      const int64_t after = tile_ + k - unit_->position;
      const int64_t first = std::max<int64_t>(0, after) * shared_ / kRows * kRows;
      const int64_t end = std::min(rows_, (after + kKeys + call_.window - 1) * shared_);
      for (int64_t row = first; row < end; row += kRows) {
        multiply<kRows>(queries + row * d_, keys_ + k, d_, scores + row * kTile + k);
      }
    }
  }

  // A row's scores to weights; what it does not see weighs nothing.
  void soften(int64_t row, Seen seen) {
    float* const scores = scores_.data() + row * kTile;
    const int64_t count = round_up(keys_seen_, kWidth);
    if (seen.begin >= seen.end) {
      std::fill_n(scores, count, 0.0f);
      return;
    }
    if (call_.softcap > 0) cap(scores, count);
    std::fill(scores, scores + seen.begin, kLowest);
    std::fill(scores + seen.end, scores + count, kLowest);
    Vector most = load(scores, kWidth);
    for (int64_t k = kWidth; k < count; k += kWidth) {
      const Vector next = load(scores + k, kWidth);
      most = select(next > most, next, most);
    }
    move_to(row, largest(most));
    Vector sum{};
    for (int64_t k = 0; k < count; k += kWidth) {
      const Vector weight = exponential(load(scores + k, kWidth) - top_[size_t(row)]);
      store(scores + k, kWidth, weight);
      sum += weight;
    }
    sum_[size_t(row)] += total(sum);
  }

  void cap(float* scores, int64_t count) const {
    const float inverse = 1 / call_.softcap;
    for (int64_t k = 0; k < count; k += kWidth) {
      store(scores + k, kWidth, call_.softcap * tanh(load(scores + k, kWidth) * inverse));
    }
  }

  static float largest(Vector x) {
    float lanes[kWidth];
    store(lanes, kWidth, x);
    return *std::max_element(lanes, lanes + kWidth);
  }

  void move_to(int64_t row, float top) {
    if (!(top > top_[size_t(row)])) return;
    const float factor = exponential(top_[size_t(row)] - top);
    top_[size_t(row)] = top;
    sum_[size_t(row)] *= factor;
    float* const out = out_.data() + row * d_v_;
    for (int64_t i = 0; i < d_v_; ++i) out[i] *= factor;
  }

  template <int kRows>
  void add_all_values(Seen seen, const float* weights, float* out) const {
    constexpr int kVectors = kSums / kRows;
    int64_t column = 0;
    for (; column + kVectors * kWidth <= d_v_; column += kVectors * kWidth) {
      add_values<kRows, kVectors>(weights, values_, seen.begin, seen.end, column, out, d_v_);
    }
    for (; column < d_v_; column += kWidth) {
      add_values<kRows, 1>(weights, values_, seen.begin, seen.end, column, out, d_v_);
    }
  }

  // Zeros at first, aligned to whole cache lines.
  class Buffer {
   public:
    explicit Buffer(int64_t size) : lines_(size_t(round_up(size, kLine) / kLine)) {}
    float* data() { return lines_.data()->x; }

   private:
    static constexpr int64_t kLine = 16;
    struct alignas(4 * kLine) Line {
      float x[kLine];
    };
    std::vector<Line> lines_;
  };

  const PagedAttention<Stored>& call_;
  const int64_t shared_, d_, d_v_;  // heads that share one of keys; sizes in whole vectors
  // By the rows of each head of the unit; `rows_` of a head, among them one that fills up a pair.
  Buffer queries_, out_, scores_;  // [rows, d_], [rows, d_v_], [rows, kTile]
  Buffer wide_keys_, wide_values_;
  std::vector<float> top_;
  std::vector<double> sum_;
  int64_t slots_[kTile];
  const float *keys_[kTile], *values_[kTile];
  const Unit* unit_ = nullptr;
  int64_t rows_ = 0, tile_ = 0, keys_seen_ = 0;
};

// What threads take in turn: of a sequence that is decoded all heads, so that the pool is read from front to
// back; of a prompt as many queries as share what the caches hold, in one head of keys.
template <class Stored>
std::vector<Unit> divide(const PagedAttention<Stored>& call, int64_t most_queries) {
  std::vector<Unit> units;
  for (int64_t i = 0; i < call.sequences; ++i) {
    const int64_t row = call.cu_query[i], count = call.cu_query[i + 1] - row;
    if (count == 1) units.push_back({i, row, 1, call.lengths[i] - 1, 0, call.kv_heads});
    if (count <= 1) continue;
    for (int64_t head = 0; head < call.kv_heads; ++head) {
      for (int64_t done = 0; done < count; done += most_queries) {
        const int64_t queries = std::min(most_queries, count - done);
        units.push_back({i, row + done, queries, call.lengths[i] - count + done, head, 1});
      }
    }
  }
  return units;
}

// Multiply-adds, or numbers of the pool at what it takes to read one.
template <class Stored>
int64_t estimate(const PagedAttention<Stored>& call, const std::vector<Unit>& units) {
  constexpr int64_t kReading = 8;
  int64_t sum = 0;
  for (const Unit& unit : units) {
    const int64_t seen = std::min(call.window + unit.queries, unit.position + unit.queries);
    const int64_t rows = unit.queries * (call.heads / call.kv_heads);
    sum += seen * unit.heads * (call.d + call.d_v) * std::max(kReading, rows);
  }
  return sum;
}

template <class Stored>
void check(const PagedAttention<Stored>& call) {
  check_prefix_sum("cu_query", call.cu_query, call.sequences, call.tokens);
  for (int64_t i = 0; i < call.sequences; ++i) {
    const int64_t own = call.cu_query[i + 1] - call.cu_query[i], most = call.most * call.block;
    if (call.lengths[i] < own || call.lengths[i] > most) {
      throw std::invalid_argument("lengths must lie between a sequence's queries and what its blocks hold, " +
                                  std::to_string(own) + " and " + std::to_string(most) + " at index " +
                                  std::to_string(i) + ", got " + std::to_string(call.lengths[i]));
    }
  }
}

}  // namespace

template <class Isa, class Stored>
void paged_attention(const PagedAttention<Stored>& call, int threads) {
  check(call);
  const int64_t shared = call.heads / call.kv_heads, most_queries = std::max<int64_t>(1, kMostRows / shared);
  const std::vector<Unit> units = divide(call, most_queries);
  const int64_t of_one = call.kv_heads * Worker<Stored>::count_rows(shared);
  const int64_t most_rows = std::max(of_one, Worker<Stored>::count_rows(most_queries * shared));
  std::atomic<size_t> next{0};
  in_parallel(int64_t(units.size()), estimate(call, units) / 8, threads, [&](int64_t, int64_t) {
    Worker<Stored> worker(call, most_rows);
    for (size_t unit = next++; unit < units.size(); unit = next++) worker.attend(units[unit]);
  });
}

template void paged_attention<HIPER_FAST_ISA>(const PagedAttention<float>&, int);
template void paged_attention<HIPER_FAST_ISA>(const PagedAttention<Bfloat16>&, int);
template void paged_attention<HIPER_FAST_ISA>(const PagedAttention<Half>&, int);

}  // namespace hiper_fast
