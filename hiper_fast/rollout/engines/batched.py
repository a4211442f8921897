"""The built-in engine: the model that trains, all requests at hand in left-padded batches."""

from __future__ import annotations

import torch

from hiper_fast.agent.agent import Agent
from hiper_fast.agent.generate import Past, generate
from hiper_fast.config import Config
from hiper_fast.rollout.engines import Answer, Request


class Engine:
    """The same seed, weights and requests give the same answers.

    Of conversations it keeps the keys and values: a request reads its new tokens only.
    """

    def __init__(self, agent: Agent, config: Config, *, temperature: float, seed: int):
        self.agent, self.config, self.temperature = agent, config.agent, temperature
        self.generator = torch.Generator().manual_seed(seed)
        self.known: dict[
            int, tuple[list[int], Past]
        ] = {}  # conversation -> ids read and said, their past

    def answer(self, requests: list[Request]) -> list[Answer]:
        conversations = [request.conversation for request in requests]
        continued = any(conversation is not None for conversation in conversations)
        pasts = [self.take_past(request) for request in requests] if continued else None
        self.known.clear()  # those of finished episodes go
        with self.agent.eager():
            samples = generate(
                self.agent.model,
                [request.ids for request in requests],
                max_new_tokens=self.config.max_response_tokens,
                temperature=self.temperature,
                stop_ids=self.agent.stop_ids,
                generator=self.generator,
                batch_tokens=self.config.batch_tokens,
                pasts=pasts,
                vocabulary=self.agent.head.vocabulary,
            )
        if continued:
            for request, (ids, _), past in zip(requests, samples, pasts, strict=True):
                self.known[request.conversation] = request.ids + ids, past
        return [Answer(ids, logprobs) for ids, logprobs in samples]

    def take_past(self, request: Request) -> Past | None:
        ids, past = self.known.get(request.conversation, ([], None))
        return (
            past if request.ids[: len(ids)] == ids else None
        )  # a person may have said something else
