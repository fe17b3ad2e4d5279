"""WebDataset folders of other programs: which tars they have, and in which splits, with or without an info file."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self

import msgspec

from fractalshards.errors import FractalError, UsageError
from fractalshards.human import human_count, human_list
from fractalshards.manifest import INFO, RECIPE, TRAINING, Count, find_manifest
from fractalshards.storage import read_json
from fractalshards.tars import Tar

_log = logging.getLogger(__name__)

_INFO_FILES = (INFO, "info.json")  # timm reads the first that exists
_SPLIT_WORDS = {
    "train": TRAINING, "training": TRAINING, "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
_WORD = re.compile("[a-z]+")
_MAX_NAMED = 8


class _Split(msgspec.Struct, frozen=True):
    filenames: tuple[str, ...] = ()
    shard_lengths: tuple[Count, ...] = ()
    alt_label: str | None = None

    def __post_init__(self) -> None:
        if self.shard_lengths and len(self.shard_lengths) != len(self.filenames):
            raise ValueError("filenames and shard_lengths differ in length")


class _Info(msgspec.Struct, frozen=True):
    splits: dict[str, _Split] = {}
    num_classes: Count | None = None


@dataclass(frozen=True)
class WebDatasetOptions:
    """How to read a WebDataset folder.

    ``label_key`` is the field of ``KEY.json`` that holds the class index; None: the one that the info file names, if
    any, else the class index is in ``KEY.cls``.
    """

    label_key: str | None = None
    patterns: tuple[tuple[str, str], ...] = ()  # splits, each with a pattern such as ``0009*.tar`` of its tars
    skip_bad: bool = False  # leave out samples without an image or a label, instead of raising an error

    @classmethod
    def parse(cls, label_key: str | None, split: str | None, skip_bad: bool = False) -> Self:
        """Create options from the values of ``--label-key`` and ``--split``, ``train=PATTERN,val=PATTERN``."""
        if label_key == "":
            raise UsageError("--label-key is empty; give the name of a field, such as label")
        pairs = [part.strip().partition("=") for part in split.split(",")] if split is not None else []
        if not all(name in (TRAINING, "val") and pattern for name, _, pattern in pairs):
            raise UsageError(f"--split {split}: give patterns of the tars' names, as train=00*.tar,val=01*.tar")
        return cls(label_key, tuple((name, pattern) for name, _, pattern in pairs), skip_bad)

    def check_unused(self, data: str | Path) -> None:
        """Raise UsageError if options are given for tars of other programs, which ``data`` is not."""
        if self.label_key is not None or self.patterns:
            raise UsageError(f"--label-key and --split are for local tars of other programs, not for {data}")


DEFAULT_OPTIONS = WebDatasetOptions()


@dataclass(frozen=True)
class WebDatasetInfo:
    """The tars of a folder by split, and the number of classes, or None if no info file says it."""

    splits: Mapping[str, tuple[Tar, ...]]
    classes: int | None


def _find_info(folder: Path) -> Path | None:
    return next((folder / name for name in _INFO_FILES if (folder / name).is_file()), None)


def is_webdataset(folder: Path) -> bool:
    """Return whether another program wrote a folder: its ``_info.json`` is not ours, or it has tars and no recipe."""
    if (folder / INFO).is_file():
        return "format_version" not in read_json(folder / INFO, dict[str, Any])
    if not folder.is_dir() or (folder / RECIPE).exists():  # a recipe without a manifest: our build has not finished
        return False
    return _find_info(folder) is not None or bool(_find_tars(folder))


def find_dataset(folder: Path, options: WebDatasetOptions) -> bool:
    """Check quickly that there is a dataset in a folder, and return whether another program wrote it."""
    if is_webdataset(folder):
        return True
    find_manifest(folder)
    options.check_unused(folder)
    return False


def load_webdataset(folder: Path, options: WebDatasetOptions) -> WebDatasetInfo:
    """Find the tars of a folder: those that its ``_info.json`` or ``info.json`` lists as timm does, else all.

    A split with a pattern in ``options`` consists of the tars that match. The others belong to the split in the info
    file, else to the one that their name contains as a word; without such words, all are for training.

    Raises FractalError if there is no tar, a field of the info file is wrong, a name could lead out of the folder, or
    it is not clear to which split a tar belongs; UsageError if no tar matches a pattern.
    """
    path = _find_info(folder)
    try:
        info = read_json(path, _Info) if path else _Info()
    except FractalError as error:
        raise FractalError(f"{error}, or remove it to read all tars of the folder") from error
    listed = [
        (split, Tar(_tar_path(folder, name, path or folder), length, options.label_key or one.alt_label or None))
        for split, one in info.splits.items()
        for name, length in zip_longest(one.filenames, one.shard_lengths)  # without lengths: None
    ]
    if not listed:
        listed = [("", Tar(_tar_path(folder, name, folder), None, options.label_key)) for name in _find_tars(folder)]
    if not listed:
        raise FractalError(f"{folder}: holds no .tar files; check the path, and decompress .tar.gz files")
    names = {tar.path: str(tar.path.relative_to(folder)) for _, tar in listed}
    matched: dict[Path, str] = {}
    for split, pattern in options.patterns:
        paths = [path for path, name in names.items() if fnmatchcase(path.name, pattern) or fnmatchcase(name, pattern)]
        if not paths:
            found = human_list(list(names.values()), _MAX_NAMED)
            raise UsageError(f"--split {split}={pattern}: matches none of the tars {found}")
        matched = dict.fromkeys(paths, split) | matched
    by_name = _split_by_name(folder, [tar for split, tar in listed if not split and tar.path not in matched])
    splits: dict[str, list[Tar]] = {}
    for split, tar in listed:
        name = matched.get(tar.path) or split or by_name[tar.path]
        if tar.path in matched or name not in dict(options.patterns):
            splits.setdefault(name, []).append(tar)
    if matched or by_name:
        counts = ", ".join(f"{human_count(len(tars), 'tar')} in {split}" for split, tars in splits.items())
        _log.info("%s: splits by the names of the tars: %s", folder, counts)
    return WebDatasetInfo({split: tuple(tars) for split, tars in splits.items()}, info.num_classes)


def _find_tars(folder: Path) -> list[str]:
    """Return the sorted names of the tars in a folder, or if there are none, in its folders named like splits."""
    if here := sorted(_tar_names(folder)):
        return here
    below = [path for path in folder.iterdir() if path.name.lower() in _SPLIT_WORDS and path.is_dir()]
    return sorted(f"{path.name}/{name}" for path in below for name in _tar_names(path))


def _tar_names(folder: Path) -> Iterator[str]:
    return (path.name for path in folder.iterdir() if path.match("[!.]*.tar"))  # glob skips a folder it may not read


def _tar_path(folder: Path, name: str, where: Path) -> Path:
    """Return the path of a tar whose name, which may have folders, comes from ``where``."""
    for part in name.split("/"):
        if not part.isprintable() or part[:1] in ("", ".") or set(part) & {":", "\\"}:  # webdataset runs "pipe:" names
            raise FractalError(f"{where}: {name!r} is not a plain file name; rename the tar, if it is yours")
    return folder / name


def _split_by_name(folder: Path, tars: Sequence[Tar]) -> dict[Path, str]:
    """Return the split of each tar: the one that its folder's or its own name contains as a word, else ``train``."""
    splits: dict[Path, set[str]] = {}
    for tar in tars:
        text = tar.path.stem if tar.path.parent == folder else tar.path.parent.name
        splits[tar.path] = {_SPLIT_WORDS[word] for word in _WORD.findall(text.lower()) if word in _SPLIT_WORDS}
    least = 1 if any(splits.values()) else 0
    for path, found in splits.items():
        if not least <= len(found) <= 1:
            raise FractalError(f"{path}: no split, or several, in its name; use --split train=PATTERN,val=PATTERN")
    return {path: next(iter(found), TRAINING) for path, found in splits.items()}
