// BM25 top-k over an inverted index, a window of documents at a time, so that the sums stay in the cache.
// Within a window the terms with the smallest upper bounds are left out for as long as all of them together
// cannot lift a document into the top k (MaxScore; Turtle and Flood, 1995), and looked up only for documents
// that the other terms brought close. Bounds are those of blocks of postings (block-max; Ding and Suel,
// 2011). Nothing is approximate: the scores are those of adding up every posting.
#include <algorithm>
#include <cstring>
#include <vector>

#include "ops.h"

namespace hiper_fast {
namespace {

constexpr int32_t kWindow = 4096;  // documents

// What one term adds to a document: grows with count and inverse length.
float term_score(float weight, float impact) { return weight - weight / (1.0f + impact); }

// Sums are formed in different orders; this covers what that can change in a bound.
float bound_score(double sum) { return float(sum * (1.0 + 1e-12)); }

struct Term {
  float weight;
  const int32_t* documents;  // the postings not behind the window
  const uint16_t* counts;
  const int32_t* end;
  const float* block_bounds;
  int64_t passed;             // postings behind the window
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
  bool admits(float score) const { return heap_.size() < k_ || score > heap_.front().score; }
  void offer(Hit hit) {
    if (!admits(hit.score)) return;
    if (heap_.size() == k_) {
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

}  // namespace

int64_t bm25_search(const int32_t* documents, const uint16_t* counts, const float* block_bounds,
                    const uint8_t* norms, const float* inverse, const int64_t* begins, const int64_t* ends,
                    const int64_t* block_begins, const float* weights, int32_t* out_documents,
                    float* out_scores, int64_t terms, int64_t total, int64_t k, int64_t block) {
  std::vector<Term> all(static_cast<size_t>(terms));
  for (int64_t t = 0; t < terms; ++t) {
    all[t] = {weights[t],
              documents + begins[t],
              counts + begins[t],
              documents + ends[t],
              block_bounds + block_begins[t],
              0,
              nullptr,
              0.0};
  }
  std::vector<Term*> active;
  std::vector<double> bounds;  // bounds[i]: on what the first i active terms add together
  std::vector<double> sums(kWindow);
  std::vector<int32_t> candidates;
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
    size_t optional = 0;  // so many terms cannot make a hit without the others
    while (optional < active.size() && !best.admits(bound_score(bounds[optional + 1]))) ++optional;

    if (optional < active.size()) {
      for (size_t i = optional; i < active.size(); ++i) {
        const Term& term = *active[i];
        const uint16_t* count = term.counts;
        for (const int32_t* document = term.documents; document != term.window_end; ++document, ++count) {
          sums[*document - base] += term_score(term.weight, float(*count) * inverse[norms[*document]]);
        }
      }
      candidates.clear();
      for (int32_t document = int32_t(base); document < limit; ++document) {
        const double sum = sums[document - base];
        if (sum > 0.0 && best.admits(bound_score(sum + bounds[optional]))) candidates.push_back(document);
      }
      for (size_t i = optional; i-- > 0 && !candidates.empty();) {
        const Term& term = *active[i];
        const int32_t* at = term.documents;
        size_t kept = 0;
        for (const int32_t document : candidates) {
          double& sum = sums[document - base];
          if (!best.admits(bound_score(sum + bounds[i + 1]))) continue;
          at = std::lower_bound(at, term.window_end, document);
          if (at != term.window_end && *at == document) {
            const float count = term.counts[at - term.documents];
            sum += term_score(term.weight, count * inverse[norms[document]]);
          }
          candidates[kept++] = document;
        }
        candidates.resize(kept);
      }
      for (const int32_t document : candidates) best.offer({float(sums[document - base]), document});
      std::fill(sums.begin(), sums.end(), 0.0);
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
