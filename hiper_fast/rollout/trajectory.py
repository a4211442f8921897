"""Episodes as a struct of arrays: what a rollout stores, and all that learning reads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from hiper_fast import response
from hiper_fast.ops import reference
from hiper_fast.packing import interleave, prefix_sums, spread


@dataclass(slots=True)
class Turn:
    """One turn as a person reads it; kept for the report, never used for learning."""

    observation: str
    response: str
    subgoal: str | None  # None: no subgoal yet
    action: str


@dataclass(slots=True)
class Episode:
    """One episode as the rollout lived it, before it is packed into `Trajectories`."""

    task: str
    task_type: str
    won: bool = False
    terminated: bool = False
    continued: bool = False  # each prompt continues what was read and answered before: its tokens are the new ones only
    plans: bool = True  # the agent pursues subgoals; False: it only acts
    prompts: list[list[int]] = field(
        default_factory=list
    )  # token ids, a list a turn; truncated: one more, of the end
    responses: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    states: list[int] = field(default_factory=list)  # `key_state` of each turn
    group: int = 0  # equal: episodes of the same game
    truncated_prompts: int = 0
    near_misses: int = 0  # turns whose action was inadmissible for its quotes or the like alone
    responses_at_limit: int = 0  # as long as they may be: most of them were cut
    score: float | None = None  # the environment's own score in [0, 1], where it gives one
    reachable: bool = True  # whether the best score can be had at all


@dataclass(frozen=True, slots=True)
class Lost:
    """An episode that its environment failed in."""

    number: int  # its place among those that were asked for
    cause: str  # crash, error, garbage, memory, timeout
    text: str


@dataclass(slots=True)
class Sequences:
    """What the model reads, packed, and where responses and values stand in it.

    Prompt 0, response 0, prompt 1, response 1, … follow each other; positions count through this stream, so that they
    do not depend on where cu_seqlens cuts it.
    """

    ids: Tensor  # int64 [prompt tokens + tokens]
    cu_seqlens: Tensor  # int32 [sequences + 1]
    token_index: Tensor  # int64 [tokens]: positions of the response tokens, ascending
    value_index: Tensor  # int64 [turns, 3]: positions whose hidden states give the low, high and switch value;
    # or [tokens, 1]: those that predict the response tokens, each for all three

    def __len__(self) -> int:
        return self.cu_seqlens.numel() - 1


@dataclass(slots=True)
class Trajectories:
    """A batch of episodes, packed. Sampled ids and log-probs are stored as drawn, never re-tokenised."""

    prompt_ids: Tensor  # int64 [prompt tokens]
    cu_prompts: Tensor  # int32 [turns + 1]
    response_ids: Tensor  # int64 [tokens]
    cu_tokens: Tensor  # int32 [turns + 1]
    old_logprobs: Tensor  # float32 [tokens]
    rewards: Tensor  # float32 [turns], shaping included once `shape_rewards` has run
    cu_turns: Tensor  # int32 [trajectories + 1]
    terminated: Tensor  # bool [trajectories]; the others were truncated
    won: Tensor  # bool [trajectories]
    continued: bool  # the turns of a trajectory continue each other: prompts hold new tokens only
    final_ids: Tensor  # int64, prompts of the states after the last turns of truncated episodes
    cu_final: Tensor  # int32 [trajectories + 1]; empty ranges where terminated
    roles: Tensor  # uint8 [tokens]
    switch: Tensor  # bool [turns]
    value_index: Tensor  # int32 [turns, 3]: low, high, switch; offsets into the response
    valid: Tensor  # bool [turns]
    state: Tensor  # int64 [turns]; equal: the same observation and commands
    group: Tensor  # int64 [trajectories]; equal: episodes of the same game
    episodes: list[Episode]
    lost: list[Lost] = field(default_factory=list)  # which are not among them
    updates_behind: int = 0  # by how many the weights that played are older than those of now
    sampled_logprobs: Tensor | None = None  # float32 [tokens], where old_logprobs are recomputed

    @property
    def turns(self) -> int:
        return self.rewards.numel()

    def sequences(self, *, final: bool = False, token_values: bool = False) -> Sequences:
        """One sequence a turn, its prompt, then its response; or one a trajectory, if its turns continue each other.

        `final` lets the trajectories' sequences go on to the states after their last turns; `token_values` has
        values at response tokens instead of at turns.
        """
        packed = self.prompt_ids, self.cu_prompts, self.response_ids, self.cu_tokens
        ids, cu_seqlens = interleave(*packed)
        token_index = torch.arange(self.response_ids.numel())  # [tokens]
        token_index += spread(self.cu_prompts[1:], self.cu_tokens)
        before_response = (self.cu_prompts[1:] + self.cu_tokens[:-1]).long() - 1
        value_index = before_response[:, None] + self.value_index
        if self.continued:
            cu_seqlens = cu_seqlens[self.cu_turns.long()]
        if self.continued and final:
            ids, cu_seqlens = interleave(ids, cu_seqlens, self.final_ids, self.cu_final)
            token_index += spread(self.cu_final[:-1], self.cu_tokens[self.cu_turns.long()])
            value_index += spread(self.cu_final[:-1], self.cu_turns)[:, None]
        if token_values:
            value_index = token_index[:, None] - 1  # [tokens, 1]
        return Sequences(ids, cu_seqlens, token_index, value_index)


def key_state(observation: str, commands: Iterable[str]) -> int:
    """A number for what can be seen and done at a turn, the same in every process."""
    text = "\n".join([observation, *commands]).encode(errors="replace")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


FindRoles = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


def pack(episodes: list[Episode], find_roles: FindRoles) -> Trajectories:
    """Episodes -> Trajectories; `find_roles(response_ids, cu_tokens)` is `ops.find_roles`, pieces bound."""
    prompts = flatten(episode.prompts[: len(episode.responses)] for episode in episodes)
    responses = flatten(episode.responses for episode in episodes)
    finals = [[] if episode.terminated else episode.prompts[-1] for episode in episodes]
    response_ids, cu_tokens = join(responses), measure(responses)
    roles, switch, value_index, valid = find_roles(response_ids, cu_tokens)
    if not all(episode.plans for episode in episodes):
        roles, switch, valid = see_actions_alone(roles, switch, episodes)
    return Trajectories(
        prompt_ids=join(prompts),
        cu_prompts=measure(prompts),
        response_ids=response_ids,
        cu_tokens=cu_tokens,
        old_logprobs=join(flatten(episode.logprobs for episode in episodes), torch.float32),
        rewards=join((episode.rewards for episode in episodes), torch.float32),
        cu_turns=measure(episode.responses for episode in episodes),
        terminated=torch.tensor([episode.terminated for episode in episodes], dtype=torch.bool),
        won=torch.tensor([episode.won for episode in episodes], dtype=torch.bool),
        continued=any(episode.continued for episode in episodes),
        final_ids=join(finals),
        cu_final=measure(finals),
        roles=roles,
        switch=switch,
        value_index=value_index,
        valid=valid,
        state=join(episode.states for episode in episodes),
        group=torch.tensor([episode.group for episode in episodes], dtype=torch.int64),
        episodes=episodes,
    )


def see_actions_alone(
    roles: Tensor, switch: Tensor, episodes: list[Episode]
) -> tuple[Tensor, Tensor, Tensor]:
    """Roles [tokens], switch and valid [turns] where nothing but an action is asked for."""
    said = (turn.response for episode in episodes for turn in episode.turns)
    valid = [response.parse(text, plans=False).valid for text in said]
    return roles & reference.ACTION, torch.zeros_like(switch), torch.tensor(valid)


def flatten(lists: Iterable[list]) -> list:
    return list(chain.from_iterable(lists))


def join(lists: Iterable[list], dtype: torch.dtype = torch.int64) -> Tensor:
    """One packed tensor of all lists' numbers."""
    return torch.tensor(flatten(lists), dtype=dtype)


def measure(lists: Iterable[list]) -> Tensor:
    """Prefix sums of the lists' lengths."""
    return prefix_sums([len(one) for one in lists])
