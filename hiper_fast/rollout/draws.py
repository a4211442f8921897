"""Random numbers of single requests: a function of their seed, whenever and beside whatever they are answered."""

from __future__ import annotations

import hashlib
import struct

import numpy as np

# SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
STEP = 0x9E3779B97F4A7C15
ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def mix(*numbers: int) -> int:
    """A seed in [0, 2**63) for what these int64 numbers name: a run's draw, an episode, a turn."""
    text = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def uniforms(seed: int, count: int) -> np.ndarray:
    """The numbers that a seed stands for: float64 [count] in [0, 1), one for each token of a response."""
    states = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(STEP) + np.uint64(seed)
    for shift, factor in ROUNDS:
        states = (states ^ (states >> np.uint64(shift))) * np.uint64(factor)
    return (states >> np.uint64(11)) * 2.0**-53
