"""Seed the random numbers of a forward, so that no random state need be saved."""

from __future__ import annotations

import hashlib


def dropout_seed(seed: int, step: int, rank: int, micro: int) -> int:
    """Return a 63-bit seed of its own for every forward: of a run's seed, a step, a rank and a micro-batch."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}/{micro}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
