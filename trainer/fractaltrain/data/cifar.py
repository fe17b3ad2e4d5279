"""CIFAR-10 and CIFAR-100 through torchvision, which downloads the archives or takes those it finds."""

from pathlib import Path
from urllib.error import URLError

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100

from fractalshards.errors import FractalError
from fractaltrain.data.source import ArraySource

DATASETS = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def load_cifar(name: str, folder: Path) -> tuple[ArraySource, ArraySource]:
    """The 50,000 training and 10,000 test images of 32 x 32.

    CIFAR's own files are pickles. torchvision opens them only when their MD5 sums are the published ones, and so
    nothing else is ever unpickled.

    Args:
        name: ``cifar10`` or ``cifar100``.
        folder: holds the archive or the folder unpacked from it; otherwise the archive is downloaded to it.

    Raises:
        FractalError: if the archive is neither there nor can be downloaded, or is damaged.
    """
    return _load(name, folder, train=True), _load(name, folder, train=False)


def _load(name: str, folder: Path, train: bool) -> ArraySource:
    kind = DATASETS[name]
    try:
        dataset = kind(folder, train=train, download=True)
    except URLError as error:
        if (folder / kind.filename).is_file():
            raise FractalError(f"{folder / kind.filename}: not the published archive; fetch it again") from error
        raise FractalError(
            f"{kind.url}: cannot be downloaded ({error.reason}); fetch it elsewhere, put {kind.filename} into "
            f"{folder} (another folder: --data-dir) and run again"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise FractalError(f"{folder / kind.filename}: damaged ({error}); remove it and run again") from error
    labels = np.asarray(dataset.targets, np.int64)
    part = "train" if train else "test"
    return ArraySource(f"{name}/{part}", np.asarray(dataset.data), labels, classes=len(dataset.classes))
