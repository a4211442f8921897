// Which level trains each token, with the semantics of hiper_fast/response.py. The text is never put
// together: a tag begins with '<', so only tokens that hold one are looked into; of all others a byte of
// flags is read.
#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
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

constexpr std::array<std::string_view, 3> kOpening = {"<action>", "<subgoal>", "<switch>"};
constexpr std::array<std::string_view, 3> kClosing = {"</action>", "</subgoal>", "</switch>"};
constexpr std::array<uint8_t, 3> kRoles = {kAction, kSubgoal, kSwitch};

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

  // Whether the text from `at` on begins with `tag`; if so `at` becomes the position after it.
  bool skip(std::string_view tag, Position& at) const {
    for (Position next = at; next.token < count; ++next.token, next.byte = 0) {
      const std::string_view text = piece(next.token).substr(size_t(next.byte));
      const size_t size = std::min(text.size(), tag.size());
      if (!std::equal(text.begin(), text.begin() + size, tag.begin())) return false;
      tag.remove_prefix(size);
      if (tag.empty()) {
        at = {next.token, next.byte + int64_t(size)};
        return true;
      }
    }
    return false;
  }

  // If a tag that can matter begins at the '<' at `start`, tell its block.
  void read_tag(Position start, std::array<Block, 3>& blocks) const {
    for (size_t i = 0; i < blocks.size(); ++i) {
      Block& block = blocks[i];
      Position end = start;
      if (block.found || !skip(block.open ? kClosing[i] : kOpening[i], end)) continue;
      if (!block.open) {
        block.open = true;
        block.first = start.token;
        block.content_begin = end;
      } else {
        block.found = true;
        block.last = end.token;
        block.content_end = start;
      }
      return;
    }
  }

  void read_tags(int64_t token, std::array<Block, 3>& blocks) const {
    const std::string_view text = piece(token);
    for (size_t at = text.find('<'); at != text.npos; at = text.find('<', at + 1)) {
      read_tag({token, int64_t(at)}, blocks);
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

// Ids are fetched so far ahead: a page, past which a processor by itself does not look, holds 512 of them.
constexpr int64_t kAhead = 1024;
constexpr int64_t kEight = 8;  // flags that are written at a time

// The flags of kCount tokens to `flags`; returns all of them together.
template <int64_t kCount, class Id>
uint64_t look_up(const Id* ids, const uint8_t* piece_flags, int64_t vocabulary, uint8_t* flags) {
  bool outside = false;  // as unsigned numbers, in which the negative ones are large
  for (int64_t k = 0; k < kCount; ++k) outside |= uint64_t(int64_t(ids[k])) >= uint64_t(vocabulary);
  if (outside) {
    const Id* const id = std::find_if(ids, ids + kCount, [=](Id x) { return x < 0 || x >= vocabulary; });
    throw std::invalid_argument("token_ids: " + std::to_string(*id) + " is not in the vocabulary of " +
                                std::to_string(vocabulary) + " pieces");
  }
  uint8_t found[kCount];
  for (int64_t k = 0; k < kCount; ++k) found[k] = piece_flags[ids[k]];
  std::memcpy(flags, found, kCount);
  uint64_t together = 0;
  std::memcpy(&together, found, kCount);
  return together;
}

// The tokens' flags to `flags` [count]; returns all of them together.
template <class Id>
uint8_t look_up_all(const Id* ids, int64_t count, const uint8_t* piece_flags, int64_t vocabulary,
                    uint8_t* flags) {
  uint64_t seen = 0;
  int64_t i = 0;
  for (; i + kEight <= count; i += kEight) {
    prefetch(ids + i + kAhead);
    seen |= look_up<kEight>(ids + i, piece_flags, vocabulary, flags + i);
  }
  for (; i < count; ++i) seen |= look_up<1>(ids + i, piece_flags, vocabulary, flags + i);
  for (int64_t bits = 32; bits >= 8; bits /= 2) seen |= seen >> bits;
  return uint8_t(seen);
}

// The first token from `token` on whose flags have kHasAngle, or `count`.
int64_t find_angle(const uint8_t* flags, int64_t token, int64_t count) {
  constexpr uint64_t kAngles = 0x0101010101010101 * kHasAngle;
  for (uint64_t eight; token + 8 <= count; token += 8) {
    std::memcpy(&eight, flags + token, sizeof eight);
    if (eight & kAngles) break;
  }
  while (token < count && !(flags[token] & kHasAngle)) ++token;
  return token;
}

// The flags of tokens become their roles.
void write_roles(const std::array<Block, 3>& blocks, int64_t count, uint8_t* roles) {
  // Above the roles stand, shifted, those that a token can have: tokens without bytes are in no block.
  constexpr int kShift = 3;
  constexpr uint8_t kAny = kAction | kSubgoal | kSwitch;
  for (int64_t i = 0; i < count; ++i) roles[i] = roles[i] & kEmpty ? 0 : kAny << kShift;
  for (size_t b = 0; b < blocks.size(); ++b) {
    if (!blocks[b].found) continue;
    const uint8_t role = kRoles[b];
    const int64_t end = blocks[b].last + 1;
    for (int64_t i = blocks[b].first; i < end; ++i) roles[i] |= (roles[i] >> kShift) & role;
  }
  const uint8_t everywhere = blocks[0].found ? 0 : kAction;
  for (int64_t i = 0; i < count; ++i) roles[i] = (roles[i] & kAny) | everywhere;
}

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
                int64_t vocabulary, uint8_t* roles, bool* switches, int32_t* value_index, bool* valid,
                int threads) {
  check_prefix_sum("cu_tokens", cu_tokens, turns, tokens);
  in_parallel(turns, tokens, threads, [=](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      const int64_t base = cu_tokens[n];
      const Response<Id> response{token_ids + base, cu_tokens[n + 1] - base, piece_bytes, piece_offsets};
      std::array<Block, 3> blocks;
      auto& [action, subgoal, decision] = blocks;

      // First the flags of all tokens, kept where their roles will be; then the few tokens that hold a '<'.
      uint8_t* const flags = roles + base;
      const uint8_t seen = look_up_all(response.ids, response.count, piece_flags, vocabulary, flags);
      for (int64_t i = find_angle(flags, 0, response.count); i < response.count;
           i = find_angle(flags, i + 1, response.count)) {
        response.read_tags(i, blocks);
      }

      const Word word = decision.found ? read_word(response, decision) : Word::kEmpty;
      switches[n] = word == Word::kSwitch || word == Word::kOther;
      valid[n] = (word == Word::kKeep || word == Word::kSwitch) && subgoal.found && action.found &&
                 !((seen & kHasHighByte) && has_cjk(response));

      write_roles(blocks, response.count, flags);
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
  });
}

template void find_roles(const int32_t*, const int32_t*, const uint8_t*, const int32_t*, const uint8_t*,
                         int64_t, int64_t, int64_t, uint8_t*, bool*, int32_t*, bool*, int);
template void find_roles(const int64_t*, const int32_t*, const uint8_t*, const int32_t*, const uint8_t*,
                         int64_t, int64_t, int64_t, uint8_t*, bool*, int32_t*, bool*, int);

}  // namespace hiper_fast
