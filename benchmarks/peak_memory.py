"""The most memory that a loss's forward and backward held beyond its gradients, in a process of its own.

python benchmarks/peak_memory.py {op,materialised} N H V
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from hiper_fast import ops


def head_inputs(n: int, h: int, v: int) -> SimpleNamespace:
    """What a head of width h over v tokens gets for n loss rows; the old log-probs are near the present ones."""
    g = torch.Generator().manual_seed(0)
    x = SimpleNamespace(targets=torch.randint(0, v, (n,), generator=g))
    x.hidden, x.weight = (torch.randn(rows, h, generator=g).mul_(h**-0.25) for rows in (n, v))
    parts = zip(
        x.hidden.split(8), x.targets.split(8), strict=True
    )  # few at a time, to leave no peak of its own
    chosen = torch.cat(
        [ops.linear_logprobs(hidden, x.weight, targets) for hidden, targets in parts]
    )
    x.old, x.ref = (chosen + 0.2 * torch.randn(n, generator=g) for _ in range(2))
    x.advantages = torch.randn(n, generator=g)
    x.hidden.requires_grad_()
    x.weight.requires_grad_()
    return x


def loss(which: str, x: SimpleNamespace) -> torch.Tensor:
    """op: linear_ppo. materialised: all logits, their log_softmax, and autograd."""
    if which == "op":
        return ops.linear_ppo(
            x.hidden, x.weight, x.targets, x.old, x.advantages, ref_logprobs=x.ref
        )[0]
    log_p = torch.log_softmax(x.hidden @ x.weight.T, dim=1)
    logprobs = log_p.gather(1, x.targets[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(dim=1)
    return torch_ppo_loss(logprobs, x.old, x.advantages, x.ref, entropy)


def torch_ppo_loss(logprobs, old, advantages, ref, entropy):
    """ppo_loss with its default options over tokens that all count, in torch operations."""
    ratio = (logprobs - old).exp()
    policy = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    policy = torch.where(advantages < 0, torch.minimum(policy, -3 * advantages), policy)
    d = ref - logprobs
    return (policy + 0.01 * (d.exp() - d - 1).clamp(-10, 10) - 0.001 * entropy).mean()


def main() -> None:
    which, sizes = sys.argv[1], map(int, sys.argv[2:])
    torch.set_num_threads(1)
    x = head_inputs(*sizes)
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed is still there, and would serve unseen
    before = memory("VmRSS")
    began = time.process_time()
    (loss(which, x) / 3).backward()  # a share of a batch: backward has something to scale
    seconds = time.process_time() - began
    gradients = x.hidden.grad.nbytes + x.weight.grad.nbytes
    print(
        json.dumps({"seconds": seconds, "beyond_gradients": memory("VmHWM") - before - gradients})
    )


def memory(name: str) -> int:
    """Bytes this process has (VmRSS) or had at most (VmHWM) in memory; only Linux tells both."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
