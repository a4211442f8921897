"""What is wrong with a run, said while it is wrong: rules over the rows of metrics.jsonl.

Alerts are a function of the rows alone. So a resumed run, which first reads those it has, says
what it would have said uninterrupted, and the report finds the same alerts in the file.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

HELD = 3  # rows in a row for which a value must be out of bounds, or within them again
FIRST = 3  # values whose mean "the first updates" had
MANY = 0.2  # of the turns: worth a word at once
POLICY_METRICS = (  # that are 0 while the critic trains alone
    "loss/policy", "loss/kl", "loss/entropy", "loss/clip_fraction", "optim/grad_norm",
)  # fmt: skip
VALUE_LOSS, CRITIC = "loss/value", "value/"
LEAST_TURNS = 3  # of an episode, below which one segment is no sign of anything

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Limit:
    """What a value should not cross, given the ones before it."""

    text: str
    is_crossed: Callable[[float, Sequence[float]], bool]


def above(limit: float, of: str = "") -> Limit:
    return Limit(f"above {limit:g}{of}", lambda value, past: value > limit)


def below(limit: float) -> Limit:
    return Limit(f"below {limit:g}", lambda value, past: value < limit)


def below_first(drop: float) -> Limit:
    """`drop` below the first updates' mean."""

    def is_crossed(value: float, past: Sequence[float]) -> bool:
        return len(past) >= FIRST and value < math.fsum(past[:FIRST]) / FIRST - drop

    return Limit(f"more than {drop:g} below the first updates", is_crossed)


def above_first(times: float, least: float) -> Limit:
    """`times` the first updates' mean, and `least`."""

    def is_crossed(value: float, past: Sequence[float]) -> bool:
        first = math.fsum(past[:FIRST]) / FIRST
        return len(past) >= FIRST and value > max(least, times * first)

    return Limit(f"above {least:g} and {times:g} times the first updates", is_crossed)


def below_best(drop: float) -> Limit:
    def is_crossed(value: float, past: Sequence[float]) -> bool:
        return value < max(past, default=value) - drop

    return Limit(f"more than {drop:g} below the best", is_crossed)


def read_number(row: Row, key: str) -> float | None:
    """None where it is not there, or was not finite."""
    return read_finite(row.get(key))


