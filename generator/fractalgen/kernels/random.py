"""Random numbers that do not depend on the numpy version, the CPU or the order of work.

``Stream`` draws scalars for Python code. ``hash32`` computes a word per counter for kernels, so that loops over
counters vectorise and any element can be computed without those before it.
"""

from dataclasses import dataclass

import numpy as np
import xxhash
from numba import njit, uint32

from fractalshards.random import GOLDEN64, MASK64, mix64

Key = tuple[np.uint32, np.uint32]  # selects one of 2**64 sequences of ``hash32``


@dataclass
class Stream:
    """A sequence of random numbers: splitmix64 from a 64-bit state."""

    state: int

    @classmethod
    def of(cls, *identity: str | int) -> "Stream":
        """Return the stream of an identity, e.g. ``Stream.of("single", seed, "train", label, number)``."""
        return cls(xxhash.xxh3_64_intdigest("/".join(map(str, identity)).encode()))

    def bits64(self) -> int:
        """Draw a uniform integer in [0, 2**64)."""
        self.state = (self.state + GOLDEN64) & MASK64
        return mix64(self.state)

    def uniform(self, low: float, high: float) -> float:
        """Draw a uniform float64 in [low, high), of 53 random bits."""
        return low + (high - low) * ((self.bits64() >> 11) * 2.0**-53)

    def integer(self, low: int, high: int) -> int:
        """Draw an integer in [low, high), uniform to within 2**-64."""
        return low + (self.bits64() * (high - low) >> 64)

    def chance(self, probability: float) -> bool:
        """Return True with the given probability."""
        return self.uniform(0.0, 1.0) < probability

    def key(self) -> Key:
        """Draw a key for ``hash32``."""
        bits = self.bits64()
        return np.uint32(bits >> 32), np.uint32(bits & 0xFFFFFFFF)


@njit(inline="always")
def hash32(counter: np.uint32, key0: np.uint32, key1: np.uint32) -> np.uint32:
    """Hash (counter, key) to a uniform 32-bit word: two rounds of multiply-xorshift, keyed between the rounds.

    Every operation is cast back to 32 bits, because numba would promote it to 64 and halve the vector width.
    """
    word = uint32(uint32(counter * uint32(0x9E3779B9)) + key0)
    word = uint32(uint32(word ^ uint32(word >> uint32(16))) * uint32(0x21F0AAAD))
    word = uint32(uint32(word ^ uint32(word >> uint32(15))) + key1)
    word = uint32(uint32(word ^ uint32(word >> uint32(16))) * uint32(0x735A2D97))
    return uint32(word ^ uint32(word >> uint32(15)))
