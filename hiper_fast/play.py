"""Play a game in the terminal, or watch a checkpoint play it.

python -m hiper_fast.play household
python -m hiper_fast.play webshop --game 12
python -m hiper_fast.play household --record mine.jsonl    # demonstrations for a warm start
python -m hiper_fast.play household --checkpoint runs/household-seed0/checkpoints/step-000028
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hiper_fast import configure, response
from hiper_fast.agent.agent import Agent
from hiper_fast.agent.runtime import configure_torch
from hiper_fast.config import Config
from hiper_fast.envs.base import GameError
from hiper_fast.envs.family import Task, families
from hiper_fast.envs.prompts import State
from hiper_fast.learn.demonstrations import (
    SUFFIX,
    UNREADABLE,
    is_file,
    is_readable,
    record_episode,
    write_blocks,
)
from hiper_fast.learn.score import score
from hiper_fast.options import ConfigError
from hiper_fast.rollout import engines
from hiper_fast.rollout.engines import Answer
from hiper_fast.rollout.episode import Play
from hiper_fast.rollout.games import Games
from hiper_fast.rollout.play import Sampled
from hiper_fast.rollout.policy import load_policy
from hiper_fast.rollout.prompter import make_prompter
from hiper_fast.rollout.trajectory import Episode, pack
from hiper_fast.runs import checkpoint
from hiper_fast.runs.folder import find_config
from hiper_fast.text import clean

QUIT = ("q", "quit", "exit")
SUBGOAL = "subgoal:"  # begins a line that names what the next commands are for


@dataclass(slots=True)
class Thought:
    """What the agent means to do at a turn."""

    answer: Answer
    text: bytes
    values: list[float] | None  # low, high, switch; None without a critic


class Mind:
    """A checkpoint at the table: answers one turn at a time, and values it if its critic was saved with it."""

    def __init__(self, path: Path, config: Config, games: Games, temperature: float, seed: int):
        config.train.kl_coef = 0.0  # no reference model: nothing is learned here
        self.config, self.agent = config, load_policy(config, seed)
        if self.agent.model is not None and (path / "critic.safetensors").exists():
            checkpoint.load(path, policy=self.agent.model, critic=self.agent.add_critic())
        self.prompter = make_prompter(self.agent.tokenizer, config.agent, games.family)
        engine = engines.make(self.agent, config)
        engine.wake()
        engine.update()
        self.voice = Sampled(engine, temperature, seed)

    def think(self, play: Play) -> Thought | None:
        """None where the conversation has grown too long for another turn."""
        [(ids, truncated)] = self.prompter([play.state])
        play.see(ids, truncated)
        if play.over:
            return None
        self.voice.ask(play)
        while not (answers := self.voice.hear()):
            pass
        [(_, answer)] = answers
        text = self.agent.decode(answer.ids)
        return Thought(answer, text, value_turn(self.agent, play.context, answer, self.config))


def value_turn(
    agent: Agent, prompt: list[int], answer: Answer, config: Config
) -> list[float] | None:
    """The critic's values of one turn: low, high, switch."""
    if agent.critic is None or not answer.ids:
        return None
    turn = Episode("", "", terminated=True, prompts=[prompt], responses=[answer.ids])
    turn.logprobs, turn.rewards, turn.states = [answer.logprobs], [0.0], [0]
    return score(agent, pack([turn], agent.find_roles), config).values.places[0].tolist()


def show_page(play: Play) -> Panel:
    """What the environment shows, with what can be clicked in bold."""
    text = Text(overflow="fold")
    for line, clickable in play.family.split_lines(play.state.observation, play.state.commands):
        text.append(line + "\n", style="bold cyan" if clickable else "")
    text.rstrip()
    title = "the end" if play.over else f"turn {len(play.episode.responses) + 1}"
    return Panel(text, title=title, title_align="left")


def show_thought(thought: Thought, state: State) -> Panel:
    """The decision, the subgoal it leads to, the action and the values."""
    parsed = response.parse(thought.text, plans=state.plans)
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    if not parsed.valid:
        said = thought.text.decode(errors="replace")
        table.add_row("said", Text(clean(said), style="red"))
    if state.plans:
        named = parsed.subgoal if parsed.switch or state.subgoal is None else state.subgoal
        table.add_row("decision", "SWITCH" if parsed.switch else "KEEP")
        table.add_row("subgoal", Text(clean(named or "None")))
    table.add_row("action", Text(clean(response.command(thought.text)), style="bold"))
    for name, value in zip(("V low", "V high", "V switch"), thought.values or [], strict=False):
        table.add_row(name, f"{value:+.2f}")
    return Panel(table, title="agent", title_align="left")


