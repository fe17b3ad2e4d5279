"""Datasets of shards to train on: our own, those behind a cache, and WebDataset folders of other programs."""

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fractalshards.errors import BadSampleError, FractalError, describe_os_error
from fractalshards.manifest import MAX_CLASSES, TRAINING, Manifest, load_manifest
from fractalshards.png import decode_image
from fractalshards.reader import Example, OpenFiles, StoredSplit, read_blocks
from fractalshards.remote.cache import ShardCache
from fractalshards.tars import TarIndex, index_digest, index_tars
from fractalshards.webdataset import DEFAULT_OPTIONS, WebDatasetOptions, is_webdataset, load_webdataset
from fractaltrain.data.source import LabelledSource, Splits, WithLabels

if TYPE_CHECKING:
    from fractaltrain.distributed import World  # imports torch

VAL_SPLITS = ("val", "validation")  # names of the split to evaluate on; the first that exists is used


def open_shards(
    folder: Path, world: "World", tars: WebDatasetOptions = DEFAULT_OPTIONS, for_training: bool = True
) -> Splits[LabelledSource]:
    """Open a folder of shards, ours or anyone's in WebDataset format, on every rank. Collective.

    Raises FractalError if the dataset is missing or damaged, or has no split ``train``.

    Args:
        tars: how to read tars of another program; rank 0 reads their headers for all ranks.
        for_training: whether ``Splits.train`` is used; if not, it may be the val split.
    """
    if is_webdataset(folder):
        return world.from_main(lambda: _open_webdataset(folder, tars, for_training))
    manifest = load_manifest(folder)
    return _open_splits(manifest, lambda split: StoredSplit(manifest, split))


def open_cached(cache: ShardCache, window: int) -> Splits[LabelledSource]:
    """Open a remote dataset behind a prepared cache; raises FractalError as ``open_shards`` does.

    Args:
        window: shards that are shuffled together; training keeps this many open, evaluation one.
    """
    manifest = cache.manifest
    limits = {TRAINING: window}
    return _open_splits(manifest, lambda split: StoredSplit(manifest, split, cache.open, limits.get(split, 1)))


def _open_splits(manifest: Manifest, open_split: Callable[[str], StoredSplit]) -> Splits[LabelledSource]:
    train = open_split(TRAINING)
    val = next((open_split(name) for name in VAL_SPLITS if name in manifest.splits), None)
    return Splits(train, val, train.digest, train.image_size, train.label_type == "multi", train.recipe)


class WebDatasetSource(WithLabels):
    """One split of a WebDataset folder; takes 40 bytes of memory per sample, and its key."""

    def __init__(self, paths: Sequence[Path], indices: Sequence[TarIndex], classes: int) -> None:
        labels = np.concatenate([tar.labels for tar in indices])
        super().__init__(labels, classes, lengths=tuple(map(len, indices)))
        self._paths, self._indices = paths, indices
        self._starts = np.cumsum([0, *self.lengths])
        self._files = OpenFiles()

    def read(self, index: int) -> Example:
        """Read and decode a sample; raises BadSampleError, naming the tar, if it is damaged or cannot be read."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        place = index - int(self._starts[number])
        path, tar = self._paths[number], self._indices[number]
        key, start, size = tar.key(place), int(tar.starts[place]), int(tar.sizes[place])
        file = self._files.open(path)
        try:
            image = decode_image(read_blocks(file.fileno(), start, start + size))
            return Example(key, image, int(self.labels[index]))
        except FractalError as error:
            raise BadSampleError(f"{path}: {key}: {error}; replace or remove it") from error
        except OSError as error:
            raise BadSampleError(f"{path}: {key}: {describe_os_error(error)}") from error


def _open_webdataset(folder: Path, options: WebDatasetOptions, for_training: bool) -> Splits[LabelledSource]:
    info = load_webdataset(folder, options)
    train, val = ([name for name in names if name in info.splits][:1] for names in ((TRAINING,), VAL_SPLITS))
    if not train and (for_training or not val):
        found = ", ".join(info.splits) or "none"
        raise FractalError(f"{folder}: no split {TRAINING!r} to train on, only {found}; name its tars with --split")
    if val and not for_training and info.classes is not None:
        train = []  # it would only serve to count the classes
    names = train + val
    indices = {name: index_tars(info.splits[name], options.skip_bad) for name in names}
    for name in names:
        if not sum(map(len, indices[name])):
            raise FractalError(f"{folder}: no samples in {name}; check the path, and that images have labels")
    together = list(chain.from_iterable(indices.values()))
    highest = max(int(tar.labels.max(initial=-1)) for tar in together)
    classes = highest + 1 if info.classes is None else info.classes
    if not highest < classes <= MAX_CLASSES:
        raise FractalError(
            f"{folder}: labels reach {highest}, which does not fit {classes} classes; labels count from 0, to at most "
            f"{MAX_CLASSES - 1}; correct them, or num_classes in the info file"
        )
    sources = [WebDatasetSource([tar.path for tar in info.splits[name]], indices[name], classes) for name in names]
    return Splits(sources[0], sources[-1] if val else None, index_digest(together))
