"""Episodes that never wait for each other: each goes on as soon as its prompt, response or environment is there."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, Protocol

from hiper_fast.agent.speaker import Speaker
from hiper_fast.config import Config
from hiper_fast.envs.base import Environment
from hiper_fast.envs.family import Family, Task
from hiper_fast.options import ConfigError
from hiper_fast.rollout import engines
from hiper_fast.rollout.draws import mix
from hiper_fast.rollout.engines import Answer, Engine, Request
from hiper_fast.rollout.episode import CallWanted, Play, PromptWanted, ResponseWanted, Wanted
from hiper_fast.rollout.prompter import Prompter
from hiper_fast.rollout.trajectory import Lost, Trajectories, pack
from hiper_fast.rollout.workers import EnvironmentFailed, Worker, call_checked, open_workers
from hiper_fast.text import PlainError

Make = Callable[[], Environment]
Decode = Callable[[list[int]], bytes]


class TooManyLost(PlainError):
    """Environments failed in more episodes than `rollout.max_lost` allows."""


@dataclass(frozen=True, slots=True)
class Draw:
    """Which episodes are to be played, and how they are sampled."""

    tasks: list[Task]
    temperature: float
    seed: int
    group: int = 1  # so many tasks in a row are of one game


class Dropped(Exception):
    """The rollout is not wanted any more."""


class Rollouts:
    """What plays a run's episodes: its engine and its environments. `open_rollouts` makes and ends one."""

    def __init__(
        self,
        agent: Speaker,
        engine: Engine,
        workers: Sequence[Worker],
        family: Family,
        prompter: Prompter,
        config: Config,
    ):
        self.agent, self.engine, self.family = agent, engine, family
        self.prompter, self.config = prompter, config
        self.seats = Workers(workers) if workers else Seats(family.make)
        self.dropped = threading.Event()

    def drop(self) -> None:
        """Ends what another thread plays, now and from now on, with Dropped."""
        self.dropped.set()

    def play_on(self, draw: Draw, following: Draw | None) -> Trajectories:
        """As `play`; another player may begin with the `following` ones."""
        return self.play(draw)

    def play(self, draw: Draw) -> Trajectories:
        """An episode of each task with the agent's weights of now, packed.

        Of many processes each plays its share, and gets to know them all. The same seed gives the same episodes,
        however many are played at once. TooManyLost where environments failed too often.
        """
        world, tasks, numbered = self.agent.world, draw.tasks, list(enumerate(draw.tasks))
        plays = [
            Play(None, task, self.family, self.config, number)
            for number, task in world.share(numbered)
        ]
        most = self.config.rollout.max_lost * len(tasks)
        with world.whole(self.agent.model), awake(self.engine):
            voice = Sampled(self.engine, draw.temperature, draw.seed)
            stage = Stage(
                self.seats, self.prompter, voice, self.agent.decode, dropped=self.dropped.is_set
            )
            at_once = min(self.engine.capacity, self.config.rollout.slots)
            lost = stage.run(plays, most=most, at_once=at_once)
        lost = world.gather(lost)
        whole = world.gather([(play.number, play.episode) for play in plays if play.over])
        if len(lost) > most or not whole:
            raise TooManyLost(
                f"{len(lost)} of {len(tasks)} episodes were lost, more than rollout.max_lost "
                f"({self.config.rollout.max_lost:g}) allows: {describe_lost(lost)}"
            )
        for number, episode in whole:
            episode.group = number // draw.group
        trajectories = pack([episode for _, episode in whole], self.agent.find_roles)
        trajectories.lost = lost
        return trajectories


@contextlib.contextmanager
def open_rollouts(
    agent: Speaker, family: Family, prompter: Prompter, config: Config
) -> Iterator[Rollouts]:
    """The engine that `rollout.engine` names, and `rollout.workers`, within."""
    engine = engines.make(agent, config)
    with contextlib.closing(engine), open_workers(family.make, config.rollout) as workers:
        yield Rollouts(agent, engine, workers, family, prompter, config)


