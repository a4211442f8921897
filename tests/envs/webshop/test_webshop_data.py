"""WebShop's files: their forms, the cache of what was built from them, all that may be wrong."""

import gzip
import json
import lzma
import random

import pytest
from helpers import configure
from products import asked, product

from hiper_fast.envs import make, webshop
from hiper_fast.envs.webshop import Catalogue, DataError, WebShop
from hiper_fast.envs.webshop.items import make_records, read_items, read_object
from hiper_fast.options import ConfigError
from hiper_fast.rollout.games import Games

ATTRIBUTES = asked("dimmable")


def only(**changes):
    """The record of one product."""
    [record] = make_records([product(**changes)], {}, {})
    return record


@pytest.fixture
def folder(tmp_path):
    """WebShop's files with three products."""
    data = tmp_path / "data"
    data.mkdir()
    items = [product(f"B{i:09d}", pricing="$10 - $20", customization_options="") for i in range(3)]
    (data / "items_shuffle_1000.json").write_text(json.dumps(items))
    (data / "items_ins_v2_1000.json").write_text(
        json.dumps({item["asin"]: ATTRIBUTES for item in items})
    )
    return data


@pytest.fixture
def load(folder, tmp_path):
    return lambda **options: Catalogue.load(
        folder, **{"cache": tmp_path / "cache", "nouns": "plain", **options}
    )


# What is read.


def test_skipped_products():
    items = [product(asin) for asin in ("B1", "nan", "B1234567890", "B1", "b1", "B123456789")]
    items[3]["name"] = "A duplicate"
    assert [(r["asin"], r["name"]) for r in make_records(items, {}, {})] == [
        (asin, "Oak Desk Lamp") for asin in ("B1", "b1", "B123456789")
    ]


@pytest.mark.parametrize(
    ("pricing", "prices", "tag"),
    [
        ("", [100.0], "$100.0"),
        (None, [100.0], "$100.0"),
        ("$18.50", [18.5], "$18.5"),
        ("$1,234.00", [1234.0], "$1234.0"),
        ("$3.99 - $10.99", [3.99, 10.99], "$3.99 to $10.99"),
        ("$3 $4 $5", [3.0, 4.0], "$3.0 to $4.0"),
        ("from $3 a piece", [3.0], "$3.0"),
    ],
)
def test_prices(pricing, prices, tag):
    record = only(pricing=pricing)
    assert (record["prices"], record["price_tag"]) == (prices, tag)


def test_options_and_bullets():
    options = {"SIZE": [{"value": " Large/XL "}, {"value": "Small"}], "Color": None}
    assert only(customization_options=options)["options"] == {"size": ["large | xl", "small"]}
    assert only(small_description="one text")["bullets"] == ["one text"]
    assert only()["attributes"] == ["DUMMY_ATTR"]


