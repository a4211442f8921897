"""A model that is served elsewhere, behind an OpenAI-compatible address: for evaluation and for play.

The server keeps its own weights, so nothing is trained through it. Token ids go both ways where it takes and gives
them (completions, as vLLM has them); else a prompt is one user message of a chat, and the tokens of what it says are
those of the tokenizer at hand.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import threading
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from hiper_fast.agent.speaker import Speaker
from hiper_fast.agent.tokens import RESPONSE
from hiper_fast.config import Config, RolloutConfig
from hiper_fast.options import ConfigError, option, show, show_name
from hiper_fast.rollout import chat
from hiper_fast.rollout.engines import Answer, Request
from hiper_fast.rollout.engines._http import Server, ServerError
from hiper_fast.rollout.prompter import find_opening
from hiper_fast.text import replace_surrogates

MOMENT = 0.1  # seconds that `collect` waits for an answer
SEEDS = 2**31  # some servers read a seed as int32
KEYLESS = {401, 403}  # statuses of a server that wants a key, or another
MOST_NAMED = 5  # models of a server that an error lists


@dataclass(slots=True)
class Options(RolloutConfig):
    base_url: str = option("", "address of the server, as http://localhost:8000/v1")
    served_model: str = option("", "name of the model there; none: the only one that it serves")
    api: Literal["auto", "tokens", "chat"] = option(
        "auto",
        "tokens: completions of token ids, as vLLM has them; chat: chat/completions of text; auto: tokens where the "
        "server has them",
    )
    api_key_variable: str = option(
        "", "environment variable that holds the API key, as OPENAI_API_KEY; none: no key is sent"
    )
    slots: int = option(64, "episodes played, and requests under way, at once", above=0, most=1024)
    timeout: float = option(60.0, "seconds that an answer may take", above=0)


class Engine:
    """Asks a server; `agent` is how text is read and written here. Log-probs are not asked for: all are NaN.

    ConfigError for a server, a model or a key that is not there; ServerError where it no longer answers.
    """

    Options = Options
    own_weights = True

    def __init__(self, agent: Speaker, config: Config):
        options = config.rollout
        self.server = Server(
            options.base_url, timeout=options.timeout, key=read_key(options.api_key_variable)
        )
        self.api = choose_api(self.server, agent, config)
        self.capacity = options.slots
        self.wanted: queue.SimpleQueue = (
            queue.SimpleQueue()
        )  # (key, request, content), None: enough
        self.done: queue.SimpleQueue = (
            queue.SimpleQueue()
        )  # (key, request, what is said or an error)
        self.under_way: dict[int, Request] = {}
        self.threads: list[threading.Thread] = []

    def wake(self) -> None:
        pass

    def update(self) -> None:
        """Nothing: the server's weights are its own."""

    def submit(self, key: int, request: Request) -> None:
        self.under_way[key] = request
        self.wanted.put((key, request, self.api.write(request)))
        if len(self.threads) < min(len(self.under_way), self.capacity):
            self.threads.append(threading.Thread(target=self.work, daemon=True))
            self.threads[-1].start()

    def work(self) -> None:
        """Asks for one response after the other, in a thread of its own, which no tokenizer is fit for."""
        while job := self.wanted.get():
            key, request, content = job
            if self.under_way.get(key) is not request:
                continue
            try:
                said = self.server.ask(self.api.path, content, self.api.read)
            except Exception as error:  # raised where answers are collected
                said = error
            self.done.put((key, request, said))

    def collect(self) -> list[tuple[int, Answer]]:
        answers = []
        for key, request, said in drain(self.done):
            if self.under_way.get(key) is not request:
                continue
            del self.under_way[key]
            if isinstance(said, Exception):
                raise said
            ids = self.api.tokenize(said)
            answers.append((key, Answer(ids, [math.nan] * len(ids))))
        return answers

    def cancel(self, key: int) -> None:
        self.under_way.pop(key, None)

    def sleep(self) -> None:
        self.under_way.clear()

    def close(self) -> None:
        self.sleep()
        self.server.close()
        for _ in self.threads:
            self.wanted.put(None)


def drain(done: queue.SimpleQueue) -> list:
    """What is in a queue, or comes within a moment."""
    found = []
    with contextlib.suppress(queue.Empty):
        found.append(done.get(timeout=MOMENT))
        while True:
            found.append(done.get_nowait())
    return found


class Tokens:
    """Completions of token ids: what is read and said is the server's, token for token."""

    path = "/completions"

    def __init__(self, server: Server, model: str, agent: Speaker, config: Config):
        self.server, self.model, self.agent = server, model, agent
        self.limit = config.agent.max_response_tokens

    def probe(self) -> bool:
        """Whether the server gives token ids; ConfigError if its tokenizer makes others of a text."""
        content = {"model": self.model, "prompt": RESPONSE, "max_tokens": 1, "temperature": 0}
        content |= {"add_special_tokens": False, "return_token_ids": True}
        try:
            reply = self.server.ask(self.path, content)
        except ServerError as error:
            if error.status is None:
                raise
            return False
        found = take(reply, "choices", 0, "prompt_token_ids")
        if found is None:
            return False
        if found != self.agent.tokenizer(RESPONSE, add_special_tokens=False)["input_ids"]:
            raise ConfigError(
                f"model.path: its tokenizer is not that of {show(self.model)} at {self.server.url}; give the model "
                "that is served, or let the server read text: --rollout.api chat"
            )
        return True

    def write(self, request: Request) -> dict[str, Any]:
        return describe(self.model, request, self.limit) | {
            "prompt": request.ids,
            "stop_token_ids": list(self.agent.stop_ids),
            "return_token_ids": True,
            "top_k": -1,  # a served model may bring other defaults
            "min_p": 0,
            "repetition_penalty": 1,
        }

    def read(self, reply: Any) -> list[int]:
        """What is said; whatever it raises, it is none."""
        ids = reply["choices"][0]["token_ids"]
        if not ids or not all(type(i) is int and 0 <= i < len(self.agent.pieces) for i in ids):
            raise ValueError("token_ids")
        return ids

    def tokenize(self, said: list[int]) -> list[int]:
        return said


