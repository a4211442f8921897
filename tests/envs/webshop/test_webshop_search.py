"""WebShop's search: the analyzer by hand, the index beside a plain reference and beside Lucene."""

import json
import lzma
import math
import random
from collections import Counter

import numpy as np
import pytest

from hiper_fast.envs.webshop import Catalogue, index
from hiper_fast.envs.webshop.analyzer import stem, tokenize
from hiper_fast.envs.webshop.index import LENGTHS, Index


@pytest.fixture(params=["cpp", "numpy"])
def implementation(request, monkeypatch):
    """Both ways to search; without the extension the first one fails, which tests must tell."""
    if request.param == "numpy":
        monkeypatch.setattr(index, "extension", None)
    else:
        assert index.extension is not None, "the extension was not built"
    return request.param


# --- the analyzer ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \t\n -- !? ", []),
        ("The dogs and THE Cats", ["dog", "cat"]),
        ("they will not be in such an it", []),
        # possessives, with each apostrophe; only at the end, only s, and a stem follows
        ("women's WOMEN’S women＇s", ["women", "women", "women"]),
        ("boss's s' 's it's", ["boss", "s", "s"]),
        ("don't o'clock rock'n'roll", ["don't", "o'clock", "rock'n'rol"]),
        ("'tis 'quoted' ''", ["ti", "quot"]),
        # what joins letters does not join digits, and the other way round
        ("a.b c:d e'f x,y x;y", ["a.b", "c:d", "e'f", "x", "y", "x", "y"]),
        ("1.5 1,000 3;4 9'10 3:4 1..2", ["1.5", "1,000", "3;4", "9'10", "3", "4", "1", "2"]),
        ("5. .5 v2.0 2.b b.2 10ft 2x4", ["5", "5", "v2.0", "2", "b", "b", "2", "10ft", "2x4"]),
        ("wi-fi usb/c 50% $9.99 a@b", ["wi", "fi", "usb", "c", "50", "9.99", "b"]),
        # joiners belong to a word, but make none
        ("foo_bar _x_ _ ___ 1_2 _.a", ["foo_bar", "_x_", "1_2"]),
        # digits are decimal ones
        ("½ ² ① Ⅷ ٣٤ ６", ["ⅷ", "٣٤", "６"]),
        # ideographs and hiragana one by one, katakana and hangul together, apart from letters
        (
            "東京タワー ひら 한국어 abcアイ1",
            ["東", "京", "タワー", "ひ", "ら", "한국어", "abc", "アイ", "1"],
        ),
        ("人々 ﾞ ﾟ ｱﾞ", ["人", "々", "ｱﾞ"]),
        ("ภาษาไทย ไทย", ["ภาษาไทย", "ไทย"]),
        ('צה"ל ג\' "צה" ו', ['צה"ל', "ג'", "צה", "ו"]),
        # marks cling to what they follow
        ("cafe\u0301 a\u200db \u0301 x\u00ady", ["cafe\u0301", "a\u200db", "x\u00ady"]),
        # emoji are words: sequences, skin tones, key caps, flags in pairs; as of Unicode 12.1
        (
            "👩\u200d👩\u200d👧 👍🏽👍 ❤\ufe0f❤",
            ["👩\u200d👩\u200d👧", "👍🏽", "👍", "❤\ufe0f", "❤"],
        ),
        ("1\ufe0f\u20e3 #\ufe0f\u20e3 # * 🇺🇸🇩🇪 🇺", ["1\ufe0f\u20e3", "#\ufe0f\u20e3", "🇺🇸", "🇩🇪"]),
        ("red★blue ☆ ✿ ❀ ✔ ® ™ ☏ ➜ ♥", ["red", "★", "blue", "✔", "®", "™", "☏", "♥"]),
        ("\u200d😀 🏽 \ufe0f", ["\u200d😀", "🏽"]),
        # one letter for one, as Java has it
        ("İSTANBUL ΣΑΣ ÉTÉS", ["istanbul", "σασ", "été"]),
        ("ab\ud800cd", ["ab", "cd"]),
    ],
)
def test_tokens(text, expected):
    assert tokenize(text) == expected


def test_long_words_are_cut_where_the_tokenizer_ends_its_buffer():
    assert [len(token) for token in tokenize("a" * 600)] == [255, 255, 90]
    assert tokenize("b" * 254 + ".cd") == ["b" * 254, "cd"]
    assert tokenize("x " + "1" * 255) == ["x", "1" * 255]


