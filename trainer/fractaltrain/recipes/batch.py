"""Whether a recipe's batch can be shared out: among processes, into parts, in pairs; and whether there are so many."""

from math import lcm

from fractalshards.errors import UsageError
from fractaltrain.recipes.recipe import Recipe
from fractaltrain.stream.order import rank_batch


def check_batch(recipe: Recipe, processes: int, accumulate: int, samples: int | None = None) -> None:
    """Refuse what no step could be taken with: unequal parts of a process's batch, or an odd one to mix in pairs.

    Args:
        samples: of an epoch, which must fill a batch; None: not known yet.

    Raises:
        UsageError: saying what to change.
    """
    batch = rank_batch(recipe.batch_size, processes)
    if batch % accumulate:
        raise UsageError(
            f"--accumulate {accumulate} cannot cut a process's batch of {batch} into equal parts; choose a divisor"
        )
    unit = processes * lcm(accumulate, 2 if recipe.mixes else 1)  # any multiple of it can be shared out
    if recipe.batch_size % unit:
        raise UsageError(
            f"mixup and cutmix take pairs of images, but a process has {batch} of a batch; "
            f"choose --batch-size {max(recipe.batch_size // unit, 1) * unit}"
        )
    if samples is not None and recipe.batch_size > samples:
        largest = samples // unit * unit
        advice = f"lower --batch-size to {largest}" if largest else "use more images, or lower --nproc or --accumulate"
        raise UsageError(f"a batch of {recipe.batch_size} is larger than the {samples} training samples; {advice}")