@pytest.mark.parametrize(("ending", "opener"), [("", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_compressed_files_are_the_same_shop(folder, tmp_path, ending, opener):
    for path in list(folder.iterdir()):
        text = path.read_text()
        path.unlink()
        with opener(f"{path}{ending}", "wt") as file:
            file.write(text)
    catalogue = Catalogue.load(folder, seed=4, cache=tmp_path / "cache")
    assert catalogue.search("lamp") == [f"B{i:09d}" for i in range(3)]
    assert len(catalogue.goals()) == 3 and not len(catalogue.goals("human"))


@pytest.mark.parametrize("text", ["[]", " [ ] ", '[{"a": [1, "]"]} , {}\n]', '[{"é": -2.5e3}]'])
def test_the_reader_reads_as_json_does(tmp_path, text, monkeypatch):
    monkeypatch.setattr("hiper_fast.envs.webshop.items._CHUNK", 1)
    (tmp_path / "items.json").write_text(text, encoding="utf-8")
    assert list(read_items(tmp_path / "items.json")) == json.loads(text)


def test_both_sizes_in_one_folder(folder, load):
    small = json.loads((folder / "items_shuffle_1000.json").read_text())
    (folder / "items_shuffle.json").write_text(json.dumps([*small, product("B1")]))
    (folder / "items_ins_v2.json").write_text("{}")
    assert (len(load(size="1000")), len(load(size="all"))) == (3, 4)
    with pytest.raises(DataError, match="size='1000' or 'all'"):
        load()
    with pytest.raises(ValueError, match="size: 'huge' is none of 1000, all"):
        load(size="huge")


def test_a_shop_without_products(folder, load):
    (folder / "items_shuffle_1000.json").write_text("[]")
    catalogue = load()
    assert (len(catalogue), catalogue.search("lamp"), len(catalogue.goals())) == (0, [], 0)
    with pytest.raises(ValueError, match="there is no 'train' goal"):
        WebShop(catalogue)


# The cache.


def entries(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def test_the_cache_is_used_and_belongs_to_the_content(folder, load, tmp_path, monkeypatch):
    first = load(seed=3)
    [entry] = entries(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            "hiper_fast.envs.webshop.catalogue.read_items", None
        )  # it would be called to build
        again = load(seed=3)
    assert (
        again.search("oak lamp") == first.search("oak lamp")
        and again.prices.tolist() == first.prices.tolist()
    )
    assert [again.goals()[i] for i in range(3)] == [first.goals()[i] for i in range(3)]
    (folder / "items_shuffle_1000.json").write_text(json.dumps([product("B2")]))
    assert load().search("lamp") == ["B2"]
    assert len(entries(tmp_path)) == 2 and entry in entries(tmp_path)


@pytest.mark.parametrize("name", ["products.jsonl", "tables.npz", "summary.json", "index"])
@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_a_damaged_cache_is_built_again(load, tmp_path, name, damage):
    expected = load().search("oak lamp")
    [entry] = entries(tmp_path)
    path = tmp_path / "cache" / entry / name
    paths = (
        [path]
        if path.is_file()
        else [p for p in path.rglob("*") if p.is_file()] or sorted(path.parent.glob(f"{name}*"))
    )
    assert paths
    for path in paths:
        content = path.read_bytes()
        path.unlink()
        if damage != "gone":
            path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"something else")
    with pytest.warns(UserWarning, match="the cache cannot be used and is built again"):
        assert load().search("oak lamp") == expected
    assert entries(tmp_path) == [entry]
    assert load().search("oak lamp") == expected


def test_no_place_for_a_cache(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="nothing can be cached there"):
        catalogue = Catalogue.load(folder, cache=tmp_path / "file")
    assert len(catalogue.search("lamp")) == 3


def test_a_full_disk_keeps_the_shop_in_memory(load, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("hiper_fast.envs.webshop.catalogue.Index.save", fail)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert len(load().search("lamp")) == 3
    assert entries(tmp_path) == []


def test_another_process_was_faster(load, tmp_path, monkeypatch):
    from hiper_fast.envs.webshop.catalogue import Index

    save = Index.save

    def slow(index, path):
        with monkeypatch.context() as patch:
            patch.setattr(Index, "save", save)
            load()
        save(index, path)

    monkeypatch.setattr(Index, "save", slow)
    assert len(load().search("lamp")) == 3 and len(entries(tmp_path)) == 1


def test_the_cache_honours_xdg(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    Catalogue.load(folder)
    assert len(list((tmp_path / "home" / "hiper_fast" / "webshop").iterdir())) == 1


def test_a_failed_build_leaves_nothing(folder, load, tmp_path):
    (folder / "items_shuffle_1000.json").write_text(
        json.dumps([product(), product("B2", name=None)])
    )
    with pytest.raises(DataError):
        load()
    assert entries(tmp_path) == []


def test_progress(load):
    told = []
    load(progress=lambda stage, done: told.append((stage, done)))
    assert ("reading products", 3) in told and {stage.split()[0] for stage, _ in told} >= {
        "looking",
        "reading",
    }


# What may be wrong.


@pytest.mark.parametrize(
    "key",
    [
        "asin",
        "name",
        "category",
        "query",
        "product_category",
        "full_description",
        "small_description",
    ],
)
@pytest.mark.parametrize("wrong", ["missing", None, 3, {"a": 1}, [2]])
def test_bad_products_are_named(key, wrong):
    item = product()
    if wrong == "missing":
        del item[key]
    else:
        item[key] = wrong
    with pytest.raises(DataError, match=f"the file: product (B000000001|0): .*'{key}'"):
        list(make_records([item], {}, {}, source="the file"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pricing": 3}, "'pricing' is int"),
        ({"pricing": "cheap"}, "'pricing' is 'cheap', expected prices"),
        ({"pricing": "$1.2.3"}, "'pricing' is"),
        ({"customization_options": "red"}, "'customization_options' is str"),
        ({"customization_options": {"a": "red"}}, "'a' must list objects"),
        ({"customization_options": {"a": [{"image": ""}]}}, "'a' must list objects"),
        ({"customization_options": {"a": [{"value": 7}]}}, "'a' must list objects"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(DataError, match=message):
        only(**changes)


@pytest.mark.parametrize(
    "attributes",
    [
        3,
        {"attributes": None},
        {"attributes": [1]},
        {"instruction": 3},
        {"instruction": "x"},
        {"instruction": "x", "instruction_attributes": []},
        {"instruction": "x", "instruction_attributes": [None]},
    ],
)
def test_bad_attributes_are_named(attributes):
    with pytest.raises(DataError, match="product B000000001: "):
        list(make_records([product()], {"B000000001": attributes}, {}))


@pytest.mark.parametrize(
    "human", [3, [3], [{}], [{"instruction": "x", "instruction_attributes": ["a"]}]]
)
def test_bad_human_instructions_are_named(human):
    with pytest.raises(DataError, match="product B000000001: "):
        list(make_records([product()], {}, {"B000000001": human}))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "3",
        "[",
        "[{}",
        "[{},",
        "[{} {}]",
        "[1, 2]",
        "[[]]",
        '[{"asin": "B',
        "[nul]",
        "[{}}",
        "[" * 100_000,
        "\ufeff[]",
    ],
)
def test_bad_json(tmp_path, text):
    path = tmp_path / "items.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="items.json: "):
        list(read_items(path))


@pytest.mark.parametrize("text", ["", "[]", "3", '{"a": ', "{" * 100_000, '{"a":' * 100_000])
def test_bad_json_objects(tmp_path, text):
    path = tmp_path / "ins.json"
    path.write_text(text)
    with pytest.raises(DataError, match="ins.json: "):
        read_object(path)


def test_missing_files(tmp_path, folder, load):
    with pytest.raises(DataError, match="there is no such folder"):
        Catalogue.load(tmp_path / "nowhere")
    (folder / "items_ins_v2_1000.json").unlink()
    with pytest.raises(DataError, match="there is no items_ins_v2_1000.json"):
        load()


@pytest.mark.parametrize("ending", ["", ".gz", ".xz"])
def test_damaged_files(folder, tmp_path, ending):
    """Cut anywhere, or with bytes changed: an error of ours, or a shop that plays."""
    rng = random.Random(ending)
    path = folder / "items_shuffle_1000.json"
    content = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[ending](path.read_bytes())
    path.unlink()
    path = folder / (path.name + ending)
    for _ in range(60):
        damaged = bytearray(
            content[: rng.randrange(len(content) + 1)] if rng.random() < 0.5 else content
        )
        for _ in range(rng.randrange(3)):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(bytes(damaged))
        try:
            catalogue = Catalogue.load(folder, cache=tmp_path / "cache", nouns="plain")
        except DataError as error:
            assert "items_shuffle_1000.json" in str(error)
            continue
        if len(catalogue):
            assert play(catalogue)


def play(catalogue):
    """Buys the best product for "lamp"."""
    env = WebShop(catalogue, split="all") if len(catalogue.goals()) else None
    if env:
        env.reset(seed=0)
        info = env.step("search[lamp]")[-1]
        if len(info["available_actions"]["clickables"]) > 2:
            env.step(info["admissible_commands"][-1])
            assert env.step("click[buy now]")[2]
    return True


def test_strange_texts_play():
    """Lone surrogates, controls, right-to-left marks, blanks, markup, long texts in every field."""
    strange = [
        "\ud83d",
        "\x00",
        "\u202e",
        " ",
        "<b>&amp;</b>",
        "[SEP]",
        "lamp " * 2000,
        "ﬀ İ ß",
        "'\"\\",
    ]
    for i, text in enumerate(strange):
        options = {text: [{"value": text}, {"value": "x"}]}
        items = [
            product(
                f"B{i}",
                name=f"lamp {text}",
                query=text,
                full_description=text,
                small_description=[text],
            ),
            product(f"C{i}", customization_options=options),
        ]
        attributes = {item["asin"]: ATTRIBUTES | {"instruction": text} for item in items}
        catalogue = Catalogue.from_items(items, attributes, nouns="plain")
        assert play(catalogue) and len(catalogue.search(f"lamp {text}")) == 2


def test_make_plays_data_or_the_embedded_shop(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WEBSHOP_DATA", str(folder))
    env = make("webshop", split="all")
    assert (
        len(env.catalogue) == 3
        and make("webshop", split="all", data=folder).catalogue is env.catalogue
    )
    monkeypatch.delenv("WEBSHOP_DATA")
    env = make("webshop")
    assert env.provenance["catalogue"] == "embedded shop 0" and env.reset(seed=1)[1]["task"]
    with pytest.raises(ValueError, match="unknown option 'engine' for webshop"):
        make("webshop", engine="native")


def test_what_is_shared_cannot_change(folder, load):
    one, other = load(prices={"B000000001": 1.0}), load()
    assert one["B000000001"].price == 1.0 and other["B000000001"].price >= 10
    with pytest.raises(ValueError, match="read-only"):
        other.prices[0] = 1.0
    with pytest.raises(ValueError, match="read-only"):
        other.goals().split("all")[0] = 1
    assert other.goals() is other.goals("synthetic")


@pytest.mark.parametrize("damage", ["truncated", "emptied", "swapped", "gone"])
@pytest.mark.parametrize("name", ["items_shuffle_1000", "items_ins_v2_1000", "items_human_ins"])
def test_a_damaged_file_is_one_error_that_names_it_before_anything_is_played(
    folder, tmp_path, monkeypatch, name, damage
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (folder / "items_human_ins.json").write_text(json.dumps({"B000000001": []}))
    config = configure("webshop", env__data=str(folder), env__split="all", env__eval_split="all")
    Games(config)
    file, text = folder / f"{name}.json", (folder / f"{name}.json").read_text()
    other = '{"a": 1}' if text.startswith("[") else "[]"
    if damage == "gone":
        file.unlink()
    else:
        file.write_text({"truncated": text[:-3], "emptied": "", "swapped": other}[damage])
    if (name, damage) == ("items_human_ins", "gone"):
        return  # which a shop can do without
    webshop._load.cache_clear()
    with pytest.raises(ConfigError, match=f"env: .*{name}.json") as caught:
        Games(config)
    assert "\n" not in str(caught.value)