@pytest.mark.parametrize(
    "piece", ["_", "\u0301", "\u200d", "a\u0301", "#\ufe0f", "a'", "1,", 'א"', "👍\u200d", "a_"]
)
def test_time_is_linear_in_the_text(piece):
    """With a quadratic pattern each of these would take a minute."""
    tokenize(piece * 20_000)


@pytest.mark.parametrize(
    "pairs",
    [
        "caresses:caress ponies:poni ties:ti caress:caress cats:cat s:s as:as is:is gas:ga",
        "feed:feed agreed:agre plastered:plaster bled:bled motoring:motor sing:sing",
        "conflated:conflat troubled:troubl sized:size hopping:hop tanned:tan falling:fall",
        "hissing:hiss fizzed:fizz",
        "failing:fail filing:file happy:happi sky:sky say:sai by:by yellow:yellow",
        "relational:relat conditional:condit rational:ration valenci:valenc hesitanci:hesit",
        "digitizer:digit",
        "conformabli:conform radicalli:radic differentli:differ vileli:vile analogousli:analog",
        "vietnamization:vietnam predication:predic operator:oper feudalism:feudal",
        "decisiveness:decis",
        "hopefulness:hope callousness:callous formaliti:formal sensitiviti:sensit",
        "sensibiliti:sensibl",
        "archaeologi:archaeolog possibli:possibl",  # his own departures
        "triplicate:triplic formative:form formalize:formal electriciti:electr",
        "electrical:electr hopeful:hope",
        "goodness:good revival:reviv allowance:allow inference:infer airliner:airlin",
        "gyroscopic:gyroscop",
        "adjustable:adjust defensible:defens irritant:irrit replacement:replac",
        "adjustment:adjust dependent:depend",
        "adoption:adopt homologou:homolog communism:commun activate:activ angulariti:angular",
        "homologous:homolog",
        "effective:effect bowdlerize:bowdler probate:probat rate:rate cease:ceas",
        "controll:control roll:roll",
        "eed:eed ing:ing ed:ed ion:ion onion:onion",
    ],
)
def test_stem(pairs):
    for word, expected in (pair.split(":") for pair in pairs.split()):
        assert stem(word) == expected, word


# --- the index against plain loops ---


def norm_length(length):
    """What Lucene's one byte keeps of a length: 24 exactly, then four significant bits."""
    if length < 24:
        return length
    above = length - 24
    shift = max(above.bit_length() - 4, 0)
    return 24 + (above >> shift << shift)


def reference_search(documents, query, k):
    """(documents, scores): every document scored in turn, then sorted."""
    one = np.float32(1)
    counts = [Counter(tokenize(document)) for document in documents]
    lengths = [count.total() for count in counts]
    filled = sum(length > 0 for length in lengths)
    average = np.float32(sum(lengths) / max(filled, 1))
    scored = []
    for number, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        total, matches = 0.0, False
        for term, repeated in Counter(tokenize(query)).items():
            if count[term]:
                df = sum(term in other for other in counts)
                weight = np.float32(repeated) * np.float32(
                    math.log(1 + (filled - df + 0.5) / (df + 0.5))
                )
                normalised = (one - np.float32(0.4)) + np.float32(0.4) * np.float32(
                    norm_length(length)
                ) / average
                inverse = one / (np.float32(0.9) * normalised)
                total += float(weight - weight / (one + np.float32(count[term]) * inverse))
                matches = True
        if matches:
            scored.append((-np.float32(total), number))
    scored = sorted(scored)[:k]
    return [number for _, number in scored], [-score for score, _ in scored]


def assert_like_reference(documents, query, k):
    numbers, scores = Index.build(documents).search_with_scores(query, k)
    assert numbers.dtype == np.int32 and scores.dtype == np.float32
    expected, expected_scores = reference_search(documents, query, k)
    assert numbers.tolist() == expected
    assert scores.tolist() == [float(score) for score in expected_scores]


