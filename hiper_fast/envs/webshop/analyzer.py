"""Text to search terms, as Lucene's English analyzer makes them.

Words are those of Unicode Standard Annex #29 as Lucene's StandardTokenizer reads it: South-East
Asian text stays in one piece, an ideograph or a hiragana letter is a word, an emoji sequence is a
word. Stems are Porter's ("An algorithm for suffix stripping", 1980) with the two departures of his
own later program: -bli -> -ble and -logi -> -log.
"""

from __future__ import annotations

from functools import lru_cache

import regex

MAX_WORD = 255  # a longer word is cut, as the tokenizer's buffer does

STOP_WORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then "
    "there these they this to was will with".split()
)

# Marks cling to whatever precedes them. Skin tones are emoji here, though marks since Unicode 11.0.
_MARK = r"[[\p{WB=Extend}\p{WB=Format}\p{WB=ZWJ}]--[\U0001F3FB-\U0001F3FF]]"


def _make_word_pattern() -> regex.Pattern:
    letter, hebrew = r"\p{WB=ALetter}", r"\p{WB=Hebrew_Letter}"
    katakana, joiner = r"\p{WB=Katakana}", r"\p{WB=ExtendNumLet}"
    marks, marked_letters = rf"{_MARK}*+", rf"[{letter}{_MARK}]*+"
    in_word = rf"[\p{{WB=MidLetter}}\p{{WB=MidNumLet}}']{marks}"
    in_number = rf"[\p{{WB=MidNum}}\p{{WB=MidNumLet}}']{marks}"

    alphabetic = rf"{letter}{marked_letters}(?:{in_word}[{letter}{hebrew}]{marked_letters})*+"
    more_hebrew = rf"(?:{in_word}[{letter}{hebrew}]{marked_letters})*+"
    hebrew_word = rf"{hebrew}{marks}(?:\"{marks}{hebrew}{marks}|'{marks}|{more_hebrew})"
    number = rf"\p{{Nd}}{marks}(?:(?:{in_number})?\p{{Nd}}{marks})*+"
    run = rf"(?:(?:{alphabetic}|{number}|{hebrew_word})++|(?:{katakana}{marks})++)"
    word = rf"(?:{run}|(?:{joiner}{marks})++{run}?+)(?:(?:{joiner}{marks})++{run}?+)*+"

    # Today's property holds fewer symbols than that of Unicode 12.1, which Lucene has.
    older = r"\u2600-\u2605\u2607-\u2612\u2614-\u2685\u2690-\u2705\u2708-\u2712\u2763-\u2767"
    pictograph = rf"[\p{{Extended_Pictographic}}{older}]"
    skin_tone = r"[\U0001F3FB-\U0001F3FF]"
    emoji_marks = rf"[{_MARK}--[\uFE0E\uFE0F]]*+"
    toned = rf"\p{{Emoji_Modifier_Base}}{emoji_marks}{skin_tone}"
    picture = rf"(?:{toned}|{pictograph}|{skin_tone}){emoji_marks}\uFE0F?+"
    emoji = rf"(?:(?<!\u200D)\u200D++)?+{picture}(?:\u200D*+(?<=\u200D){picture})*+"
    key_cap = r"[#*]\uFE0F?+\u20E3" + emoji_marks
    flag = rf"(?:\p{{WB=Regional_Indicator}}{marks}){{2}}"

    south_east_asian = rf"(?:\p{{LB=SA}}{marks})++"
    ideograph = rf"[\p{{Script=Han}}\p{{Script=Hiragana}}]{marks}"
    return regex.compile(
        "|".join([word, emoji, key_cap, flag, south_east_asian, ideograph]), regex.V1
    )


_WORD = _make_word_pattern()
_JOINERS_ALONE = regex.compile(rf"[\p{{WB=ExtendNumLet}}{_MARK}]+", regex.V1)


def find_words(text: str) -> list[str]:
    """The words of a text, as they are written; a run of `_` alone may be one, without a term."""
    found = _WORD.findall(text)
    if found and max(map(len, found)) > MAX_WORD:
        return [piece for word in found for piece in _cut(word)]
    return found


def _cut(word: str) -> list[str]:
    pieces, start = [], 0
    while match := _WORD.search(word, start, start + MAX_WORD):
        pieces.append(match.group())
        start = match.end()
    return pieces