def read_finite(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def read_trained(row: Row, key: str) -> float | None:
    """None while the critic trains alone, when the policy's metrics are 0."""
    trains = row.get("loss/policy") or "policy/clip_fraction_action" in row
    return read_number(row, key) if trains else None


def read_learned(row: Row, key: str) -> float | None:
    """None too for the loss of a critic where there is none; what is no metric of learning is read as it is."""
    if key in POLICY_METRICS:
        return read_trained(row, key)
    if key == VALUE_LOSS and not row.get(key) and not any(k.startswith(CRITIC) for k in row):
        return None
    return read_number(row, key)


def read_share_of_episode(row: Row, key: str) -> float | None:
    value, turns = read_number(row, key), read_number(row, "rollout/turns")
    return value / turns if value is not None and turns and turns >= LEAST_TURNS else None


def read_share_of_turns(row: Row, key: str) -> float | None:
    """Of all turns of the update or evaluation; `key` is a count."""
    stage = key.partition("/")[0]
    kept = "eval/episodes" if stage == "eval" else "episodes"
    count, turns, episodes = (read_number(row, k) for k in (key, f"{stage}/turns", kept))
    if count is None or not turns or not episodes:
        return None
    return count / (turns * (episodes if stage == "eval" else episodes / row["step"]))


def read_of_present_weights(row: Row, key: str) -> float | None:
    """None for episodes of older weights, as rollout.ahead has them."""
    return read_number(row, key) if "fidelity/tolerance" in row else None


def read_share_of_tolerance(row: Row, key: str) -> float | None:
    value, tolerance = read_number(row, key), read_number(row, "fidelity/tolerance")
    return value / tolerance if value is not None and tolerance else None


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of docs/training.md's table; `metric` may be a pattern of keys."""

    metric: str
    limit: Limit
    wrong: str
    cure: str
    held: int = HELD
    at_once: Limit | None = None  # beyond which one row is enough
    read: Callable[[Row, str], float | None] = read_number


RULES = (
    Rule(
        "rollout/switch_rate", above(0.9),
        "nearly every turn begins a new subgoal",
        "bring reward.keep closer to 0, or above it",
    ),
    Rule(
        "rollout/segment_length", above(0.9, " of the episode"),
        "one subgoal is kept for the whole episode",
        "set reward.keep below 0 (the paper: -0.3), raise train.entropy_coef",
        read=read_share_of_episode,
    ),
    Rule(
        "rollout/valid_rate", below(0.5),
        "most responses do not keep the format",
        "give a warm start, a longer agent.max_response_tokens or a larger model",
    ),
    Rule(
        "rollout/valid_rate", below_first(0.05),
        "the policy loses the format",
        "lower train.lr, raise train.kl_coef, leave advantage.malformed on",
    ),
    Rule(
        "rollout/near_miss_rate", above(0.1),
        "many actions would be admissible without their quotes, full stop or capitals",
        "give a warm start, or a line in the prompt that asks for the bare command",
    ),
    Rule(
        "rollout/success", below(0.01),
        "all episodes are lost: nothing shows the way",
        "give a warm start, easier games or a larger env.max_turns",
    ),
    Rule(
        "rollout/success", above(0.99),
        "all episodes are won: nothing is left to learn",
        "stop, or play harder games",
    ),
    Rule(
        "rollout/groups_alike", above(0.8),
        "in most groups all episodes have the same return and teach nothing",
        "raise train.group or agent.temperature, play games of middling difficulty",
    ),
    Rule(
        "*/truncated_prompts", above(0.01, " of the turns"),
        "prompts are cut",
        "raise agent.max_prompt_tokens or lower agent.history",
        read=read_share_of_turns, at_once=above(MANY, " of the turns"),
    ),
    Rule(
        "*/responses_at_limit", above(0.05, " of the turns"),
        "responses end where they may not go on, not where they would",
        "raise agent.max_response_tokens, or give a warm start that teaches the format",
        read=read_share_of_turns, at_once=above(MANY, " of the turns"),
    ),
    Rule(
        "value/explained_*", below(0),
        "the critic is worse than a constant",
        "raise train.critic_updates, lower train.critic_lr, or take model.critic: separate",
        held=5,
    ),
    Rule(
        "loss/kl", above(0.3),
        "the policy has run far from its reference; the format tends to go next",
        "lower train.lr, raise train.kl_coef",
        read=read_trained,
    ),
    Rule(
        "policy/entropy_action", below(0.01),
        "actions are no longer chosen, only repeated: nothing new is tried",
        "raise train.entropy_coef, lower train.lr",
    ),
    Rule(
        "policy/entropy_*", above_first(2, least=0.1),
        "that role's tokens become random",
        "lower train.entropy_coef and train.lr, raise train.kl_coef",
    ),
    Rule(
        "loss/clip_fraction", above(0.2),
        "steps are too long: the clip cuts much of the gradient off",
        "lower train.lr or train.minibatches; in bfloat16 try train.old_logprobs: recomputed",
        read=read_trained,
    ),
    Rule(
        "fidelity/logprob_mean_abs", above(1, " of fidelity/tolerance"),
        "the engine samples from another policy than the one that trains",
        "see that it heeds agent.temperature, leaves no tokens out (top-k, top-p) and has the newest weights; for its "
        "numerics train.old_logprobs: recomputed with train.importance_cap: 2 corrects",
        read=read_share_of_tolerance,
    ),
    Rule(
        "fidelity/outside_clip", above(0.01),
        "the clip cuts gradients off for what the engine's log-probs differ from the trainer's",
        "train.old_logprobs: recomputed with train.importance_cap: 2, or model.dtype: float32",
        read=read_of_present_weights,
    ),
    Rule(
        "optim/grad_norm", below(1e-8),
        "the policy gets no gradient",
        "look at rollout/success and rollout/groups_alike: returns that are all alike give none",
        read=read_trained,
    ),
    Rule(
        "optim/skipped_steps", above(0),
        "loss or gradient was not finite and steps were left out",
        "lower train.lr; train.max_skipped of them in a row end the run",
        held=1,
    ),
    Rule(
        "eval/success", below_best(0.1),
        "the policy has become worse on unseen games",
        "go back to the best checkpoint, with a lower train.lr or a higher train.kl_coef",
        held=2,
    ),
)  # fmt: skip


@dataclass(slots=True)
class Alert:
    """Something that has been wrong since an update; `until`: the first at which it no longer was."""

    rule: Rule
    metric: str
    value: float  # when it was noticed
    since: int
    until: int | None = None

    def __str__(self) -> str:
        return (
            f"warning: {self.metric} is {self.value:.3g}, {self.rule.limit.text} since update "
            f"{self.since}: {self.rule.wrong}; {self.rule.cure}"
        )


@dataclass(slots=True)
class Watch:
    """One rule over one metric: the values so far, and the alert that holds."""

    rule: Rule
    metric: str
    past: list[float] = field(default_factory=list)
    alert: Alert | None = None
    since: int = 0  # when values began to contradict what was said last
    contrary: int = 0  # how many in a row do

    def see(self, step: int, value: float) -> str:
        """What is to be said of the next value, or nothing."""
        crossed = self.rule.limit.is_crossed(value, self.past)
        self.past.append(value)
        if crossed == (self.alert is not None):
            self.contrary = 0
            return ""
        self.since = self.since if self.contrary else step
        self.contrary += 1
        needed = 1 if crossed and self.is_drastic(value) else self.rule.held
        if self.contrary < needed:
            return ""
        self.contrary = 0
        return self.warn(value) if crossed else self.mend(value)

    def is_drastic(self, value: float) -> bool:
        return self.rule.at_once is not None and self.rule.at_once.is_crossed(value, self.past)

    def warn(self, value: float) -> str:
        self.alert = Alert(self.rule, self.metric, value, self.since)
        return str(self.alert)

    def mend(self, value: float) -> str:
        self.alert.until, self.alert = self.since, None
        limit = self.rule.limit.text
        return f"mended: {self.metric} is {value:.3g}, not {limit} since update {self.since}"


class Health:
    """Reads a run's rows, in their order, and says once when something begins and once when it ends."""

    def __init__(self, rows: Iterable[Row] = ()):
        self.alerts: list[Alert] = []  # all so far, by when they were noticed
        self._watches: dict[tuple[Rule, str], Watch] = {}
        for row in rows:
            self.read(row)

    def read(self, row: Row) -> list[str]:
        """What the row gives reason to say."""
        said = []
        for rule, metric in [(rule, key) for key in row for rule in find_rules(key)]:
            value = rule.read(row, metric)
            watch = self._watches.setdefault((rule, metric), Watch(rule, metric))
            text = "" if value is None else watch.see(row["step"], value)
            if text:
                said.append(text)
            if text and watch.alert:
                self.alerts.append(watch.alert)
        return said


@functools.cache
def find_rules(key: str) -> tuple[Rule, ...]:
    """Those that watch a metric."""
    return tuple(rule for rule in RULES if fnmatchcase(key, rule.metric))
