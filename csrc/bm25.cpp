// BM25 top-k over an inverted index, a window of documents at a time, so that the sums stay in the cache.
// Within a window the terms with the smallest upper bounds are left out for as long as all of them together
// cannot lift a document into the top k (MaxScore; Turtle and Flood, 1995), and looked up only for documents
// that the other terms brought close. Bounds are those of blocks of postings (block-max; Ding and Suel,
// 2011). Nothing is approximate: the scores are those of adding up every posting.
#include <algorithm>
#include <vector>

#include "ops.h"

namespace hiper_fast {
namespace {

constexpr int32_t kWindow = 4096;  // documents
constexpr int64_t kLookup = 16;    // postings that can be added in the time in which one is looked up

// What one term adds to a document: grows with count and inverse length.
float term_score(float weight, float impact) { return weight - weight / (1.0f + impact); }

struct Term {
  float weight;
  const int32_t* documents;  // the postings not behind the window
  const uint16_t* counts;
  const int32_t* end;
  const float* block_bounds;
  int64_t passed = 0;         // postings behind the window
  const int32_t* window_end;  // the postings in the window end here
  double bound;               // on what it adds to any document in the window

  // Finds the postings before `limit`, and their bound. False if there are none.
  bool enter(int32_t limit, int64_t block) {
    int64_t step = 1;
    const int32_t* low = documents;
    while (end - low > step && low[step] < limit) low += step, step *= 2;
    window_end = std::lower_bound(low, low + std::min<int64_t>(step + 1, end - low), limit);
    if (window_end == documents) return false;
    const int64_t last = passed + (window_end - documents) - 1;
    bound =
        term_score(weight, *std::max_element(block_bounds + passed / block, block_bounds + last / block + 1));
    return true;
  }

  void leave() {
    const int64_t size = window_end - documents;
    documents += size;
    counts += size;
    passed += size;
  }
};

struct Hit {
  float score;
  int32_t document;
  bool operator<(const Hit& other) const {  // better
    return score != other.score ? score > other.score : document < other.document;
  }
};

// The k best so far. Documents come in rising order, so one that ties with the worst is no better.
class TopK {
 public:
  explicit TopK(size_t k) : k_(k) { heap_.reserve(k); }
  // What a document's sum must exceed, less what the order of summation can change in it.
  double needed() const { return heap_.size() < k_ ? 0.0 : double(heap_.front().score) * (1.0 - 1e-12); }
  void offer(Hit hit) {
    if (heap_.size() == k_) {
      if (hit.score <= heap_.front().score) return;
      std::pop_heap(heap_.begin(), heap_.end());
      heap_.pop_back();
    }
    heap_.push_back(hit);
    std::push_heap(heap_.begin(), heap_.end());
  }
  const std::vector<Hit>& sorted() {
    std::sort(heap_.begin(), heap_.end());
    return heap_;
  }

 private:
  size_t k_;
  std::vector<Hit> heap_;  // the worst in front
};

// The scores so far of the documents base .. base + kWindow.
class Window {
 public:
  Window(const uint8_t* norms, const float* inverse) : norms_(norms), inverse_(inverse), sums_(kWindow) {}
  void move(int64_t base) {
    base_ = int32_t(base);
    std::fill(sums_.begin(), sums_.end(), 0.0);
  }
  double sum(int32_t document) const { return sums_[document - base_]; }

  // Adds what the term gives to every document.
  void add(const Term& term) {
    const int64_t size = term.window_end - term.documents;
    for (int64_t posting = 0; posting < size; ++posting) add(term, posting);
  }

  // The same for those documents only.
  void look_up(const Term& term, const int32_t* wanted, size_t count) {
    const int32_t* at = term.documents;
    for (size_t i = 0; i < count; ++i) {
      at = std::lower_bound(at, term.window_end, wanted[i]);
      if (at == term.window_end) return;
      if (*at == wanted[i]) add(term, at - term.documents);
    }
  }

 private:
  void add(const Term& term, int64_t posting) {
    const int32_t document = term.documents[posting];
    sums_[document - base_] += term_score(term.weight, term.counts[posting] * inverse_[norms_[document]]);
  }

  const uint8_t* norms_;
  const float* inverse_;
  int32_t base_ = 0;
  std::vector<double> sums_;
};

}  // namespace

int64_t bm25_search(const int32_t* documents, const uint16_t* counts, const float* block_bounds,
                    const uint8_t* norms, const float* inverse, const int64_t* begins, const int64_t* ends,
                    const int64_t* block_begins, const float* weights, int32_t* out_documents,
                    float* out_scores, int64_t terms, int64_t total, int64_t k, int64_t block) {
  std::vector<Term> all(static_cast<size_t>(terms));
  for (int64_t t = 0; t < terms; ++t) {
    all[t].weight = weights[t];
    all[t].documents = documents + begins[t];
    all[t].counts = counts + begins[t];
    all[t].end = documents + ends[t];
    all[t].block_bounds = block_bounds + block_begins[t];
  }
  std::vector<Term*> active;
  std::vector<double> bounds;  // bounds[i]: on what the first i active terms add together
  std::vector<int32_t> candidates(kWindow);
  Window window(norms, inverse);
  TopK best(static_cast<size_t>(k));

  for (int64_t base = 0; base < total; base += kWindow) {
    const int32_t limit = int32_t(std::min<int64_t>(base + kWindow, total));
    active.clear();
    for (Term& term : all) {
      if (term.enter(limit, block)) active.push_back(&term);
    }
    std::sort(active.begin(), active.end(), [](const Term* a, const Term* b) { return a->bound < b->bound; });
    bounds.assign(1, 0.0);
    for (const Term* term : active) bounds.push_back(bounds.back() + term->bound);

    const double needed = best.needed();
    size_t optional = 0;  // so many terms cannot make a hit without the others
    while (optional < active.size() && bounds[optional + 1] <= needed) ++optional;
    if (optional < active.size()) {
      window.move(base);
      for (size_t i = optional; i < active.size(); ++i) window.add(*active[i]);
      // Selecting without branches, for which documents pass is unpredictable.
      const double floor = std::max(0.0, needed - bounds[optional]);
      size_t count = 0;
      for (int32_t document = int32_t(base); document < limit; ++document) {
        candidates[count] = document;
        count += window.sum(document) > floor;
      }
      for (size_t i = optional; i-- > 0 && count > 0;) {
        const size_t before = count;
        count = 0;
        for (size_t c = 0; c < before; ++c) {
          candidates[count] = candidates[c];
          count += window.sum(candidates[c]) + bounds[i + 1] > needed;
        }
        const Term& term = *active[i];
        if (int64_t(count) * kLookup > term.window_end - term.documents) {
          window.add(term);
        } else {
          window.look_up(term, candidates.data(), count);
        }
      }
      for (size_t c = 0; c < count; ++c) best.offer({float(window.sum(candidates[c])), candidates[c]});
    }
    for (Term* term : active) term->leave();
  }

  const std::vector<Hit>& hits = best.sorted();
  for (size_t i = 0; i < hits.size(); ++i) {
    out_documents[i] = hits[i].document;
    out_scores[i] = hits[i].score;
  }
  return int64_t(hits.size());
}

}  // namespace hiper_fast
