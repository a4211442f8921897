"""A shop: products, prices, goals and search; immutable, and shared by all environments."""

from __future__ import annotations

import hashlib
import math
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from hiper_fast.text import clean, replace_surrogates

from . import pages
from .goals import Goals
from .index import Index
from .items import (
    DataError,
    Record,
    make_document,
    make_records,
    read_items,
    read_object,
)
from .reward import Nouns, Reward, find_nouns
from .store import Progress, Store

HITS = 50  # products that a search finds at most
_FORMAT = b"hiper_fast webshop 2"  # of the cache
_KEPT_PRODUCTS, _KEPT_SEARCHES = 1 << 13, 1 << 13  # in memory, parsed or answered
_CHUNK = 1 << 22  # bytes hashed at a time
_TELL_EVERY = 2  # seconds
_ENDINGS = (".json", ".json.gz", ".json.xz")

Recipe = tuple[Callable[..., "Catalogue"], tuple, dict[str, Any]]  # what makes a catalogue again


@dataclass(frozen=True, eq=False)
class Product:
    """One product and its pages. `price` is what it costs, also if `price_tag` shows a range."""

    number: int
    price: float
    asin: str
    name: str
    category: str
    query: str
    product_category: str
    description: str
    bullets: list[str]
    prices: list[float]
    price_tag: str
    options: dict[str, list[str]]
    attributes: list[str]
    instruction: str | None
    instruction_attributes: list[str]
    human: list[Record]

    @cached_property
    def searched_texts(self) -> tuple[str, str, str]:
        """Where an attribute may also be found, in lower case."""
        return self.name.lower(), " ".join(self.bullets).lower(), self.description.lower()

    @cached_property
    def row(self) -> tuple[pages.Node, ...]:
        return pages.make_row(self)

    @cached_property
    def page(self) -> pages.Page:
        return pages.make_item(self)

    @cached_property
    def page_with_attributes(self) -> pages.Page:
        return pages.make_item(self, show_attributes=True)

    @cached_property
    def sub_pages(self) -> dict[str, pages.Page]:
        return {name: pages.make_sub_page(self, name) for name in pages.SUB_PAGES}


