"""WebShop's own files, read piece by piece: raw items -> records, or an error that says why not."""

from __future__ import annotations

import gzip
import json
import lzma
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, TextIO

from hiper_fast.text import strip_all, strip_controls

from ..base import GameError

Record = dict[str, Any]

NO_ATTRIBUTES = ["DUMMY_ATTR"]
LONGEST_ASIN = 10
_CHUNK = 1 << 20  # characters read at a time
_LARGEST_ITEM = 1 << 25  # characters; a longer "item" is a damaged file
_WHITE_SPACE = " \t\r\n"
_DECODER = json.JSONDecoder()
_OPENERS = {".gz": gzip.open, ".xz": lzma.open}
_TEXTS = ("name", "category", "query", "product_category", "full_description")


class DataError(GameError):
    """Shop data that cannot be used; the message names the file, the product and the key."""


def read_items(path: Path) -> Iterator[Any]:
    """The objects in the JSON array in `path` (plain, .gz or .xz), one at a time."""
    with _open(path) as file:
        text = _Text(file, path)
        if text.peek() != "[":
            raise DataError(f"{path}: expected a JSON array of products")
        separator = "["
        while separator != "]":
            text.skip()
            if separator == "[" and text.peek() == "]":
                return
            yield text.take_object()
            separator = text.peek()
            if separator not in ("]", ","):
                wrong = f"not valid JSON (expected , or ] after a product, got {separator!r})"
                state = wrong if separator else "truncated"
                raise DataError(f"{path}: {state}; fetch the file again")


