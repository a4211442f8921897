// Which level trains each token: lay out the bytes of a response, find its three blocks, map them back to tokens.
// The semantics are those of hiper_fast/response.py.
#include <algorithm>
#include <cstring>
#include <string_view>
#include <vector>

#include "ops.h"

namespace hiper_fast {
namespace {

constexpr size_t npos = std::string_view::npos;

// A block's place in the text, tags included, and the text between the tags.
struct Block {
  size_t begin = npos, end = npos;
  std::string_view content;
  bool found() const { return begin != npos; }
};

Block find_block(std::string_view text, std::string_view open, std::string_view close) {
  Block block;
  const size_t begin = text.find(open);
  if (begin == npos) return block;
  const size_t inner = begin + open.size();
  const size_t inner_end = text.find(close, inner);
  if (inner_end == npos) return block;
  block.begin = begin;
  block.end = inner_end + close.size();
  block.content = text.substr(inner, inner_end - inner);
  return block;
}

std::string_view strip(std::string_view text) {
  constexpr std::string_view whitespace = " \t\n\r\v\f";
  const size_t begin = text.find_first_not_of(whitespace);
  if (begin == npos) return {};
  return text.substr(begin, text.find_last_not_of(whitespace) - begin + 1);
}

bool equals_upper(std::string_view text, std::string_view upper) {
  if (text.size() != upper.size()) return false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i] >= 'a' && text[i] <= 'z' ? char(text[i] - 'a' + 'A') : text[i];
    if (c != upper[i]) return false;
  }
  return true;
}

// A UTF-8 character in U+4E00..U+9FFF, that is E4 B8 80 .. E9 BF BF.
bool has_cjk(std::string_view text) {
  const auto* s = reinterpret_cast<const uint8_t*>(text.data());
  const auto continues = [](uint8_t byte) { return (byte & 0xC0) == 0x80; };
  for (size_t i = 0; i + 2 < text.size(); ++i) {
    if (s[i] >= 0xE4 && s[i] <= 0xE9 && continues(s[i + 1]) && continues(s[i + 2]) &&
        (s[i] != 0xE4 || s[i + 1] >= 0xB8)) {
      return true;
    }
  }
  return false;
}

}  // namespace

template <class Id>
void find_roles(const Id* token_ids, const int32_t* cu_tokens, const uint8_t* piece_bytes,
                const int32_t* piece_offsets, int64_t tokens, int64_t turns, int64_t vocabulary, uint8_t* roles,
                bool* switches, int32_t* value_index, bool* valid) {
  check_prefix_sum("cu_tokens", cu_tokens, turns, tokens);
  std::vector<char> buffer(4096);
  std::vector<size_t> starts;  // where each token's bytes begin, and the text's end

  for (int64_t n = 0; n < turns; ++n) {
    const int64_t base = cu_tokens[n], count = cu_tokens[n + 1] - base;
    starts.resize(size_t(count) + 1);
    size_t size = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Id id = token_ids[base + i];
      if (id < 0 || id >= vocabulary) {
        throw std::invalid_argument("token_ids: " + std::to_string(id) + " at index " + std::to_string(base + i) +
                                    " is not in the vocabulary of " + std::to_string(vocabulary) + " pieces");
      }
      const int32_t piece = piece_offsets[id];
      const size_t length = size_t(piece_offsets[id + 1] - piece);
      if (size + length + 16 > buffer.size()) buffer.resize(2 * (size + length + 16));
      // Nearly every piece is short: one fixed copy of 16 bytes beats a call with the exact length.
      std::memcpy(&buffer[size], piece_bytes + piece, 16);
      if (length > 16) std::memcpy(&buffer[size + 16], piece_bytes + piece + 16, length - 16);
      starts[size_t(i)] = size;
      size += length;
    }
    starts[size_t(count)] = size;

    const std::string_view text(buffer.data(), size);
    const Block decision = find_block(text, "<switch>", "</switch>");
    const Block subgoal = find_block(text, "<subgoal>", "</subgoal>");
    const Block action = find_block(text, "<action>", "</action>");

    const std::string_view word = strip(decision.content);
    const bool keep = equals_upper(word, "KEEP");
    switches[n] = !word.empty() && !keep;
    valid[n] = (keep || equals_upper(word, "SWITCH")) && subgoal.found() && action.found() && !has_cjk(text);

    const auto mark = [&](const Block& block, uint8_t role) {
      if (!block.found()) return;
      // The token that holds the block's first byte is the last one that begins at or before it.
      const auto after = std::upper_bound(starts.begin(), starts.begin() + count, block.begin);
      for (int64_t i = after - starts.begin() - 1; i < count && starts[size_t(i)] < block.end; ++i) {
        if (starts[size_t(i) + 1] > starts[size_t(i)]) roles[base + i] |= role;
      }
    };
    mark(decision, kSwitch);
    mark(subgoal, kSubgoal);
    mark(action, kAction);
    if (!action.found()) {
      for (int64_t i = base; i < base + count; ++i) roles[i] |= kAction;
    }

    int32_t low = 0;
    for (const Block* block : {&subgoal, &decision}) {
      if (!block->found()) continue;
      const auto next = std::lower_bound(starts.begin(), starts.begin() + count, block->end) - starts.begin();
      if (next < count) {
        low = int32_t(next);
        break;
      }
    }
    value_index[3 * n] = low;
    value_index[3 * n + 1] = value_index[3 * n + 2] = 0;
  }
}

template void find_roles(const int32_t*, const int32_t*, const uint8_t*, const int32_t*, int64_t, int64_t, int64_t,
                         uint8_t*, bool*, int32_t*, bool*);
template void find_roles(const int64_t*, const int32_t*, const uint8_t*, const int32_t*, int64_t, int64_t, int64_t,
                         uint8_t*, bool*, int32_t*, bool*);

}  // namespace hiper_fast
