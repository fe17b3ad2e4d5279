"""Which image comes where: seeded permutations, the same on every machine. Pure functions."""

from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import xxhash

from fractalshards.errors import FractalError
from fractalshards.packing.listing import Indices, Part
from fractalshards.splitmix import GOLDEN64, MASK64


def shuffled(count: int, seed: int, purpose: str) -> Indices:
    """A pseudorandom permutation of range(count): the order of the outputs of splitmix64, (count,) int64."""
    key = xxhash.xxh3_64_intdigest(f"{purpose} {seed}".encode())
    words = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN64) + np.uint64(key & MASK64)
    return np.argsort(_mix(words), kind="stable")


def deal(part: Part, share: Fraction, seed: int) -> Mapping[str, Part]:
    """Split images into ``train`` and ``val``: of every class a share, rounded, goes to val, but never all.

    Raises:
        FractalError: if no class has enough images to give one.
    """
    order = shuffled(len(part.labels), seed, "deal")
    order = order[np.argsort(part.labels[order], kind="stable")]  # class after class, each shuffled
    counts = np.bincount(part.labels)
    held_out = np.zeros(len(order), bool)
    for first, count in zip(np.cumsum(counts) - counts, counts.tolist(), strict=True):
        held_out[first : first + min(int(count * share + Fraction(1, 2)), count - 1)] = True
    if not held_out.any():
        raise FractalError(f"a share of {float(share)} is no image of any class; raise the share of val")
    return {"train": part.take(np.sort(order[~held_out])), "val": part.take(np.sort(order[held_out]))}


def _mix(words: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """``splitmix.mix64`` of many words."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
