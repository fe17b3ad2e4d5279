"""Keys of pseudorandom numbers: pure functions of a seed, a purpose and counters. Needs neither numpy nor torch."""

from enum import IntEnum

from fractalshards.random import GOLDEN64, MASK64, mix64


class Purpose(IntEnum):
    """Use of a key: the word after the seed, so that no two uses share random numbers."""

    SHARDS = 0
    WINDOW = 1
    AUGMENT = 2
    STEP = 3
    SUBSET = 4
    BATCH = 5


def mix(*words: int) -> int:
    """Combine integers in [0, 2^64) into a 64-bit key, which depends on their order and number."""
    key = 0
    for word in words:
        key = mix64((key ^ word) + GOLDEN64 & MASK64)
    return key
