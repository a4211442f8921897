"""What the model reads at a turn, and what is left out of it when it grows too long."""

import pytest
from helpers import HOUSEHOLD

from hiper_fast.agent import tiny
from hiper_fast.config import AgentConfig
from hiper_fast.envs.alfworld.prompts import STYLES, render_compact
from hiper_fast.envs.prompts import State, render_reference
from hiper_fast.options import ConfigError
from hiper_fast.rollout.prompter import Prompter

COMMANDS = [
    "go to fridge 1",
    "go to shelf 2",
    "take apple 1 from shelf 1",
    "look",
    "inventory",
    "help",
]
LIST = (
    "On the shelf 1, you see "
    + ", ".join(f"a apple {i}" for i in range(1, 30))
    + ", and a bread 1."
)
A_PROMPT_A_TURN = ("reference", "compact")
TEMPLATE = "{% for m in messages %}<chat {{ m['role'] }}>{{ m['content'] }}{% endfor %}<reply>"


def state(**changes):
    history = [
        (f"saw {word} 1.", f"go to cabinet {i}") for i, word in enumerate(("mug", "egg", "pan"), 1)
    ]
    fields = {
        "task": "put a apple in fridge.",
        "observation": "On the shelf 1, you see a apple 1, and a bread 1.",
        "commands": COMMANDS,
        "subgoal": "find apple",
        "history": history,
    }
    return State(**{**fields, **changes})


def prompter(style="reference", template=None, **options):
    tokenizer = tiny.load_tokenizer(HOUSEHOLD.tokenizer)
    tokenizer.chat_template = template
    return Prompter(
        tokenizer,
        AgentConfig(**{"max_prompt_tokens": 4000, "history": 8, **options}),
        STYLES[style],
    )


def read(prompter, state):
    """(text, tokens, truncated) of one state."""
    [(ids, truncated)] = prompter([state])
    return prompter.tokenizer.decode(ids), len(ids), truncated


@pytest.mark.parametrize("style", A_PROMPT_A_TURN)
def test_all_the_agent_may_know_is_there(style):
    text, _, truncated = read(prompter(style), state())
    assert "put a apple in fridge." in text and "shelf 1" in text and "bread 1" in text
    assert "find apple" in text and not truncated
    assert "cabinet 3" in text, "the last action"


@pytest.mark.parametrize("style", STYLES)
def test_the_first_subgoal_is_none(style):
    text = STYLES[style].render(state(subgoal=None, history=[]))
    assert "ubgoal: None" in text


def test_reference_lists_every_admissible_command_but_help():
    text = render_reference(state())
    for command in COMMANDS[:-1]:
        assert f"'{command}'" in text
    assert "help" not in text
    for tag in ("<switch>", "<subgoal>", "<action>"):
        assert tag in text


def test_reference_shows_pairs_oldest_first():
    text = render_reference(state())
    positions = [
        text.index(x)
        for x in ("saw mug", "cabinet 1", "saw egg", "cabinet 2", "saw pan", "cabinet 3")
    ]
    assert positions == sorted(positions)
    assert "The last 3 observations" in text


def commands_of(text):
    """The lines of a compact prompt after its subgoal."""
    return text.split("subgoal: ")[1].splitlines()[1:]


def test_compact_groups_commands_by_verb_and_drops_those_that_only_look():
    commands = [
        *COMMANDS,
        "take mug 1 from shelf 1",
        "take mug 2 from shelf 1",
        "open drawer 1",
        "go to shelf 3",
    ]
    text = render_compact(state(commands=commands))
    assert commands_of(text) == [
        "open drawer 1",
        "go to shelf 2 shelf 3",
        "take mug 1 mug 2 from shelf 1",
        "go to fridge 1",
        "take apple 1 from shelf 1",
    ]
    assert "you see apple 1 bread 1." in text
    assert "did: cabinet 1; cabinet 2; cabinet 3" in text


