"""The loaders of other libraries for ``bench_stream.py``: endless batches of the images that our shards hold.

Each reads the same PNGs in random order and decodes them with Pillow to uint8 batches, in this process.
"""

import io
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import PILToTensor

from fractalshards.manifest import Manifest
from fractalshards.png import Pixels
from fractalshards.reader import ShardIndex, index_split, iterate_shard

Batches = Iterator[Any]  # of (images, labels)

_SHUFFLE = 1000  # samples in webdataset's buffer
_CHUNK_BYTES = "64MB"  # of litdata


def open_others(manifest: Manifest, folder: Path, batch_size: int) -> dict[str, Batches]:
    """Open the training images of a dataset in other libraries, in whose formats they are copied into ``folder``.

    Returns:
        Batches by name of the library; without litdata if it is not installed.
    """
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # the batch is a copy
    others = {
        "`webdataset`, Pillow": _webdataset(manifest, batch_size),
        "torchvision's `ImageFolder`": _image_folder(manifest, folder / "images", batch_size),
    }
    try:
        import litdata
    except ImportError:
        return others
    return others | {"`litdata`, Pillow": _litdata(litdata, manifest, folder / "litdata", batch_size)}


def decode_with_pillow(data: bytes) -> Pixels:
    """Decode an image to (H, W, 3) uint8."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _webdataset(manifest: Manifest, batch_size: int) -> Batches:
    urls = [str(manifest.folder / shard.name) for shard in manifest.splits["train"]]
    dataset = webdataset.WebDataset(urls, resampled=True, shardshuffle=False).shuffle(_SHUFFLE).decode("rgb8")
    for images, labels in dataset.to_tuple("png", "cls").batched(batch_size):
        yield torch.as_tensor(images), torch.as_tensor(labels)


def _image_folder(manifest: Manifest, folder: Path, batch_size: int) -> Batches:
    samples = (sample for index in index_split(manifest, "train") for sample in _read_shard(index))
    for number, (data, label) in enumerate(samples):
        path = folder / f"{label:05d}" / f"{number:09d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return _endless(DataLoader(ImageFolder(str(folder), PILToTensor()), batch_size, shuffle=True, drop_last=True))


def _litdata(litdata: Any, manifest: Manifest, folder: Path, batch_size: int) -> Batches:
    shards = list(index_split(manifest, "train"))
    chunks = {"chunk_bytes": _CHUNK_BYTES, "num_workers": 1, "verbose": False}
    litdata.optimize(
        _read_shard, shards, str(folder), start_method="fork", **chunks
    )  # it sets that of our loaders, too
    dataset = litdata.StreamingDataset(str(folder), shuffle=True, transform=_decode_first)
    return _endless(litdata.StreamingDataLoader(dataset, batch_size=batch_size, drop_last=True))


def _read_shard(index: ShardIndex) -> Iterator[tuple[bytes, int]]:
    for sample in iterate_shard(index):
        yield sample.files["png"], int(sample.files["cls"])


def _decode_first(sample: tuple[bytes, int]) -> tuple[Pixels, int]:
    return decode_with_pillow(sample[0]), sample[1]


def _endless(loader: Iterable[Any]) -> Batches:
    while True:
        yield from loader
