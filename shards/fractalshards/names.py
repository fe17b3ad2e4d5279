"""Names inside a dataset folder: shards, sidecars, sample keys. Pure functions."""

import re
from pathlib import Path

from fractalshards.errors import FractalError

INFO = "_info.json"
RECIPE = "recipe.json"
SYSTEMS = "systems.npz"
TRAINING = "train"  # the split to train on

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def shard_name(split: str, shard: int) -> str:
    """File name of a shard, e.g. ``train-000007.tar``."""
    return f"{split}-{shard:06d}.tar"


def sidecar_name(shard: str) -> str:
    """File name of a shard's sidecar record, e.g. ``train-000007.json``."""
    return Path(shard).with_suffix(".json").name


def dali_index_name(shard: str) -> str:
    """File name of a shard's index for NVIDIA DALI, e.g. ``train-000007.idx``."""
    return Path(shard).with_suffix(".idx").name


def sample_key(index: int) -> str:
    """Key of a sample: its index in the dataset, nine digits."""
    return f"{index:09d}"


def is_plain(name: str) -> bool:
    """Whether ``name`` is a plain file name, and nothing that could lead out of the folder.

    Separators, ``..``, a leading dot, and anything that could be read as a URL are not: webdataset runs ``pipe:`` URLs
    in a shell.
    """
    return _PLAIN.fullmatch(name) is not None and ".." not in name


def check_plain(name: str, where: str) -> str:
    """Return ``name``, which comes from a dataset that may be hostile, if it is a plain file name.

    Raises:
        FractalError: if it is not.
    """
    if not is_plain(name):
        raise FractalError(f"{where}: {name!r} is not a plain file name; do not use this dataset")
    return name
