"""One update of a policy on the same turns, packed or padded as the reference does it, in a process of its own.

python benchmarks/policy_update.py {packed,shared,padded} {alfworld,tiny}

shared: packed, and what prompts begin with is read once: here a seventh of each, about what an update's minibatches
of ALFWorld share. padded: every prompt left-padded to 2,048 tokens, every response right-padded to 512, all logits
through transformers, log-probs and loss in torch operations. All run microbatches of at most the same number of tokens
and end in a step of AdamW. Lengths are drawn around those of the reference's logs (prompts 740 tokens, responses 38).
"""

from __future__ import annotations

import ctypes
import functools
import json
import sys
import time
from dataclasses import dataclass

import torch
from peak_memory import memory
from torch import Tensor
from torch.nn.functional import pad
from transformers import Qwen2Config, Qwen2ForCausalLM

from hiper_fast import ops
from hiper_fast.agent import attention
from hiper_fast.agent.agent import run_trunk
from hiper_fast.learn.rows import Rows
from hiper_fast.packing import microbatches
from hiper_fast.rollout.trajectory import Episode, Trajectories, pack


@dataclass(frozen=True)
class Size:
    turns: int
    prompt: int  # tokens a padded prompt has
    response: int
    budget: int
    hidden: int
    layers: int
    vocabulary: int


SIZES = {
    "alfworld": Size(12, 2048, 512, 8192, 256, 4, 8192),
    "tiny": Size(5, 128, 32, 512, 16, 1, 60),
}


@dataclass
class Update:
    model: Qwen2ForCausalLM
    t: Trajectories
    advantages: Tensor
    ref_logprobs: Tensor

    @property
    def wide(self) -> torch.dtype:
        """Of log-probs: at least float32."""
        return torch.promote_types(self.model.dtype, torch.float32)


