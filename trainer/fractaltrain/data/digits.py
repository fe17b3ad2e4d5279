"""scikit-learn's handwritten digits (UCI optdigits): 1,797 grey images of 8 x 8, ten classes, part of the package."""

import numpy as np
from sklearn.datasets import load_digits as load_sklearn_digits

from fractaltrain.data.source import ArraySource

_LEVELS = 16
_NAMES = tuple("0123456789")


def load_digits() -> ArraySource:
    """All digits as 8 x 8 RGB images, grey levels 0..16 stretched to 0..255."""
    digits = load_sklearn_digits()
    grey = np.rint(digits.images * (255 / _LEVELS)).astype(np.uint8)
    return ArraySource(
        "digits", np.repeat(grey[..., None], 3, axis=3), digits.target.astype(np.int64), classes=10, class_names=_NAMES
    )
