"""Randomness by name: every random choice is a pure function of what it is for, never of order or place.

`generator(seed, "000002b66c9c498e-3f9a1c", "view", 0)` gives the same stream on every machine, in every process, whatever ran
before. Names are hashed to a 128-bit key of Philox, a counter-based generator (Salmon et al., SC 2011), so streams of different
names are independent.
"""

import hashlib

import numpy as np


def name_hash(*names: int | str, bits: int = 64) -> int:
    """A stable hash of a tuple of names, uniform in [0, 2**bits). `1` and `"1"` are different names."""
    # repr of a tuple of ints and strings is injective: ("a", "b") and ("ab",) cannot collide.
    return int.from_bytes(hashlib.blake2b(repr(names).encode(), digest_size=bits // 8).digest(), "little")


def generator(*names: int | str) -> np.random.Generator:
    """A fresh random generator that depends on `names` alone."""
    return np.random.Generator(np.random.Philox(key=name_hash(*names, bits=128)))
