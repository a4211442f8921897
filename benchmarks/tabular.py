"""A hierarchical policy in a Markov decision process so small that every episode can be listed with its probability.

Each turn the policy keeps its subgoal or switches, names a subgoal if it switched (on turn 0 in any case) and
acts. All three are softmax tables over what docs/hiper.md says they see: the state and the subgoal held so far;
for the action, the subgoal in force. Expectations and variances of gradient estimates are then sums, and the true
gradient is autograd's, through the recursion of the values. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from hiper_fast import estimators
from hiper_fast.config import AdvantageConfig
from hiper_fast.estimators import EVERY_ROLE, Credit, Turns, Values
from hiper_fast.ops import reference

KEEP, SWITCH = 0, 1  # what the switch tables choose between
COLUMNS = (
    "turn",
    "state",
    "held",
    "switch",
    "subgoal",
    "action",
)  # held: the subgoal before the turn

Pick = Callable[
    [Tensor], tuple[Tensor, Tensor]
]  # [paths, ...] -> indices [n, dimensions], weights [n]


@dataclass(frozen=True)
class World:
    """S states, A actions; an episode has at most `horizon` turns, the last of which ends it."""

    rewards: Tensor  # [S, A]
    moves: Tensor  # [S, A, S + 1], probabilities; the last state is the end
    start: Tensor  # [S], probabilities
    horizon: int

    def moves_at(self, turn: int) -> Tensor:
        if turn < self.horizon - 1:
            return self.moves
        return torch.zeros_like(self.moves).index_fill(-1, torch.tensor(len(self.start)), 1.0)


class Policy(NamedTuple):
    """A table a role, of each of the T turns: logits [T, ...]. O subgoals; to hold number O is to hold none."""

    switch: Tensor  # [T, S, O + 1, 2]
    subgoal: Tensor  # [T, S, O + 1, O]
    action: Tensor  # [T, S, O, A]

    def at(self, turn: int) -> Policy:
        """Probabilities at one turn."""
        return Policy(*(table[turn].softmax(-1) for table in self))


class Tables(NamedTuple):
    """Values at each turn and after the last one, where they are 0."""

    low: Tensor  # [T + 1, S, O], by the state and the subgoal in force
    high: Tensor  # [T + 1, S, O + 1], by the state and the subgoal held, where a new one is about to be named
    switch: Tensor  # [T + 1, S, O + 1], likewise, before anything is decided


@dataclass(frozen=True)
class Episodes:
    probability: Tensor  # [episodes], 1 in total
    lengths: Tensor  # int64 [episodes]
    terminated: Tensor  # bool [episodes]
    state: Tensor  # int64 [episodes], after the last turn
    held: Tensor  # int64 [episodes], likewise
    columns: dict[str, Tensor]  # name of COLUMNS -> int64 [turns]
    rewards: Tensor  # [turns]

    @property
    def episode(self) -> Tensor:
        """Of each turn, int64 [turns]."""
        return torch.arange(len(self.lengths)).repeat_interleave(self.lengths)

    @property
    def boundary(self) -> Tensor:
        """bool [turns]."""
        return (self.columns["switch"] == SWITCH) | (self.columns["turn"] == 0)


def draw_world(generator: torch.Generator, states=2, actions=2, horizon=4, end=0.1) -> World:
    """Standard normal rewards; moves a softmax of normals; a turn ends the episode with probability `end`."""
    normal = draw_normal(generator)
    moves = (1.5 * normal(states, actions, states)).softmax(-1)
    ends = torch.full((states, actions, 1), end, dtype=torch.float64)
    moves = torch.cat([(1 - end) * moves, ends], -1)
    return World(normal(states, actions), moves, normal(states).softmax(-1), horizon)


def draw_policy(generator: torch.Generator, world: World, subgoals=2, keep=0.0) -> Policy:
    """Standard normal logits, the same at every turn; `keep` is added to those of KEEP."""
    normal, (states, actions) = draw_normal(generator), world.rewards.shape
    switch = normal(states, subgoals + 1, 2)
    switch[..., KEEP] += keep
    tables = switch, normal(states, subgoals + 1, subgoals), normal(states, subgoals, actions)
    return Policy(*(table.expand(world.horizon, *table.shape) for table in tables))


def draw_normal(generator: torch.Generator) -> Callable[..., Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return normal


def evaluate(world: World, policy: Policy, gamma: float) -> Tables:
    """The exact values, differentiable in the policy."""
    subgoals, states = policy.subgoal.shape[-1], len(world.start)
    before = world.start.new_zeros(states, subgoals + 1)  # the next turn's decisions
    low, high, switch = [before[:, :-1]], [before], [before]
    for turn in reversed(range(world.horizon)):
        now, moves = policy.at(turn), world.moves_at(turn)[..., :-1]
        q = world.rewards[:, None] + gamma * torch.einsum("sax,xo->soa", moves, before[:, :-1])
        low.append((now.action * q).sum(-1))  # [S, O]
        high.append((now.subgoal * low[-1][:, None]).sum(-1))  # [S, O + 1]
        kept = torch.cat([low[-1], high[-1][:, -1:]], -1)  # who holds none names one
        before = now.switch[..., KEEP] * kept + now.switch[..., SWITCH] * high[-1]
        switch.append(before)
    return Tables(*(torch.stack(level[::-1]) for level in (low, high, switch)))


def find_gradient(world: World, policy: Policy, gamma: float) -> Policy:
    """d E[sum gamma^t r_t] / d logits, each turn's [T, ...] apart. Of a policy that is the same at every turn
    the gradient is their sum."""
    leaves = Policy(*(table.detach().clone().requires_grad_() for table in policy))
    value = world.start @ evaluate(world, leaves, gamma).switch[0, :, -1]
    return Policy(*torch.autograd.grad(value, leaves))


def list_all(joint: Tensor) -> tuple[Tensor, Tensor]:
    """Every choice that can be, with its probability."""
    index = joint.nonzero()
    return index, joint[tuple(index.T)]


def sample(generator: torch.Generator) -> Pick:
    """One choice a path, drawn; the path's weight stays as it is."""

    def pick(joint: Tensor) -> tuple[Tensor, Tensor]:
        drawn = joint.flatten(1).multinomial(1, generator=generator)[:, 0]
        index = torch.unravel_index(drawn, joint.shape[1:])
        return torch.stack([torch.arange(len(joint)), *index], -1), torch.ones_like(
            joint[:, 0, 0, 0, 0]
        )

    return pick


