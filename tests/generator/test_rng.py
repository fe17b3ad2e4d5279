"""Random numbers: uniform, independent, and pinned, for a change of any would change every dataset."""

import numpy as np
from numba import njit

from fractalgen.kernels.random import Stream, hash32


@njit
def words(count, key0, key1):
    out = np.empty(count, np.uint32)
    for i in range(count):
        out[i] = hash32(np.uint32(i), key0, key1)
    return out


def chi_square(values: np.ndarray, bins: int) -> float:
    counts = np.bincount(values, minlength=bins)
    return float(((counts - len(values) / bins) ** 2 / (len(values) / bins)).sum())


def test_numbers_are_pinned() -> None:
    stream = Stream.of("single", 0, "train", 3, 4)
    assert [stream.bits64() for _ in range(2)] == [5537430552962344589, 14549906094821892492]
    assert words(3, np.uint32(1), np.uint32(2)).tolist() == [1159414821, 2502442532, 2018336093]


def test_words_are_uniform_and_independent() -> None:
    """Each statistic has 255 degrees of freedom: mean 255, standard deviation 22.6."""
    for trial in range(20):
        drawn = words(1 << 18, *Stream.of("trial", trial).key())
        high = drawn >> 28
        for values in (drawn >> 24, drawn & 255, high[:-1] * 16 + high[1:], high[:-16] * 16 + high[16:]):
            assert 150 < chi_square(values, 256) < 380


def test_streams_of_different_identities_are_unrelated() -> None:
    first = [Stream.of("a", i).uniform(0, 1) for i in range(4000)]
    second = [Stream.of("a", i + 1, "").uniform(0, 1) for i in range(4000)]
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert abs(np.mean(first) - 0.5) < 0.02
    assert Stream.of("a", 12).bits64() != Stream.of("a1", 2).bits64()


def test_draws_stay_in_their_ranges_and_reach_all_of_them() -> None:
    stream = Stream.of("ranges")
    integers = [stream.integer(-3, 4) for _ in range(7000)]
    assert sorted(set(integers)) == list(range(-3, 4))
    assert chi_square(np.array(integers) + 3, 7) < 30
    uniforms = np.array([stream.uniform(2.0, 5.0) for _ in range(3000)])
    assert 2.0 <= uniforms.min() < 2.01
    assert 4.99 < uniforms.max() < 5.0
    assert abs(np.mean([stream.chance(0.3) for _ in range(5000)]) - 0.3) < 0.03
    assert not any(stream.chance(0.0) for _ in range(100))
    assert all(stream.chance(1.0) for _ in range(100))
