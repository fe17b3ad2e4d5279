"""What can be known to go wrong in a study before anything runs: missing datasets, and models that cannot be built."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from fractalshards.errors import FractalError, UsageError
from fractalshards.extras import needs_extra
from fractalshards.manifest import find_manifest
from fractalshards.sharing.urls import parse_location
from fractaltrain.data.finetuning import find_data
from fractaltrain.study.config import Study
from fractaltrain.study.plan import Group

_CLASSES = 2  # any number: only the classifier depends on it


def check_datasets(study: Study, file: Path) -> None:
    """Look for all that shall lie on this machine.

    Raises:
        FractalError: naming all that is missing, and the commands that make it.
    """
    if problems := list(missing_datasets(study)):
        raise FractalError(f"{file}: {'; '.join(problems)}")


def missing_datasets(study: Study) -> Iterator[str]:
    """Of shards and image folders that are not on this machine, though they should be: the table, and what to do."""
    for row in study.rows:
        location = parse_location(row.shards)
        if location.scheme == "file":
            try:
                find_manifest(Path(location.root))
            except FractalError as error:
                advice = f"{row.shards}: no finished dataset; run {row.build}" if row.build else str(error)
                yield f"[pretraining.{row.name}] {advice}"
    for target in study.targets:
        try:
            find_data(target.data)
        except FractalError as error:
            yield f"[finetuning.{target.name}] {error}"


def check_models(groups: Sequence[Group], image_size: int, file: Path) -> None:
    """Build every model once as each of its steps does, without memory for its weights.

    Raises:
        UsageError: naming the first that there is not, or that a recipe or the size of images does not fit.
    """
    with needs_extra("train", "a study"):
        import torch

        from fractaltrain.models import create_model
    steps = (step for group in groups for step in group.steps())
    for model, drop_path in dict.fromkeys((step.model, step.settings["recipe"]["drop_path"]) for step in steps):
        try:
            with torch.device("meta"):
                create_model(model, _CLASSES, image_size, drop_path)
        except FractalError as error:
            raise UsageError(f"{file}: [models.{model}] {error}") from error
