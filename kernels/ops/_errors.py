"""Errors that only the data can tell, without a synchronisation and without a device-side assertion.

A kernel that meets a bad value clamps it, so that it reads and writes only what it was given, and puts a 1 into its
slot of a buffer in pinned host memory. The host reads that buffer, which costs no synchronisation, before every launch:
the ValueError that names the argument comes with a later call of any op, or with `raise_pending()`. For debugging,
HIPER_FAST_SYNC_ERRORS=1 in the environment waits for the GPU after every launch: it comes with the call that had them.
"""

import functools

import numpy
import torch

HAE_TURNS, GAE_TURNS, SCATTER_TOKENS, ROLES_TOKENS, ROLES_IDS, TARGETS = range(6)
ATTENTION_QUERIES, ATTENTION_LENGTHS, ATTENTION_BLOCKS = range(6, 9)
SAMPLE_UNIFORM, SAMPLE_TEMPERATURE = range(9, 11)
_PREFIX_SUM = "must begin with 0, never fall and end with the number of {}"
_MESSAGES = {
    HAE_TURNS: "hae: cu_turns " + _PREFIX_SUM.format("turns"),
    GAE_TURNS: "gae: cu_turns " + _PREFIX_SUM.format("turns"),
    SCATTER_TOKENS: "scatter_advantages: cu_tokens " + _PREFIX_SUM.format("tokens"),
    ROLES_TOKENS: "find_roles: cu_tokens " + _PREFIX_SUM.format("tokens"),
    ROLES_IDS: "find_roles: token_ids must be in the vocabulary of the pieces",
    ATTENTION_QUERIES: "paged_attention: cu_query " + _PREFIX_SUM.format("tokens"),
    ATTENTION_LENGTHS: "paged_attention: lengths must lie between a sequence's queries and what its blocks hold",
    ATTENTION_BLOCKS: "paged_attention: blocks must be in the pool",
    SAMPLE_UNIFORM: "sample: uniform must lie in [0, 1)",
    SAMPLE_TEMPERATURE: "sample: temperature must be at least 0 and finite",
    TARGETS: "linear_logprobs or linear_ppo: targets must lie in [0, v)",
}


@functools.cache
def _buffers() -> tuple[torch.Tensor, numpy.ndarray]:
    """One buffer for all GPUs, as a tensor for the kernels and as an array for the host."""
    flags = torch.zeros(len(_MESSAGES), dtype=torch.int32, pin_memory=torch.cuda.is_available())
    return flags, flags.numpy()


def flags() -> torch.Tensor:
    """The buffer for a kernel to write to."""
    return _buffers()[0]


def raise_pending(synchronize: bool = True) -> None:
    """Raise the ValueError of an earlier op whose kernel met bad values on a GPU, once.

    Args:
        synchronize: wait for the kernels that still run, so that none of their errors is missed.
    """
    if synchronize and torch.cuda.is_available():
        torch.cuda.synchronize()
    found = _buffers()[1]
    if found.any():
        slot = int(found.nonzero()[0][0])
        found[slot] = 0
        raise ValueError(
            f"{_MESSAGES[slot]}; a call on a GPU, perhaps an earlier one, had others, and its results are not to be "
            "used (HIPER_FAST_SYNC_ERRORS=1 in the environment raises this at that call)"
        )