@contextlib.contextmanager
def awake(engine: Engine) -> Iterator[None]:
    """Within, it answers with the present weights."""
    engine.wake()
    try:
        engine.update()
        yield
    finally:
        engine.sleep()


def describe_lost(lost: Sequence[Lost]) -> str:
    """How many of each cause, and what the first one of it said."""
    first = {one.cause: one.text for one in reversed(lost)}
    counts = Counter(one.cause for one in lost).most_common()
    return "; ".join(f"{count} {cause} ({first[cause]})" for cause, count in counts)


class Voice(Protocol):
    """Who answers: an engine, or a script in its place."""

    def ask(self, play: Play) -> None: ...

    def hear(self) -> list[tuple[Play, Answer]]:
        """Some of the answers; perhaps none yet."""


class Sampled:
    """Answers of an engine. Each has a seed of its own, of the draw, the episode and the turn."""

    def __init__(self, engine: Engine, temperature: float, seed: int):
        self.engine, self.temperature, self.seed = engine, temperature, seed
        self.asked: dict[int, Play] = {}

    def ask(self, play: Play) -> None:
        seed = mix(self.seed, play.number, play.turn)
        conversation = play.number if play.episode.continued else None
        self.asked[play.number] = play
        request = Request(list(play.context), seed, self.temperature, conversation)
        self.engine.submit(play.number, request)

    def hear(self) -> list[tuple[Play, Answer]]:
        return (
            [(self.find(key, answer), answer) for key, answer in self.engine.collect()]
            if self.asked
            else []
        )

    def find(self, key: int, answer: Answer) -> Play:
        if key not in self.asked or len(answer.ids) != len(answer.logprobs):
            name = f"{type(self.engine).__module__}:{type(self.engine).__qualname__}"
            wrong = (
                f"answers request {key}, which is not under way"
                if key not in self.asked
                else f"gives {len(answer.logprobs)} log-probs for {len(answer.ids)} tokens"
            )
            raise ConfigError(f"rollout.engine: {name} {wrong}")
        return self.asked.pop(key)


class Written:
    """Answers that are all at hand."""

    def __init__(self, respond: Callable[[list[Play]], list[Answer]]):
        self.respond, self.asked = respond, []

    def ask(self, play: Play) -> None:
        self.asked.append(play)

    def hear(self) -> list[tuple[Play, Answer]]:
        plays, self.asked = self.asked, []
        return list(zip(plays, self.respond(plays), strict=True)) if plays else []


class Seats:
    """Environments of this process, as many as are played at once."""

    def __init__(self, make: Make):
        self.make = make
        self.free: list[Environment] = []

    def take(self) -> Environment:
        return self.free.pop() if self.free else self.make()

    def give_back(self, env: Environment, *, failed: bool = False) -> None:
        """One that failed is not used again."""
        if not failed:
            self.free.append(env)

    def rest(self) -> float:
        """Seconds until one can be had."""
        return 0.0


class Workers:
    """Environments in worker processes."""

    def __init__(self, workers: Iterable[Worker]):
        self.free = deque(workers)

    def take(self) -> Worker | None:
        """One that need not rest, if there is one."""
        for _ in range(len(self.free)):
            worker = self.free.popleft()
            if worker.ready_at <= time.monotonic():
                return worker
            self.free.append(worker)
        return None

    def give_back(self, worker: Worker, *, failed: bool = False) -> None:
        self.free.append(worker)

    def rest(self) -> float:
        return max(0.0, min(worker.ready_at for worker in self.free) - time.monotonic())


