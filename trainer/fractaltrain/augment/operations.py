"""Pillow's image operations on batches: every image with a level of its own, on any device.

All take images (b, 3, H, W) uint8 and levels (b,) float32 on the same device, and give images like those. They give
Pillow's pixels, but for those that move them: torch's bicubic kernel is a little sharper (a = -0.75 instead of -0.5).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Fill = tuple[int, int, int]
Operation = Callable[[Tensor, Tensor], Tensor]

_LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # ITU-R 601, as Pillow has it


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Away from black, or towards it for factors below 1."""
    return _blend(torch.zeros_like(images, dtype=torch.float32), images, factors)


def color(images: Tensor, factors: Tensor) -> Tensor:
    """Away from grey, or towards it for factors below 1."""
    return _blend(_grey(images), images, factors)


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Away from the mean grey of the image, or towards it for factors below 1."""
    return _blend((_grey(images).mean((1, 2, 3), keepdim=True) + 0.5).floor(), images, factors)


def sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """Away from a smoothed image, or towards it for factors below 1; the border stays as it is."""
    kernel = torch.ones(3, 1, 3, 3, device=images.device)
    kernel[:, :, 1, 1] = 5
    smooth = images.float()
    smooth[..., 1:-1, 1:-1] = (functional.conv2d(smooth, kernel / 13, groups=3) + 0.5).floor()
    return _blend(smooth, images, factors)


def invert(images: Tensor, _: Tensor) -> Tensor:
    """255 minus the pixel."""
    return 255 - images


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """The highest ``bits`` bits of every pixel, 0 to 8."""
    masks = (256 - 2 ** (8 - bits)).to(torch.uint8)
    return images & _per_image(masks)


def solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    """Pixels from the threshold on inverted."""
    return torch.where(images < _per_image(thresholds), images, 255 - images)


def solarize_add(images: Tensor, additions: Tensor) -> Tensor:
    """Pixels below 128 made brighter."""
    brighter = (images + _per_image(additions)).clamp(max=255).to(torch.uint8)
    return torch.where(images < 128, brighter, images)


def auto_contrast(images: Tensor, _: Tensor) -> Tensor:
    """Every channel stretched to 0..255."""
    low, high = images.amin((2, 3), keepdim=True).double(), images.amax((2, 3), keepdim=True).double()
    scale = torch.full_like(high, 255) / (high - low)  # a number over a tensor would be rounded twice
    stretched = (images * scale - low * scale).clamp(0, 255).to(torch.uint8)
    return torch.where(high > low, stretched, images)


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Every channel with its values spread evenly, by its histogram."""
    channels = len(images) * 3
    values = images.reshape(channels, -1).long()
    bins = values + 256 * torch.arange(channels, device=images.device)[:, None]
    counts = torch.bincount(bins.flatten(), minlength=256 * channels).view(channels, 256)
    highest = 255 - (counts > 0).int().flip(1).argmax(1, keepdim=True)
    step = (counts.sum(1, keepdim=True) - counts.gather(1, highest)) // 255
    before = counts.cumsum(1) - counts
    table = ((before + step // 2) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=images.device))
    return table.gather(1, values).to(torch.uint8).view(images.shape)


def rotate(fill: Fill) -> Operation:
    """Counter-clockwise about the centre, by degrees."""

    def apply(images: Tensor, degrees: Tensor) -> Tensor:
        height, width = images.shape[2:]
        sin, cos = (degrees * (math.pi / 180)).sin(), (degrees * (math.pi / 180)).cos()
        x, y = width / 2, height / 2
        rows = (cos, -sin, x - x * cos + y * sin, sin, cos, y - x * sin - y * cos)
        return _move(images, rows, fill)

    return apply


def shear(axis: int, fill: Fill) -> Operation:
    """Along x (axis 0) by a share of y, or along y (axis 1) by a share of x."""

    def apply(images: Tensor, shares: Tensor) -> Tensor:
        one, zero = torch.ones_like(shares), torch.zeros_like(shares)
        along_x, along_y = (one, shares, zero, zero, one, zero), (one, zero, zero, shares, one, zero)
        return _move(images, (along_x, along_y)[axis], fill)

    return apply


def translate(axis: int, fill: Fill) -> Operation:
    """Along x (axis 0) or y (axis 1) by a share of the side; positive shares move the picture to lower coordinates."""

    def apply(images: Tensor, shares: Tensor) -> Tensor:
        one, zero = torch.ones_like(shares), torch.zeros_like(shares)
        pixels = shares * images.shape[3 - axis]
        along_x, along_y = (one, zero, pixels, zero, one, zero), (one, zero, zero, zero, one, pixels)
        return _move(images, (along_x, along_y)[axis], fill)

    return apply


def _move(images: Tensor, rows: tuple[Tensor, ...], fill: Fill) -> Tensor:
    """Every pixel (x, y) from (a x + b y + c, d x + e y + f) of its image, bicubic; what lies outside is ``fill``.

    Args:
        rows: a, b, c, d, e, f, each (b,); coordinates count from the corner, so centres of pixels end in one half.
    """
    height, width = images.shape[2:]
    a, b, c, d, e, f = (row[:, None, None] for row in rows)
    y = torch.arange(height, device=images.device)[None, :, None] + 0.5
    x = torch.arange(width, device=images.device)[None, None, :] + 0.5
    x, y = a * x + b * y + c, d * x + e * y + f
    inside = ((x >= 0) & (x < width) & (y >= 0) & (y < height))[:, None]
    grid = torch.stack([x * (2 / width) - 1, y * (2 / height) - 1], dim=-1)
    moved = functional.grid_sample(images.float(), grid, "bicubic", "border", align_corners=False)
    colour = torch.tensor(fill, dtype=torch.uint8, device=images.device).view(3, 1, 1)
    return torch.where(inside, moved.round().clamp(0, 255).to(torch.uint8), colour)


def _blend(degenerate: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    blended = degenerate + _per_image(factors) * (images - degenerate)
    return blended.clamp(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    weights = torch.tensor(_LUMA, device=images.device).view(3, 1, 1)
    return ((images * weights).sum(1, keepdim=True) + 0.5).floor()


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
