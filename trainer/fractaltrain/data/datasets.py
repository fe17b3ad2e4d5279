"""Map-style PyTorch datasets for any training loop: of stored images, and of images that are rendered when needed.

Use them with a ``fractaltrain.EpochSampler``, or with any other sampler.
"""

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from fractalshards.errors import UsageError
from fractalshards.manifest import TRAINING
from fractalshards.reader import StoredSplit, open_dataset
from fractalshards.remote.cache import ShardCache, cache_root, open_cache, prefetching
from fractalshards.remote.stores import parse_location
from fractaltrain.config import CACHE_SIZE, MEMORY_SIZE, WINDOW
from fractaltrain.data.memory import MappedSource
from fractaltrain.data.rendered import RecipeOrPath, RenderedSplit, open_rendered
from fractaltrain.data.source import Images, SampleSource

Output = Literal["pil", "array", "tensor"]
StrPath = str | os.PathLike[str]

_OUTPUTS: dict[str, Callable[[Images], Any]] = {
    "pil": Image.fromarray,
    "array": lambda image: image if image.flags.writeable else image.copy(),
    "tensor": lambda image: torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
}


class _SampleDataset(Dataset[tuple[Any, Any]]):
    """Images and labels of a split, by index.

    Attributes:
        classes: number of classes.
        class_names: their names by index; empty if they have none.
        label_type: ``single`` or ``multi``: one class per image, or several.
        image_size: side of the square images in pixels; None if they differ.
        lengths: samples per shard, in order of index.
        digest: identifies the dataset.
        fresh: whether every epoch shows new images.
    """

    fresh = False

    def __init__(
        self,
        split: "StoredSplit | RenderedSplit",
        transform: Callable[[Any], Any] | None,
        output: Output,
        memory: Path | None,
        memory_size: int,
    ) -> None:
        """Check arguments; ``memory`` is the folder of caches if all images are to be kept in memory."""
        if output not in _OUTPUTS:
            raise UsageError(f"output is {output!r}: expected one of {', '.join(_OUTPUTS)}")
        self.classes, self.class_names = split.classes, split.class_names
        self.label_type, self.image_size = split.label_type, split.image_size
        self.lengths, self.digest = split.lengths, split.digest
        self.transform, self.output = transform, output
        self._source: SampleSource = split
        if memory is not None:
            self._source = MappedSource(split, memory, f"{split.digest}-{split.split}", memory_size, split.image_size)

    def __len__(self) -> int:
        """Return the number of samples."""
        return sum(self.lengths)

    def __iter__(self) -> Iterator[tuple[Any, int | torch.Tensor]]:
        """Yield all samples in order; if images are fresh, those of epoch 0."""
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> tuple[Any, int | torch.Tensor]:
        """Return a sample: its image, transformed, and its label.

        By ``output`` the image is an RGB image of Pillow, a uint8 array (H, W, 3) or a uint8 tensor (3, H, W). The
        label is a class index, or for multi-label images a float32 tensor (classes,), 1 for classes shown, else 0.

        Raises:
            IndexError: if there is no such sample.
            BadSampleError: if it is damaged or its file cannot be read.
            FractalError: if its file cannot be fetched, or was changed after the dataset was opened.
        """
        _, image, label = self._source.read(index)
        picture = _OUTPUTS[self.output](image)
        if self.transform is not None:
            picture = self.transform(picture)
        if isinstance(label, int):
            return picture, label
        return picture, torch.zeros(self.classes).index_fill(0, torch.tensor(label, dtype=torch.int64), 1)


