"""Randomness by name: every random choice is a pure function of what it is for, never of order or place.

`generator(seed, "000002b66c9c498e-3f9a1c", "view", 0)` gives the same stream on every machine, in every process, whatever ran
before. Names are hashed to a 128-bit key of Philox, a counter-based generator (Salmon et al., SC 2011), so streams of different
names are independent.
"""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import UInt64
from numpy.random.bit_generator import ISeedSequence

# Columns are padded to their longest string: one absurd cell must not cost gigabytes.
LONGEST_HASHED = 256


def name_hash(*names: int | str, bits: int = 64) -> int:
    """A stable hash of a tuple of names, uniform in [0, 2**bits). `1` and `"1"` are different names."""
    return int.from_bytes(_digest(names, bits), "little")


def uniform(*names: int | str) -> float:
    """One random number in [0, 1) that depends on `names` alone: the first 53 bits of their hash, without a generator."""
    return (name_hash(*names) >> 11) * 2.0**-53


def generator(*names: int | str) -> np.random.Generator:
    """A fresh random generator that depends on `names` alone: Philox with `name_hash(*names, bits=128)` as its key."""
    key = _Key(_digest(names, 128))
    return np.random.Generator(np.random.Philox(key))  # type: ignore[arg-type]  # The stubs know SeedSequence alone.


class _Key(ISeedSequence):
    """A key for Philox. Given as a number it takes twice as long: numpy then asks the system for randomness, and drops it."""

    def __init__(self, digest: bytes) -> None:
        self._words = np.frombuffer(digest, "<u8")

    def generate_state(self, n_words: int, dtype: object = np.uint64) -> UInt64[np.ndarray, "2"]:
        """What Philox takes as its key; it asks for two words."""
        return self._words


def _digest(names: tuple[int | str, ...], bits: int) -> bytes:
    # repr of a tuple of ints and strings is injective: ("a", "b") and ("ab",) cannot collide.
    return hashlib.blake2b(repr(names).encode(), digest_size=bits // 8).digest()


def hash_column(column: pa.Array, *names: int | str) -> UInt64[np.ndarray, " rows"]:
    """A stable, uniform 64-bit hash of each string of a column, vectorised: tables have millions of rows.

    Args:
        column: ASCII strings of at most `LONGEST_HASHED` characters; null and other text hash as if empty.
        names: what the hash is for; other names give an independent hash.
    """
    fits = pc.and_(pc.string_is_ascii(column), pc.less_equal(pc.binary_length(column), LONGEST_HASHED))
    ascii_only = pc.if_else(pc.fill_null(fits, False), column, "")
    lengths = pc.binary_length(ascii_only).to_numpy(zero_copy_only=False)
    width = max(8, -(-int(lengths.max(initial=0)) // 8) * 8)
    padded = pc.ascii_rpad(ascii_only, width=width, padding="\0")
    data = np.frombuffer(padded.buffers()[2], np.uint8, count=len(padded) * width, offset=padded.offset * width)
    words = data.reshape(len(padded), width).view("<u8")
    hashes = mix(lengths.astype(np.uint64) ^ np.uint64(name_hash(*names)))
    for place in range(width // 8):
        # A word beyond a string's own end must not count, or the longest string of the column would change all hashes.
        hashes = np.where(lengths > 8 * place, mix(hashes ^ words[:, place]), hashes)
    return hashes


def mix(values: UInt64[np.ndarray, " rows"]) -> UInt64[np.ndarray, " rows"]:
    """The finaliser of SplitMix64 (Steele et al., OOPSLA 2014): a bijection in which every input bit moves every output bit."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
