"""Randomness of a run as a pure function of where the run is.

Every draw of a step comes from a generator seeded by (seed, what it is for, step, rank, part). Nothing is carried from
step to step, so a resumed run, another number of loader workers, or a run beside it draws exactly the same numbers.
"""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, purpose: str, *where: int) -> int:
    """A 63-bit seed for one purpose at one place of a run."""
    text = "/".join([str(seed), purpose, *map(str, where)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *where: int) -> torch.Generator:
    """A CPU generator for one purpose at one place of a run."""
    return torch.Generator().manual_seed(derive(seed, purpose, *where))
