"""Python's random numbers (MT19937, Matsumoto & Nishimura 1998), followed and skipped in compiled loops.

A *state* is the next 624 untempered words, (624,) uint32. Loops work on *buffers*, (2, 624): the block of words that
holds word ``at`` is in row ``at // 624 % 2``, and the next block is written beside it, since loops in place would not
vectorise. All kernels release the GIL.
"""

import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import int64, njit, uint32

from fractalgen.kernels import CACHE

Words = npt.NDArray[np.uint32]

STATE_WORDS = 624
_LONG = 227  # words of a block that depend on none of each other: 624 = 227 + 227 + 169 + 1


def seed_state(seed: int) -> Words:
    """Return the state of ``random.Random(seed)``, (624,) uint32."""
    words = np.array(random.Random(seed).getstate()[1][:STATE_WORDS], np.uint32)
    buffers = np.stack([words, words])
    _twist(buffers, 0)
    state: Words = buffers[1]
    return state


@dataclass
class Mersenne:
    """A generator that draws as ``random.Random`` does."""

    buffers: Words  # (2, 624), see the module
    at: int = 0  # number of words drawn

    @classmethod
    def of(cls, state: Words) -> "Mersenne":
        """Return the generator that continues from a state."""
        return cls(np.stack([state, state]))

    def uniform(self, low: float, high: float) -> float:
        """Draw what ``random.uniform`` draws."""
        first, self.at = next_word(self.buffers, self.at)
        second, self.at = next_word(self.buffers, self.at)
        return low + (high - low) * unit_float(first, second)

    def integer(self, low: int, high: int) -> int:
        """Draw what ``random.randrange(low, high)`` draws."""
        drawn, self.at = below(self.buffers, self.at, high - low, spare_bits(high - low))
        return low + int(drawn)

    def state(self) -> Words:
        """Return the next 624 words, from which ``of`` continues."""
        row, start = self.at // STATE_WORDS & 1, self.at % STATE_WORDS
        _twist(self.buffers, row)
        return np.concatenate([self.buffers[row, start:], self.buffers[1 - row, :start]])


@njit(inline="always")
def _mix(one: np.uint32, two: np.uint32) -> np.uint32:
    """The recurrence's matrix, on the high bit of a word and the low bits of the next; masked, not multiplied."""
    odd = uint32(-int64(two & uint32(1)))
    both = (one & uint32(0x80000000)) | (two & uint32(0x7FFFFFFF))
    return uint32(both >> uint32(1)) ^ (odd & uint32(0x9908B0DF))


@njit(cache=CACHE, nogil=True)
def _twist(buffers: Words, row: int) -> None:
    """Write the block that follows the one in a row into the other row."""
    other = 1 - row
    for i in range(_LONG):
        buffers[other, i] = buffers[row, i + 397] ^ _mix(buffers[row, i], buffers[row, i + 1])
    for i in range(_LONG, 2 * _LONG):
        buffers[other, i] = buffers[other, i - _LONG] ^ _mix(buffers[row, i], buffers[row, i + 1])
    for i in range(2 * _LONG, STATE_WORDS - 1):
        buffers[other, i] = buffers[other, i - _LONG] ^ _mix(buffers[row, i], buffers[row, i + 1])
    buffers[other, 623] = buffers[other, 396] ^ _mix(buffers[row, 623], buffers[other, 0])


@njit(inline="always")
def _temper(word: np.uint32) -> np.uint32:
    word ^= word >> uint32(11)
    word ^= (word << uint32(7)) & uint32(0x9D2C5680)
    word ^= (word << uint32(15)) & uint32(0xEFC60000)
    return word ^ (word >> uint32(18))


@njit(cache=CACHE, nogil=True)
def skip(buffers: Words, at: int, count: int) -> int:
    """Skip words; return the new ``at``."""
    after = at + count
    for block in range(at // STATE_WORDS, after // STATE_WORDS):
        _twist(buffers, block & 1)
    return after


@njit(cache=CACHE, nogil=True)
def next_word(buffers: Words, at: int) -> tuple[np.uint32, int]:
    """Draw a word; return it and the new ``at``."""
    block, i = divmod(at, STATE_WORDS)
    word = _temper(buffers[block & 1, i])
    if i == STATE_WORDS - 1:
        _twist(buffers, block & 1)
    return word, at + 1


@njit(cache=CACHE, inline="always")
def spare_bits(count: int) -> np.uint32:
    """Return the number of bits of a word that an integer below ``count`` leaves, 1 <= count < 2**32."""
    bits = uint32(32)
    while count >> (32 - bits):
        bits -= uint32(1)
    return bits


@njit(cache=CACHE, nogil=True)
def below(buffers: Words, at: int, count: int, spare: np.uint32) -> tuple[np.uint32, int]:
    """Draw an integer in [0, count), given ``spare_bits(count)``; return it and the new ``at``.

    Takes as many high bits of a word as ``count`` has, again until they are below ``count``.
    """
    while True:
        word, at = next_word(buffers, at)
        if word >> spare < count:
            return word >> spare, at


@njit(cache=CACHE, nogil=True)
def fill(buffers: Words, at: int, words: Words) -> int:
    """Draw ``len(words)`` words; return the new ``at``."""
    done = 0
    while done < len(words):
        start = at % STATE_WORDS
        count = min(len(words) - done, STATE_WORDS - start)
        source = buffers[at // STATE_WORDS & 1, start : start + count]  # views: only so the loop vectorises
        target = words[done : done + count]
        for i in range(count):
            target[i] = _temper(source[i])
        at = skip(buffers, at, count)
        done += count
    return at


@njit(cache=CACHE, inline="always")
def unit_float(first: np.uint32, second: np.uint32) -> float:
    """Return the float64 in [0, 1) that Python makes of two words: 53 random bits."""
    high, low = first >> uint32(5), second >> uint32(6)
    return (np.float64(np.int32(high)) * 67108864.0 + np.float64(np.int32(low))) * (1.0 / 9007199254740992.0)
