"""CIFAR-10 and CIFAR-100 through torchvision, which downloads the archives or takes those it finds."""

from http.client import HTTPException
from pathlib import Path
from tarfile import TarError
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
    archive, unpacked = folder / kind.filename, folder / kind.base_folder
    found = next((path for path in (archive, unpacked) if path.exists()), None)
    try:
        dataset = kind(folder, train=train, download=True)
    except (URLError, HTTPException, ConnectionError, TimeoutError) as error:
        if found:
            raise FractalError(
                f"{found}: not as published, or damaged, and cannot be downloaded ({_reason(error)}); fetch it "
                f"from {kind.url} again"
            ) from error
        raise FractalError(
            f"{kind.url}: cannot be downloaded ({_reason(error)}); fetch it elsewhere, put {kind.filename} into "
            f"{folder} (another folder: --data-dir) and run again"
        ) from error
    except (RuntimeError, EOFError, TarError) as error:
        raise FractalError(f"{archive}: damaged ({error}); remove it and run again") from error
    labels = np.asarray(dataset.targets, np.int64)
    part, names = "train" if train else "test", tuple(dataset.classes)
    return ArraySource(f"{name}/{part}", np.asarray(dataset.data), labels, classes=len(names), class_names=names)


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", error)) or type(error).__name__
