// Attention to keys and values in blocks of a pool, with an online softmax over tiles of keys (Milakov and
// Gimelshein, arXiv 1805.02867). A unit of work is some queries of one sequence; its rows are those queries
// in each of the heads that share a head of keys, so that whatever is read of the pool serves all of them:
//
//     scores = rows @ keys.T            1 row by 8 keys at a time, or 3 rows by 4
//     weights = exp(scores - top)       row by row; where there is a new top, sum and out move to it
//     out += weights @ values           1 row by 8 vectors at a time, or 3 rows by 4
//
// Both products leave out what a row does not see, but for what fills up such a group.
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

constexpr int kGroup = 3;          // rows at a time, where there is more than one
constexpr int kMostAcross = 8;     // keys, or vectors of values, at a time
constexpr int64_t kTile = 64;      // keys, a multiple of that
constexpr int64_t kMostRows = 96;  // of a unit with more than one query
constexpr float kLowest = std::numeric_limits<float>::lowest();

using Vector = Vec<float>;
constexpr int64_t kWidth = kLanes<float>;

// The sums of kRows rows fit the registers, and are enough to hide how long a multiply-add takes.
template <int kRows>
constexpr int kAcross = kRows == 1 ? kMostAcross : 4;

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

// Keeps a vector that is used more than once in its register: else it is loaded for every use.
inline void hold([[maybe_unused]] Vector& x) {
#if defined(__AVX2__)
  asm("" : "+x"(x));
#endif
}

#if defined(__AVX512F__)
inline __m256 eight(Vector x) {
  __m256 halves[2];
  std::memcpy(halves, &x, sizeof x);
  return halves[0] + halves[1];
}
#elif defined(__AVX2__)
inline __m256 eight(Vector x) { return x; }
#endif

// totals[i] = the sum of the i-th vector's lanes.
inline void add_lanes(Vector a, Vector b, Vector c, Vector d, float* totals) {
#if defined(__AVX2__)
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(eight(a), eight(b)), _mm256_hadd_ps(eight(c), eight(d)));
  _mm_storeu_ps(totals, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
  for (const Vector& x : {a, b, c, d}) *totals++ = float(total(x));
#endif
}

// scores [kRows, kTile] of rows [kRows, size] and kAcross keys.
template <int kRows>
void multiply(const float* rows, const float* const* keys, int64_t size, float* scores) {
  constexpr int kKeys = kAcross<kRows>;
  Vector sums[kRows][kKeys];
  for (auto& of_row : sums) std::fill_n(of_row, kKeys, Vector{});
  for (int64_t i = 0; i < size; i += kWidth) {
    Vector row[kRows];
    for (int r = 0; r < kRows; ++r) hold(row[r] = load(rows + r * size + i, kWidth));
    for (int k = 0; k < kKeys; ++k) {
      Vector key = load(keys[k] + i, kWidth);
      if (kRows > 1) hold(key);
      for (int r = 0; r < kRows; ++r) sums[r][k] += row[r] * key;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < kKeys; k += 4) {
      const Vector* const four = sums[r] + k;
      add_lanes(four[0], four[1], four[2], four[3], scores + r * kTile + k);
    }
  }
}

// Adds to kVectors vectors of out [kRows, size], from `column` on, the values [begin, end) by their weights
// [kRows, kTile].
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
      Vector x = load(value + v * kWidth, kWidth);
      if (kRows > 1) hold(x);
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

// Zeros at first, aligned to whole cache lines.
class Buffer {
 public:
  explicit Buffer(int64_t size = 0) : lines_(size_t(round_up(size, kLine) / kLine)) {}
  float* data() { return lines_.data()->x; }
  bool empty() const { return lines_.empty(); }

  static constexpr int64_t kLine = 16;

 private:
  struct alignas(4 * kLine) Line {
    float x[kLine];
  };
  std::vector<Line> lines_;
};

// The keys of a tile, or its values, as float32 in whole vectors: where they lie, or copied.
template <class Stored>
class Tile {
 public:
  Tile(const Stored* pool, int64_t size)
      : pool_(pool), size_(size), pitch_(round_up(size, kWidth) + Buffer::kLine) {}

  // Those that `heads` heads have in `slots`, of one head.
  void read(const int64_t* slots, int64_t count, int64_t heads, int64_t head, bool copies) {
    if constexpr (std::is_same_v<Stored, float>) {
      if (!copies && size_ % kWidth == 0) {
        for (int64_t k = 0; k < count; ++k) vectors_[k] = pool_ + (slots[k] * heads + head) * size_;
        return;
      }
    }
    if (copy_.empty()) copy_ = Buffer(kTile * pitch_);
    for (int64_t k = 0; k < count; ++k) {
      const Stored* const from = pool_ + (slots[k] * heads + head) * size_;
      float* const to = copy_.data() + k * pitch_;
      for (int64_t i = 0; i < size_; ++i) to[i] = widen(from[i]);
      vectors_[k] = to;
    }
  }