def test_compact_puts_new_commands_first_and_the_best_fitting_last():
    commands = [
        "go to desk 1",
        "go to fridge 1",
        "go to shelf 2",
        "move apple 1 to desk 1",
        "move apple 1 to fridge 1",
    ]
    fitting = ["move apple 1 to desk 1", "go to fridge 1", "move apple 1 to fridge 1"]
    assert commands_of(render_compact(state(commands=commands))) == [
        "go to desk 1 shelf 2",
        *fitting,
    ]
    sent = {"go to desk 1", "move apple 1 to fridge 1"}
    assert commands_of(render_compact(state(commands=commands, sent=sent))) == [
        "go to shelf 2",
        "go to desk 1",
        "move apple 1 to fridge 1",
        "move apple 1 to desk 1",
        "go to fridge 1",
    ]
    fridges = ["go to fridge 10", "go to fridge 2", "go to fridge 1"]
    assert commands_of(render_compact(state(commands=fridges[::-1]))) == fridges


def test_compact_takes_no_preposition_for_a_word_of_the_task():
    commands = [
        "heat egg 1 with microwave 1",
        "take cup 1 from bed 1",
    ]  # by verb; fitting, the first would be last
    assert (
        commands_of(render_compact(state(task="examine the mug with the lamp.", commands=commands)))
        == commands
    )


def test_compact_without_commands_or_history():
    text = render_compact(state(commands=[], history=[], observation="", subgoal=None))
    assert text == "task: put a apple in fridge.\ndid: \nsee: \nsubgoal: None\n"


def test_what_was_sent_is_known_beyond_the_history_window():
    forgetful = prompter("compact", history=1)
    text, *_ = read(
        forgetful, state(commands=["go to cabinet 1", "go to shelf 2"], sent={"go to cabinet 1"})
    )
    assert commands_of(text) == ["go to shelf 2", "go to cabinet 1"]


def refused(*places):
    """A state in which going to these places did nothing."""
    history = [
        ("You are here.", "go to desk 1"),
        ("On the desk 1, you see a mug 1.", f"go to {places[0]}"),
    ]
    history += [("Nothing happens.", f"go to {place}") for place in places[1:]]
    return state(history=history, observation="Nothing happens.")


def test_compact_shows_of_refused_commands_only_how_many_there_were():
    before = state(
        history=[("You are here.", "go to desk 1")], observation="On the desk 1, you see a mug 1."
    )
    expected, *_ = read(prompter("compact"), before)
    for places, count in ((["moon"], 1), (["moon", "sun"], 2), (["moon"] * 20, 9)):
        text, *_ = read(prompter("compact"), refused(*places))
        assert f"\nNothing happens {count}\n" in text
        assert text.replace(f"Nothing happens {count}\n", "") == expected
    text, *_ = read(prompter("reference"), refused("moon", "sun"))
    assert "go to moon" in text and "Nothing happens." in text


def test_compact_goes_on_after_a_refused_command():
    history = [*refused("moon").history, ("Nothing happens.", "go to shelf 1")]
    text, *_ = read(
        prompter("compact"), state(history=history, observation="On the shelf 1, you see a pan 1.")
    )
    assert "did: desk 1; shelf 1\nsee: On the shelf 1, you see pan 1." in text
    assert "Nothing happens" not in text
    text, *_ = read(
        prompter("compact"),
        state(history=[("You are here.", "sing")], observation="Nothing happens."),
    )
    assert "did: \nsee: You are here." in text


@pytest.mark.parametrize("style", A_PROMPT_A_TURN)
@pytest.mark.parametrize(
    "window, shown", [(0, []), (1, [3]), (2, [2, 3]), (3, [1, 2, 3]), (50, [1, 2, 3])]
)
def test_history_window(style, window, shown):
    text, _, truncated = read(prompter(style, history=window), state())
    assert [i for i in (1, 2, 3) if f"cabinet {i}" in text] == shown
    assert not truncated, "a window is no truncation"


@pytest.mark.parametrize("style", STYLES)
def test_chat_template_is_used_where_there_is_one(style):
    plain, *_ = read(prompter(style), state())
    chat, *_ = read(prompter(style, TEMPLATE), state())
    assert chat == f"<chat user>{plain}<reply>"


def test_ids_are_those_of_the_text_without_special_tokens():
    p = prompter("compact")
    [(ids, _)] = p([state()])
    assert ids == p.tokenizer(render_compact(state()), add_special_tokens=False)["input_ids"]


