"""WebShop's search on a made-up catalogue of a million products: a query, building, saving, loading; bm25s beside it.

Terms follow Zipf and Mandelbrot's law, lengths a log-normal, and terms come in bursts; with these constants the share
of documents that have the n-th commonest term, the length and the counts are close to those of WebShop's own
1,000 products. The extension is timed only once it has answered as the numpy path does. HIPER_FAST_BENCH=tiny makes it
small enough to test the benchmark itself.
"""

import os

import numpy as np
import pytest

from hiper_fast.envs.webshop import index
from hiper_fast.envs.webshop.index import CHUNK, Index

TINY = os.environ.get("HIPER_FAST_BENCH") == "tiny"
DOCUMENTS, VOCABULARY = (2_000, 20_000) if TINY else (1_000_000, 1_000_000)
TEXTS = 200 if TINY else 2_000
PEER_DOCUMENTS = 500 if TINY else 100_000
QUERIES = 5 if TINY else 100


def draw_terms(rng, size, vocabulary):
    """Term ids, 0 the commonest: P(id) falls as 1 / (id + 10)."""
    return (10 * ((vocabulary / 10 + 1) ** rng.random(size) - 1)).astype(np.int32)


def draw_chunks(documents, vocabulary=VOCABULARY):
    """Tokenised documents as `Index.from_terms` takes them; the same ones each time."""
    rng = np.random.default_rng(0)
    for first in range(0, documents, CHUNK):
        lengths = np.exp(rng.normal(np.log(76), 0.85, min(CHUNK, documents - first))).astype(
            np.int64
        )
        terms = draw_terms(rng, lengths.sum(), vocabulary)
        fresh = np.where(rng.random(len(terms)) < 0.3, 0, np.arange(len(terms)))
        yield terms[np.maximum.accumulate(fresh)], lengths


def build(documents):
    return Index.from_terms(draw_chunks(documents), (f"w{id}" for id in range(VOCABULARY)))


def write(terms):
    return " ".join(f"w{id}" for id in terms)


def draw_queries():
    """As instructions are: 20 terms, most of them common; short ones; rare terms; and the worst, the 20 commonest."""
    rng = np.random.default_rng(1)
    return {
        "instruction": [write(draw_terms(rng, 20, 2_000)) for _ in range(QUERIES)],
        "short": [write(draw_terms(rng, 3, 2_000)) for _ in range(QUERIES)],
        "rare": [write(draw_terms(rng, 10, VOCABULARY)) for _ in range(QUERIES)],
        "commonest": [write(range(20))],
    }


@pytest.fixture(scope="module")
def catalogue():
    return build(DOCUMENTS)


@pytest.mark.parametrize("kind", draw_queries())
@pytest.mark.parametrize("implementation", ["cpp", "numpy"])
def test_search(benchmark, monkeypatch, catalogue, implementation, kind):
    queries = draw_queries()[kind]
    if implementation == "cpp" and index.extension is None:
        pytest.skip("the extension is not built")
    fast = [catalogue.search_with_scores(query) for query in queries[:10]]
    if implementation == "numpy":
        monkeypatch.setattr(index, "extension", None)
        queries = queries[:10]
        for query, (documents, scores) in zip(queries, fast, strict=True):
            plain = catalogue.search_with_scores(query)
            assert plain[0].tolist() == documents.tolist() and plain[1].tolist() == scores.tolist()
    benchmark.group = f"webshop-search-{kind}"
    benchmark.pedantic(
        lambda: [catalogue.search(query) for query in queries], rounds=3, warmup_rounds=1
    )
    benchmark.extra_info["documents"] = len(catalogue)
    benchmark.extra_info["ms_per_query"] = round(1e3 * benchmark.stats.stats.min / len(queries), 3)


@pytest.mark.benchmark(group="webshop-index")
def test_build_from_terms(benchmark):
    """Without tokenising, but with drawing the terms."""
    benchmark.pedantic(build, (DOCUMENTS,), rounds=1)


@pytest.mark.benchmark(group="webshop-index")
def test_build_from_text(benchmark):
    """Tokenising included."""
    texts = []
    for terms, lengths in draw_chunks(TEXTS):
        texts += [write(document) for document in np.split(terms, np.cumsum(lengths)[:-1])]
    benchmark.pedantic(Index.build, (texts,), rounds=1)
    benchmark.extra_info["documents_per_second"] = round(len(texts) / benchmark.stats.stats.min)


@pytest.mark.benchmark(group="webshop-index")
def test_save(benchmark, catalogue, tmp_path):
    benchmark.pedantic(catalogue.save, (tmp_path / "index",), rounds=1)
    benchmark.extra_info["bytes_per_document"] = round(
        (tmp_path / "index").stat().st_size / len(catalogue)
    )


@pytest.mark.benchmark(group="webshop-index")
def test_load(benchmark, catalogue, tmp_path):
    """With the check of its content."""
    catalogue.save(tmp_path / "index")
    benchmark.pedantic(Index.load, (tmp_path / "index",), rounds=3)


@pytest.mark.parametrize("which", ["hiper_fast", "bm25s"])
@pytest.mark.benchmark(group="webshop-search-peer")
def test_peer(benchmark, which):
    """bm25s with the same formula and the same terms. It keeps exact lengths and breaks ties at will, so only the
    scores are compared, loosely, before it is timed."""
    ours = build(PEER_DOCUMENTS)
    queries = draw_queries()["instruction"]
    search = ours.search
    if which == "bm25s":
        bm25s = pytest.importorskip("bm25s", reason="bm25s is not installed: pip install bm25s")
        documents = []
        for terms, lengths in draw_chunks(PEER_DOCUMENTS):
            documents += [
                document.tolist() for document in np.split(terms, np.cumsum(lengths)[:-1])
            ]
        tokenised = bm25s.tokenization.Tokenized(
            documents, {f"w{id}": id for id in range(VOCABULARY)}
        )
        theirs = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
        theirs.index(tokenised, show_progress=False)

        def search(query):
            return theirs.retrieve([query.split()], k=50, show_progress=False)

        ours_best, theirs_best = (
            ours.search_with_scores(queries[0])[1][0],
            search(queries[0]).scores[0][0],
        )
        assert abs(theirs_best - ours_best) < 0.1 * ours_best
    benchmark.pedantic(lambda: [search(query) for query in queries], rounds=3, warmup_rounds=1)
    benchmark.extra_info["ms_per_query"] = round(1e3 * benchmark.stats.stats.min / len(queries), 3)