class ShardDataset(_SampleDataset):
    """The images of a split of a dataset of shards, in a local folder or at a URL.

    data = ShardDataset("shards/single", transform=my_transform)
    """

    def __init__(
        self,
        location: StrPath,
        split: str = TRAINING,
        transform: Callable[[Any], Any] | None = None,
        output: Output = "pil",
        *,
        cache_dir: StrPath | None = None,
        cache_size: int = CACHE_SIZE,
        memory: bool = False,
        memory_size: int = MEMORY_SIZE,
    ) -> None:
        """Open the dataset; no images are read yet, except with ``memory``.

        Args:
            location: folder or URL (s3://, gs://, hf://, https://) of the dataset.
            split: ``train`` or ``val``.
            transform: applied to every image, in the form that ``output`` says.
            output: ``pil``: an image of Pillow; ``array``: uint8 (H, W, 3); ``tensor``: uint8 (3, H, W).
            cache_dir: folder for the shards of a URL, and for images in memory; None: that of ``fractaltrain pt``.
            cache_size: most bytes of a URL's shards to keep at a time.
            memory: decode all images once, into memory shared by all processes of the machine.
            memory_size: most bytes of these images.

        Raises:
            UsageError: if an argument is wrong, or the images or shards do not fit.
            FractalError: if the dataset is missing or damaged, or cannot be fetched.
        """
        place = parse_location(os.fspath(location))
        self._cache: ShardCache | None = None
        if place.scheme == "file":
            opened = open_dataset(place.root, split)
        else:
            self._cache = open_cache(os.fspath(location), Path(cache_dir) if cache_dir else None, cache_size, 1, split)
            self._cache.prepare()
            opened = StoredSplit(self._cache.manifest, split, self._cache.open, WINDOW)
        self._split = opened
        self._request: Callable[[Sequence[int]], None] | None = None
        super().__init__(opened, transform, output, cache_root(cache_dir) if memory else None, memory_size)

    def use_window(self, window: int) -> None:
        """Prepare for a sampler that shuffles ``window`` shards together.

        Raises:
            UsageError: if the cache of a URL cannot hold so many.
        """
        if self._cache is not None:
            self._cache.check_window(window, self._split.split)
            self._split.files.limit = window

    def prefetch(self, shards: tuple[int, ...]) -> None:
        """Fetch shards of a URL ahead, the most urgent first, in the first process of each machine."""
        in_memory = self._source is not self._split
        if self._cache is None or in_memory or os.environ.get("LOCAL_RANK", "0") != "0":
            return
        if self._request is None:
            stack = ExitStack()
            self._request = stack.enter_context(prefetching(self._cache, self._split.split))
            weakref.finalize(self, _close, stack, os.getpid())
        self._request(shards)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the process that fetches ahead, which spawned loader workers do not need."""
        return {**self.__dict__, "_request": None}


def _close(stack: ExitStack, process: int) -> None:
    if os.getpid() == process:  # not in a forked loader worker
        stack.close()


class RenderedDataset(_SampleDataset):
    """The images of a split, rendered when they are read; nothing is stored.

    data = RenderedDataset("single.json")  # fractalgen recipe --kind single --n 1000000 > single.json
    """

    def __init__(
        self,
        recipe: RecipeOrPath,
        split: str = TRAINING,
        transform: Callable[[Any], Any] | None = None,
        output: Output = "pil",
        *,
        fresh: bool = False,
        cache_dir: StrPath | None = None,
        memory: bool = False,
        memory_size: int = MEMORY_SIZE,
    ) -> None:
        """Open the dataset.

        Args:
            recipe: a recipe of ``fractalgen.make_recipe``; or a file that ``fractalgen recipe`` or ``fractalshards
                recipe`` wrote.
            fresh: new images in every epoch, for kinds without a limited number of images. Indices from n = ``len`` on
                belong to later epochs: ``EpochSampler`` yields ``e n + i`` for sample i of epoch e.
            split, transform, output, cache_dir, memory, memory_size: see ``ShardDataset``.

        Raises:
            UsageError: if an argument is wrong, the kind has a limited number of images, or they do not fit.
            FractalError: if the file is damaged or of another version, or the split is empty.
            OSError: if the file cannot be read.
        """
        if fresh and memory:
            raise UsageError("fresh and memory cannot be combined: fresh images are never shown again")
        self.fresh = fresh
        opened = open_rendered(recipe, split, fresh)
        super().__init__(opened, transform, output, cache_root(cache_dir) if memory else None, memory_size)
