"""What the model reads of WebShop."""

import pytest

from hiper_fast.agent import tiny
from hiper_fast.config import AgentConfig
from hiper_fast.envs.prompts import State
from hiper_fast.envs.webshop.family import Family
from hiper_fast.envs.webshop.prompts import (
    LIMIT,
    STYLES,
    read_page,
    render_compact,
    render_quoted,
    render_quoted_transcript,
)
from hiper_fast.rollout.prompter import Prompter

TASK = (
    "Find me gluten free teas with flavor: mint, and pack: triple, "
    "and price lower than 20.00 dollars"
)
HEAD = f"Instruction: [SEP] {TASK} [SEP] "
RESULTS = HEAD + (
    "Back to Search [SEP] Page 1 (Total results: 50) [SEP] Next > [SEP] "
    "TEA12 [SEP] Orla Tea, Gluten Free for Daily Wear [SEP] $18.49 [SEP] "
    "B07 [SEP] Fern's Tea [SEP] $3.0 to $10.99"
)
RESULT_CLICKS = ["back to search", "next >", "tea12", "b07"]
ITEM = HEAD + (
    "Back to Search [SEP] < Prev [SEP] flavor [SEP] lemon [SEP] mint [SEP] "
    "Orla Tea [SEP] Price: $18.0 [SEP] "
    "Rating: N.A. [SEP] Description [SEP] Features [SEP] Reviews [SEP] Buy Now"
)
ITEM_CLICKS = [
    "back to search",
    "< prev",
    "description",
    "features",
    "reviews",
    "buy now",
    "lemon",
    "mint",
]
SEARCHED = ("WebShop [SEP] " + HEAD + "Search", "search[gluten free teas]")


def state(observation=RESULTS, clicks=RESULT_CLICKS, **changes):
    return State(
        **{
            "task": TASK,
            "observation": observation,
            "commands": [f"click[{c}]" for c in clicks],
            **changes,
        }
    )


def test_page_begins_after_the_task():
    assert read_page(SEARCHED[0], TASK) == ["Search"]
    assert read_page("Thank you [SEP] Your code:", TASK) == ["Thank you", "Your code:"]


def test_reference_quotes_segments_and_lists_actions():
    text = render_quoted(state(history=[SEARCHED], subgoal="search"))
    assert (
        "'Back to Search' [SEP] 'Page 1 (Total results: 50)' [SEP] 'Next >' [SEP] 'TEA12' [SEP]"
        in text
    )
    assert (
        "'click[tea12]'" in text
        and "Observation: 'Search'\nAction: search[gluten free teas]" in text
    )
    assert text.count(TASK) == 1, "the task stands once"


def test_reference_lists_the_search_bar_first():
    text = render_quoted(state(SEARCHED[0], [], commands=["search[<your query>]", "click[search]"]))
    assert text.index("'search[<your query>]'") < text.index("'click[search]'")


def test_a_long_reference_prompt_drops_its_history():
    history = [(HEAD + "x" * LIMIT, "click[next >]")]
    assert len(render_quoted(state(history=history))) < LIMIT
    assert "x" * 100 in render_quoted(state(history=[(HEAD + "x" * 1000, "click[next >]")]))


def test_compact_results():
    text = render_compact(state(history=[SEARCHED], subgoal="search"))
    assert text == (
        "task:gluten free teas flavor=mint pack=triple price 20\n"
        "did: search[gluten free teas]\n"
        "see: page 1 fern's tea 3 to 11 [b07]\n"
        "can: [next >][back to search]\n"
        "subgoal: search\n"
        "orla tea gluten free daily wear 19\n"
        "click[tea12]\n"
    )


