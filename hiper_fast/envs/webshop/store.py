"""The products of a shop, compactly: records as lines of JSON, mapped, and small tables."""

from __future__ import annotations

import hashlib
import io
import json
import math
import mmap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .items import LONGEST_ASIN, Record

Progress = Callable[[str, int], None]  # (what is being done, how many are done)

_LINES, _TABLES, _SUMMARY = "products.jsonl", "tables.npz", "summary.json"


@dataclass(frozen=True)
class Store:
    """n products in file order.

    `combinations` counts the synthetic goals of a product, one per combination of its options, and
    `human` its human ones. `attribute_counts` says in how many synthetic goals an attribute is
    asked for.
    """

    lines: bytes | mmap.mmap
    offsets: np.ndarray  # int64 [n + 1], of the lines
    asins: np.ndarray  # str [n]
    by_asin: np.ndarray  # int64 [n], product numbers in the order of their ASINs
    prices: np.ndarray  # float64 [n, 2], the ends of a range, or the price and NaN
    instructed: np.ndarray  # bool [n]
    combinations: np.ndarray  # int64 [n], 0 without an instruction
    human: np.ndarray  # int64 [n]
    attribute_counts: dict[str, int]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"lines": bytes(self.lines)}  # a map is its process's own

    def __len__(self) -> int:
        return len(self.asins)

    def read_record(self, number: int) -> Record:
        return json.loads(self.lines[self.offsets[number] : self.offsets[number + 1]])

    def read_in_asin_order(self) -> Iterator[Record]:
        return map(self.read_record, self.by_asin)

    def find_number(self, asin: str) -> int:
        """The product with this ASIN; KeyError if there is none."""
        place = np.searchsorted(self.asins, asin, sorter=self.by_asin)
        if place == len(self) or self.asins[self.by_asin[place]] != asin:
            raise KeyError(asin)
        return int(self.by_asin[place])

    @classmethod
    def build_in_memory(cls, records: Iterable[Record], progress: Progress) -> Store:
        lines = io.BytesIO()
        tables, counts = _write(records, lines, progress)
        return cls(lines.getvalue(), **tables, attribute_counts=counts)

    @classmethod
    def build_on_disk(cls, records: Iterable[Record], folder: Path, progress: Progress) -> Store:
        """Writes the records into `folder` as they come and maps them."""
        with open(folder / _LINES, "wb") as lines:
            tables, counts = _write(records, lines, progress)
        np.savez(folder / _TABLES, **tables)
        mapped = _map_file(folder / _LINES)
        summary = {"attribute_counts": counts, "digest": _hash_lines(mapped)}
        (folder / _SUMMARY).write_text(json.dumps(summary), encoding="utf-8")
        return cls(mapped, **tables, attribute_counts=counts)

    @classmethod
    def load(cls, folder: Path) -> Store:
        """Maps what `build_on_disk` wrote; ValueError, OSError, KeyError, TypeError if damaged."""
        with np.load(folder / _TABLES, allow_pickle=False) as saved:
            tables = dict(saved)
        summary = json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))
        lines = _map_file(folder / _LINES)
        if summary["digest"] != _hash_lines(lines):
            raise ValueError(f"{folder / _LINES} is not what was written")
        return cls(lines, **tables, attribute_counts=summary["attribute_counts"])


def _map_file(path: Path) -> bytes | mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


def _hash_lines(lines: bytes | mmap.mmap) -> str:
    return hashlib.blake2b(lines, digest_size=16).hexdigest()


def _write(
    records: Iterable[Record], lines: BinaryIO, progress: Progress
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    offsets, asins, prices, instructed, combinations, human = [0], [], [], [], [], []
    attribute_counts: Counter[str] = Counter()
    for record in records:
        offsets.append(offsets[-1] + lines.write(json.dumps(record).encode("ascii") + b"\n"))
        asins.append(record["asin"])
        prices.append((*record["prices"], math.nan)[:2])
        instructed.append(record["instruction"] is not None)
        combinations.append(
            math.prod(map(len, record["options"].values())) if instructed[-1] else 0
        )
        human.append(len(record["human"]))
        for attribute in record["instruction_attributes"]:
            attribute_counts[attribute] += combinations[-1]
        progress("reading products", len(asins))
    names = np.array(asins, dtype=f"U{LONGEST_ASIN}")
    tables = {
        "offsets": np.array(offsets, dtype=np.int64),
        "asins": names,
        "by_asin": np.argsort(names, kind="stable"),
        "prices": np.array(prices, dtype=np.float64).reshape(-1, 2),
        "instructed": np.array(instructed, dtype=bool),
        "combinations": np.array(combinations, dtype=np.int64),
        "human": np.array(human, dtype=np.int64),
    }
    return tables, dict(attribute_counts)