class Chat:
    """A prompt as one user message, without the chat template that stands around it here: the server has its own."""

    path = "/chat/completions"

    def __init__(self, server: Server, model: str, agent: Speaker, config: Config):
        if config.agent.style == "transcript":
            raise ConfigError(
                f"agent.style: transcript goes on from token ids, and {server.url} reads text alone; use "
                "agent.style: reference, a prompt a turn"
            )
        self.server, self.model, self.agent = server, model, agent
        self.limit = config.agent.max_response_tokens
        self.before, self.after = find_frame(agent.tokenizer, config.agent.chat_template)

    def probe(self) -> None:
        """ServerError where the server does not answer."""
        request = Request(self.agent.tokenizer("a")["input_ids"], seed=0, temperature=0.0)
        self.server.ask(self.path, self.write(request) | {"max_tokens": 1}, self.read)

    def write(self, request: Request) -> dict[str, Any]:
        text = self.agent.tokenizer.decode(request.ids, clean_up_tokenization_spaces=False)
        text = text.removeprefix(self.before).removesuffix(self.after)
        messages = [{"role": "user", "content": text}]
        return describe(self.model, request, self.limit) | {"messages": messages}

    def read(self, reply: Any) -> tuple[str, bool]:
        """What is said, and whether to its end; whatever it raises, it is none."""
        choice = reply["choices"][0]
        text = choice["message"]["content"] or ""  # null beside a thought that was cut
        return replace_surrogates(text), choice.get("finish_reason") != "length"

    def tokenize(self, said: tuple[str, bool]) -> list[int]:
        text, ended = said
        ids = self.agent.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, self.agent.stop_ids[0]] if ended or not ids else ids


def take(content: Any, *path: str | int) -> Any:
    """What lies there in JSON content, None where nothing does."""
    for step in path:
        try:
            content = content[step]
        except (LookupError, TypeError):
            return None
    return content


def find_frame(tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> tuple[str, str]:
    """What stands before and behind the text of a prompt."""
    if tokenizer.chat_template is None:
        return tokenizer.decode(find_opening(tokenizer)), ""
    before, _, after = chat.render(tokenizer, options, chat.ASKED).partition(chat.ASKED)
    return before, after


def describe(model: str, request: Request, limit: int) -> dict[str, Any]:
    """What both endpoints are told alike."""
    return {
        "model": model,
        "max_tokens": limit,
        "temperature": request.temperature,
        "top_p": 1,
        "seed": request.seed % SEEDS,
    }


def choose_api(server: Server, agent: Speaker, config: Config) -> Tokens | Chat:
    """What the server is asked by, after a short request; ConfigError, in one line, where it cannot be asked."""
    served, name = [], config.rollout.served_model
    try:
        served = list_models(server)
        return try_apis(server, name or choose_model(server, served), agent, config)
    except ServerError as error:
        if error.status in KEYLESS:
            mend = "; name the environment variable that holds a key: --rollout.api_key_variable"
        elif served and name and name not in served:
            mend = f"; rollout.served_model: it serves {name_models(served)}, not {show(name)}"
        else:
            mend = ""
        raise ConfigError(f"{error}{mend}") from error


def try_apis(server: Server, model: str, agent: Speaker, config: Config) -> Tokens | Chat:
    wanted = config.rollout.api
    tokens = Tokens(server, model, agent, config)
    if wanted != "chat" and tokens.probe():
        return tokens
    if wanted == "tokens":
        raise ConfigError(
            f"rollout.api: {server.url} gives no token ids of {show(model)} (completions with return_token_ids, as "
            "vLLM has them); use chat"
        )
    text = Chat(server, model, agent, config)
    text.probe()
    return text


def list_models(server: Server) -> list[str]:
    """Those that the server names, [] if it names none. ServerError where it cannot be reached or wants a key."""
    try:
        reply = server.ask("/models")
    except ServerError as error:
        if error.status is None or error.status in KEYLESS:
            raise
        return []
    models = take(reply, "data")
    names = [take(model, "id") for model in models] if isinstance(models, list) else []
    return [name for name in names if isinstance(name, str)]


def choose_model(server: Server, served: list[str]) -> str:
    if len(served) == 1:
        return served[0]
    told = f"it serves {name_models(served)}" if served else "it does not say which it serves"
    raise ConfigError(
        f"rollout.served_model: name the model that {server.url} is asked for; {told}"
    )


def name_models(served: list[str]) -> str:
    more = f" and {len(served) - MOST_NAMED} more" if len(served) > MOST_NAMED else ""
    return ", ".join(show_name(name) for name in served[:MOST_NAMED]) + more


def read_key(variable: str) -> str | None:
    """The key in an environment variable; neither is repeated, for a key may have been given as the name."""
    if not variable:
        return None
    key = os.environ.get(variable, "").strip()
    if not key or not (key.isascii() and key.isprintable()):
        raise ConfigError(
            "rollout.api_key_variable: no environment variable of this name holds a key; set it, or leave the option "
            "out where the server needs none"
        )
    return key