@dataclass(slots=True)
class Person:
    """Who types commands at the table, or their numbers, and may name what they are for."""

    console: Console
    recorded: bool = (
        False  # every turn must be a demonstration: it has a subgoal and keeps the format
    )
    subgoal: str | None = None  # named since the last turn

    def ask(self, play: Play, mind: Mind | None, prompt: str) -> Thought | str:
        """What is typed, as a turn; asked again where it is none. Text for an empty line, and to leave."""
        while True:
            typed = ask(self.console, prompt)
            if not typed or typed.lower() in QUIT:
                return typed
            if typed.lower().startswith(SUBGOAL):
                self.subgoal = typed[len(SUBGOAL) :].strip() or None
                continue
            try:
                return self.answer(find_command(typed, play.state.commands), play, mind)
            except ValueError as error:
                print_text(self.console, str(error))

    def answer(self, command: str, play: Play, mind: Mind | None) -> Thought:
        """The command as a turn; ValueError where it cannot be one."""
        state = play.state
        subgoal, text = self.subgoal or state.subgoal, f"<action>{command}</action>"
        if subgoal and state.plans:
            text = write_blocks(subgoal != state.subgoal, subgoal, command)
        if self.recorded and state.plans and not subgoal:
            raise ValueError(f"Say first what it is for, like: {SUBGOAL} find a mug")
        if self.recorded and not is_readable(text, subgoal, command, plans=state.plans):
            raise ValueError(f"What it is for, or the command, has {UNREADABLE}.")
        self.subgoal = None
        data, ids = text.encode(errors="replace"), []
        if mind:
            ids = mind.agent.tokenizer(data.decode(), add_special_tokens=False)["input_ids"]
        return Thought(Answer(ids, [0.0] * len(ids)), data, None)


def find_command(typed: str, commands: list[str]) -> str:
    """The command of that number, or what was typed; ValueError for a number that none has."""
    numbered = {str(number): command for number, command in enumerate(commands, 1)}
    if typed not in commands and re.fullmatch(r"[+-]?\d+", typed):
        if typed not in numbered:
            raise ValueError(
                f"There is no command {typed}; they have numbers from 1 to {len(commands)}."
            )
        return numbered[typed]
    return typed


def play_game(play: Play, person: Person, mind: Mind | None = None, *, auto: bool = False) -> None:
    """Plays until the end or until the player leaves: a person alone, or a mind that may be overruled."""
    console = person.console
    print_text(console, f"Your task: {play.state.task}", style="bold")
    while not play.over:
        thought = mind.think(play) if mind else None
        if play.over:  # no room for another turn
            break
        show_turn(play, console, thought)
        prompt = "Enter: go on, or a command of yours> " if thought else "> "
        typed = "" if auto and thought else person.ask(play, mind, prompt)
        if isinstance(typed, Thought):
            thought = typed
        elif typed:
            return
        if thought:
            play.step(thought.answer, thought.text)
    console.print(show_page(play))
    print_text(console, describe_outcome(play), style="bold")


def show_turn(play: Play, console: Console, thought: Thought | None) -> None:
    """The page, beside it what the agent means to do, or below it what can be done."""
    if thought:
        beside = Table.grid(expand=True)
        beside.add_column(ratio=2)
        beside.add_column(ratio=1)
        beside.add_row(show_page(play), show_thought(thought, play.state))
        console.print(beside)
        return
    console.print(show_page(play))
    commands = enumerate(play.state.commands, 1)
    texts = [Text(f"{i} {command}", overflow="fold") for i, command in commands]
    console.print(Columns(texts, padding=(0, 2)))
    if play.state.subgoal:
        print_text(console, f"{SUBGOAL} {play.state.subgoal}", style="dim")


def print_text(console: Console, text: str, style: str = "") -> None:
    """Every word of it, whatever the terminal's width."""
    console.print(Text(text, style=style, overflow="fold"))


def describe_outcome(play: Play) -> str:
    score = f", score {play.info['task_score']:.2f}" if "task_score" in play.info else ""
    turns = len(play.episode.responses)
    at_limit = turns == play.config.env.max_turns
    limit = "Out of turns" if at_limit else "Out of room for the conversation"
    outcome = "Won" if play.episode.won else "Lost" if play.episode.terminated else limit
    return f"{outcome} after {turns} turns{score}."


def ask(console: Console, prompt: str) -> str:
    """A line from the terminal; leaving by end of input or ctrl-C reads as quit."""
    try:
        return console.input(Text(prompt)).strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return QUIT[0]


