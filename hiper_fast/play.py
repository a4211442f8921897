"""Play a game in the terminal, or watch a checkpoint play it.

python -m hiper_fast.play household
python -m hiper_fast.play webshop --game 12
python -m hiper_fast.play household --checkpoint runs/household-seed0/checkpoints/step-000028
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hiper_fast import checkpoint, hiper, response
from hiper_fast import config as configuration
from hiper_fast.config import Config, ConfigError
from hiper_fast.envs.pddl import GameError
from hiper_fast.games import Games
from hiper_fast.policy import Agent, configure_torch, load
from hiper_fast.prompt import Prompter
from hiper_fast.rollout import Answer, Play, sampled
from hiper_fast.trajectory import Episode, pack

QUIT = ("q", "quit", "exit")


@dataclass(slots=True)
class Thought:
    """What the agent means to do at a turn."""

    answer: Answer
    text: bytes
    values: list[float] | None  # low, high, switch; None without a critic


class Mind:
    """A checkpoint at the table: answers one turn at a time, and values it if its critic was saved with it."""

    def __init__(self, path: Path, config: Config, games: Games, temperature: float, seed: int):
        config.model.path = str(path.absolute())
        config.train.kl_coef = 0.0  # no reference model: nothing is learned here
        self.config, self.agent = config, load(config.model, seed)
        if (path / "critic.safetensors").exists():
            checkpoint.load(path, policy=self.agent.model, critic=self.agent.add_critic())
        self.prompter = Prompter(
            self.agent.tokenizer, config.agent, configuration.prompt_style(config), games.family.styles
        )
        self.respond = sampled(self.agent, config, temperature, seed)

    def __call__(self, play: Play) -> Thought | None:
        """None where the conversation has grown too long for another turn."""
        [prompt] = self.prompter([play.state])
        play.see(prompt)
        if play.over:
            return None
        [answer] = self.respond([play])
        return Thought(answer, self.agent.decode(answer[0]), values(self.agent, play.context, answer, self.config))


def values(agent: Agent, prompt: list[int], answer: Answer, config: Config) -> list[float] | None:
    """The critic's values of one turn: low, high, switch."""
    if agent.critic is None or not answer[0]:
        return None
    turn = Episode(
        "", "", terminated=True, prompts=[prompt], responses=[answer[0]], logprobs=[answer[1]], rewards=[0.0]
    )
    scores, *_ = hiper.score(agent, pack([turn], agent.find_roles), config)
    return scores[0].tolist()


def page(play: Play) -> Panel:
    """What the environment shows, with what can be clicked in bold."""
    text = Text()
    for line in play.state.observation.replace(" [SEP] ", "\n").splitlines():
        text.append(line + "\n", style="bold cyan" if f"click[{line.lower()}]" in play.state.commands else "")
    text.rstrip()
    return Panel(text, title="the end" if play.over else f"turn {len(play.episode.responses) + 1}", title_align="left")


def mind_panel(thought: Thought, subgoal: str | None) -> Panel:
    """The decision, the subgoal it leads to, the action and the values."""
    parsed = response.parse(thought.text)
    table = Table.grid(padding=(0, 1))
    if not parsed.valid:
        table.add_row("said", Text(thought.text.decode(errors="replace"), style="red"))
    table.add_row("decision", "SWITCH" if parsed.switch else "KEEP")
    table.add_row("subgoal", Text((parsed.subgoal if parsed.switch or subgoal is None else subgoal) or "None"))
    table.add_row("action", Text(response.command(thought.text), style="bold"))
    for name, value in zip(("V low", "V high", "V switch"), thought.values or [], strict=False):
        table.add_row(name, f"{value:+.2f}")
    return Panel(table, title="agent", title_align="left")