def test_compact_puts_last_what_shares_most_and_what_was_clicked_back():
    rows = (
        "A1 [SEP] Free Teas [SEP] $5.0 [SEP] A2 [SEP] Gluten Free Teas [SEP] $6.0 [SEP] "
        "A3 [SEP] Free Teas [SEP] $7.0"
    )
    shown = state(
        HEAD + "Page 1 (Total results: 3) [SEP] Next > [SEP] " + rows, ["next >", "a1", "a2", "a3"]
    )
    assert render_compact(shown).endswith(
        "\nfree teas 7\nclick[a3]\nfree teas 5\nclick[a1]\ngluten free teas 6\nclick[a2]\n"
    )
    shown.sent.add("click[a2]")
    assert render_compact(shown).endswith("\nfree teas 7\nclick[a3]\nfree teas 5\nclick[a1]\n")
    assert "see: page 1 gluten free teas 6 [a2]\n" in render_compact(shown)


def test_compact_item():
    history = [SEARCHED, (RESULTS, "click[tea12]")]
    text = render_compact(state(ITEM, ITEM_CLICKS, history=history, subgoal="choose product"))
    assert "did: search[gluten free teas][tea12]\n" in text
    assert "see: flavor [lemon] orla tea price: 18\n" in text
    assert "\ncan: [buy now][< prev][back to search]\nsubgoal: choose product\nmissing: " in text
    assert text.endswith("\nmissing: flavor=mint pack=triple\nclick[mint]\n")
    history += [(ITEM, "click[mint]")]
    text = render_compact(
        state(ITEM, ITEM_CLICKS, history=history, subgoal="choose options", sent={"click[mint]"})
    )
    assert "see: flavor [lemon] [mint] orla tea price: 18\n" in text
    assert text.endswith("subgoal: choose options\nmissing: pack=triple\n\n")
    history += [(ITEM, "click[triple]")]
    text = render_compact(state(ITEM, ITEM_CLICKS, history=history, subgoal="choose options"))
    assert text.endswith("missing: nothing\n\n")


def test_an_item_opened_anew_has_nothing_chosen():
    history = [
        (RESULTS, "click[tea12]"),
        (ITEM, "click[mint]"),
        (ITEM, "click[< prev]"),
        (RESULTS, "click[b07]"),
    ]
    text = render_compact(state(ITEM, ITEM_CLICKS, history=history, sent={"click[mint]"}))
    assert text.endswith("\nmissing: flavor=mint pack=triple\nclick[mint]\n")


def test_compact_search_page():
    text = render_compact(state(SEARCHED[0], commands=["search[<your query>]", "click[search]"]))
    assert text.endswith("did: \nsee: \ncan: [search]\nsubgoal: None\nsearch[gluten free teas]\n")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("observation", ["", "[SEP]", "no [SEP] instruction", RESULTS])
def test_any_state_can_be_shown(style, observation):
    assert STYLES[style].render(state(observation, [], task=""))
    assert STYLES[style].render(state(observation, [], task="i want tea."))


def test_the_tokenizer_of_the_shop_has_every_word_of_its_prompts_whole():
    tokenizer = tiny.load_tokenizer(Family.tokenizer)
    prompter = Prompter(tokenizer, AgentConfig(max_prompt_tokens=400), STYLES["compact"])
    [(ids, truncated)] = prompter(
        [state(ITEM, ITEM_CLICKS, history=[SEARCHED], subgoal="choose options")]
    )
    assert not truncated
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert not [p for p in pieces if len(p) == 1 and p.isalpha() and p not in ("Ċ", "Ġ")]


def test_transcript_shows_pages_as_reference_does_and_the_task_once():
    first = render_quoted_transcript(
        state(SEARCHED[0], commands=["search[<your query>]", "click[search]"])
    )
    later = render_quoted_transcript(state(history=[SEARCHED], subgoal="search", context=[1]))
    assert (
        first.count(TASK) == 1
        and "\n'Search'\n" in first
        and "\nsearch[<your query>]\nclick[search]\n" in first
    )
    assert (
        TASK not in later
        and "'Next >' [SEP] 'TEA12' [SEP]" in later
        and "\nclick[tea12]\n" in later
    )
    assert "gluten free teas]" not in later, "what it did stands in its own response"