def test_words_are_remembered_with_the_ids_that_the_tokenizer_gives(monkeypatch):
    monkeypatch.setattr("hiper_fast.rollout.prompter.MOST_WORDS", 3)
    ours = prompter()
    texts = [render_reference(state(task=task)) for task in ("find a mug", "open it\n<|end|> now")]
    for few in (texts, texts[1:], [], ["", " "], texts):
        whole = ours.tokenizer(few, add_special_tokens=False)["input_ids"] if few else []
        assert ours.tokenize(few) == whole
    ours.tokenize([" b"])
    assert list(ours.words.known) == [" b"], "forgotten, as they had become too many"
    assert ours.tokenize([" b"])[0] is not ours.words.known[" b"], "the caller's own list"


def test_many_states_at_once_and_none():
    p = prompter("compact")
    states = [state(), state(task="look."), state(history=[])]
    assert p(states) == [p([s])[0] for s in states]
    assert p([]) == []


# Prompts over the limit.


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "chat"])
@pytest.mark.parametrize("plans", [True, False])
@pytest.mark.parametrize("style", STYLES)
def test_a_limit_below_what_the_format_takes_is_refused(style, plans, template):
    nothing = state(task="", observation="", commands=[], history=[], subgoal=None, plans=plans)
    _, size, _ = read(prompter(style, template, subgoals=plans), nothing)
    prompter(style, template, subgoals=plans, max_prompt_tokens=size + 1).check_room()
    message = f"agent.max_prompt_tokens: {size} leave nothing .* format alone are {size} tokens"
    with pytest.raises(ConfigError, match=message):
        prompter(style, template, subgoals=plans, max_prompt_tokens=size).check_room()


@pytest.mark.parametrize("style", STYLES)
def test_a_prompt_just_at_the_limit_is_whole(style):
    text, size, _ = read(prompter(style), state())
    assert read(prompter(style, max_prompt_tokens=size), state()) == (text, size, False)


@pytest.mark.parametrize("style", A_PROMPT_A_TURN)
def test_first_the_history_goes(style):
    whole, size, _ = read(prompter(style), state())
    text, shorter, truncated = read(prompter(style, max_prompt_tokens=size - 1), state())
    assert truncated and shorter < size
    assert "cabinet" not in text
    assert "bread 1" in text, "the observation is still whole"
    assert text == STYLES[style].render(state(history=[]))


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "chat"])
@pytest.mark.parametrize("style", STYLES)
def test_then_the_tail_of_the_observation(style, template):
    long = state(observation=LIST)
    _, size, _ = read(prompter(style, template), state(observation=LIST, history=[]))
    for limit in (size - 1, size - 9, size - 30):
        text, tokens, truncated = read(prompter(style, template, max_prompt_tokens=limit), long)
        assert truncated and tokens <= limit
        assert "put a apple in fridge." in text, "the task stays"
        assert "On the shelf 1, you see" in text and "bread 1." not in text, "the tail goes"
        assert "fridge 1" in text and "find apple" in text, "commands and subgoal stay"
        assert text.startswith("<chat user>") == (template is not None)
        assert tokens > limit - 12, "no more than needed goes"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("limit", [1, 2, 17, 60])
def test_no_limit_is_too_small(style, limit):
    """The reference raised in the middle of a run."""
    for extreme in (
        state(observation=LIST),
        state(observation="界" * 400),
        state(observation="", commands=[f"go to cabinet {i}" for i in range(60)] * 9),
        state(task="x " * 900),
    ):
        for template in (None, TEMPLATE):
            _, tokens, truncated = read(prompter(style, template, max_prompt_tokens=limit), extreme)
            assert 1 <= tokens <= limit and truncated


def test_cut_characters_of_many_tokens_never_overflow():
    """A cut in the middle of a character decodes to U+FFFD, which is longer than what was cut."""
    for limit in range(300, 330):
        _, tokens, _ = read(
            prompter("compact", max_prompt_tokens=limit), state(observation="é界🧑" * 90)
        )
        assert tokens <= limit


