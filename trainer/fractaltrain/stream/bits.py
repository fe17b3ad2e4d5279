"""Random bits that are a pure function of integers, the same with every numpy and torch.

numpy's and torch's own distributions may change between versions; an epoch order must not. The generator is
splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
"""

from enum import IntEnum

import numpy as np
import numpy.typing as npt

from fractalshards.random import GOLDEN64, MASK64, mix64

Bits = npt.NDArray[np.uint64]


class Purpose(IntEnum):
    """What random bits are for; the first word after the seed, so that no two uses share their bits."""

    SHARDS = 0
    WINDOW = 1
    AUGMENT = 2
    STEP = 3
    SUBSET = 4


class Draw(IntEnum):
    """What random numbers of one sample are for, under the key of the sample in its epoch."""

    CROP = 0
    FLIP = 1
    RANDAUGMENT = 2
    JITTER = 3
    ERASE = 4
    MIX = 5


def mix(*words: int) -> int:
    """A 64-bit key from integers in [0, 2^64); another order of the words gives another key."""
    key = 0
    for word in words:
        key = mix64((key ^ word) + GOLDEN64 & MASK64)
    return key


def permutation(n: int, key: int) -> npt.NDArray[np.int64]:
    """A permutation of 0..n-1 as an (n,) int64 array: the order that sorts n outputs of splitmix64.

    >>> permutation(5, mix(0, 1)).tolist()
    [0, 4, 3, 2, 1]
    """
    counters = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(GOLDEN64) + np.uint64(key)
    return np.argsort(_mix64_all(counters), kind="stable").astype(np.int64, copy=False)


def uniforms(keys: Bits, draw: Draw, count: int) -> npt.NDArray[np.float64]:
    """Random numbers in [0, 1) for every key: (b,) uint64 to (b, count) float64."""
    starts = _mix64_all((_mix64_all(keys + np.uint64(GOLDEN64)) ^ np.uint64(draw)) + np.uint64(GOLDEN64))  # as mix
    counters = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN64)
    return (_mix64_all(starts[:, None] + counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix64_all(z: Bits) -> Bits:
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)
