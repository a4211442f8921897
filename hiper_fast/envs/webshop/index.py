"""BM25 search over a fixed set of documents, with Lucene's scores and order to the last bit.

    score(q, d) = sum over the terms t of q of  w - w / (1 + count_d(t) * inv(d))      w =
    count_q(t) * idf(t) idf(t) = ln(1 + (N - df + 0.5) / (df + 0.5))      inv(d) = 1 / (k1 * (1 - b
    + b * length(d) / average length))

k1 = 0.9 and b = 0.4 as Anserini sets them; N counts the documents that have a term at all. Every
summand is float32, the sum is formed in double and returned as float32, and length(d) is what is
left of it in the byte that Lucene keeps. Equal scores stand in order of document numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from zlib import crc32

import numpy as np

from hiper_fast.envs.webshop.analyzer import tokenize

try:
    from hiper_fast import _C as extension
except ImportError:
    extension = None

K1, B = np.float32(0.9), np.float32(0.4)
BLOCK = 128  # postings that share an upper bound
CHUNK = 1 << 14  # documents inverted at a time while building
MAX_COUNT = 65_535  # a term's count in one document saturates here
FORMAT, VERSION = "hiper_fast search index", 1


def _make_length_table() -> np.ndarray:
    """int64 [256]: the document length that each of Lucene's norm bytes stands for; rising."""
    steps = np.arange(256 - 24)
    shift = np.maximum(steps // 8 - 1, 0)
    return np.concatenate(
        [np.arange(24), 24 + np.where(steps < 8, steps, (steps % 8 + 8) << shift)]
    )


LENGTHS = _make_length_table()


class Index:
    """An immutable inverted index. Document numbers are positions in what it was built from.

    Build it with `Index.build`, keep it with `save`, and share it between processes by
    `Index.load`, which maps the file into memory, or by forking.
    """

    # In the order of the file: wide types first, so that each array is aligned.
    _ARRAYS = {
        "posting_offsets": np.int64,  # [terms + 1] into documents and counts
        "block_offsets": np.int64,  # [terms + 1] into block_bounds
        "term_offsets": np.int64,  # [terms + 1] into term_bytes
        "term_hashes": np.uint32,  # [terms], rising: CRC-32 of each term
        "documents": np.int32,  # [postings], rising within a term
        "block_bounds": np.float32,  # [blocks], the largest count * inv of BLOCK postings
        "counts": np.uint16,  # [postings], of the term in the document
        "norms": np.uint8,  # [documents], which of LENGTHS
        "term_bytes": np.uint8,  # the terms in UTF-8, one after another
    }

    def __init__(self, arrays: dict[str, np.ndarray], filled: int, total_tokens: int):
        self._arrays = arrays
        self.filled = filled
        self.total_tokens = total_tokens
        for name in self._ARRAYS:
            setattr(self, f"_{name}", arrays[name])
        self._inverse = _invert_lengths(filled, total_tokens)
        self._entry = lru_cache(maxsize=1 << 16)(self._find_entry)
        shared = (self._documents, self._counts, self._block_bounds, self._norms, self._inverse)
        self._addresses = [array.ctypes.data for array in shared]

    def __reduce__(self) -> tuple:
        return Index, (self._arrays, self.filled, self.total_tokens)

    def __len__(self) -> int:
        """The number of documents."""
        return len(self._norms)

    @classmethod
    def build(
        cls, documents: Iterable[str], progress: Callable[[int], None] | None = None
    ) -> Index:
        """From the documents' texts, in the order in which equal scores are to stand.

        Args:
            documents: read once, one at a time.
            progress: called now and then with the number of documents read so far, and at the end.
        """
        vocabulary = _Vocabulary()
        return cls.from_terms(_tokenize(documents, vocabulary, progress), vocabulary)

    @classmethod
    def from_terms(
        cls, chunks: Iterable[tuple[np.ndarray, np.ndarray]], vocabulary: Iterable[str]
    ) -> Index:
        """From documents that were tokenised before.

        Args:
            chunks: pairs of term ids [tokens], document after document, and lengths [documents].
            vocabulary: the terms in order of their ids, each once; read after the last chunk.
        """
        lengths, inverted = [np.empty(0, np.int64)], []
        first = 0
        for terms, chunk_lengths in chunks:
            inverted.append(_invert(terms, chunk_lengths, first))
            lengths.append(chunk_lengths)
            first += len(chunk_lengths)
        lengths = np.concatenate(lengths)
        filled, total_tokens = int(np.count_nonzero(lengths)), int(lengths.sum())

        encoded = [term.encode() for term in vocabulary]
        hashes = np.fromiter(map(crc32, encoded), np.uint32, len(encoded))
        order = np.argsort(hashes, kind="stable")
        sizes = np.zeros(len(encoded), np.int64)
        for terms, runs, _, _ in inverted:
            sizes[terms] += runs
        posting_offsets = _add_up(sizes[order])
        arrays = {
            "posting_offsets": posting_offsets,
            "block_offsets": _add_up(-(-sizes[order] // BLOCK)),
            "term_offsets": _add_up(np.fromiter(map(len, encoded), np.int64, len(encoded))[order]),
            "term_hashes": hashes[order],
            "norms": (np.searchsorted(LENGTHS, lengths, side="right") - 1).astype(np.uint8),
            "term_bytes": np.frombuffer(b"".join([encoded[i] for i in order]), np.uint8),
        }
        free = np.empty(len(encoded), np.int64)  # each term's next free posting
        free[order] = posting_offsets[:-1]
        documents, counts = (
            np.empty(posting_offsets[-1], np.int32),
            np.empty(posting_offsets[-1], np.uint16),
        )
        for terms, runs, chunk_documents, chunk_counts in inverted:
            place = np.repeat(free[terms] - _add_up(runs)[:-1], runs) + np.arange(
                len(chunk_documents)
            )
            documents[place], counts[place] = chunk_documents, chunk_counts
            free[terms] += runs
        arrays |= {"documents": documents, "counts": counts}
        arrays["block_bounds"] = _bound_blocks(arrays, _invert_lengths(filled, total_tokens))
        return cls(arrays, filled, total_tokens)

    def search(self, query: str, k: int = 50) -> np.ndarray:
        """The k best documents that share a term, best first, int32 [at most k]."""
        return self.search_with_scores(query, k)[0]

    def search_with_scores(self, query: str, k: int = 50) -> tuple[np.ndarray, np.ndarray]:
        """(documents int32, scores float32), both [at most k].

        Raises:
            ValueError: if k is not at least 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        found = [
            (count, *entry)
            for term, count in Counter(tokenize(query)).items()
            if (entry := self._entry(term))
        ]
        if not found:
            return np.empty(0, np.int32), np.empty(0, np.float32)
        repeated, *places, idf = zip(*found, strict=True)
        weights = np.array(repeated, np.float32) * np.array(idf, np.float32)
        search = _search_numpy if extension is None else _search_cpp
        return search(self, *np.array(places, np.int64), weights, min(k, len(self)))

    def _find_entry(self, term: str) -> tuple[int, int, int, np.float32] | None:
        """(first posting, end, first block, idf) of a term; None if no document has it."""
        encoded = term.encode("utf-8", "surrogatepass")
        number = int(np.searchsorted(self._term_hashes, np.uint32(value := crc32(encoded))))
        while number < len(self._term_hashes) and self._term_hashes[number] == value:
            begin, end = self._term_offsets[number : number + 2]
            if self._term_bytes[begin:end].tobytes() == encoded:
                begin, end = map(int, self._posting_offsets[number : number + 2])
                idf = np.float32(
                    math.log(1 + (self.filled - (end - begin) + 0.5) / (end - begin + 0.5))
                )
                return begin, end, int(self._block_offsets[number]), idf
            number += 1
        return None

    def save(self, path: str | os.PathLike) -> None:
        """Write one file, header and arrays in `.npy` format. It appears whole or not at all."""
        path = Path(path)
        header = {
            "format": FORMAT,
            "version": VERSION,
            "filled": self.filled,
            "total_tokens": self.total_tokens,
        }
        header["digest"] = _hash_index(header, self._arrays)
        path.parent.mkdir(parents=True, exist_ok=True)
        file = tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=path.name, suffix=".tmp", delete=False
        )
        try:
            with file:
                text = json.dumps(header)
                np.save(
                    file, np.frombuffer(text.ljust(-(-len(text) // 64) * 64).encode(), np.uint8)
                )
                for name in self._ARRAYS:
                    np.save(file, self._arrays[name])
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike) -> Index:
        """Map a saved index into memory, after a check of its content.

        Raises:
            OSError: if there is no such file, or it cannot be read.
            ValueError: if the file is damaged, or no index of this version.
        """
        path = Path(path)
        mend = f"; delete {path} and build the index anew"
        try:
            header, arrays = _read_index(path)
        except OSError:
            raise
        except Exception as error:  # damage shows in every way
            raise ValueError(
                f"{path} is no search index, or it is damaged: {error}{mend}"
            ) from error
        if header["version"] != VERSION:
            raise ValueError(
                f"{path} is a search index of version {header['version']}, not {VERSION}{mend}"
            )
        return cls(arrays, header["filled"], header["total_tokens"])


class _Vocabulary(dict):
    """Term -> id, given in order of first use."""

    def __missing__(self, term: str) -> int:
        self[term] = id = len(self)
        return id


def _tokenize(
    documents: Iterable[str], vocabulary: _Vocabulary, progress: Callable[[int], None] | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    terms, lengths, done = array("i"), array("q"), 0
    for text in documents:
        found = tokenize(text)
        terms.extend(map(vocabulary.__getitem__, found))
        lengths.append(len(found))
        if len(lengths) == CHUNK:
            yield np.array(terms), np.array(lengths)
            done += CHUNK
            terms, lengths = array("i"), array("q")
            if progress:
                progress(done)
    yield np.array(terms), np.array(lengths)
    if progress:
        progress(done + len(lengths))


def _invert(terms: np.ndarray, lengths: np.ndarray, first: int) -> tuple[np.ndarray, ...]:
    """A chunk's postings by term, then document: (terms, postings of each, documents, counts)."""
    documents = np.repeat(np.arange(first, first + len(lengths), dtype=np.int64), lengths)
    keys = np.sort(terms.astype(np.int64) << 32 | documents)
    begins = _find_run_begins(keys)
    counts = np.diff(begins, append=len(keys))
    keys = keys[begins]
    all_terms, documents = keys >> 32, keys.astype(np.int32)
    begins = _find_run_begins(all_terms)
    runs = np.diff(begins, append=len(keys))
    return all_terms[begins], runs, documents, np.minimum(counts, MAX_COUNT).astype(np.uint16)


def _find_run_begins(values: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.diff(values, prepend=-1))


def _add_up(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def _invert_lengths(filled: int, total_tokens: int) -> np.ndarray:
    """float32 [256]: inv of each norm; each operation is rounded, in Lucene's order."""
    average = np.float32(total_tokens / filled) if filled else np.float32(1)
    return np.float32(1) / (K1 * ((np.float32(1) - B) + B * LENGTHS.astype(np.float32) / average))


def _bound_blocks(arrays: dict[str, np.ndarray], inverse: np.ndarray) -> np.ndarray:
    blocks, offsets = arrays["block_offsets"], arrays["posting_offsets"]
    if blocks[-1] == 0:
        return np.empty(0, np.float32)
    within = np.arange(blocks[-1]) - np.repeat(blocks[:-1], np.diff(blocks))
    begins = np.repeat(offsets[:-1], np.diff(blocks)) + BLOCK * within
    return np.maximum.reduceat(
        arrays["counts"] * inverse[arrays["norms"][arrays["documents"]]], begins
    )


def _search_numpy(
    index: Index, begins, ends, blocks, weights, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Adds up every posting of every term."""
    totals = np.zeros(len(index))
    for begin, end, weight in zip(begins, ends, weights, strict=True):
        documents = index._documents[begin:end]
        impacts = index._counts[begin:end] * index._inverse[index._norms[documents]]
        totals[documents] += weight - weight / (np.float32(1) + impacts)
    found = np.flatnonzero(totals)
    scores = totals[found].astype(np.float32)
    if len(found) > k:
        good = scores >= np.partition(scores, -k)[-k]
        found, scores = found[good], scores[good]
    best = np.argsort(-scores, kind="stable")[:k]
    return found[best].astype(np.int32), scores[best]


def _search_cpp(
    index: Index, begins, ends, blocks, weights, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The same without the postings that cannot matter."""
    documents, scores = np.empty(k, np.int32), np.empty(k, np.float32)
    given = [array.ctypes.data for array in (begins, ends, blocks, weights, documents, scores)]
    found = extension.bm25_search(*index._addresses, *given, len(begins), len(index), k, BLOCK)
    return documents[:found], scores[:found]


def _hash_index(header: dict, arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(json.dumps(header).encode(), digest_size=16)
    for name in Index._ARRAYS:
        digest.update(f"{arrays[name].dtype.str} {arrays[name].shape}".encode())
        digest.update(arrays[name])
    return digest.hexdigest()


def _read_index(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Header and arrays of a saved index; no arrays if it is one of another version."""
    with path.open("rb") as file:
        stored = np.asarray(np.memmap(path, np.uint8, "r"))
        header = json.loads(_read_array(file, stored).tobytes())
        if header["format"] != FORMAT:
            raise ValueError(f"its header says {header['format']!r}")
        if header["version"] != VERSION:
            return header, {}
        arrays = {name: _read_array(file, stored) for name in Index._ARRAYS}
        whole = file.tell() == len(stored)
    if not whole or header.pop("digest") != _hash_index(header, arrays):
        raise ValueError("its content does not fit its digest")
    return header, arrays


def _read_array(file, stored: np.ndarray) -> np.ndarray:
    """The array in `.npy` format at the file's position, as a view of the mapped file."""
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not the .npy format 1.0")
    (size,), _, dtype = np.lib.format.read_array_header_1_0(file)
    begin = file.tell()
    end = begin + dtype.itemsize * size
    if not begin <= end <= len(stored):
        raise ValueError("an array ends outside of the file")
    file.seek(end)
    return stored[begin:end].view(dtype)