def play(world: World, policy: Policy, pick: Pick = list_all, *, limit=None, copies=1) -> Episodes:
    """All episodes with their probabilities; or, with `sample`, `copies` drawn from each state to start in.

    After `limit` turns they are truncated.
    """
    limit, states = limit or world.horizon, len(world.start)
    state = torch.arange(states).repeat(copies)
    going = Group(
        torch.zeros(len(state), 0, len(COLUMNS), dtype=torch.int64),
        world.start.repeat(copies) / copies,
        state,
        torch.full_like(state, policy.subgoal.shape[-1]),
    )
    groups = []
    for turn in range(limit):
        index, chance = pick(join_choices(world, policy, turn, going.state, going.held))
        path, switch, subgoal, action, state = index.T
        columns = (
            torch.full_like(path, turn),
            going.state[path],
            going.held[path],
            switch,
            subgoal,
            action,
        )
        past = torch.cat([going.past[path], torch.stack(columns, -1)[:, None]], 1)
        played = Group(past, going.probability[path] * chance, state, subgoal)
        over = (state == states) | (turn == limit - 1)
        groups.append(played.take(over))
        going = played.take(~over)
    return join(world, groups)


def join_choices(world: World, policy: Policy, turn: int, state: Tensor, held: Tensor) -> Tensor:
    """The probability of all that one turn of each path can be, [paths, 2, O, A, S + 1]."""
    now = policy.at(turn)
    named = now.subgoal[state, held]  # [paths, O]
    kept = one_hot(held, named.shape[-1] + 1)[:, :-1].to(named) if turn else named
    return (
        now.switch[state, held][:, :, None, None, None]
        * torch.stack([kept, named], 1)[:, :, :, None, None]
        * now.action[state][:, None, :, :, None]
        * world.moves_at(turn)[state][:, None, None]
    )


class Group(NamedTuple):
    """Paths of one length."""

    past: Tensor  # int64 [paths, turns, COLUMNS]
    probability: Tensor  # [paths]
    state: Tensor  # int64 [paths], after the last turn
    held: Tensor  # int64 [paths], likewise

    def take(self, mask: Tensor) -> Group:
        return Group(*(part[mask] for part in self))


def join(world: World, groups: list[Group]) -> Episodes:
    """One after the other."""
    lengths = [torch.full_like(group.state, group.past.shape[1]) for group in groups]
    turns = torch.cat([group.past.flatten(0, 1) for group in groups])  # [turns, COLUMNS]
    columns = dict(zip(COLUMNS, turns.unbind(-1), strict=True))
    state = torch.cat([group.state for group in groups])
    return Episodes(
        probability=torch.cat([group.probability for group in groups]),
        lengths=torch.cat(lengths),
        terminated=state == len(world.start),
        state=state,
        held=torch.cat([group.held for group in groups]),
        columns=columns,
        rewards=world.rewards[columns["state"], columns["action"]],
    )


