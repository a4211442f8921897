"""A tokenizer's chat template: a prompt, what goes on from a response, and whether it is fit for either."""

from __future__ import annotations

import itertools
import re
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, meta
from transformers import PreTrainedTokenizerBase

from hiper_fast.config import AgentConfig
from hiper_fast.options import ConfigError, suggest

# Stand for what is asked and answered where a template is asked what it puts around them.
ASKED, ANSWER = "\N{INTERLINEAR ANNOTATION ANCHOR}", "\N{OBJECT REPLACEMENT CHARACTER}"
GENERATION = re.compile(r"{%-?\s*(end)?generation\s*-?%}")  # transformers' own tag
GIVEN = {"messages", "add_generation_prompt", "raise_exception", "strftime_now"}  # by transformers


def render(tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], *contents: str) -> str:
    """A conversation that a user begins, up to the assistant's next response; ConfigError where the template fails."""
    roles = itertools.cycle(("user", "assistant"))
    messages = [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=False)
    ]
    template = tokenizer.apply_chat_template
    try:
        return template(messages, tokenize=False, add_generation_prompt=True, **options)
    except Exception as error:  # a template is a program: it raises what it likes
        many = len(contents) > 1
        raise ConfigError(
            f"model.path: its chat template fails on {'a conversation' if many else 'a user message'}: {error}; "
            f"use {'agent.style: reference, a prompt a turn' if many else 'another model'}"
        ) from error


def go_on(tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], text: str) -> str:
    """What stands between a response and the next one, which answers `text`."""
    return render(tokenizer, options, ASKED, ANSWER, text).partition(ANSWER)[2]


def check(tokenizer: PreTrainedTokenizerBase, config: AgentConfig) -> None:
    """ConfigError where the chat template, if any, cannot make the style's prompts or cannot read its options."""
    options = config.chat_template
    if tokenizer.chat_template is None:
        if options:
            raise ConfigError(
                f"agent.chat_template: the model's tokenizer has no chat template to read {', '.join(options)}; "
                "leave it out"
            )
        return
    check_options(tokenizer, options)
    if ASKED not in render(tokenizer, options, ASKED):
        raise ConfigError(
            "model.path: its chat template leaves out what the user says; use another model"
        )
    if config.style == "transcript":
        check_conversation(tokenizer, options)


def check_options(tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> None:
    """ConfigError for a name that the template never reads; Jinja would pass over it in silence."""
    if not options:
        return
    source = GENERATION.sub("", tokenizer.get_chat_template())
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
    except TemplateSyntaxError:
        return  # to render it will say where
    read = meta.find_undeclared_variables(tree) - GIVEN - tokenizer.special_tokens_map.keys()
    for name in options:
        if name not in read:
            known = ", ".join(sorted(read)) or "no option at all"
            mend = suggest(name, sorted(read), f"it reads {known}")
            raise ConfigError(
                f"agent.chat_template: the model's chat template never reads {name!r}; {mend}"
            )


def check_conversation(tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> None:
    """ConfigError unless a conversation, put together turn by turn, is what the template makes of the whole.

    Two things may differ: blanks around a response, and what a prompt adds after the assistant's name, as an empty
    thought. They stay as they were read.
    """
    opening, later = render(tokenizer, options, ASKED), go_on(tokenizer, options, ASKED)
    parts = render(tokenizer, options, ASKED, ANSWER, ASKED, ANSWER, ASKED).split(ANSWER)
    fault = None
    if len(parts) != 3 or any(part.count(ASKED) != 1 for part in parts):
        fault = "does not render every message once"
    elif not opening.startswith(parts[0].rstrip()) or not later.startswith(parts[1].rstrip()):
        fault = "renders an earlier prompt otherwise than it was read"
    elif later != parts[2]:
        fault = "renders a prompt by what came long before it"
    if fault:
        raise ConfigError(
            f"agent.style: transcript cannot go on with the model's chat template: of a conversation it {fault}; use "
            "agent.style: reference, a prompt a turn"
        )