def parse_arguments(
    argv: list[str] | None,
) -> tuple[argparse.ArgumentParser, argparse.Namespace, list[str]]:
    """The parser, what it knows, and the dotted options that are left."""
    parser = argparse.ArgumentParser(
        prog="python -m hiper_fast.play",
        description="Play a game in the terminal, or watch a checkpoint play it; you may overrule it at any turn.",
        epilog="The dotted options of hiper_fast.train say what is played: --env.size medium, … Leave with q.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "env", help=f"what to play: {', '.join(families.names())} or package.module:Family"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="a run's folder, for its best checkpoint; a folder under runs/<name>/checkpoints; or any causal LM folder",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the game and of the agent's sampling [0]"
    )
    parser.add_argument(
        "--game", help="a certain game: its number, or for alfworld its file or folder"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        help="the agent's sampling temperature [that of its evaluation]",
    )
    parser.add_argument(
        "--record",
        metavar="FILE.jsonl",
        type=Path,
        help=f"append the game, once it is over, to this file of demonstrations; a line '{SUBGOAL} find a mug' says "
        "what the next commands are for",
    )
    parser.add_argument(
        "--auto", action="store_true", help="let the agent play on without waiting for Enter"
    )
    return parser, *parser.parse_known_args(argv)


def check_arguments(arguments: argparse.Namespace) -> None:
    families.find(arguments.env)
    if arguments.checkpoint and not arguments.checkpoint.is_dir():
        raise ConfigError(f"--checkpoint: there is no folder {arguments.checkpoint}")
    if arguments.record and arguments.checkpoint:
        raise ConfigError("--record: keeps what a person plays; leave --checkpoint out")
    if arguments.record and not is_file(str(arguments.record)):
        raise ConfigError(
            f"--record: a file of demonstrations ends in {SUFFIX}, {arguments.record} does not"
        )
    if arguments.record and not arguments.record.absolute().parent.is_dir():
        raise ConfigError(f"--record: there is no folder {arguments.record.absolute().parent}")
    if arguments.seed < 0:
        raise ConfigError(f"--seed: must not be negative, got {arguments.seed}")
    if arguments.temperature is not None and not arguments.temperature >= 0:
        raise ConfigError(f"--temperature: must not be negative, got {arguments.temperature}")


def choose_checkpoint(arguments: argparse.Namespace, console: Console) -> None:
    """In place of a run's folder its best checkpoint, which is said."""
    given = arguments.checkpoint
    if given and (found := checkpoint.find(given)) != given:
        print_text(console, checkpoint.describe_choice(given, found))
        arguments.checkpoint = found


def read_options(arguments: argparse.Namespace, overrides: list[str]) -> Config:
    """The configuration of the checkpoint's run, if there is one beside it, for the chosen environment."""
    argv = ["--env", arguments.env, *overrides]
    own = None
    if arguments.checkpoint:
        argv.append(f"--model={arguments.checkpoint.absolute()}")
        own = find_config(arguments.checkpoint)
    return configure.parse(argv, program="play", description=__doc__, run=own)


def open_game(arguments: argparse.Namespace, config: Config) -> tuple[Play, Task, Mind | None]:
    games, mind = Games(config), None
    if arguments.checkpoint:
        given = arguments.temperature
        temperature = config.eval.temperature if given is None else given
        mind = Mind(arguments.checkpoint, config, games, temperature, arguments.seed)
    else:
        config.env.max_turns = sys.maxsize  # a person may take all the time
    task = (
        {"seed": arguments.seed}
        if arguments.game is None
        else games.family.find_task(arguments.game)
    )
    return Play(games.make(1)[0], task, games.family, config).begin(), task, mind


def record(file: Path, play: Play, task: Task, console: Console) -> None:
    """Keeps a game that is over."""
    if not play.over:
        print_text(console, "Not recorded: the game is not over.")
        return
    record_episode(file, play, task)
    print_text(console, f"Recorded in {file}.")


def main(argv: list[str] | None = None) -> int:
    parser, arguments, overrides = parse_arguments(argv)
    console = Console(highlight=False)
    try:
        check_arguments(arguments)
        choose_checkpoint(arguments, console)
        config = read_options(arguments, overrides)
        configure_torch(config.run)
        play, task, mind = open_game(arguments, config)
        person = Person(console, recorded=arguments.record is not None)
        play_game(play, person, mind, auto=arguments.auto)
        if arguments.record:
            record(arguments.record, play, task, console)
    except (ValueError, GameError, checkpoint.CheckpointError, OSError) as error:
        print(clean(f"{parser.prog}: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        console.print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