class Stage:
    """Episodes under way. Each runs until it waits; what they wait for is made for all of them at once."""

    def __init__(
        self,
        seats: Seats | Workers,
        prompter: Prompter,
        voice: Voice,
        decode: Decode,
        *,
        dropped: Callable[[], bool] = lambda: False,
    ):
        """decode: ids -> bytes. dropped: whether to end with Dropped."""
        self.seats, self.prompter, self.voice, self.decode = seats, prompter, voice, decode
        self.dropped = dropped
        self.runs: dict[Play, Any] = {}  # their coroutines
        self.looking: list[Play] = []  # for a prompt
        self.asking = 0  # for a response
        self.calling: dict[Play, Worker] = {}  # an environment elsewhere
        self.lost: list[Lost] = []

    def run(self, plays: Iterable[Play], *, most: float = 0, at_once: int) -> list[Lost]:
        """Plays all to their end; those that are not `over` then were lost. Beyond `most` no more are begun."""
        queue = deque(plays)
        try:
            while queue or self.runs:
                if self.dropped():
                    raise Dropped
                while queue and len(self.runs) < at_once and self.seat(queue[0]):
                    queue.popleft()
                if not self.runs:
                    time.sleep(self.seats.rest())
                self.show_prompts()
                for play, answer in self.voice.hear():
                    self.asking -= 1
                    self.resume(play, (answer, self.decode(answer.ids)))
                self.listen()
                if len(self.lost) > most:
                    queue.clear()
        finally:
            for worker in self.calling.values():  # only if it was interrupted
                worker.drop()
        return self.lost

    def seat(self, play: Play) -> bool:
        """Begins an episode, if there is an environment for it."""
        play.env = play.env or self.seats.take()
        if play.env is None:
            return False
        self.runs[play] = play.run()
        self.resume(play, None)
        return True

    def resume(self, play: Play, value: Any) -> None:
        """Lets an episode go on with what it waited for."""
        try:
            wanted = self.runs[play].send(value)
            while isinstance(wanted, CallWanted) and not isinstance(play.env, Worker):
                result = call_checked(play.env, wanted.name, *wanted.args, **wanted.kwargs)
                wanted = self.runs[play].send(result)
        except StopIteration:
            self.leave(play)
        except EnvironmentFailed as failure:
            self.lose(play, failure)
        else:
            self.wait(play, wanted)

    def wait(self, play: Play, wanted: Wanted) -> None:
        if isinstance(wanted, PromptWanted):
            self.looking.append(play)
        elif isinstance(wanted, ResponseWanted):
            self.asking += 1
            self.voice.ask(play)
        else:
            play.env.send(wanted.name, *wanted.args, **wanted.kwargs)
            self.calling[play] = play.env

    def leave(self, play: Play, *, failed: bool = False) -> None:
        self.runs.pop(play).close()
        self.seats.give_back(play.env, failed=failed)

    def lose(self, play: Play, failure: EnvironmentFailed) -> None:
        play.over = False
        self.lost.append(Lost(play.number, failure.cause, str(failure)))
        self.leave(play, failed=True)

    def show_prompts(self) -> None:
        while self.looking:
            plays, self.looking = self.looking, []
            prompts = self.prompter([play.state for play in plays])
            for play, prompt in zip(plays, prompts, strict=True):
                self.resume(play, prompt)

    def listen(self) -> None:
        """Takes what environments elsewhere have said; waits for them if there is nothing else to do."""
        if not self.calling:
            return
        deadline = min(worker.deadline for worker in self.calling.values())
        idle = not self.asking and not self.looking
        timeout = max(0.0, deadline - time.monotonic()) if idle else 0.0
        said = set(wait([worker.connection for worker in self.calling.values()], timeout))
        now = time.monotonic()
        for play, worker in list(self.calling.items()):
            if worker.connection in said or worker.deadline <= now:
                del self.calling[play]
                self.hear_from(play, worker)

    def hear_from(self, play: Play, worker: Worker) -> None:
        try:
            result = worker.receive()
        except EnvironmentFailed as failure:
            self.lose(play, failure)
        else:
            self.resume(play, result)
