"""Random erasing (Zhong et al., AAAI 2020), as in DeiT: rectangles of normalised images become noise."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fractaltrain.stream.bits import Bits, Draw, uniforms

_TRIES = 10  # of a rectangle that fits; else the image stays whole
_AREA = (0.02, 1 / 3)
_LOG_RATIO = np.log(1 / 0.3)

Boxes = npt.NDArray[np.int64]


def erase(images: Tensor, keys: Bits, probability: float) -> Tensor:
    """Normalised images (b, 3, H, W) float with rectangles of some replaced by N(0, 1), in place."""
    height, width = images.shape[2:]
    boxes = erased_boxes(keys, height, width, probability)
    chosen = np.flatnonzero(boxes[:, 2] > 0)
    if len(chosen) == 0:
        return images
    top, left, h, w = torch.from_numpy(boxes[chosen].T).to(images.device)[..., None, None, None]
    y = torch.arange(height, device=images.device).view(-1, 1)
    x = torch.arange(width, device=images.device)
    inside = (y >= top) & (y < top + h) & (x >= left) & (x < left + w)
    generator = torch.Generator(images.device).manual_seed(int(keys[0] ^ np.uint64(Draw.ERASE)))
    noise = torch.randn((len(chosen), *images.shape[1:]), generator=generator, device=images.device)
    indices = torch.from_numpy(chosen).to(images.device)
    images[indices] = torch.where(inside, noise.to(images.dtype), images[indices])
    return images


def erased_boxes(keys: Bits, height: int, width: int, probability: float) -> Boxes:
    """What is erased of each image: (b, 4) int64, top, left, height and width; all 0 for those that stay whole.

    The area is uniform in 0.02 to 1/3 of the image's, the logarithm of height over width in that of 0.3 to 1/0.3.
    """
    numbers = uniforms(keys, Draw.ERASE, 3 + 2 * _TRIES)
    areas = height * width * (_AREA[0] + numbers[:, 3 : 3 + _TRIES] * (_AREA[1] - _AREA[0]))
    ratios = np.exp(_LOG_RATIO * (2 * numbers[:, 3 + _TRIES :] - 1))
    heights = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
    widths = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    fits = (heights > 0) & (heights < height) & (widths > 0) & (widths < width)
    first, rows = fits.argmax(1), np.arange(len(keys))
    h, w = heights[rows, first], widths[rows, first]
    top = (numbers[:, 1] * (height - h + 1)).astype(np.int64)
    left = (numbers[:, 2] * (width - w + 1)).astype(np.int64)
    erased = (numbers[:, 0] < probability) & fits.any(1)
    return np.where(erased[:, None], np.stack([top, left, h, w], axis=1), 0)