def test_only_the_long_ones_are_flagged():
    p = prompter("compact")
    limit = len(p([state()])[0][0])
    p.config.max_prompt_tokens = limit
    assert [flag for _, flag in p([state(), state(observation=LIST), state(history=[])])] == [
        False,
        True,
        False,
    ]


# A transcript: each prompt goes on from the context.

CHAT = (
    "{{ '<|pad|>system' }}{% for m in messages %}<|pad|>{{ m['role'] }}\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|pad|>assistant\n{% endif %}"
)  # <|pad|> and <|end|> are special tokens of the tiny tokenizer


@pytest.mark.parametrize("cut", [False, True], ids=["ended", "cut"])
@pytest.mark.parametrize("template", [None, CHAT], ids=["plain", "chat"])
def test_prompts_and_responses_add_up_to_the_conversation(template, cut):
    p = prompter("transcript", template)
    first, *_ = p([state(history=[], subgoal=None)])
    answers = [f"<action>go to shelf {i}</action>" for i in range(3)]
    states = [state(observation=f"saw pan {i}.", subgoal=f"find pan {i}") for i in range(3)]
    context = list(first[0])
    for answer, now in zip(answers, states, strict=True):
        context += p.tokenizer(answer + "<|end|>" * (not cut), add_special_tokens=False)[
            "input_ids"
        ]
        now.context = list(context)
        [(ids, truncated)] = p([now])
        assert not truncated
        context += ids
    opening, *later = (
        STYLES["transcript"].render(state(history=[], subgoal=None)),
        *map(STYLES["transcript"].render, states),
    )
    if template:
        messages = [{"role": "user", "content": opening}]
        for answer, text in zip(answers, later, strict=True):
            messages += [
                {"role": "assistant", "content": answer},
                {"role": "user", "content": text},
            ]
        expected = p.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    else:
        expected = opening + "".join(
            f"{a}<|end|>\n{text}" for a, text in zip(answers, later, strict=True)
        )
    assert p.tokenizer.decode(context) == expected
    assert context == p.tokenizer(expected, add_special_tokens=False)["input_ids"]


def test_a_transcript_tells_the_task_once_and_then_only_what_is_new():
    p = prompter("transcript")
    text, *_ = read(p, state(history=[], subgoal=None))
    for told in (
        "put a apple in fridge.",
        "bread 1",
        "\ngo to shelf 2\n",
        "subgoal: None",
        "<switch>",
        "<subgoal>",
        "<action>",
    ):
        assert text.count(told) == 1, told
    later, *_ = read(p, state(context=[5, 1]))
    assert "task" not in later and "<action>" not in later and "cabinet" not in later
    assert all(
        told in later for told in ("bread 1", "\ngo to shelf 2\n", "Current subgoal: find apple")
    )
    assert "help" not in text + later


def test_a_sampled_end_token_is_not_said_twice_and_no_other_is_taken_for_it():
    p = prompter("transcript")
    end = p.tokenizer.eos_token_id
    [(ended, _)], [(cut, _)] = p([state(context=[7, end])]), p([state(context=[end, 7])])
    assert cut == [end, *ended] and end not in ended
    p.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"  # no end token at all
    )
    [newline] = p.tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert p([state(context=[7, newline])]) == p([state(context=[7])]), "text is not an end token"


def test_a_context_counts_with_its_prompt():
    p = prompter("transcript", max_response_tokens=50)
    [(whole, _)] = p([state(context=[7, 1])])
    for missing, truncated in ((0, False), (1, True)):
        p.config.max_prompt_tokens = 2 + len(whole) - missing
        assert p([state(context=[7, 1])]) == [(whole, truncated)], (
            "within the response's room the state is whole"
        )
    p.config.max_prompt_tokens = len(whole) - 60
    [(ids, truncated)] = p([state(context=[7, 1])])
    assert truncated and 2 + len(ids) == p.config.max_prompt_tokens + 50
    for context in ([7] * p.config.max_prompt_tokens, [7] * (p.config.max_prompt_tokens + 49)):
        [(ids, truncated)] = p([state(context=context)])
        assert truncated and len(ids) <= p.config.max_prompt_tokens + 50 - len(context)
    assert p([state(context=[7] * (p.config.max_prompt_tokens + 50))]) == [([], True)]
