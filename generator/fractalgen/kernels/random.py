"""Our own random numbers: the same for every numpy version, CPU and order of work.

``Stream`` gives scalars to Python code; ``hash32`` gives kernels one word per counter, so that a loop over counters
vectorises and any element can be computed without the ones before it.
"""

from dataclasses import dataclass

import numpy as np
import xxhash
from numba import njit, uint32

from fractalshards.random import GOLDEN64, MASK64, mix64


@dataclass
class Stream:
    """A sequence of random numbers: splitmix64 from a 64-bit state."""

    state: int

    @classmethod
    def of(cls, *identity: str | int) -> "Stream":
        """The stream that belongs to an identity, e.g. ``Stream.of("single", seed, "train", label, replica)``."""
        return cls(xxhash.xxh3_64_intdigest("/".join(map(str, identity)).encode()))

    def bits64(self) -> int:
        """A uniform integer in [0, 2**64)."""
        self.state = (self.state + GOLDEN64) & MASK64
        return mix64(self.state)

    def uniform(self, low: float, high: float) -> float:
        """A uniform float64 in [low, high), of 53 random bits."""
        return low + (high - low) * ((self.bits64() >> 11) * 2.0**-53)

    def integer(self, low: int, high: int) -> int:
        """A uniform integer in [low, high), to within 2**-64 of uniform."""
        return low + (self.bits64() * (high - low) >> 64)

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.uniform(0.0, 1.0) < probability

    def key(self) -> tuple[np.uint32, np.uint32]:
        """A key for ``hash32``."""
        bits = self.bits64()
        return np.uint32(bits >> 32), np.uint32(bits & 0xFFFFFFFF)


@njit(inline="always")
def hash32(counter: np.uint32, key0: np.uint32, key1: np.uint32) -> np.uint32:
    """A uniform 32-bit word for (counter, key): a two-round multiply-xorshift hash, keyed between the rounds.

    Every operation is cast back to 32 bits, for numba would promote it to 64 and halve the vector width.
    """
    word = uint32(uint32(counter * uint32(0x9E3779B9)) + key0)
    word = uint32(uint32(word ^ uint32(word >> uint32(16))) * uint32(0x21F0AAAD))
    word = uint32(uint32(word ^ uint32(word >> uint32(15))) + key1)
    word = uint32(uint32(word ^ uint32(word >> uint32(16))) * uint32(0x735A2D97))
    return uint32(word ^ uint32(word >> uint32(15)))