def give_credit(
    name: str,
    episodes: Episodes,
    tables: Tables,
    config: AdvantageConfig,
    after: Tensor | None = None,
) -> Credit:
    """An estimator's, with the values of `tables`. Truncated episodes bootstrap from the table `after`
    [T + 1, S, O + 1], by what follows their last turn; None: from 0."""
    turn, state, held = (episodes.columns[name] for name in ("turn", "state", "held"))
    low = tables.low[turn, state, episodes.columns["subgoal"]]
    values = [low, tables.high[turn, state, held], tables.switch[turn, state, held]]
    bootstrap = torch.zeros_like(episodes.probability)
    if after is not None:
        cut = ~episodes.terminated
        bootstrap[cut] = after[episodes.lengths[cut], episodes.state[cut], episodes.held[cut]]
    estimate = estimators.find(name)
    return estimate(view_turns(episodes), Values(torch.stack(values, -1), bootstrap), config)


def view_turns(episodes: Episodes) -> Turns:
    """What an estimator sees; every response names all three roles."""
    switch = episodes.columns["switch"] == SWITCH
    ends = episodes.lengths.cumsum(0)
    return Turns(
        rewards=episodes.rewards,
        switch=switch,
        valid=torch.ones_like(switch),
        roles=torch.full_like(switch, EVERY_ROLE, dtype=torch.uint8),
        state=episodes.columns["state"],
        cu_turns=torch.cat([ends.new_zeros(1), ends]).int(),
        cu_tokens=torch.arange(len(switch) + 1).int(),
        terminated=episodes.terminated,
        group=torch.arange(len(ends)),
    )


def flatten(tables: Tables) -> Tables:
    """As flat GAE's critic has them: V_high learns from every turn, and so the value before its decisions."""
    return tables._replace(high=tables.switch)


class Terms(NamedTuple):
    """What each turn adds to the gradient of one role's table."""

    row: tuple[Tensor, ...]  # indices of the table's rows, int64 [turns] each, the turn first
    vectors: Tensor  # [turns, choices], advantage x d log pi / d logits


def find_terms(policy: Policy, episodes: Episodes, credit: Credit) -> Policy:
    """The policy-gradient terms of the three roles: the advantages of a role's levels add up."""
    turn, state, held, switch, subgoal, action = (episodes.columns[name] for name in COLUMNS)
    every = torch.ones_like(episodes.boundary)
    parts = (
        (reference.SWITCH, policy.switch, (turn, state, held), switch, every),
        (reference.SUBGOAL, policy.subgoal, (turn, state, held), subgoal, episodes.boundary),
        (reference.ACTION, policy.action, (turn, state, subgoal), action, every),
    )
    terms = []
    for role, table, row, chosen, decided in parts:
        levels = [level for level in credit.levels if level.roles & role]
        advantages = sum(
            level.advantages * (level.carried & decided) for level in levels
        )  # [turns] or 0
        log_p = table[row].log_softmax(-1)  # [turns, choices]
        scores = one_hot(chosen, table.shape[-1]) - log_p.exp()
        terms.append(Terms(row, torch.as_tensor(advantages).reshape(-1, 1) * scores))
    return Policy(*terms)


def expect(policy: Policy, episodes: Episodes, terms: Policy) -> Policy:
    """The expected estimate, each turn's [T, ...] apart, as `find_gradient` has it."""
    weight = episodes.probability[episodes.episode, None]  # [turns, 1]
    return Policy(*(
        torch.zeros_like(table).index_put(term.row, weight * term.vectors, accumulate=True)
        for table, term in zip(policy, terms, strict=True)
    ))  # fmt: skip


def estimate_each(policy: Policy, episodes: Episodes, terms: Policy) -> Policy:
    """The estimates of single episodes, for a policy that is the same at every turn: [episodes, ...]."""
    count = len(episodes.lengths)
    return Policy(*(
        table.new_zeros(count, *table.shape[1:]).index_put(
            (episodes.episode, *term.row[1:]), term.vectors, accumulate=True
        )
        for table, term in zip(policy, terms, strict=True)
    ))  # fmt: skip


def find_variance(episodes: Episodes, estimates: Policy) -> Policy:
    """E |g - E g|^2 of one episode's estimate, a number a role."""
    weight = episodes.probability[:, None]
    flat = (table.flatten(1) for table in estimates)
    return Policy(*(
        ((weight * g.square()).sum() - (weight * g).sum(0).square().sum()).item() for g in flat
    ))  # fmt: skip
