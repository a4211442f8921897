// Which level trains each token, with the semantics of hiper_fast/response.py. The text is never put
// together: a tag begins with '<', so only tokens that hold one are looked into; of all others a byte of
// flags is read.
#include <array>
#include <string_view>

#include "ops.h"

namespace hiper_fast {
namespace {

// A byte of the text: of which token (within the response), and where in its piece.
struct Position {
  int64_t token, byte;
};

// One block: open once its first opening tag was seen, found once a closing tag followed.
struct Block {
  bool open = false, found = false;
  int64_t first = 0, last = 0;              // the tokens of its first and last byte, tags included
  Position content_begin{}, content_end{};  // between the tags
};

constexpr std::array<std::string_view, 3> kNames = {"action>", "subgoal>", "switch>"};
constexpr std::array<uint8_t, 3> kRoles = {kAction, kSubgoal, kSwitch};
constexpr size_t kLongestTag = 10;  // </subgoal>

template <class Id>
struct Response {
  const Id* ids;
  int64_t count;
  const uint8_t* bytes;
  const int32_t* offsets;

  std::string_view piece(int64_t token) const {
    const int32_t begin = offsets[ids[token]];
    return {reinterpret_cast<const char*>(bytes) + begin, size_t(offsets[ids[token] + 1] - begin)};
  }

  // If a tag begins at the '<' at `start`, tell its block.
  void read_tag(Position start, std::array<Block, 3>& blocks) const {
    char window[kLongestTag];
    Position from[kLongestTag];
    size_t size = 0;
    for (Position at = start; at.token < count && size < kLongestTag; ++at.token, at.byte = 0) {
      for (const char c : piece(at.token).substr(size_t(at.byte))) {
        if (size == kLongestTag) break;
        from[size] = {at.token, at.byte++};
        window[size++] = c;
      }
    }
    const bool closing = size > 1 && window[1] == '/';
    const size_t skip = closing ? 2 : 1;
    const std::string_view rest(window + skip, size - skip);
    for (size_t i = 0; i < kNames.size(); ++i) {
      if (rest.substr(0, kNames[i].size()) != kNames[i]) continue;
      const Position end = from[skip + kNames[i].size() - 1];
      Block& block = blocks[i];
      if (!closing && !block.open) {
        block.open = true;
        block.first = start.token;
        block.content_begin = {end.token, end.byte + 1};
      } else if (closing && block.open && !block.found) {
        block.found = true;
        block.last = end.token;
        block.content_end = start;
      }
    }
  }

  template <class Use>
  void each_byte(Position begin, Position end, Use use) const {
    for (int64_t token = begin.token; token < count && token <= end.token; ++token) {
      std::string_view text = piece(token);
      if (token == end.token) text = text.substr(0, size_t(end.byte));
      if (token == begin.token) text = text.substr(size_t(begin.byte));
      for (const char c : text) use(uint8_t(c));
    }
  }
};

enum class Word { kEmpty, kKeep, kSwitch, kOther };

// The switch text, stripped of ASCII whitespace, in any case.
template <class Id>
Word read_word(const Response<Id>& response, const Block& block) {
  char word[6] = {};
  size_t size = 0, pending = 0;  // pending: whitespace that counts only if more follows
  response.each_byte(block.content_begin, block.content_end, [&](uint8_t c) {
    if (c == ' ' || (c >= '\t' && c <= '\r')) {
      pending += size > 0;
      return;
    }
    size += pending;  // neither word has whitespace inside: any of it only makes the size wrong
    pending = 0;
    if (size < sizeof word) word[size] = char(c >= 'a' && c <= 'z' ? c - 'a' + 'A' : c);
    ++size;
  });
  if (size == 0) return Word::kEmpty;
  if (size == 4 && std::string_view(word, 4) == "KEEP") return Word::kKeep;
  if (size == 6 && std::string_view(word, 6) == "SWITCH") return Word::kSwitch;
  return Word::kOther;
}

// A UTF-8 character in U+4E00..U+9FFF, that is E4 B8 80 .. E9 BF BF.
template <class Id>
bool has_cjk(const Response<Id>& response) {
  uint8_t before = 0, last = 0;
  bool found = false;
  response.each_byte({0, 0}, {response.count, 0}, [&](uint8_t c) {
    found |= before >= 0xE4 && before <= 0xE9 && (last & 0xC0) == 0x80 && (c & 0xC0) == 0x80 &&
             (before != 0xE4 || last >= 0xB8);
    before = last;
    last = c;
  });
  return found;
}

}  // namespace

template <class Id>
void find_roles(const Id* token_ids, const int32_t* cu_tokens, const uint8_t* piece_bytes,
                const int32_t* piece_offsets, const uint8_t* piece_flags, int64_t tokens, int64_t turns,
                int64_t vocabulary, uint8_t* roles, bool* switches, int32_t* value_index, bool* valid) {
  check_prefix_sum("cu_tokens", cu_tokens, turns, tokens);
  for (int64_t i = 0; i < tokens; ++i) {
    if (token_ids[i] < 0 || token_ids[i] >= vocabulary) {
      throw std::invalid_argument("token_ids: " + std::to_string(token_ids[i]) +
                                  " is not in the vocabulary of " + std::to_string(vocabulary) + " pieces");
    }
  }

  for (int64_t n = 0; n < turns; ++n) {
    const int64_t base = cu_tokens[n];
    const Response<Id> response{token_ids + base, cu_tokens[n + 1] - base, piece_bytes, piece_offsets};
    std::array<Block, 3> blocks;
    auto& [action, subgoal, decision] = blocks;

    uint8_t seen = 0;
    for (int64_t i = 0; i < response.count; ++i) {
      const uint8_t flags = piece_flags[response.ids[i]];
      seen |= flags;
      if (flags & kHasAngle) {
        const std::string_view piece = response.piece(i);
        for (size_t at = piece.find('<'); at != piece.npos; at = piece.find('<', at + 1)) {
          response.read_tag({i, int64_t(at)}, blocks);
        }
      }
    }

    const Word word = decision.found ? read_word(response, decision) : Word::kEmpty;
    switches[n] = word == Word::kSwitch || word == Word::kOther;
    valid[n] = (word == Word::kKeep || word == Word::kSwitch) && subgoal.found && action.found &&
               !((seen & kHasHighByte) && has_cjk(response));

    for (size_t b = 0; b < blocks.size(); ++b) {
      if (!blocks[b].found) continue;
      for (int64_t i = blocks[b].first; i <= blocks[b].last; ++i) {
        if (!(piece_flags[response.ids[i]] & kEmpty)) roles[base + i] |= kRoles[b];
      }
    }
    if (!action.found) {
      for (int64_t i = 0; i < response.count; ++i) roles[base + i] |= kAction;
    }

    // The token after the one that holds a block's last byte is the first to start at or after the block's
    // end.
    int64_t low = 0;
    if (subgoal.found && subgoal.last + 1 < response.count) {
      low = subgoal.last + 1;
    } else if (decision.found && decision.last + 1 < response.count) {
      low = decision.last + 1;
    }
    value_index[3 * n] = int32_t(low);
    value_index[3 * n + 1] = value_index[3 * n + 2] = 0;
  }
}

template void find_roles(const int32_t*, const int32_t*, const uint8_t*, const int32_t*, const uint8_t*,
                         int64_t, int64_t, int64_t, uint8_t*, bool*, int32_t*, bool*);
template void find_roles(const int64_t*, const int32_t*, const uint8_t*, const int32_t*, const uint8_t*,
                         int64_t, int64_t, int64_t, uint8_t*, bool*, int32_t*, bool*);

}  // namespace hiper_fast