class _Text:
    """What is left of a file's text, read as it is needed."""

    def __init__(self, file: TextIO, path: Path):
        self.file, self.path = file, path
        self.text, self.ended = "", False

    def read_more(self) -> bool:
        chunk = _read(self.file, self.path, _CHUNK)
        self.text, self.ended = self.text + chunk, not chunk
        return not self.ended

    def peek(self) -> str:
        """The next character but white space, "" at the end."""
        self.text = self.text.lstrip(_WHITE_SPACE)
        while not self.text and self.read_more():
            self.text = self.text.lstrip(_WHITE_SPACE)
        return self.text[:1]

    def skip(self) -> None:
        self.text = self.text[1:]

    def take_object(self) -> Any:
        if self.peek() not in "{":
            got = repr(self.text[:20])
            raise DataError(f"{self.path}: expected a JSON object for every product, got {got}")
        while True:
            try:
                item, end = _DECODER.raw_decode(self.text)
            except (json.JSONDecodeError, RecursionError) as error:
                hopeless = len(self.text) > _LARGEST_ITEM or isinstance(error, RecursionError)
                if hopeless or not self.read_more():
                    state = "truncated" if self.ended else "not valid JSON"
                    raise DataError(
                        f"{self.path}: {state} ({error}); fetch the file again"
                    ) from None
            else:
                self.text = self.text[end:]
                return item


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path` (plain, .gz or .xz)."""
    with _open(path) as file:
        try:
            content = json.loads(_read(file, path, -1))
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(
                f"{path}: not valid JSON, perhaps truncated ({error}); fetch the file again"
            ) from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, product by product")
    return content


def _open(path: Path) -> TextIO:
    try:
        return _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _read(file: TextIO, path: Path, size: int) -> str:
    try:
        return file.read(size)
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: damaged or truncated ({error}); fetch the file again") from None


def make_records(
    items: Iterable[Any],
    attributes: Mapping[str, Any],
    human: Mapping[str, Any],
    source: str = "items",
) -> Iterator[Record]:
    """One record per product, in file order, without ASINs that are "nan", too long or repeated.

    A record has `asin name category query product_category description bullets prices price_tag
    options attributes instruction instruction_attributes human`, its texts as `strip_controls`
    leaves them; `prices` holds one price or the two ends of a range. Raises DataError naming
    `source`, the product and the key for what is missing or of another type.
    """
    seen = set()
    for position, item in enumerate(items):
        if not isinstance(item, dict) or not isinstance(item.get("asin"), str):
            raise DataError(f"{source}: product {position}: 'asin' is missing or no text")
        asin, key = strip_controls(item["asin"]), item["asin"]
        if asin == "nan" or len(asin) > LONGEST_ASIN or asin in seen:
            continue
        seen.add(asin)
        try:
            record = _make_record(asin, item, attributes.get(key, {}), human.get(key, []))
        except DataError as error:
            raise DataError(f"{source}: product {asin}: {error}") from None
        yield strip_all(record)


def _make_record(asin: str, item: dict[str, Any], attributes: Any, human: Any) -> Record:
    texts = {key: _get_typed(item, key, str) for key in _TEXTS}
    bullets = item.get("small_description")
    prices, price_tag = _read_prices(item.get("pricing"))
    if not isinstance(attributes, dict):
        raise DataError("its attributes are no JSON object")
    instruction = attributes.get("instruction")
    return {
        "asin": asin,
        "name": texts["name"],
        "category": texts["category"],
        "query": texts["query"].lower().strip(),
        "product_category": texts["product_category"],
        "description": texts["full_description"],
        "bullets": [bullets]
        if isinstance(bullets, str)
        else _get_strings(item, "small_description"),
        "prices": prices,
        "price_tag": price_tag,
        "options": _read_options(item.get("customization_options")),
        "attributes": _get_strings(attributes, "attributes")
        if "attributes" in attributes
        else NO_ATTRIBUTES,
        "instruction": None if instruction is None else _get_typed(attributes, "instruction", str),
        "instruction_attributes": [] if instruction is None else _get_asked(attributes),
        "human": _read_human(human),
    }


def _get_typed(record: Mapping[str, Any], key: str, kind: type) -> Any:
    if key not in record:
        raise DataError(f"{key!r} is missing")
    if not isinstance(record[key], kind):
        raise DataError(f"{key!r} is {type(record[key]).__name__}, expected {kind.__name__}")
    return record[key]


def _get_strings(record: Mapping[str, Any], key: str) -> list[str]:
    values = _get_typed(record, key, list)
    if not all(isinstance(value, str) for value in values):
        raise DataError(f"{key!r} must hold texts only")
    return values


def _get_asked(record: Mapping[str, Any]) -> list[str]:
    asked = _get_strings(record, "instruction_attributes")
    if not asked:
        raise DataError("'instruction_attributes' is empty, though there is an instruction")
    return asked


def _read_prices(pricing: Any) -> tuple[list[float], str]:
    """The price or the ends of its range, and the price as shown."""
    if not pricing:
        return [100.0], "$100.0"
    if not isinstance(pricing, str):
        raise DataError(f"'pricing' is {type(pricing).__name__}, expected str")
    try:
        prices = [float(Decimal(re.sub(r"[^\d.]", "", price))) for price in pricing.split("$")[1:3]]
    except InvalidOperation:
        prices = []
    if not prices or not all(map(math.isfinite, prices)):
        raise DataError(
            f"'pricing' is {pricing!r}, expected prices such as '$9.99' or '$9.99 - $19.99'"
        )
    return prices, " to ".join(f"${price}" for price in prices)


def _read_options(customization: Any) -> dict[str, list[str]]:
    """Option name -> its values, as a page shows them."""
    if not customization:
        return {}
    if not isinstance(customization, dict):
        raise DataError(f"'customization_options' is {type(customization).__name__}, expected dict")
    options = {}
    for name, contents in customization.items():
        if contents is None:
            continue
        if not isinstance(contents, list) or not all(
            isinstance(content, dict) and isinstance(content.get("value"), str)
            for content in contents
        ):
            raise DataError(
                f"'customization_options': {name!r} must list objects with a text 'value'"
            )
        options[name.lower()] = [
            content["value"].strip().replace("/", " | ").lower() for content in contents
        ]
    return options


def _read_human(instructions: Any) -> list[Record]:
    """What people asked for; instructions without attributes are left out."""
    if not isinstance(instructions, list) or not all(
        isinstance(entry, dict) for entry in instructions
    ):
        raise DataError("its human instructions are no list of objects")
    return [
        {
            "instruction": _get_typed(entry, "instruction", str),
            "attributes": _get_strings(entry, "instruction_attributes"),
            "options": _get_strings(entry, "instruction_options"),
        }
        for entry in instructions
        if _get_strings(entry, "instruction_attributes")
    ]


def make_document(record: Record) -> str:
    """What the search reads: title, description, first bullet and options, in lower case."""
    options = ", and ".join(
        f"{name}: {', '.join(values)}" for name, values in record["options"].items()
    )
    bullet = record["bullets"][0] if record["bullets"] else ""
    return " ".join([record["name"], record["description"], bullet, options]).lower()
