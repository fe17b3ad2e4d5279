"""What is said of a batch that cannot be shared out leads to one that can."""

import re
from dataclasses import replace
from itertools import product

import pytest

from fractalshards.errors import UsageError
from fractaltrain.recipes import PRETRAINING
from fractaltrain.recipes.batch import check_batch

RECIPE = PRETRAINING["anderson"]
MIXING = PRETRAINING["deit"]


@pytest.mark.parametrize("recipe", [RECIPE, MIXING])
def test_the_advice_can_be_followed(recipe):
    """With every small batch, world and training set, until there is no advice for so few images."""
    ended = set()
    for batch, processes, samples in product(range(1, 13), range(1, 5), range(1, 13)):
        asked, told = batch, ""
        for _ in range(4):
            try:
                check_batch(replace(recipe, batch_size=asked), processes, 1, samples)
                ended.add("trained")
                break
            except UsageError as error:
                told = str(error)
                advised = re.search(r"--batch-size (?:to )?(\d+)", told)
                if advised is None:
                    assert samples < processes * (2 if recipe.mixes else 1)
                    ended.add("too few")
                    break
                asked = int(advised[1])
        else:
            raise AssertionError(f"{batch}, {processes}, {samples}: {told}")
    assert ended == {"trained", "too few"}


@pytest.mark.parametrize(
    ("recipe", "batch", "processes", "accumulate", "samples", "words"),
    [
        (RECIPE, 8, 1, 1, 7, "a batch of 8 is larger than the 7 training samples; lower --batch-size to 7"),
        (RECIPE, 8, 4, 1, 7, "training samples; lower --batch-size to 4"),
        (RECIPE, 4, 4, 1, 3, "training samples; use more images, or lower --nproc or --accumulate"),
        (RECIPE, 12, 2, 3, 11, "training samples; lower --batch-size to 6"),
        (MIXING, 6, 2, 1, None, "but a process has 3 of a batch; choose --batch-size 4"),
        (RECIPE, 8, 2, 3, None, "--accumulate 3 cannot cut a process's batch of 4 into equal parts"),
    ],
)
def test_words(recipe, batch, processes, accumulate, samples, words):
    with pytest.raises(UsageError, match=words):
        check_batch(replace(recipe, batch_size=batch), processes, accumulate, samples)