@lru_cache(maxsize=1 << 16)
def make_term(word: str) -> str | None:
    """The search term of a word, None for a stop word."""
    if _JOINERS_ALONE.fullmatch(word):
        return None
    if word[-1] in "sS" and word[-2:-1] in ("'", "\u2019", "\uff07"):
        word = word[:-2]
    # One character for one, as Java does it: no final sigma, no dot left of the Turkish capital.
    word = word.lower() if word.isascii() else "".join([c.lower()[0] for c in word])
    return None if word in STOP_WORDS else stem(word)


@lru_cache(maxsize=1 << 17)
def _tokenize_chunk(chunk: str) -> tuple[str, ...]:
    return tuple(found for word in find_words(chunk) if (found := make_term(word)) is not None)


def tokenize(text: str) -> list[str]:
    """All terms of a text: `tokenize("The dog's 2 beds") == ["dog", "2", "bed"]`."""
    # A space ends every word, and most of what stands between two spaces was seen before.
    return [found for chunk in text.split(" ") for found in _tokenize_chunk(chunk)]


# Porter's steps. The measure m counts vowel-consonant pairs; `y` after a consonant is a vowel.

_STEP_2 = {
    "ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize", "bli": "ble",
    "alli": "al", "entli": "ent", "eli": "e", "ousli": "ous", "ization": "ize", "ation": "ate",
    "ator": "ate", "alism": "al", "iveness": "ive", "fulness": "ful", "ousness": "ous",
    "aliti": "al", "iviti": "ive", "biliti": "ble", "logi": "log",
}  # fmt: skip
_STEP_3 = {
    "icate": "ic",
    "ative": "",
    "alize": "al",
    "iciti": "ic",
    "ical": "ic",
    "ful": "",
    "ness": "",
}
_STEP_4 = dict.fromkeys(
    "al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize".split(), ""
)


def stem(word: str) -> str:
    """Porter's stem of a lower-case word: `stem("relational") == "relat"`."""
    if len(word) <= 2:
        return word
    word = _strip_plural(word)
    word = _strip_past(word)
    if word.endswith("y") and _has_vowel(word[:-1]):
        word = word[:-1] + "i"
    word = _replace_suffix(word, _STEP_2, 0)
    word = _replace_suffix(word, _STEP_3, 0)
    word = _replace_suffix(word, _STEP_4, 1)
    if word.endswith("e"):
        measure = _measure(word[:-1])
        if measure > 1 or (measure == 1 and not _ends_short(word[:-1])):
            word = word[:-1]
    if word.endswith("ll") and _measure(word[:-1]) > 1:
        word = word[:-1]
    return word


def _strip_plural(word: str) -> str:
    if word.endswith(("sses", "ies")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _strip_past(word: str) -> str:
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    suffix = "ed" if word.endswith("ed") else "ing" if word.endswith("ing") else ""
    root = word.removesuffix(suffix)
    if not suffix or not _has_vowel(root):
        return word
    if root.endswith(("at", "bl", "iz")):
        return root + "e"
    if _ends_double(root):
        return root if root[-1] in "lsz" else root[:-1]
    return root + "e" if _measure(root) == 1 and _ends_short(root) else root


def _replace_suffix(word: str, table: dict[str, str], measure: int) -> str:
    """Replaces the longest suffix in the table if what is before it has more than that measure."""
    for length in range(min(len(word), 7), 1, -1):
        suffix = word[-length:]
        if suffix in table:
            root = word[:-length]
            if suffix == "ion" and not root.endswith(("s", "t")):
                return word
            return root + table[suffix] if _measure(root) > measure else word
    return word


def _mark_vowels(word: str) -> list[bool]:
    vowels, after_consonant = [], False
    for letter in word:
        after_vowel_or_start = not after_consonant
        vowel = letter in "aeiou" or (letter == "y" and not after_vowel_or_start)
        vowels.append(vowel)
        after_consonant = not vowel
    return vowels


def _has_vowel(word: str) -> bool:
    return any(_mark_vowels(word))


def _measure(word: str) -> int:
    vowels = _mark_vowels(word)
    return sum(before and not after for before, after in zip(vowels, vowels[1:], strict=False))


def _ends_double(word: str) -> bool:
    return len(word) > 1 and word[-1] == word[-2] and not _mark_vowels(word)[-1]


def _ends_short(word: str) -> bool:
    """Consonant, vowel, consonant other than w, x and y."""
    return _mark_vowels(word)[-3:] == [False, True, False] and word[-1] not in "wxy"
