import doctest
from collections import Counter

import numpy as np
import pytest
import xxhash
from fractaltrain.stream.bits import Draw, mix, permutation, uniforms
from hypothesis import given
from hypothesis import strategies as st

from fractalshards.random import GOLDEN64, mix64
from fractaltrain.stream import bits

WORDS = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4)


def test_docstring_examples():
    assert doctest.testmod(bits).failed == 0


def test_splitmix64_gives_the_published_numbers():
    """The first outputs for seed 1234567, as the reference implementation (Vigna) prints them."""
    counters = np.arange(1, 4, dtype=np.uint64) * np.uint64(GOLDEN64) + np.uint64(1234567)
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert bits._mix64_all(counters).tolist() == published
    assert [mix64(int(counter)) for counter in counters] == published


@given(st.integers(0, 300), st.integers(0, 2**64 - 1))
def test_permutation_has_every_number_once(n, key):
    assert sorted(permutation(n, key).tolist()) == list(range(n))


def test_all_permutations_are_about_equally_frequent():
    drawn = Counter(tuple(permutation(4, mix(key)).tolist()) for key in range(4800))
    assert len(drawn) == 24
    chi_squared = sum((count - 200) ** 2 / 200 for count in drawn.values())
    assert chi_squared < 50  # 23 degrees of freedom: one in a thousand is above 49.7


@given(WORDS, WORDS)
def test_different_words_give_different_keys(first, second):
    assert 0 <= mix(*first) < 2**64
    assert (mix(*first) == mix(*second)) == (first == second)


@pytest.mark.parametrize("other", [(1, 0), (0, 1, 0), (0,)])
def test_key_depends_on_order_and_number_of_words(other):
    assert mix(0, 1) != mix(*other)


def test_uniforms_never_change():
    numbers = uniforms(np.array([0, 1, 2**64 - 1], np.uint64), Draw.CROP, 2)
    assert (numbers.shape, numbers.dtype) == ((3, 2), np.float64)
    assert xxhash.xxh3_64_hexdigest(numbers.astype("<f8").tobytes()) == "8b9197b8ebdd6cf3"


def test_uniforms_of_every_key_and_draw_are_their_own_and_uniform():
    keys = np.arange(2000, dtype=np.uint64)
    drawn = {draw: uniforms(keys, draw, 10) for draw in Draw}
    everything = np.concatenate([numbers.ravel() for numbers in drawn.values()])
    assert 0 <= everything.min() <= everything.max() < 1
    assert len(np.unique(everything)) == len(everything)
    counts = np.histogram(everything, bins=100, range=(0, 1))[0]
    expected = len(everything) / 100
    assert ((counts - expected) ** 2 / expected).sum() < 150  # 99 degrees of freedom
    assert np.array_equal(uniforms(keys[7:9], Draw.MIX, 4), drawn[Draw.MIX][7:9, :4])