def inputs(size: Size, dtype: torch.dtype = torch.float32) -> Update:
    """Turns of random tokens and a random model."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=11 * size.hidden // 4,
        num_hidden_layers=size.layers, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return draw_turns(Qwen2ForCausalLM(config).to(dtype), size, dtype)


def draw_turns(model: Qwen2ForCausalLM, size: Size, dtype: torch.dtype) -> Update:
    """Turns of random tokens whose old and reference log-probs are near those of an untrained model."""
    g = torch.Generator().manual_seed(0)

    def ids(mean: int, spread: int, most: int) -> list[int]:
        length = mean + int(spread * torch.randn((), generator=g))
        return torch.randint(2, size.vocabulary, (min(most, max(1, length)),), generator=g).tolist()

    p, r = size.prompt, size.response
    episodes = [
        Episode("", "", terminated=True, prompts=[ids(p * 740 // 2048, p // 13, p)], rewards=[0.0],
                responses=[ids(r * 38 // 512, r // 64, r)])
        for _ in range(size.turns)
    ]  # fmt: skip
    common = p * 740 // 2048 // 7
    for episode in episodes:
        episode.prompts[0][:common] = episodes[0].prompts[0][:common]
        episode.logprobs = [[0.0] * len(episode.responses[0])]
    t = pack(episodes, roles_of_nothing)
    near = (torch.randn(3, t.response_ids.numel(), generator=g) * 0.3).to(dtype)
    t.old_logprobs, ref_logprobs = near[:2] - torch.log(torch.tensor(size.vocabulary))
    return Update(model, t, near[2], ref_logprobs)


def roles_of_nothing(ids: Tensor, cu_tokens: Tensor):
    """What `find_roles` returns, where nobody asks for roles."""
    every = cu_tokens[1:] > 0
    return torch.ones_like(ids), every, torch.zeros(len(every), 3, dtype=torch.int32), every


def packed(x: Update, size: Size, *, share: bool = False) -> tuple[float, int]:
    """Gradients of the update; (loss, tokens computed)."""
    attention.use(x.model)
    device = x.model.device
    sequences, every = x.t.sequences(), torch.ones_like(x.t.roles, dtype=torch.bool)
    total = computed = 0
    for batch in microbatches(sequences.ids, sequences.cu_seqlens, size.budget, share=share):
        rows = Rows(sequences, batch, every)
        values = x.t.response_ids, x.t.old_logprobs, x.advantages, x.ref_logprobs
        *data, ref_logprobs = (v[rows.tokens].to(device) for v in values)
        hidden = run_trunk(x.model.base_model, batch.to(device))[rows.token_rows.to(device)]
        loss, _ = ops.linear_ppo(
            hidden, x.model.lm_head.weight, *data,
            ref_logprobs=ref_logprobs, denominator=len(every),
        )  # fmt: skip
        loss.backward()
        total, computed = total + loss.item(), computed + batch.input_ids.numel()
    return total, computed


def padded(x: Update, size: Size) -> tuple[float, int]:
    """The same in the reference's layout."""
    device, lengths = x.model.device, x.t.cu_tokens.diff().tolist()
    prompts = x.t.prompt_ids.split(x.t.cu_prompts.diff().tolist())

    def right(values: Tensor) -> Tensor:
        each = [pad(v, (0, size.response - len(v))) for v in values.split(lengths)]
        return torch.stack(each).to(device)

    responses, mask = right(x.t.response_ids), right(torch.ones_like(x.t.response_ids))
    inputs, attended = (
        torch.stack([pad(p, (size.prompt - len(p), 0)) for p in each]).to(device)
        for each in (prompts, [torch.ones_like(p) for p in prompts])
    )
    attended = torch.cat([attended, mask], 1)
    inputs, positions = torch.cat([inputs, responses], 1), (attended.cumsum(1) - 1).clamp(min=0)
    data = [right(v) for v in (x.t.old_logprobs, x.advantages, x.ref_logprobs)]
    total = 0.0
    for part in torch.arange(size.turns).split(max(1, size.budget // inputs.shape[1])):
        out = x.model(
            input_ids=inputs[part], attention_mask=attended[part], position_ids=positions[part]
        )
        log_p = torch.log_softmax(out.logits[:, size.prompt - 1 : -1], -1, dtype=x.wide)
        logprobs = log_p.gather(-1, responses[part, :, None])[..., 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
        each = ppo_terms(logprobs, *(v[part] for v in data), entropy)
        loss = (each * mask[part]).sum() / mask.sum()
        loss.backward()
        total += loss.item()
    return total, inputs.numel()


def ppo_terms(
    logprobs: Tensor, old: Tensor, advantages: Tensor, ref: Tensor, entropy: Tensor
) -> Tensor:
    """Each token's loss with ppo_loss's default options."""
    ratio = (logprobs - old).exp()
    policy = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    policy = torch.where(advantages < 0, torch.minimum(policy, -3 * advantages), policy)
    d = ref - logprobs
    return policy + 0.01 * (d.exp() - d - 1).clamp(-10, 10) - 0.001 * entropy


LAYOUTS = {"packed": packed, "shared": functools.partial(packed, share=True), "padded": padded}


def main() -> None:
    layout, size = sys.argv[1], SIZES[sys.argv[2]]
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    x = inputs(size)
    optimizer = torch.optim.AdamW(x.model.parameters(), lr=1e-6)
    ctypes.CDLL(None).malloc_trim(0)
    before, began = memory("VmRSS"), time.process_time()
    loss, tokens = LAYOUTS[layout](x, size)
    norm = torch.nn.utils.clip_grad_norm_(x.model.parameters(), 1.0).item()
    optimizer.step()
    seconds = time.process_time() - began
    states = 3 * sum(
        p.nbytes for p in x.model.parameters()
    )  # gradients and AdamW's moments: of every layout
    peak = memory("VmHWM") - before - states
    print(
        json.dumps(
            {
                "loss": loss,
                "grad_norm": norm,
                "tokens": tokens,
                "seconds": seconds,
                "beyond_states": peak,
            }
        )
    )


if __name__ == "__main__":
    main()