def play_game(play: Play, console: Console, mind: Mind | None = None, *, auto: bool = False) -> None:
    """Plays until the end or until the player leaves: a person alone, or a mind that a person may overrule."""
    console.print(Text(f"Your task: {play.state.task}", style="bold"))
    while not play.over:
        thought = mind(play) if mind else None
        if play.over:  # no room for another turn
            break
        if thought:
            beside = Table.grid(expand=True)
            beside.add_column(ratio=2)
            beside.add_column(ratio=1)
            beside.add_row(page(play), mind_panel(thought, play.state.subgoal))
            console.print(beside)
        else:
            console.print(page(play))
            commands = [Text(f"{i} {command}") for i, command in enumerate(play.state.commands, 1)]
            console.print(Columns(commands, padding=(0, 2)))
        typed = "" if auto and thought else ask(console, "Enter: go on, or a command of yours> " if thought else "> ")
        if typed.lower() in QUIT:
            return
        if typed.isdigit() and 1 <= int(typed) <= len(play.state.commands):
            typed = play.state.commands[int(typed) - 1]
        if typed:
            text = f"<action>{typed}</action>".encode(errors="replace")
            ids = mind.agent.tokenizer(text.decode(), add_special_tokens=False)["input_ids"] if mind else []
            thought = Thought((ids, [0.0] * len(ids)), text, None)
        if thought:
            play.step(thought.answer, thought.text)
    console.print(page(play))
    score = f", score {play.info['task_score']:.2f}" if "task_score" in play.info else ""
    turns = len(play.episode.responses)
    limit = "Out of turns" if turns == play.config.env.max_turns else "Out of room for the conversation"
    outcome = "Won" if play.episode.won else "Lost" if play.episode.terminated else limit
    console.print(Text(f"{outcome} after {turns} turns{score}.", style="bold"))


def ask(console: Console, prompt: str) -> str:
    """A line from the terminal; leaving by end of input or ctrl-C reads as quit."""
    try:
        return console.input(Text(prompt)).strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return QUIT[0]


def settings(arguments: argparse.Namespace, overrides: list[str]) -> Config:
    """The configuration of the checkpoint's run, if there is one beside it, for the chosen environment."""
    source = None
    if arguments.checkpoint:
        beside = arguments.checkpoint.resolve().parent.parent / "config.yaml"
        source = beside if beside.exists() else None
    argv = [*(["--config", str(source)] if source else []), "--env", arguments.env, *overrides]
    return configuration.parse(argv, program="play", description=__doc__)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m hiper_fast.play",
        description="Play a game in the terminal, or watch a checkpoint play it; you may overrule it at any turn.",
        epilog="The dotted options of hiper_fast.train say what is played: --env.size medium, … Leave with q.",
        allow_abbrev=False,
    )
    parser.add_argument("env", choices=configuration.CHOICES["env.name"][1:], help="what to play")
    parser.add_argument(
        "--checkpoint", type=Path, help="a folder under runs/<name>/checkpoints, or any causal LM folder"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the game and of the agent's sampling [0]")
    parser.add_argument("--game", help="a certain game: its number, or for alfworld its file or folder")
    parser.add_argument("--temperature", type=float, help="the agent's sampling temperature [that of its evaluation]")
    parser.add_argument("--auto", action="store_true", help="let the agent play on without waiting for Enter")
    arguments, overrides = parser.parse_known_args(argv)
    console = Console(highlight=False)
    try:
        if arguments.checkpoint and not arguments.checkpoint.is_dir():
            raise ConfigError(f"--checkpoint: there is no folder {arguments.checkpoint}")
        if arguments.seed < 0:
            raise ConfigError(f"--seed: must not be negative, got {arguments.seed}")
        if arguments.temperature is not None and not arguments.temperature >= 0:
            raise ConfigError(f"--temperature: must not be negative, got {arguments.temperature}")
        config = settings(arguments, overrides)
        configure_torch(config.run)
        games, mind = Games(config), None
        if arguments.checkpoint:
            temperature = config.eval.temperature if arguments.temperature is None else arguments.temperature
            mind = Mind(arguments.checkpoint, config, games, temperature, arguments.seed)
        else:
            config.env.max_turns = sys.maxsize  # a person may take all the time
        task = {"seed": arguments.seed} if arguments.game is None else games.family.named(arguments.game)
        play = Play(games.make(1)[0], task, config)
        play_game(play, console, mind, auto=arguments.auto)
    except (ValueError, GameError, checkpoint.CheckpointError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        console.print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
