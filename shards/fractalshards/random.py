"""splitmix64 (Steele, Lea & Flood, OOPSLA 2014): random bits that are the same with every version of every library.

The distributions of numpy and torch may change between versions; images and the order of an epoch must not.
"""

import numpy as np
import numpy.typing as npt

MASK64 = (1 << 64) - 1
GOLDEN64 = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB

Bits = npt.NDArray[np.uint64]


def mix64(word: int) -> int:
    """Apply the finaliser: a bijection of 64-bit words in which every input bit changes about half of the output."""
    word = ((word ^ (word >> 30)) * _FIRST) & MASK64
    word = ((word ^ (word >> 27)) * _SECOND) & MASK64
    return word ^ (word >> 31)


def mix64_array(words: Bits) -> Bits:
    """Apply ``mix64`` to every element of a uint64 array."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(_FIRST)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(_SECOND)
    return words ^ (words >> np.uint64(31))


def permutation(n: int, key: int) -> npt.NDArray[np.int64]:
    """Return the order that sorts n outputs of splitmix64 from a 64-bit state: (n,) int64.

    >>> permutation(5, 0).tolist()
    [2, 4, 1, 0, 3]
    """
    words = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(GOLDEN64) + np.uint64(key)
    return np.argsort(mix64_array(words), kind="stable").astype(np.int64, copy=False)
