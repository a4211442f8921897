// The CPU kernels: plain functions over contiguous raw buffers, so that one build serves every torch version.
// Shapes and dtypes are checked in Python; what only the data can tell (prefix sums, token ids) is checked
// here and thrown as std::invalid_argument, which Python sees as a ValueError.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace hiper_fast {

enum Role : uint8_t { kAction = 1, kSubgoal = 2, kSwitch = 4 };

// out: [6, turns], rows advantages_low, returns_low, advantages_high, returns_high, advantages_switch,
// returns_switch. values_switch, bootstrap_low and bootstrap_high may be null, which means 0.
template <class T>
void hae(const T* rewards, const T* values_low, const T* values_high, const T* values_switch,
         const bool* switches, const bool* terminated, const int32_t* cu_turns, const T* bootstrap_low,
         const T* bootstrap_high, int64_t turns, int64_t trajectories, double gamma, double lambda_turn,
         double lambda_segment, T* out, bool* boundary);

// out: [2, turns], rows advantages, returns. bootstrap may be null.
template <class T>
void gae(const T* rewards, const T* values, const bool* terminated, const int32_t* cu_turns,
         const T* bootstrap, int64_t turns, int64_t trajectories, double gamma, double lambda, T* out);

// out: [turns], 0 off the mask.
template <class T>
void normalize(const T* values, const bool* mask, int64_t turns, double eps, T* out);

enum PieceFlag : uint8_t { kHasAngle = 1, kHasHighByte = 2, kEmpty = 4 };

// piece_offsets: [vocabulary + 1] into piece_bytes; piece_flags: [vocabulary]. roles must come in zeroed.
template <class Id>
void find_roles(const Id* token_ids, const int32_t* cu_tokens, const uint8_t* piece_bytes,
                const int32_t* piece_offsets, const uint8_t* piece_flags, int64_t tokens, int64_t turns,
                int64_t vocabulary, uint8_t* roles, bool* switches, int32_t* value_index, bool* valid);

template <class T>
void scatter_advantages(const T* advantages_low, const T* advantages_high, const T* advantages_switch,
                        const bool* boundary, const uint8_t* roles, const int32_t* cu_tokens, int64_t tokens,
                        int64_t turns, T* advantages, bool* loss_mask);

// The k best documents of a query, best first; returns how many there are. documents, counts: all terms' postings;
// block_bounds: the largest count * inverse of each block of a term's postings; norms: [total] into inverse [256].
// begins, ends, block_begins, weights: [terms], where the query's terms have their postings and bounds. out_*: [k].
int64_t bm25_search(const int32_t* documents, const uint16_t* counts, const float* block_bounds, const uint8_t* norms,
                    const float* inverse, const int64_t* begins, const int64_t* ends, const int64_t* block_begins,
                    const float* weights, int32_t* out_documents, float* out_scores, int64_t terms, int64_t total,
                    int64_t k, int64_t block);

// cu must be an exclusive prefix sum: 0, then never falling, `total` at its end.
inline void check_prefix_sum(const char* name, const int32_t* cu, int64_t segments, int64_t total) {
  if (cu[0] != 0)
    throw std::invalid_argument(std::string(name) + " must begin with 0, got " + std::to_string(cu[0]));
  for (int64_t i = 0; i < segments; ++i) {
    if (cu[i + 1] < cu[i]) {
      throw std::invalid_argument(std::string(name) + " must never fall, but falls from " +
                                  std::to_string(cu[i]) + " to " + std::to_string(cu[i + 1]) + " at index " +
                                  std::to_string(i + 1));
    }
  }
  if (cu[segments] != total) {
    throw std::invalid_argument(std::string(name) + " must end with " + std::to_string(total) + ", got " +
                                std::to_string(cu[segments]));
  }
}

}  // namespace hiper_fast
