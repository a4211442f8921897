"""Credit for turns. Each file of this folder is one estimator: `estimate(turns, values, config) -> Credit`.

`advantage.estimator` names one: a file here, a name given to `register`, an entry point of the group
hiper_fast.estimators, or package.module:function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hiper_fast.ops import reference
from hiper_fast.plugins import Plugins

LOW, HIGH, SWITCH = range(3)  # the critic's heads: columns of values
EVERY_ROLE = reference.ACTION | reference.SUBGOAL | reference.SWITCH


@dataclass(frozen=True, slots=True)
class Turns:
    """All that an estimator may know of a batch of episodes."""

    rewards: Tensor  # float32 [turns], shaping included
    switch: Tensor  # bool [turns], the response opens a segment
    valid: Tensor  # bool [turns], it keeps the format
    roles: Tensor  # uint8 [turns], the roles that its tokens have: ACTION | SUBGOAL | SWITCH of ops.reference
    state: Tensor  # int64 [turns]; equal in a group: the same observation and commands
    cu_turns: Tensor  # int32 [trajectories + 1]
    cu_tokens: Tensor  # int32 [turns + 1], response tokens
    terminated: Tensor  # bool [trajectories]; the others were truncated
    group: Tensor  # int64 [trajectories]; equal: episodes of the same game


@dataclass(frozen=True, slots=True)
class Values:
    """What the critic says of them."""

    turns: Tensor | None  # float32 [turns, 3], columns LOW, HIGH, SWITCH; None: read at tokens
    bootstrap: Tensor  # float32 [trajectories], V_high after the last turn; 0 but for `advantage.bootstrap: next_state`
    tokens: Tensor | None = (
        None  # float32 [tokens, 3], where each response token is predicted; None: read at turns
    )

    @property
    def places(self) -> Tensor:
        """Wherever the critic was read, float32 [turns or tokens, 3]."""
        return self.turns if self.tokens is None else self.tokens


@dataclass(frozen=True, slots=True)
class Level:
    """Credit on one scale of time, for the tokens of some roles; a number a turn, or a token."""

    name: str
    roles: int  # whose tokens take the advantage; a token of several of them takes it once
    advantages: Tensor  # float32 [turns]
    carried: Tensor  # bool [turns]: whose tokens it trains
    returns: Tensor | None = (
        None  # float32 [turns], what the value should have been; None: no critic
    )
    learned: Tensor | None = None  # bool [turns]: from which the value's head learns
    head: int = HIGH
    raw: bool = True  # advantage.normalize applies; False: the advantages are as they are to be
    per_token: bool = False  # all four are [tokens] instead


@dataclass(frozen=True, slots=True)
class Credit:
    """What an estimator gives. The advantages of a token that is of several levels add up."""

    levels: tuple[Level, ...]


Estimator = Callable[..., Credit]  # (turns: Turns, values: Values | None, config: AdvantageConfig)

_plugins = Plugins(
    "estimator", "advantage.estimator",
    package="hiper_fast.estimators", attribute="estimate", group="hiper_fast.estimators",
)  # fmt: skip
find, names, register = _plugins.find, _plugins.names, _plugins.register


def requires(
    *, values: bool = True, groups: bool = False, tokens: bool = False
) -> Callable[[Estimator], Estimator]:
    """Says what an estimator needs, where it is not the usual: without values no critic is made, and it
    gets None for them; with groups a run must play each game several times (`train.group`); with tokens
    the critic is read at every response token instead of at turns, and levels with returns are `per_token`."""

    def mark(estimate: Estimator) -> Estimator:
        estimate.needs_values, estimate.needs_groups = values, groups
        estimate.needs_tokens = tokens
        return estimate

    return mark


def needs_values(estimate: Estimator) -> bool:
    return getattr(estimate, "needs_values", True)


def needs_groups(estimate: Estimator) -> bool:
    return getattr(estimate, "needs_groups", False)


def needs_tokens(estimate: Estimator) -> bool:
    return getattr(estimate, "needs_tokens", False)
