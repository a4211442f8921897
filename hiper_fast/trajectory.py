"""Episodes as a struct of arrays: what a rollout stores, and all that learning reads."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


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
    prompts: list[list[int]] = field(default_factory=list)  # token ids, a list a turn; truncated: one more, of the end
    responses: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    truncated_prompts: int = 0
    score: float | None = None  # the environment's own score in [0, 1], where it gives one
    reachable: bool = True  # whether the best score can be had at all


@dataclass(slots=True)
class Sequences:
    """What the model reads, packed, and where responses and values stand in it.

    Prompt 0, response 0, prompt 1, response 1, … follow each other; positions count through this stream, so that they
    do not depend on where cu_seqlens cuts it.
    """

    ids: Tensor  # int64 [prompt tokens + tokens]
    cu_seqlens: Tensor  # int32 [sequences + 1]
    token_index: Tensor  # int64 [tokens]: positions of the response tokens, ascending
    value_index: Tensor  # int64 [turns, 3]: positions whose hidden states give the low, high and switch value

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
    episodes: list[Episode]

    @property
    def turns(self) -> int:
        return self.rewards.numel()

    def sequences(self, *, final: bool = False) -> Sequences:
        """One sequence a turn, its prompt, then its response; or one a trajectory, if its turns continue each other.

        `final` lets the trajectories' sequences go on to the states after their last turns.
        """
        ids, cu_seqlens = interleave(self.prompt_ids, self.cu_prompts, self.response_ids, self.cu_tokens)
        token_index = torch.arange(self.response_ids.numel()) + spread(self.cu_prompts[1:], self.cu_tokens)
        before_response = (self.cu_prompts[1:] + self.cu_tokens[:-1]).long() - 1
        value_index = before_response[:, None] + self.value_index
        if self.continued:
            cu_seqlens = cu_seqlens[self.cu_turns.long()]
        if self.continued and final:
            ids, cu_seqlens = interleave(ids, cu_seqlens, self.final_ids, self.cu_final)
            token_index += spread(self.cu_final[:-1], self.cu_tokens[self.cu_turns.long()])
            value_index += spread(self.cu_final[:-1], self.cu_turns)[:, None]
        return Sequences(ids, cu_seqlens, token_index, value_index)


def prefix_sums(lengths) -> Tensor:
    """int32 exclusive prefix sums `[0, l0, l0 + l1, …]`."""
    lengths = torch.as_tensor(lengths, dtype=torch.int32)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)])


def ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """int64: `starts[0], starts[0] + 1, …` for `lengths[0]` numbers, then the same of `starts[1]`, and so on."""
    ends = lengths.cumsum(0)
    return torch.arange(int(lengths.sum()), device=starts.device) + (starts - ends + lengths).repeat_interleave(lengths)


def spread(values: Tensor, cu: Tensor) -> Tensor:
    """int64: `values[i]` for every element of range `i`."""
    return values.long().repeat_interleave(cu.diff())


def interleave(a: Tensor, cu_a: Tensor, b: Tensor, cu_b: Tensor) -> tuple[Tensor, Tensor]:
    """Joins ranges `i` of `a` and of `b`, for every `i`, into one packed tensor and its prefix sums."""
    cu = cu_a + cu_b
    out = a.new_empty(int(cu[-1]))
    out[torch.arange(a.numel()) + spread(cu_b[:-1], cu_a)] = a
    out[torch.arange(b.numel()) + spread(cu_a[1:], cu_b)] = b
    return out, cu


def pack(episodes: list[Episode], find_roles) -> Trajectories:
    """Episodes -> Trajectories; `find_roles(response_ids, cu_tokens)` is `ops.find_roles` with the pieces bound."""
    prompts = [p for e in episodes for p in e.prompts[: len(e.responses)]]
    responses = [r for e in episodes for r in e.responses]
    finals = [[] if e.terminated else e.prompts[-1] for e in episodes]

    def flat(lists, dtype=torch.int64):
        return torch.tensor([x for one in lists for x in one], dtype=dtype)

    response_ids, cu_tokens = flat(responses), prefix_sums([len(r) for r in responses])
    roles, switch, value_index, valid = find_roles(response_ids, cu_tokens)
    return Trajectories(
        prompt_ids=flat(prompts),
        cu_prompts=prefix_sums([len(p) for p in prompts]),
        response_ids=response_ids,
        cu_tokens=cu_tokens,
        old_logprobs=flat([row for e in episodes for row in e.logprobs], torch.float32),
        rewards=flat([e.rewards for e in episodes], torch.float32),
        cu_turns=prefix_sums([len(e.responses) for e in episodes]),
        terminated=torch.tensor([e.terminated for e in episodes], dtype=torch.bool),
        won=torch.tensor([e.won for e in episodes], dtype=torch.bool),
        continued=any(e.continued for e in episodes),
        final_ids=flat(finals),
        cu_final=prefix_sums([len(p) for p in finals]),
        roles=roles,
        switch=switch,
        value_index=value_index,
        valid=valid,
        episodes=episodes,
    )
