"""Decoded samples of a small dataset, in a memory-mapped file that all processes of a machine share.

    FOLDER/HOST/NAME.pixels   all images, one after the other
    FOLDER/HOST/NAME.npz      their offsets, sizes, labels and keys
    FOLDER/HOST/lock          held while files are filled, opened and removed

The first process fills the file. Each process that reads it holds a shared lock on it, which the kernel releases when
the process ends. A file without readers is removed at the end of a run, or at the start of the next one.
"""

import fcntl
import os
import socket
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from fractalshards.errors import BadSampleError, UsageError
from fractalshards.human import human_bytes
from fractalshards.reader import Example
from fractalshards.storage import atomic_file, check_space, remove_leftovers
from fractaltrain.data.source import Images, SampleSource, Splits


class MappedSource:
    """All samples of a source, decoded once; images are read-only views. Bad samples are read from the source again."""

    def __init__(self, source: SampleSource, folder: Path, name: str, limit: int, image_size: int | None) -> None:
        """Fill the file, or open the one that another process of this machine has filled.

        Raises UsageError if the images are larger than ``limit``; FractalError if the disk has no room for them, or a
        sample cannot be fetched.

        Args:
            folder: private folder of the user's caches.
            name: identifies dataset and split; a plain file name.
            limit: most bytes of images.
            image_size: side of all images in pixels; None: they differ.
        """
        self.lengths, self.classes = source.lengths, source.classes
        self._source = source
        self._pixels_path = folder / socket.gethostname() / f"{name}.pixels"
        self._index_path = self._pixels_path.with_suffix(".npz")
        self._pixels_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _lock(self._pixels_path):
            remove_leftovers(self._pixels_path.parent)
            for path in self._pixels_path.parent.glob("*.pixels"):  # also of this dataset: its files may have changed
                _remove_if_unused(os.open(path, os.O_RDONLY | os.O_CLOEXEC), path)
            if not self._index_path.exists():
                self._fill(limit, image_size)
            self._open()

    @property
    def bytes(self) -> int:
        """Size of all images."""
        return len(self._pixels)

    def read(self, index: int) -> Example:
        """Return a sample.

        Raises IndexError if there is no such sample; BadSampleError if it could not be read from the source, and still
        cannot.
        """
        if not 0 <= index < len(self._places):
            raise IndexError(f"sample index is {index}: expected 0 to {len(self._places) - 1}")
        start, height, width = self._places[index].tolist()
        if not height:
            return self._source.read(index)
        image: Images = self._pixels[start : start + height * width * 3].reshape(height, width, 3)
        first, last = self._label_ends[index : index + 2].tolist()
        labels = self._labels[first:last].tolist()
        return Example(str(self._keys[index]), image, labels[0] if self._is_single else tuple(labels))

    def _fill(self, limit: int, image_size: int | None) -> None:
        """Decode all samples into the file, the index last."""
        samples = sum(self.lengths)
        known = samples * image_size**2 * 3 if image_size else 0
        _check_size(known, limit)
        check_space(self._pixels_path, known, "choose another --cache-dir, or train without --memory")
        places, keys = np.zeros((samples, 3), np.int64), [""] * samples
        labels: list[tuple[int, ...]] = [()] * samples
        is_single = True
        with atomic_file(self._pixels_path) as file:
            for index in range(samples):
                with suppress(BadSampleError):
                    keys[index], image, label = self._source.read(index)
                    places[index] = file.tell(), *image.shape[:2]
                    _check_size(file.tell() + image.nbytes, limit)
                    file.write(np.ascontiguousarray(image).data)
                    is_single = isinstance(label, int)
                    labels[index] = (label,) if isinstance(label, int) else label
        flat, ends = np.array([*chain(*labels)], np.int64), np.cumsum([0, *map(len, labels)])
        with atomic_file(self._index_path) as file:
            np.savez(file, places=places, keys=keys, labels=flat, label_ends=ends, is_single=is_single)

    def _open(self) -> None:
        """Map the file, hold its lock, and read the index."""
        descriptor = os.open(self._pixels_path, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        self.close = weakref.finalize(self, _release, descriptor, self._pixels_path, os.getpid())
        self._pixels: npt.NDArray[np.uint8] = np.empty(0, np.uint8)
        if os.fstat(descriptor).st_size:  # at least one sample is readable
            self._pixels = np.memmap(self._pixels_path, np.uint8, mode="r").view(np.ndarray)
        with np.load(self._index_path, allow_pickle=False) as index:
            self._places, self._labels, self._label_ends = index["places"], index["labels"], index["label_ends"]
            self._keys, self._is_single = index["keys"], bool(index["is_single"])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the mapping: a process that unpickles this maps the file itself."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_pixels", "close")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


@contextmanager
def keep_in_memory(splits: Splits[SampleSource], folder: Path, limit: int, name: str) -> Iterator[Splits[SampleSource]]:
    """Keep all samples of both splits in memory, in at most ``limit`` bytes, until the block ends.

    Args:
        name: identifies the dataset.
    """
    kept: dict[str, Any] = {}
    with ExitStack() as stack:
        for split, source in (("train", splits.train), ("val", splits.val)):
            if source is not None:
                kept[split] = MappedSource(source, folder, f"{name}-{split}", limit, splits.image_size)
                stack.callback(kept[split].close)
                limit -= kept[split].bytes
        yield replace(splits, **kept)


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise UsageError(f"images take over {human_bytes(limit)}; raise --memory-size (memory_size) or drop --memory")


def _lock(path: Path) -> FileLock:
    return FileLock(path.with_name("lock"), is_singleton=True)


def _release(descriptor: int, path: Path, process: int) -> None:
    """Stop reading the file, and remove it if this was its last reader; a forked worker leaves that to its parent."""
    if os.getpid() != process:
        return
    if _lock(path).is_locked:  # garbage that is collected while this thread opens a dataset
        os.close(descriptor)
        return
    with suppress(OSError), _lock(path):
        _remove_if_unused(descriptor, path)


def _remove_if_unused(descriptor: int, path: Path) -> None:
    """Remove a file and its index unless other processes read it, and close the descriptor."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.with_suffix(".npz").unlink(missing_ok=True)  # first: without an index the file counts as missing
        path.unlink(missing_ok=True)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)
