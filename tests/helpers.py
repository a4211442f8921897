"""What many tests begin with."""

import inspect
import json
from html.parser import HTMLParser

import torch

from hiper_fast.agent.loading import load_agent
from hiper_fast.config import ModelConfig
from hiper_fast.configure import resolve
from hiper_fast.envs.family import families
from hiper_fast.estimators import Turns
from hiper_fast.packing import prefix_sums
from hiper_fast.rollout.games import Games
from hiper_fast.rollout.play import Draw, Seats, Stage, Written, open_rollouts
from hiper_fast.rollout.prompter import Prompter

HOUSEHOLD = families.find("household")


def make_tiny(family=HOUSEHOLD, seed=0, **model):
    """The tiny model's agent, on the CPU."""
    return load_agent(ModelConfig(**{"device": "cpu", **model}), seed, family.tokenizer)


def configure(name="household", **options):
    """A resolved configuration; `train__lr=1` is train.lr."""
    given = {key.replace("__", "."): value for key, value in options.items()}
    return resolve(given={"env.name": name, "model.device": "cpu", **given})


def play_tasks(agent, config, tasks, *, temperature=1.0, seed=0, group=1):
    """The trajectories of `tasks`, played by the configured engine."""
    family = Games(config).family
    prompter = Prompter(agent.tokenizer, config.agent, family.styles[config.agent.style])
    with open_rollouts(agent, family, prompter, config) as rollouts:
        return rollouts.play(Draw(tasks, temperature, seed, group))


def play_script(plays, prompter, respond, decode):
    """The episodes of `plays`, answered by `respond(plays)`, a list."""
    Stage(Seats(None), prompter, Written(respond), decode).run(plays, at_once=len(plays))
    return [play.episode for play in plays]


def answer_all(engine, requests):
    """An engine's answers to its requests, in their order."""
    engine.wake()
    engine.update()
    for key, request in enumerate(requests):
        engine.submit(key, request)
    answers = {}
    while len(answers) < len(requests):
        answers |= dict(engine.collect())
    engine.sleep()
    return [answers[key] for key in range(len(requests))]


def name_cache(model):
    """What `forward` calls its KV cache; transformers 5.24 has renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def make_turns(rewards, switch=None, state=None, group=None, terminated=None, tokens=None):
    """`estimators.Turns` of episodes, each a list of its turns' rewards; `switch`, `state` and `tokens`, how many
    each response has, likewise."""
    flat = [reward for episode in rewards for reward in episode]
    count, episodes = len(flat), len(rewards)
    cu_turns = [0]
    for episode in rewards:
        cu_turns.append(cu_turns[-1] + len(episode))

    def join(lists, default):
        return [x for one in lists for x in one] if lists is not None else default

    return Turns(
        rewards=torch.tensor(flat, dtype=torch.float32),
        switch=torch.tensor(join(switch, [False] * count), dtype=torch.bool),
        valid=torch.ones(count, dtype=torch.bool),
        roles=torch.full((count,), 7, dtype=torch.uint8),
        state=torch.tensor(join(state, list(range(count))), dtype=torch.int64),
        cu_turns=torch.tensor(cu_turns, dtype=torch.int32),
        cu_tokens=prefix_sums(join(tokens, [1] * count)),
        terminated=torch.ones(episodes, dtype=torch.bool)
        if terminated is None
        else torch.tensor(terminated),
        group=torch.tensor(
            group if group is not None else list(range(episodes)), dtype=torch.int64
        ),
    )


VOID = {"meta", "br", "input", "link", "img", "hr"}


class Page(HTMLParser):
    """Checks that tags nest, and collects them with the text of each script."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts[-1] += data
        elif self.open[-1:] != ["style"]:
            self.text += data

    @property
    def ids(self) -> set[str]:
        return {attributes["id"] for _, attributes in self.tags if "id" in attributes}

    @property
    def data(self) -> list[dict]:
        return json.loads(self.scripts[0])
