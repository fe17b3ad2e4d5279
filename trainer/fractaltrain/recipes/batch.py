"""Whether a recipe's batch can be shared out: among processes, into parts, in pairs."""

from fractalshards.errors import UsageError
from fractaltrain.recipes.recipe import Recipe
from fractaltrain.stream.order import rank_batch


def check_batch(recipe: Recipe, processes: int, accumulate: int) -> None:
    """Refuse what no step could be taken with: unequal parts of a process's batch, or an odd one to mix in pairs.

    Raises:
        UsageError: saying what to change.
    """
    batch = rank_batch(recipe.batch_size, processes)
    if batch % accumulate:
        raise UsageError(
            f"--accumulate {accumulate} cannot cut a process's batch of {batch} into equal parts; choose a divisor"
        )
    if recipe.mixes and batch % 2:
        raise UsageError(
            f"mixup and cutmix take pairs of images, but a process has {batch} of a batch; change --batch-size"
        )