  const float* const* vectors() const { return vectors_; }

 private:
  const Stored* pool_;
  // Copies lie a cache line further apart than they need to, lest those of a power of two share a few sets.
  int64_t size_, pitch_;
  Buffer copy_;
  const float* vectors_[kTile];
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
        sums_(most_rows * kWidth),
        keys_(call.keys, call.d),
        values_(call.values, call.d_v),
        top_(size_t(most_rows)),
        positions_(size_t(most_rows)) {}

  void attend(const Unit& unit) {
    unit_ = &unit;
    rows_ = count_rows(unit.queries * shared_);
    // Rows that only fill up a group stand where the last query does.
    std::fill_n(positions_.begin(), rows_, unit.position + unit.queries - 1);
    for (int64_t query = 0; query < unit.queries; ++query) {
      std::fill_n(positions_.begin() + query * shared_, shared_, unit.position + query);
    }
    for (int64_t head = 0; head < unit.heads; ++head) begin(head);
    const int64_t end = unit.position + unit.queries;
    for (tile_ = first_seen(unit.position); tile_ < end; tile_ += kTile) {
      keys_seen_ = std::min(kTile, end - tile_);
      find_slots();
      for (int64_t head = 0; head < unit.heads; ++head) add_tile(head);
    }
    for (int64_t head = 0; head < unit.heads; ++head) finish(head);
  }

  static int64_t count_rows(int64_t rows) { return rows == 1 ? 1 : round_up(rows, kGroup); }

 private:
  int64_t first_seen(int64_t position) const { return std::max<int64_t>(0, position - call_.window + 1); }

  Seen seen_by(int64_t row) const {
    const int64_t position = positions_[size_t(row)];
    return {std::max<int64_t>(0, first_seen(position) - tile_), std::min(keys_seen_, position + 1 - tile_)};
  }

  // Calls use(row, its place in query and out by heads) for the rows of a head.
  template <class Use>
  void each_row(int64_t head, Use use) const {
    int64_t row = head * rows_;
    for (int64_t query = 0; query < unit_->queries; ++query) {
      const int64_t first = (unit_->head + head) * shared_, place = (unit_->row + query) * call_.heads;
      for (int64_t h = first; h < first + shared_; ++h) use(row++, h, place + h);
    }
  }

  void begin(int64_t head) {
    const int64_t first = head * rows_;
    std::fill_n(queries_.data() + first * d_, rows_ * d_, 0.0f);
    std::fill_n(out_.data() + first * d_v_, rows_ * d_v_, 0.0f);
    std::fill_n(top_.data() + first, rows_, kLowest);
    std::fill_n(sums_.data() + first * kWidth, rows_ * kWidth, 0.0f);
    each_row(head, [this](int64_t row, int64_t its_head, int64_t place) {
      const float* const from = call_.query + place * call_.d;
      const float scale = call_.scale;
      std::transform(from, from + call_.d, queries_.data() + row * d_, [=](float x) { return x * scale; });
      if (!call_.sinks) return;
      top_[size_t(row)] = call_.sinks[its_head];
      sums_.data()[row * kWidth] = 1;
    });
  }

  void finish(int64_t head) {
    each_row(head, [this](int64_t row, int64_t, int64_t place) {
      const float* const from = out_.data() + row * d_v_;
      const float share = float(1 / total(load(sums_.data() + row * kWidth, kWidth)));
      float* const to = call_.out + place * call_.d_v;
      std::transform(from, from + call_.d_v, to, [=](float x) { return x * share; });
    });
  }

  // Where in the pool the tile's keys lie; the last one stands also for those that fill up a group.
  void find_slots() {
    const int32_t* number = call_.blocks + unit_->sequence * call_.most + tile_ / call_.block;
    for (int64_t k = 0, first = tile_ % call_.block; k < keys_seen_; ++number, first = 0) {
      const int64_t block = *number;
      if (block < 0 || block >= call_.pool) {
        throw std::invalid_argument("blocks must lie in [0, " + std::to_string(call_.pool) + "), got " +
                                    std::to_string(block) + " at index " + std::to_string(unit_->sequence));
      }
      const int64_t count = std::min(call_.block - first, keys_seen_ - k);
      for (int64_t i = 0; i < count; ++i) slots_[k + i] = block * call_.block + first + i;
      k += count;
    }
    std::fill(slots_ + keys_seen_, slots_ + round_up(keys_seen_, kMostAcross), slots_[keys_seen_ - 1]);
  }

