"""A served model as engine: against a small server that answers as vLLM does, and one that reads text alone."""

import json
import math
import socket
import threading
import time

import pytest
from endpoint import REPLY, Endpoint, serve
from helpers import configure, make_tiny

from hiper_fast.agent.loading import load_speaker
from hiper_fast.eval import main as evaluate
from hiper_fast.options import ConfigError
from hiper_fast.play import main as play
from hiper_fast.rollout.engines import Request, _http
from hiper_fast.rollout.engines.openai import Engine
from hiper_fast.train import main as train

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPT = "You are in a room. Your task: look at the mug."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder, of which only the tokenizer is here."""
    folder = tmp_path_factory.mktemp("served")
    make_tiny().tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return make_tiny().tokenizer


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(_http, "DELAYS", (0.01, 0.01, 0.01))


@pytest.fixture(params=["tokens", "chat"])
def endpoint(request, tokenizer):
    with serve(Endpoint(tokenizer, tokens=request.param == "tokens")) as endpoint:
        yield endpoint


def make_engine(folder, endpoint, *, url=None, template=None, **options):
    options = {f"rollout__{name}": value for name, value in options.items()}
    config = configure(
        model__path=str(folder),
        rollout__engine="openai",
        rollout__base_url=url or endpoint.url,
        agent__max_response_tokens=28,
        **options,
    )
    speaker = load_speaker(config.model, config.agent)
    speaker.tokenizer.chat_template = template
    return Engine(speaker, config)


def answer(engine, *requests):
    """The answers, in the order of the requests."""
    for key, request in enumerate(requests):
        engine.submit(key, request)
    return [answer for _, answer in sorted(collect(engine, len(requests)), key=lambda x: x[0])]


def collect(engine, count, seconds=10):
    found, ends = [], time.monotonic() + seconds
    while len(found) < count:
        assert time.monotonic() < ends
        found += engine.collect()
    return found


def ask(tokenizer, text=PROMPT, seed=7, temperature=0.4):
    return Request(tokenizer(text, add_special_tokens=False)["input_ids"], seed, temperature)


# What is asked and answered.


def test_the_answer_is_what_the_server_says(folder, endpoint, tokenizer):
    [found] = answer(make_engine(folder, endpoint), ask(tokenizer))
    assert found.ids == [*endpoint.encode(REPLY), tokenizer.eos_token_id]
    assert len(found.logprobs) == len(found.ids) and all(map(math.isnan, found.logprobs))
    [(_, content)] = endpoint.answered
    assert (content["temperature"], content["seed"], content["max_tokens"]) == (0.4, 7, 28)
    assert content["model"] == "served" and endpoint.keys == {None}


def test_token_ids_go_both_ways(folder, tokenizer):
    with serve(Endpoint(tokenizer)) as endpoint:
        request = ask(tokenizer, seed=2**62 + 5)
        answer(make_engine(folder, endpoint), request)
        [(path, content)] = endpoint.answered
    assert path == "/v1/completions" and content["prompt"] == request.ids
    assert content["stop_token_ids"] == [tokenizer.eos_token_id] and content["seed"] == 5
    assert content["top_k"] == -1 and content["repetition_penalty"] == 1


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_chat_is_told_the_prompt_without_its_template(folder, tokenizer, template):
    with serve(Endpoint(tokenizer, tokens=False)) as endpoint:
        framed = PROMPT if template is None else f"<user>{PROMPT}</user><assistant>"
        answer(make_engine(folder, endpoint, template=template), ask(tokenizer, framed))
        [(path, content)] = endpoint.answered
    assert path == "/v1/chat/completions"
    assert content["messages"] == [{"role": "user", "content": PROMPT}]
    assert "top_k" not in content and "return_token_ids" not in content


def test_the_server_is_asked_as_the_option_says(folder, tokenizer):
    with serve(Endpoint(tokenizer)) as endpoint:
        answer(make_engine(folder, endpoint, api="chat"), ask(tokenizer))
        assert endpoint.answered[0][0] == "/v1/chat/completions"


@pytest.mark.parametrize("text", [None, "", "\ud800 é"])
def test_any_text_is_an_answer(folder, tokenizer, text):
    with serve(Endpoint(tokenizer, tokens=False)) as endpoint:
        engine = make_engine(folder, endpoint)
        endpoint.reply = lambda content: text
        [found] = answer(engine, ask(tokenizer))
    assert found.ids[-1] == tokenizer.eos_token_id
    assert engine.api.agent.decode(found.ids).decode() == (text or "").replace("\ud800", "?")


# Many at once.


def test_many_are_under_way_at_once_and_each_gets_its_own_answer(folder, tokenizer):
    all_there = threading.Barrier(8, timeout=10)

    def reply(content):
        if content["max_tokens"] > 1:
            all_there.wait()
        return f"desk {content.get('seed')}"

    with serve(Endpoint(tokenizer)) as endpoint:
        endpoint.reply = reply
        engine = make_engine(folder, endpoint, slots=8)
        answers = answer(engine, *(ask(tokenizer, seed=seed) for seed in range(16)))
    assert engine.capacity == len(engine.threads) == 8
    texts = [engine.api.agent.decode(found.ids).decode() for found in answers]
    assert texts == [f"desk {seed}" for seed in range(16)]


def test_what_is_cancelled_or_dropped_never_comes(folder, endpoint, tokenizer):
    engine = make_engine(folder, endpoint)
    endpoint.faults = [503, 503]
    engine.submit(0, ask(tokenizer))
    engine.submit(1, ask(tokenizer))
    engine.cancel(0)
    engine.cancel(5)
    assert [key for key, _ in collect(engine, 1)] == [1]
    engine.submit(2, ask(tokenizer))
    engine.sleep()
    engine.wake()
    engine.submit(3, ask(tokenizer))
    assert [key for key, _ in collect(engine, 1)] == [3] and not engine.under_way
    engine.close()
    for thread in engine.threads:
        thread.join(5)
        assert not thread.is_alive()


# Faults.


GARBAGE = [
    b"{",
    b"",
    b"[" * 10**5,
    [],
    {"choices": []},
    {"choices": [{"message": 5, "token_ids": ["a"]}]},
]


@pytest.mark.parametrize(
    "fault", [500, 429, 503, "lost", *GARBAGE], ids=lambda fault: str(fault)[:9]
)
def test_what_may_pass_is_tried_again(folder, endpoint, tokenizer, fault):
    engine = make_engine(folder, endpoint)
    endpoint.faults = [fault, fault]
    [found] = answer(engine, ask(tokenizer))
    assert len(endpoint.answered) == 3 and found.ids[:-1] == endpoint.encode(REPLY)


@pytest.mark.parametrize(
    "fault, told",
    [
        (500, "answers 500: out of order"),
        ("lost", "cannot be reached"),
        (b"garbage\n", r"answers what is no answer: b'garbage\\n'"),
        ({"choices": [{"text": "no ids", "message": {}}]}, "answers what is no answer"),
    ],
)
def test_what_stays_is_told_in_one_line(folder, endpoint, tokenizer, fault, told):
    engine = make_engine(folder, endpoint)
    endpoint.faults = [fault] * 4
    with pytest.raises(ConnectionError, match=told) as caught:
        answer(engine, ask(tokenizer))
    assert str(caught.value).startswith(f"rollout.base_url: {endpoint.url}/")
    assert "\n" not in str(caught.value) and len(endpoint.answered) == 4


def test_a_refusal_is_not_asked_again(folder, endpoint, tokenizer):
    engine = make_engine(folder, endpoint)
    endpoint.faults = [400]
    with pytest.raises(ConnectionError, match="answers 400: out of order"):
        answer(engine, ask(tokenizer))
    assert len(endpoint.answered) == 1


def test_a_server_that_hangs_costs_its_time_limit(folder, endpoint, tokenizer):
    engine = make_engine(folder, endpoint, timeout=0.2)
    endpoint.faults = ["hang"]
    assert len(answer(engine, ask(tokenizer))) == 1
    endpoint.faults = ["hang"] * 4
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=r"did not answer within 0.2 s \(rollout.timeout\)"):
        answer(engine, ask(tokenizer))
    assert time.monotonic() - started < 4


# What is refused at the start.


def refused(folder, endpoint, **options):
    """The one line of the error."""
    with pytest.raises(ConfigError) as caught:
        make_engine(folder, endpoint, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_server_that_is_not_there(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        told = refused(folder, None, url=url)
    assert told == f"rollout.base_url: {url}/models cannot be reached (Connection refused)"


@pytest.mark.parametrize(
    "url, told",
    [
        ("localhost:8000", "is no address of a server; give one as http://localhost:8000/v1"),
        ("ftp://a/v1", "is no address"),
        ("http://a:b/v1", "is no address"),
        ("http://[a/v1", "is no address"),
        ("http://a/v1?key=x", "is no address"),
        ("http://me:secret@a/v1", "leave name and password out"),
    ],
)
def test_what_is_no_address(folder, url, told):
    said = refused(folder, None, url=url)
    assert told in said and "secret" not in said


def test_an_address_must_be_given(folder):
    config = configure(model__path=str(folder), rollout__engine="openai")
    with pytest.raises(ConfigError, match="rollout.base_url: '' is no address"):
        Engine(load_speaker(config.model, config.agent), config)


def test_the_model_is_named_where_there_are_several(folder, endpoint, tokenizer):
    told = refused(folder, endpoint, served_model="other")
    assert "The model `other` does not exist." in told and "it serves served, not 'other'" in told
    endpoint.served = ("a", "b")
    assert "rollout.served_model: name the model" in refused(folder, endpoint)
    assert refused(folder, endpoint).endswith("it serves a, b")
    assert answer(make_engine(folder, endpoint, served_model="b"), ask(tokenizer))
    endpoint.list_models = dict
    assert refused(folder, endpoint).endswith("it does not say which it serves")
    assert answer(make_engine(folder, endpoint, served_model="b"), ask(tokenizer))


def test_a_text_only_server_has_no_token_ids(folder, tokenizer):
    with serve(Endpoint(tokenizer, tokens=False)) as endpoint:
        assert refused(folder, endpoint, api="tokens").startswith("rollout.api: ")


def test_a_transcript_needs_token_ids(folder, tokenizer):
    with serve(Endpoint(tokenizer, tokens=False)) as endpoint:
        config = configure(
            model__path=str(folder), agent__style="transcript",
            rollout__engine="openai", rollout__base_url=endpoint.url,
        )  # fmt: skip
        speaker = load_speaker(config.model, config.agent)
        with pytest.raises(ConfigError, match="agent.style: transcript goes on from token ids"):
            Engine(speaker, config)
        endpoint.tokens = True
        Engine(speaker, config)


def test_the_tokenizer_must_be_the_servers(folder, tokenizer):
    endpoint = Endpoint(tokenizer)
    encode = endpoint.encode
    endpoint.encode = lambda text: encode(text)[::-1]
    with serve(endpoint):
        assert "model.path: its tokenizer is not that of 'served'" in refused(folder, endpoint)
        make_engine(folder, endpoint, api="chat")


def test_a_key_comes_from_the_environment_alone(folder, endpoint, tokenizer, monkeypatch):
    endpoint.key = "sk-secret"
    told = refused(folder, endpoint)
    assert "answers 401: Unauthorized" in told and "--rollout.api_key_variable" in told
    told = refused(folder, endpoint, api_key_variable="sk-secret")
    assert "rollout.api_key_variable" in told and "secret" not in told
    monkeypatch.setenv("MY_KEY", "sk-secret\n")
    engine = make_engine(folder, endpoint, api_key_variable="MY_KEY")
    assert answer(engine, ask(tokenizer)) and endpoint.keys == {None, "Bearer sk-secret"}


# The commands.


@pytest.fixture
def served(folder, endpoint, monkeypatch):
    """What the commands are told of the endpoint."""
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    return [
        *("--checkpoint", str(folder), "--env.max_turns", "3", "--agent.max_response_tokens", "28"),
        *("--rollout.engine", "openai", "--rollout.base_url", endpoint.url),
    ]


def test_a_served_model_is_evaluated_without_its_weights(served, endpoint, tmp_path):
    file = tmp_path / "all.json"
    argv = ["--env=household", "--eval.episodes=6", "--eval.temperature=0.7", *served]
    assert evaluate([*argv, "--sampling-seed", "0,1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["episodes"]
    assert len(rows) == 12 and {row["turns"] for row in rows} == {3}
    assert {content["temperature"] for _, content in endpoint.answered} == {0.7}
    assert len({content["seed"] for _, content in endpoint.answered}) == 36


def test_a_served_model_plays_in_the_terminal(served, endpoint, capsys):
    assert play(["household", "--auto", "--temperature", "0", *served]) == 0
    assert "Out of turns after 3 turns" in capsys.readouterr().out
    assert {content["temperature"] for _, content in endpoint.answered} == {0.0}


def test_a_server_that_is_lost_ends_an_evaluation_in_one_line(served, endpoint, capsys):
    endpoint.faults = [500] * 1000
    assert evaluate(["--env=household", "--eval.episodes", "2", *served]) == 2
    err = capsys.readouterr().err
    assert "answers 500: out of order" in err and err.count("\n") == 1


def test_nothing_is_trained_through_an_endpoint(served, tmp_path, capsys):
    options = [option for option in served if not option.startswith("--checkpoint")]
    options[0] = f"--model={options[0]}"
    assert train([*options, "--run.folder", str(tmp_path), "--run.display=none"]) == 2
    err = capsys.readouterr().err
    assert "rollout.engine: openai answers from weights of its own" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())
