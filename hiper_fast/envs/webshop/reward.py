"""The score of a purchase: type, attributes, options and price against the goal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from rapidfuzz.fuzz import token_set_ratio
from rapidfuzz.process import extractOne
from rapidfuzz.utils import default_process

Nouns = Callable[[str], list[str]]

NO_NOUNS = 0.2  # the title score of a goal whose title has no noun
POOR, GOOD = 0.1, 0.2  # title scores: below POOR the type pays POOR, above GOOD it pays in full
DOUBTFUL = 0.5  # what it pays between them
SAME_PATH = 2  # parts that categories must share to match
ALIKE = 85.5  # token set ratios from here on match: rounded, they are above 85

COLORS = """ alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze
brown burgundy camel camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee
cognac copper coral cranberry cream crystal dark denim eggplant elephant espresso fuchsia gold
granite grape graphite grass gray green grey heather indigo ivory ivy khaki lavender lemon leopard
light lilac lime magenta maroon mauve merlot midnight mint mocha multicolor mushroom mustard natural
navy nude olive orange peach pewter pink plum purple rainbow red rose royal rust sand sapphire
seashell silver skull slate steel stone stonewash sunflower tan taupe teal tiger turquoise violet
walnut wheat white wine yellow
""".split()

STOP_WORDS = frozenset(
    """