def random_documents(rng, count, vocabulary, longest):
    """Few words, many of them often, so that scores tie and counts repeat."""
    words = [f"w{number}" for number in range(vocabulary)]
    weights = [1 / (number + 1) for number in range(vocabulary)]
    return [" ".join(rng.choices(words, weights, k=rng.randint(0, longest))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(12))
def test_random_corpora(implementation, seed):
    rng = random.Random(seed)
    documents = random_documents(
        rng, rng.choice([1, 2, 7, 60, 150]), rng.choice([2, 20]), rng.choice([3, 40, 90])
    )
    for query in random_documents(rng, 4, 25, 6):
        assert_like_reference(documents, query, rng.choice([1, 2, 10, 1000]))


@pytest.mark.parametrize("count", [4095, 4097, 9000])
def test_implementations_agree_where_postings_are_left_out(monkeypatch, count):
    """Several windows and blocks; common and rare terms, so that bounds decide; equal to a bit."""
    rng = random.Random(count)
    built = Index.build(random_documents(rng, count, 200, 12))
    for number, query in enumerate(
        random_documents(rng, 40, 220, 9) + ["w0", "w0 w1 w2", "w199", "w0 w199 w199"]
    ):
        k = (1, 10, 50, 20_000)[number % 4]
        fast = built.search_with_scores(query, k)
        with monkeypatch.context() as context:
            context.setattr(index, "extension", None)
            plain = built.search_with_scores(query, k)
        assert fast[0].tolist() == plain[0].tolist() and fast[1].tolist() == plain[1].tolist()


@pytest.mark.parametrize("best", [4096, 5000, 8191])
def test_a_bound_covers_every_block_of_a_window(implementation, best):
    """One document is far better than the rest of its window; windows begin within blocks."""
    documents = ["red red box"] + [""] * 50 + ["red box box box box box"] * 8141
    documents[best] = "red " * 20
    assert Index.build(documents).search("red", 1).tolist() == [best]


def test_no_documents_and_no_matches(implementation):
    for documents in ([], [""], ["the of", "--"], ["red shoe"]):
        built = Index.build(documents)
        assert len(built) == len(documents)
        for query in ("", "blue", "the", "?!", "\ud800"):
            numbers, scores = built.search_with_scores(query)
            assert numbers.tolist() == [] and scores.tolist() == []


def test_one_document(implementation):
    assert_like_reference(["a red shoe"], "red", 50)
    assert Index.build(["a red shoe"]).search("red hats").tolist() == [0]


def test_empty_documents_keep_their_number_and_do_not_count(implementation):
    assert_like_reference(["", "red shoe", "", "blue shoe box", "the"], "blue shoe", 50)


def test_ties_stand_in_order_of_documents(implementation):
    built = Index.build(["red shoe", "blue shoe", "red shoe", "green shoe shoe"] * 5_000)
    assert built.search("red", 7).tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert built.search("shoe red", 3).tolist() == [0, 2, 4]
    assert built.search("green hat", 2).tolist() == [3, 7]


def test_repeated_query_terms_count(implementation):
    documents = ["red hat", "blue blue blue hat", "red red blue"]
    assert_like_reference(documents, "red blue", 5)
    assert_like_reference(documents, "red blue red blues reds", 5)
    assert (
        Index.build(documents).search("hat red red").tolist()
        != Index.build(documents).search("hat blue").tolist()
    )


def test_k_is_a_bound(implementation):
    built = Index.build(["red shoe", "red", "blue"])
    assert [len(built.search("red", k)) for k in (1, 2, 3, 10**9)] == [1, 2, 2, 2]
    for k in (0, -1):
        with pytest.raises(ValueError, match="k must be at least 1"):
            built.search("red", k)


def test_terms_of_one_hash_are_told_apart(implementation, monkeypatch):
    monkeypatch.setattr(index, "crc32", lambda term: len(term))
    built = Index.build(["red", "hat", "red hat tin", "tin box"])
    assert set(built.search("tin").tolist()) == {2, 3}
    assert set(built.search("red").tolist()) == {0, 2}
    assert built.search("cap").tolist() == []


def test_lengths():
    assert len(LENGTHS) == 256 and all(np.diff(LENGTHS) > 0)
    for length in [*range(5_000), 123_456_789, 2**31 - 1]:
        kept = LENGTHS[np.searchsorted(LENGTHS, length, side="right") - 1]
        assert kept == norm_length(length), length


def test_chunks_make_no_difference(monkeypatch):
    documents = random_documents(random.Random(1), 50, 20, 10)
    whole = Index.build(iter(documents))
    monkeypatch.setattr(index, "CHUNK", 7)
    done = []
    chunked = Index.build(iter(documents), done.append)
    assert done == [7, 14, 21, 28, 35, 42, 49, 50]
    for name in Index._ARRAYS:
        assert chunked._arrays[name].dtype == Index._ARRAYS[name]
        np.testing.assert_array_equal(chunked._arrays[name], whole._arrays[name])


def test_counts_saturate(implementation):
    built = Index.build(["red " * 70_000, "red hat"])
    assert built._counts.max() == 65_535
    assert built.search("red").tolist() == [0, 1]


# --- the file ---

DOCUMENTS = ["red shoe", "", "blue shoe box", "a women's hat ★ 東京"]


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "cache" / "shop.index"
    Index.build(DOCUMENTS).save(path)
    return path


def test_saved_and_loaded(saved, implementation):
    loaded = Index.load(saved)
    assert len(loaded) == 4
    assert loaded.search("women hats").tolist() == [3]
    numbers, scores = Index.build(DOCUMENTS).search_with_scores("shoe box")
    assert [values.tolist() for values in loaded.search_with_scores("shoe box")] == [
        numbers.tolist(),
        scores.tolist(),
    ]
    for values in loaded._arrays.values():
        assert values.flags.aligned and not values.flags.writeable
    assert [path.name for path in saved.parent.iterdir()] == ["shop.index"]


def test_an_empty_index_can_be_saved(tmp_path, implementation):
    Index.build([]).save(tmp_path / "empty")
    assert Index.load(tmp_path / "empty").search("red").tolist() == []


def test_saving_replaces_and_a_failure_leaves_what_was_there(saved, monkeypatch):
    before = saved.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    other = Index.build(["other"])
    with monkeypatch.context() as context:
        context.setattr(index.np, "save", fail)
        with pytest.raises(OSError, match="disk full"):
            other.save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["shop.index"]
    other.save(saved)
    assert len(Index.load(saved)) == 1


def test_every_cut_is_noticed(saved):
    content = saved.read_bytes()
    for size in [*range(0, len(content), 61), len(content) - 1]:
        saved.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"shop\.index.*build the index anew"):
            Index.load(saved)
    saved.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="damaged"):
        Index.load(saved)


