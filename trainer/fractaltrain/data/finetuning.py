"""The images to fine-tune on, by name, and which of them are held out."""

from dataclasses import dataclass
from pathlib import Path

from fractaltrain.data.source import LabelledSource, Source, split_per_class, split_share

NAMES = ("digits", "cifar10", "cifar100")
FOLDER_PREFIX = "imagefolder:"
_DIGITS_TRAINING_SHARE = 0.8


@dataclass(frozen=True)
class DataChoice:
    """What ``--data`` and its companions say.

    ``name`` is one of ``NAMES`` or ``imagefolder:PATH``; with ``per_class`` only so many training images of every
    class are used, chosen by ``subset_seed``; ``folder`` is where CIFAR's archives are or go.
    """

    name: str
    per_class: int | None
    subset_seed: int
    folder: Path


def open_data(choice: DataChoice) -> tuple[Source, Source]:
    """Training images and held-out images.

    CIFAR and image folders come with their own held-out part, which is always whole. The digits have none: of them
    everything is held out that ``per_class`` does not choose, or a fifth of every class without it.

    Raises:
        FractalError: if the images are missing, damaged, or too few for ``per_class``.
    """
    if choice.name == "digits":
        from fractaltrain.data.digits import load_digits

        digits = load_digits()
        if choice.per_class is None:
            return split_share(digits, _DIGITS_TRAINING_SHARE, choice.subset_seed)
        return split_per_class(digits, choice.per_class, choice.subset_seed)
    train, held_out = _open_split(choice)
    if choice.per_class is None:
        return train, held_out
    return split_per_class(train, choice.per_class, choice.subset_seed)[0], held_out


def _open_split(choice: DataChoice) -> tuple[LabelledSource, LabelledSource]:
    if choice.name.startswith(FOLDER_PREFIX):
        from fractaltrain.data.folder import load_folders

        return load_folders(Path(choice.name.removeprefix(FOLDER_PREFIX)))
    from fractaltrain.data.cifar import load_cifar

    return load_cifar(choice.name, choice.folder)