  void add_tile(int64_t head) {
    const int64_t count = round_up(keys_seen_, kMostAcross), first = head * rows_;
    keys_.read(slots_, count, call_.kv_heads, unit_->head + head, false);
    values_.read(slots_, count, call_.kv_heads, unit_->head + head, rows_ > kGroup);
    rows_ == 1 ? add_tile<1>(first) : add_tile<kGroup>(first);
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
    constexpr int64_t kKeys = kAcross<kRows>;
    for (int64_t k = 0; k < keys_seen_; k += kKeys) {
      const int64_t after = tile_ + k - unit_->position;
      const int64_t first = std::max<int64_t>(0, after) * shared_ / kRows * kRows;
      const int64_t end = std::min(rows_, (after + kKeys + call_.window - 1) * shared_);
      for (int64_t row = first; row < end; row += kRows) {
        multiply<kRows>(queries + row * d_, keys_.vectors() + k, d_, scores + row * kTile + k);
      }
    }
  }

  // A row's scores to weights; what it does not see weighs nothing.
  void soften(int64_t row, Seen seen) {
    float *const scores = scores_.data() + row * kTile, *const sums = sums_.data() + row * kWidth;
    const int64_t begin = std::min(seen.begin, kTile) / kWidth * kWidth;
    const int64_t end = std::max(begin, round_up(seen.end, kWidth));
    std::fill(scores, scores + begin, 0.0f);
    std::fill(scores + end, scores + kTile, 0.0f);
    if (seen.begin >= seen.end) return;
    if (call_.softcap > 0) cap(scores + begin, end - begin);
    std::fill(scores + begin, scores + seen.begin, kLowest);
    std::fill(scores + seen.end, scores + end, kLowest);
    move_to(row, largest(scores + begin, end - begin));
    Vector sum = load(sums, kWidth);
    for (int64_t k = begin; k < end; k += kWidth) {
      const Vector weight = exponential(load(scores + k, kWidth) - top_[size_t(row)]);
      store(scores + k, kWidth, weight);
      sum += weight;
    }
    store(sums, kWidth, sum);
  }

  void cap(float* scores, int64_t count) const {
    const float inverse = 1 / call_.softcap;
    for (int64_t k = 0; k < count; k += kWidth) {
      store(scores + k, kWidth, call_.softcap * tanh(load(scores + k, kWidth) * inverse));
    }
  }

  static float largest(const float* x, int64_t count) {
    Vector most = load(x, kWidth);
    for (int64_t i = kWidth; i < count; i += kWidth) {
      const Vector next = load(x + i, kWidth);
      most = select(next > most, next, most);
    }
    float lanes[kWidth];
    store(lanes, kWidth, most);
    return *std::max_element(lanes, lanes + kWidth);
  }

  // Sum and out of a row to a new top, if it is one.
  void move_to(int64_t row, float top) {
    if (!(top > top_[size_t(row)])) return;
    const float factor = exponential(top_[size_t(row)] - top);
    top_[size_t(row)] = top;
    for (int64_t i = 0; i < kWidth; ++i) sums_.data()[row * kWidth + i] *= factor;
    for (int64_t i = 0; i < d_v_; ++i) out_.data()[row * d_v_ + i] *= factor;
  }

  // As many vectors at a time as there are: each pass over the keys takes as long as its multiply-adds, or as
  // one of them takes by itself.
  template <int kRows, int kVectors = kAcross<kRows>>
  void add_all_values(Seen seen, const float* weights, float* out, int64_t column = 0) const {
    for (; column + kVectors * kWidth <= d_v_; column += kVectors * kWidth) {
      add_values<kRows, kVectors>(weights, values_.vectors(), seen.begin, seen.end, column, out, d_v_);
    }
    if constexpr (kVectors > 1) add_all_values<kRows, kVectors / 2>(seen, weights, out, column);
  }

  const PagedAttention<Stored>& call_;
  const int64_t shared_, d_, d_v_;  // heads that share one of keys; sizes in whole vectors
  // By the rows of each head of the unit; `rows_` of a head, among them those that fill up a group.
  Buffer queries_, out_, scores_, sums_;  // [rows, d_], [rows, d_v_], [rows, kTile], [rows, kWidth]
  Tile<Stored> keys_, values_;
  std::vector<float> top_;
  std::vector<int64_t> positions_;  // of the rows of one head
  int64_t slots_[kTile];
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