class Catalogue:
    """A shop. Build one with `Catalogue.load` or `Catalogue.from_items` and share it.

    `seed` draws, once and before any split, the price of every product with a price range and then
    the price limits of the goals. `prices` maps ASINs to prices that replace the draw. `nouns` is
    the reward's noun test (`find_nouns`).
    """

    def __init__(
        self,
        store: Store,
        index: Index,
        *,
        seed: int = 0,
        prices: Mapping[str, float] | None = None,
        nouns: str | Nouns = "auto",
        name: str = "items",
        recipe: Recipe | None = None,
    ):
        drawn = {"seed": seed, "prices": prices, "nouns": nouns}
        self._recipe = recipe or (Catalogue, (store, index), drawn | {"name": name})
        self.store, self.index, self.seed, self.name = store, index, seed, name
        self.reward = Reward(find_nouns(nouns))
        rng = random.Random(seed)
        self.prices = store.prices[:, 0].copy()
        for number, (low, high) in enumerate(store.prices.tolist()):
            if not math.isnan(high):
                self.prices[number] = rng.uniform(low, high)
        self._drawn = rng.getstate()
        for asin, price in (prices or {}).items():
            self.prices[self._find_number(asin, "prices")] = _check_price(asin, price)
        self.prices.setflags(write=False)
        self.get_product = lru_cache(maxsize=_KEPT_PRODUCTS)(self._make_product)
        self.find_hits = lru_cache(maxsize=_KEPT_SEARCHES)(self._search)
        self._goals: dict[str, Goals] = {}

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        seed: int = 0,
        prices: Mapping[str, float] | None = None,
        *,
        size: str | None = None,
        nouns: str | Nouns = "auto",
        cache: str | os.PathLike | None = None,
        progress: Progress | None = None,
    ) -> Catalogue:
        """Reads WebShop's own files from `folder`; what is made of them is cached on disk.

        `items_shuffle*.json` and `items_ins_v2*.json`, and `items_human_ins.json` if it is there;
        each plain, .gz or .xz. size: "1000", or "all", where the folder holds both sets. cache: the
        folder for caches (default: $XDG_CACHE_HOME/hiper_fast/webshop, or ~/.cache/…); an entry
        belongs to the content of the files. progress: called with what is being done and how many
        are done; the default tells stderr when it takes long.

        Raises DataError, a ValueError, naming the file, for what is missing or cannot be used.
        """
        files = _find_files(Path(folder), size)
        progress = progress or _Patience()
        store, index = _load_or_build(files, _find_cache_folder(cache), progress)
        drawn = {"seed": seed, "prices": prices, "nouns": nouns}
        again = Catalogue.load, (os.path.abspath(folder),), {**drawn, "size": size, "cache": cache}
        return cls(store, index, **drawn, name=files["items"].name, recipe=again)

    @classmethod
    def from_items(
        cls,
        items: Iterable[Mapping[str, Any]],
        attributes: Mapping[str, Any],
        human: Mapping[str, Any] | None = None,
        *,
        seed: int = 0,
        prices: Mapping[str, float] | None = None,
        nouns: str | Nouns = "auto",
        name: str = "items",
    ) -> Catalogue:
        """A shop from items in the format of WebShop's files; nothing is cached on disk."""
        store = Store.build_in_memory(
            make_records(items, attributes, human or {}, source=name), _ignore_progress
        )
        return cls(
            store,
            _build_index(store, _ignore_progress),
            seed=seed,
            prices=prices,
            nouns=nouns,
            name=name,
        )

    def __reduce__(self) -> tuple:
        """Pickled as how it was made; what came from files or from a seed is made of them again."""
        return _make_again, (*self._recipe, len(self))

    def remember(self, make: Callable[..., Catalogue], *arguments: Any) -> Catalogue:
        """Itself, to be pickled as `make(*arguments)`."""
        self._recipe = make, arguments, {}
        return self

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, asin: str) -> Product:
        """The product with this ASIN; KeyError if there is none."""
        return self.get_product(self.store.find_number(asin))

    def search(self, query: str, k: int = HITS) -> list[str]:
        """The ASINs of the at most `k` best products for `query`, best first."""
        return [str(self.store.asins[number]) for number in self._search(query, k)]

    def reachable(self, goal: Mapping[str, Any]) -> bool:
        """Whether the goal's own product with the options that the goal names has a score of 1."""
        product = self.get_product(self._find_number(goal["asin"], "goal"))
        options = goal["goal_options"]
        chosen = options.values() if isinstance(options, Mapping) else options
        return self.reward(product, goal, product.price, chosen)[0] == 1

    def goals(self, kind: str = "synthetic") -> Goals:
        """All goals of a kind, "synthetic" or "human". Made once."""
        if kind not in self._goals:
            rng = random.Random()
            rng.setstate(self._drawn)
            self._goals[kind] = Goals(self, kind, rng)
        return self._goals[kind]

    def _make_product(self, number: int) -> Product:
        """Product `number`, in file order, parsed when it is needed; the last ones are kept."""
        return Product(
            number=number, price=float(self.prices[number]), **self.store.read_record(number)
        )

    def _search(self, query: str, k: int = HITS) -> tuple[int, ...]:
        """As `search`, but product numbers. The last answers are kept."""
        return tuple(self.store.by_asin[self.index.search(replace_surrogates(query), k)].tolist())

    def _find_number(self, asin: str, argument: str) -> int:
        try:
            return self.store.find_number(asin)
        except KeyError:
            raise ValueError(f"{argument}: there is no product {asin!r} in {self.name}") from None


def _make_again(
    make: Callable[..., Catalogue], arguments: tuple, options: dict[str, Any], count: int
) -> Catalogue:
    catalogue = make(*arguments, **options)
    if len(catalogue) != count:
        raise DataError(
            f"{catalogue.name}: it had {count} products when this was pickled and has {len(catalogue)}; "
            "fetch the same files again"
        )
    return catalogue


def _check_price(asin: str, price: float) -> float:
    if isinstance(price, bool) or not isinstance(price, (int, float)) or not 0 <= price < math.inf:
        raise ValueError(f"prices: {asin}: expected a price, got {price!r}")
    return price


def _build_index(store: Store, progress: Progress) -> Index:
    """The search index, in the order of the ASINs, for equal scores are ordered by ASIN."""
    return Index.build(
        map(make_document, store.read_in_asin_order()),
        lambda done, *_: progress("indexing products", done),
    )


