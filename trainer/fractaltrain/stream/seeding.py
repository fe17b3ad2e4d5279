"""Global generators, seeded for a while: for libraries that draw from nothing else."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(key: int) -> Iterator[None]:
    """Run with torch's CPU generator seeded by ``key``, and put it back as it was."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(key)
    try:
        yield
    finally:
        torch.set_rng_state(before)


@contextmanager
def seeded_numpy(key: int) -> Iterator[None]:
    """Run with numpy's and Python's global generators seeded by ``key``, and put them back as they were."""
    before = random.getstate(), np.random.get_state()
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
