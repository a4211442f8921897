"""Episodes in step: every running episode gets its response from one batch; the finished ones leave it."""

from __future__ import annotations

from collections.abc import Callable

from hiper_fast.agent.agent import Agent
from hiper_fast.config import Config
from hiper_fast.envs.base import Environment
from hiper_fast.envs.family import Family, Task
from hiper_fast.options import ConfigError
from hiper_fast.rollout import engines
from hiper_fast.rollout.engines import Answer
from hiper_fast.rollout.episode import Play
from hiper_fast.rollout.prompter import Prompter
from hiper_fast.rollout.trajectory import Episode, Trajectories, pack

Respond = Callable[[list[Play]], list[Answer]]


def play_tasks(
    agent: Agent,
    envs: list[Environment],
    tasks: list[Task],
    family: Family,
    prompter: Prompter,
    config: Config,
    *,
    temperature: float,
    seed: int,
    group: int = 1,
) -> Trajectories:
    """The episodes of `tasks`, packed; `group` in a row are of one game.

    Of many processes each plays its share, in `envs`, and gets to know them all.
    """
    world = agent.world
    plays = [
        Play(env, task, family, config) for env, task in zip(envs, world.share(tasks), strict=True)
    ]
    make_engine = engines.find(config.rollout.engine)
    engine = make_engine(agent, config, temperature=temperature, seed=seed + (world.rank << 32))
    with world.whole(agent.model):
        episodes = play_in_step(plays, prompter, ask(engine), agent.decode)
    episodes = world.gather(episodes)
    for number, episode in enumerate(episodes):
        episode.group = number // group
    return pack(episodes, agent.find_roles)


def ask(engine: engines.Engine) -> Respond:
    def respond(plays: list[Play]) -> list[Answer]:
        answers = engine.answer([play.request() for play in plays])
        if len(answers) != len(plays):
            name = f"{type(engine).__module__}:{type(engine).__qualname__}"
            raise ConfigError(
                f"rollout.engine: {name} gave {len(answers)} answers to {len(plays)} requests"
            )
        return answers

    return respond


def play_in_step(
    plays: list[Play], prompter: Prompter, respond: Respond, decode: Callable[[list[int]], bytes]
) -> list[Episode]:
    """Plays all episodes to their end or the turn limit.

    `respond` maps running plays to answers; `decode` maps ids to bytes. A truncated episode ends with the
    prompt of the state after its last turn, for the bootstrap.
    """
    running = show_prompts(plays, prompter)
    while running:
        for play, answer in zip(running, respond(running), strict=True):
            play.step(answer, decode(answer.ids))
        show_prompts([play for play in running if is_truncated(play)], prompter)
        running = show_prompts([play for play in running if not play.over], prompter)
    return [play.episode for play in plays]


def show_prompts(plays: list[Play], prompter: Prompter) -> list[Play]:
    """Gives each play the prompt of its state; returns those that go on."""
    prompts = prompter([play.state for play in plays])
    for play, (ids, truncated) in zip(plays, prompts, strict=True):
        play.see(ids, truncated)
    return [play for play in plays if not play.over]


def is_truncated(play: Play) -> bool:
    return play.over and not play.episode.terminated