a about above across after again against all almost along already also although always am among an
and another any anyone anything are around as at be became because become been before being below
between both but by can cannot could did do does doing done down during each either else enough etc
even ever every everyone everything few for from further had has have having he her here hers
herself him himself his how however i if in indeed into is it its itself just least less many may me
might mine more most mostly much must my myself neither never no nobody none nor not nothing now of
off often on once one only onto or other others otherwise our ours ourselves out over own per
perhaps please quite rather really same several she should since so some someone something sometimes
still such than that the their theirs them themselves then there these they this those though
through throughout thus to together too toward towards under until up upon us very via was we well
were what whatever when whenever where whether which while who whoever whole whom whose why will
with within without would yet you your yours yourself yourselves
""".split()
)
_POSSESSIVE = re.compile(r"['’]s\b", re.IGNORECASE)
_WORD = re.compile(r"\b[^\W\d_]+\b")
_LATIN_1 = dict.fromkeys(
    range(128, 256)
)  # thefuzz, which the original calls, drops these characters


class PlainNouns:
    """The default: the alphabetic words that are no stop words. Needs nothing installed."""

    name = "alphabetic words without stop words"

    def __call__(self, title: str) -> list[str]:
        return [
            word
            for word in _WORD.findall(_POSSESSIVE.sub("", title).lower())
            if word not in STOP_WORDS
        ]


class SpacyNouns:
    """The original's: what spaCy's en_core_web_sm tags as a noun. Raises ImportError without it."""

    def __init__(self):
        import spacy

        try:
            self._tag = spacy.load("en_core_web_sm", disable=["parser", "ner", "lemmatizer"])
        except OSError as error:
            raise ImportError(f"spaCy has no model en_core_web_sm: {error}") from None
        self.name = f"spaCy en_core_web_sm {self._tag.meta['version']}"

    def __call__(self, title: str) -> list[str]:
        return [token.text.lower() for token in self._tag(title) if token.pos_ in ("NOUN", "PROPN")]


def find_nouns(which: str | Nouns = "auto") -> Nouns:
    """The reward's noun test: "spacy", "plain", or "auto", spaCy where its model is installed.

    A callable (title -> its nouns in lower case, repeats kept) is taken as it is.
    Raises ImportError for "spacy" without the model and ValueError for another name.
    """
    if callable(which):
        return which
    if which not in ("auto", "spacy", "plain"):
        raise ValueError(f"nouns: {which!r} is none of auto, spacy, plain")
    if which != "plain":
        try:
            return SpacyNouns()
        except ImportError:
            if which == "spacy":
                raise
    return PlainNouns()


def get_name(nouns: Nouns) -> str:
    """What a report calls a noun test."""
    return getattr(nouns, "name", None) or getattr(nouns, "__name__", type(nouns).__name__)


class Reward:
    """Scores purchases. `nouns` is the noun test for title similarity; titles are tagged once.

    r_type * (attribute matches + option matches + [price <= limit]) / (attributes + options + 1)
    """

    def __init__(self, nouns: Nouns):
        self.nouns = nouns
        self._nouns_of = lru_cache(maxsize=1 << 14)(lambda title: tuple(nouns(title)))

    def __call__(
        self, product, goal: Mapping[str, Any], price: float, options: Iterable[str]
    ) -> tuple[float, dict[str, Any]]:
        """(score in [0, 1], its parts) of buying `product` with the chosen option values `options`.

        The parts carry WebShop's names: r_type with its query_match, category_match and
        title_score, and r_att, r_option, r_price, unweighted, with their weights w_att, w_option,
        w_price. r_option and w_option are absent when the goal has no options.
        """
        kind = self._rate_type(product, goal)
        wanted, chosen = goal["attributes"], goal["goal_options"]
        attributes = _count_attributes(product, wanted)
        matches = _count_options(options, chosen.items() if isinstance(chosen, Mapping) else chosen)
        cheap = price <= goal["price_upper"]
        count = len(wanted) + len(chosen) + 1
        score = (attributes + matches + cheap) / count * kind["r_type"]
        parts = {
            "r_type": kind.pop("r_type"),
            "r_att": attributes / len(wanted),
            "w_att": len(wanted) / count,
            **kind,
        }
        if chosen:
            parts |= {"r_option": matches / len(chosen), "w_option": len(chosen) / count}
        return score, parts | {"r_price": cheap, "w_price": 1 / count}

    def _rate_type(self, product, goal: Mapping[str, Any]) -> dict[str, Any]:
        query_match = product.query == goal["query"]
        category_match = (
            len(_split_path(product.product_category) & _split_path(goal["product_category"]))
            >= SAME_PATH
        )
        nouns = self._nouns_of(goal["name"])
        shared = set(self._nouns_of(product.name)).intersection(nouns)
        title_score = len(shared) / len(nouns) if nouns else NO_NOUNS
        if title_score == 0:
            r_type = 0.0
        elif title_score < POOR:
            r_type = POOR
        else:
            good = query_match or category_match or title_score > GOOD
            r_type = 1.0 if good else DOUBTFUL
        return {
            "r_type": r_type,
            "query_match": query_match,
            "category_match": category_match,
            "title_score": title_score,
        }


@lru_cache(maxsize=1 << 14)
def _split_path(category: str) -> frozenset[str]:
    return frozenset(part.strip() for part in category.split("›"))


@lru_cache(maxsize=1 << 16)
def _process(text: str) -> str:
    return default_process(text.translate(_LATIN_1))


def _is_like_any(text: str, processed: Sequence[str]) -> bool:
    found = extractOne(_process(text), processed, scorer=token_set_ratio, score_cutoff=ALIKE)
    return found is not None


def _count_attributes(product, wanted: Sequence[str]) -> int:
    known = [_process(attribute) for attribute in product.attributes]

    def has(want: str) -> bool:
        return _is_like_any(want, known) or any(want in text for text in product.searched_texts)

    return sum(map(has, wanted))


def _count_options(chosen: Iterable[str], wanted: Iterable[str | tuple[str, str]]) -> int:
    chosen = [_process(_find_color(value)) for value in chosen]
    return sum(_is_like_any(str(_find_color(want)), chosen) for want in wanted)


@lru_cache(maxsize=1 << 14)
def _find_color(option: str | tuple[str, str]) -> str | tuple[str, str]:
    """The first colour in an option value; in a (name, value) pair one equal to either."""
    return next((color for color in COLORS if color in option), option)
