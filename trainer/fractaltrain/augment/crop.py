"""Crops of single images, in the loader workers: (H, W, 3) uint8 to (S, S, 3) uint8."""

import math

import numpy as np
import torch
from torch.nn import functional

from fractaltrain.data.source import Images
from fractaltrain.stream.bits import Draw, uniforms

_TRIES = 10  # of a piece that fits, then the largest one in the middle
_EVALUATION_SCALE = 256 / 224
_LOG_RATIOS = (math.log(3 / 4), math.log(4 / 3))

Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""


def random_crop(image: Images, key: int, size: int) -> Images:
    """A piece of ``size`` x ``size``; an image that is smaller is stretched to that instead."""
    height, width, _ = image.shape
    if height < size or width < size:
        return resize(image, size)
    y, x = _draw(key, 2)
    top, left = int(y * (height - size + 1)), int(x * (width - size + 1))
    return image[top : top + size, left : left + size]


def centre_crop(image: Images, _key: int, size: int) -> Images:
    """The middle of ``size`` x ``size``; an image that is smaller is stretched to that instead."""
    height, width, _ = image.shape
    if height < size or width < size:
        return resize(image, size)
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def resized_centre_crop(image: Images, key: int, size: int) -> Images:
    """The middle of ``size`` x ``size`` of the image resized, in its shape, to a shorter side of 8/7 of that."""
    square = centre_crop(image, key, min(image.shape[:2]))  # what is left and right of it is not needed
    return centre_crop(resize(square, round(size * _EVALUATION_SCALE)), key, size)


def random_resized_crop(image: Images, key: int, size: int, scale: tuple[float, float]) -> Images:
    """A piece of random area and shape, resized to ``size`` x ``size``, bicubic with antialiasing."""
    top, left, height, width = resized_crop_box(image.shape[0], image.shape[1], scale, key)
    return resize(image[top : top + height, left : left + width], size)


def resized_crop_box(height: int, width: int, scale: tuple[float, float], key: int) -> Box:
    """The piece that RandomResizedCrop takes of an image (Szegedy et al., Going deeper with convolutions, 2015).

    Its area is uniform in ``scale`` of the image's, the logarithm of its width over its height in that of 3/4 to 4/3.
    """
    numbers = _draw(key, 2 * _TRIES + 2)
    low, high = _LOG_RATIOS
    for area, shape in zip(numbers[:_TRIES], numbers[_TRIES : 2 * _TRIES], strict=True):
        pixels = height * width * (scale[0] + area * (scale[1] - scale[0]))
        ratio = math.exp(low + shape * (high - low))
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(numbers[-2] * (height - h + 1)), int(numbers[-1] * (width - w + 1)), h, w
    w = min(width, max(1, round(height * math.exp(high))))
    h = min(height, max(1, round(width / math.exp(low))))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(image: Images, size: int) -> Images:
    """``size`` x ``size``, bicubic with antialiasing; torch does it on bytes, faster than Pillow."""
    tensor = torch.from_numpy(np.ascontiguousarray(image) if image.flags.writeable else image.copy())
    planes = tensor.permute(2, 0, 1)[None]
    resized = functional.interpolate(planes, (size, size), mode="bicubic", antialias=True)[0]
    pixels: Images = resized.permute(1, 2, 0).numpy()
    return pixels


def _draw(key: int, count: int) -> list[float]:
    numbers: list[float] = uniforms(np.array([key], np.uint64), Draw.CROP, count)[0].tolist()
    return numbers
