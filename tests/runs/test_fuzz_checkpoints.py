"""Whatever befalls a checkpoint's files, it loads, or one line says what is wrong and nothing of it was taken.

By hand, for more of them: HIPER_FAST_FUZZ=1000 pytest tests/runs/test_fuzz_checkpoints.py
"""

import json
import os
import random
import warnings

import pytest
import torch
from helpers import configure, make_tiny

from hiper_fast.agent.loading import load_agent
from hiper_fast.config import ModelConfig
from hiper_fast.learn.optim import build_optimizers
from hiper_fast.options import ConfigError
from hiper_fast.runs import checkpoint
from hiper_fast.runs.checkpoint import CheckpointError

COUNT = int(os.environ.get("HIPER_FAST_FUZZ", 40))
LONGEST = 700  # characters of a message
NASTY = [
    None,
    True,
    -1,
    0,
    1e308,
    "",
    "x" * 3000,
    "\x1b[2J",
    "../../x",
    [],
    {},
    [[[]]],
    {"a": None},
]


def build():
    agent = make_tiny()
    agent.add_critic()
    return agent, build_optimizers(agent, configure())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    agent, optimizers = build()
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()
    return checkpoint.save(
        tmp_path_factory.mktemp("run") / "checkpoints", 3, policy=agent.model, tokenizer=agent.tokenizer,
        critic=agent.critic, optimizers=optimizers, state={"best": 0.5},
    )  # fmt: skip


def damage(rng, content, other):
    """The bytes of a file after an accident; None: it is gone."""
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    kind = rng.randrange(8)
    if kind == 0:
        return None
    if kind == 1:
        return content[:a]
    if kind == 2:
        return content[:a] + content[b:]
    if kind == 3:
        return other
    if kind == 4:
        return content[:a] + rng.randbytes(min(8, b - a)) + content[min(b, a + 8) :]
    if kind == 5:  # most of a header is in the first bytes
        place = rng.randrange(min(64, len(content)))
        return content[:place] + rng.randbytes(1) + content[place + 1 :]
    if kind == 6:
        return content[:b] + content[a:b] + content[b:]
    return change_json(rng, content)


def change_json(rng, content):
    """Another value somewhere in it, if it is JSON."""
    try:
        whole = json.loads(content)
    except ValueError:
        return content[::-1]
    place = whole
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = rng.choice(keys)
        if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.3:
            place[key] = rng.choice(NASTY)
            return json.dumps(whole).encode()
        place = place[key]


def try_to_resume(path, agent, optimizers):
    """The error of a resume, if any, which must leave everything as it was."""
    networks = {"policy": agent.model, "critic": agent.critic}
    before = [p.clone() for network in networks.values() for p in network.parameters()]
    try:
        checkpoint.load(path, **networks, optimizers=optimizers)
    except CheckpointError as error:
        after = [p for network in networks.values() for p in network.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return error
    return None


def try_to_load(path):
    try:
        load_agent(ModelConfig(path=str(path), device="cpu"), seed=0)
    except ConfigError as error:
        return error
    return None


def test_a_damaged_checkpoint_loads_or_is_refused_in_one_line(saved):
    rng = random.Random(f"checkpoints {COUNT}")
    agent, optimizers = build()
    files = sorted(path for path in saved.iterdir() if path.is_file())
    whole = {path: path.read_bytes() for path in files}
    refused = 0
    for number in range(COUNT):
        file, other = rng.choice(files), rng.choice(files)
        content = damage(rng, whole[file], whole[other])
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            errors = [try_to_resume(saved, agent, optimizers), try_to_load(saved)]
        for error in filter(None, errors):
            said = str(error)
            assert said.strip() and "\n" not in said and len(said) < LONGEST, (number, file, said)
            assert said.isprintable(), (number, file)
        refused += any(errors)
        file.write_bytes(whole[file])
    assert refused > COUNT / 4
    assert try_to_resume(saved, agent, optimizers) is None and try_to_load(saved) is None