@pytest.mark.filterwarnings("ignore:Reading `.npy`")
def test_every_changed_byte_is_noticed(saved):
    content = saved.read_bytes()
    for at in [*range(0, 512, 5), *range(512, len(content), 17)]:
        changed = bytearray(content)
        changed[at] ^= 1
        saved.write_bytes(changed)
        with pytest.raises(ValueError, match=r"shop\.index.*build the index anew"):
            Index.load(saved)


def test_other_files_and_versions_are_refused(saved, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        Index.load(tmp_path / "absent")
    np.save(tmp_path / "other.npy", np.arange(3))
    with pytest.raises(ValueError, match="other.npy is no search index"):
        Index.load(tmp_path / "other.npy")
    monkeypatch.setattr(index, "VERSION", 2)
    with pytest.raises(ValueError, match="of version 1, not 2"):
        Index.load(saved)


# --- against Lucene ---


@pytest.fixture(scope="module")
def shop(data_dir, tmp_path_factory):
    """(the index of the 1,000 products, their ASINs in its order)"""
    catalogue = Catalogue.load(data_dir / "webshop", cache=tmp_path_factory.mktemp("cache"))
    return catalogue.index, catalogue.store.asins[catalogue.store.by_asin].tolist()


def test_number_of_tokens(shop):
    assert (len(shop[0]), shop[0].total_tokens) == (1_000, 107_608)


def test_lucene_agrees(shop, data_dir, implementation):
    shop_index, asins = shop
    with lzma.open(data_dir / "webshop" / "lucene_top50.jsonl.xz", "rt") as lines:
        queries = [json.loads(line) for line in lines]
    assert len(queries) == 400
    for query in queries:
        numbers, scores = shop_index.search_with_scores(query["query"])
        assert [asins[number] for number in numbers] == query["hits"], query["query"]
        # four decimals are printed, of scores that were set a millionth apart where they tied
        np.testing.assert_allclose(scores, query["scores"], rtol=0, atol=6e-5)