def _find_files(folder: Path, size: str | None) -> dict[str, Path]:
    """The files of a shop in `folder`: items, attributes and, if there is one, human."""
    if size not in (None, "1000", "all"):
        raise ValueError(f"size: {size!r} is none of 1000, all")
    if not folder.is_dir():
        raise DataError(
            f"{folder}: there is no such folder; give the one with WebShop's items_shuffle*.json"
        )
    found = {}
    for role, stem in [("items", "items_shuffle"), ("attributes", "items_ins_v2")]:
        suffixes = {None: ("_1000", ""), "1000": ("_1000",), "all": ("",)}[size]
        files = [folder / f"{stem}{suffix}{ending}" for suffix in suffixes for ending in _ENDINGS]
        found[role] = _choose_only(
            [file for file in files if file.exists()], folder, f"{stem}{suffixes[0]}.json"
        )
    human = [folder / f"items_human_ins{ending}" for ending in _ENDINGS]
    if any(file.exists() for file in human):
        found["human"] = _choose_only(
            [file for file in human if file.exists()], folder, "items_human_ins.json"
        )
    return found


def _choose_only(files: list[Path], folder: Path, example: str) -> Path:
    if not files:
        raise DataError(f"{folder}: there is no {example} (plain, .gz or .xz)")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise DataError(
            f"{folder}: there are {names}; say which with size='1000' or 'all', or keep one"
        )
    return files[0]


def _find_cache_folder(given: str | os.PathLike | None) -> Path:
    if given is not None:
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (
        (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "hiper_fast" / "webshop"
    )


def _load_or_build(
    files: Mapping[str, Path], folder: Path, progress: Progress
) -> tuple[Store, Index]:
    """The parsed products and their index from the cache, or built and put there."""
    entry = folder / _hash_files(files, progress)
    if entry.exists():
        try:
            return Store.load(entry), Index.load(entry / "index")
        except Exception as error:  # whatever is wrong with a cache, building it again mends it
            warnings.warn(
                clean(f"{entry}: the cache cannot be used and is built again ({error})"),
                stacklevel=3,
            )
            shutil.rmtree(entry, ignore_errors=True)
    attributes = read_object(files["attributes"])
    human = read_object(files["human"]) if "human" in files else {}

    def source() -> Iterator[Record]:
        return make_records(
            read_items(files["items"]), attributes, human, source=str(files["items"])
        )

    try:
        return _build(source(), entry, progress)
    except OSError as error:
        warnings.warn(
            clean(f"{folder}: nothing can be cached there ({error}); the shop is kept in memory"),
            stacklevel=3,
        )
        store = Store.build_in_memory(source(), progress)
        return store, _build_index(store, progress)


def _build(source: Iterator[Record], entry: Path, progress: Progress) -> tuple[Store, Index]:
    """Builds a shop beside `entry` and moves it there: an entry is whole or not there at all."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{entry.name}-", dir=entry.parent, ignore_cleanup_errors=True
    ) as fresh:
        built = Path(fresh) / "entry"
        built.mkdir()
        store = Store.build_on_disk(source, built, progress)
        index = _build_index(store, progress)
        index.save(built / "index")
        with suppress(OSError):  # another process was faster
            os.rename(built, entry)
        return store, index


def _hash_files(files: Mapping[str, Path], progress: Progress) -> str:
    digest = hashlib.blake2b(_FORMAT, digest_size=16)
    for role, path in files.items():
        try:
            digest.update(f"{role} {path.suffix} {path.stat().st_size}\n".encode())
            _add_content(digest, path, progress)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    return digest.hexdigest()


def _add_content(digest: hashlib.blake2b, path: Path, progress: Progress) -> None:
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            progress(f"looking at {path.name} (bytes)", file.tell())


def _ignore_progress(stage: str, done: int) -> None:
    pass


class _Patience:
    """Tells stderr how far it is, now and then."""

    def __init__(self):
        self._told = time.monotonic()

    def __call__(self, stage: str, done: int) -> None:
        if time.monotonic() > self._told + _TELL_EVERY:
            self._told = time.monotonic()
            print(clean(f"webshop: {stage}: {done:,}"), file=sys.stderr, flush=True)
