"""Crops of single images, in the loader workers: (H, W, 3) uint8 to (S, S, 3) uint8."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2

from fractaltrain.data.source import Images
from fractaltrain.recipes.recipe import TrainRecipe
from fractaltrain.stream.bits import Bits, Draw, mix, uniforms
from fractaltrain.stream.loader import Batch
from fractaltrain.stream.seeding import seeded, seeded_numpy

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


_ERASING_TRIES = 10  # of a rectangle that fits; else the image stays whole
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
    numbers = uniforms(keys, Draw.ERASE, 3 + 2 * _ERASING_TRIES)
    areas = height * width * (_AREA[0] + numbers[:, 3 : 3 + _ERASING_TRIES] * (_AREA[1] - _AREA[0]))
    ratios = np.exp(_LOG_RATIO * (2 * numbers[:, 3 + _ERASING_TRIES :] - 1))
    heights = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
    widths = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    fits = (heights > 0) & (heights < height) & (widths > 0) & (widths < width)
    first, rows = fits.argmax(1), np.arange(len(keys))
    h, w = heights[rows, first], widths[rows, first]
    top = (numbers[:, 1] * (height - h + 1)).astype(np.int64)
    left = (numbers[:, 2] * (width - w + 1)).astype(np.int64)
    erased = (numbers[:, 0] < probability) & fits.any(1)
    return np.where(erased[:, None], np.stack([top, left, h, w], axis=1), 0)


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


Numbers = npt.NDArray[np.float64]
Level = Callable[[Numbers, Numbers], Numbers]

_LAYERS = 2
_PROBABILITY = 0.5
_DEVIATION = 0.5
_SCALE = 10.0
_MOST = 9.999  # at 10, Posterize would keep no bits: a black image, which Pillow refuses to make


def randaugment(images: Tensor, keys: Bits, magnitude: float, fill: Fill) -> Tensor:
    """RandAugment of a batch (b, 3, H, W) uint8 on its device, drawn by the keys (b,) of its samples."""
    policy = _policy(fill)
    numbers = uniforms(keys, Draw.RANDAUGMENT, 5 * _LAYERS).reshape(len(keys), _LAYERS, 5)
    images = images.clone()
    for layer in range(_LAYERS):
        which, chance, radius, angle, sign = numbers[:, layer].T
        gauss = np.sqrt(-2 * np.log(1 - radius)) * np.cos(2 * np.pi * angle)  # Box and Muller
        strengths = np.clip(magnitude + _DEVIATION * gauss, 0, _MOST) / _SCALE
        signs = np.where(sign < 0.5, -1.0, 1.0)
        chosen = np.where(chance < _PROBABILITY, (which * len(policy)).astype(int), -1)
        for number, (operation, level) in enumerate(policy):
            _apply(operation, images, chosen == number, level(strengths, signs))
    return images


def color_jitter(images: Tensor, keys: Bits, strength: float) -> Tensor:
    """Brightness, contrast and saturation of a batch, in an order of each image's own, by factors U(1 - s, 1 + s)."""
    numbers = uniforms(keys, Draw.JITTER, 6)
    orders = np.argsort(numbers[:, :3], axis=1)
    factors = 1 + strength * (2 * numbers[:, 3:] - 1)
    images = images.clone()
    for place in range(3):
        for number, operation in enumerate((brightness, contrast, color)):
            _apply(operation, images, orders[:, place] == number, factors[:, number])
    return images


def timm_randaugment(image_size: int, magnitude: float, fill: Fill) -> Callable[[Images, int], Images]:
    """timm's RandAugment of an image (H, W, 3) uint8 by its key: the reference."""
    figures = {
        "translate_const": int(image_size * 0.45),
        "img_mean": fill,
        "interpolation": Image.Resampling.BICUBIC,
        "magnitude_max": _MOST,
    }
    augment = rand_augment_transform(f"rand-mstd{_DEVIATION:g}-inc1", figures)
    for operation in augment.ops:
        operation.magnitude = magnitude  # in its text timm takes whole numbers only

    def apply(image: Images, key: int) -> Images:
        with seeded_numpy(mix(key, Draw.RANDAUGMENT)):
            return np.asarray(augment(Image.fromarray(image)))

    return apply


def _apply(operation: Operation, images: Tensor, chosen: npt.NDArray[np.bool_], levels: Numbers) -> None:
    """Change the chosen images in place."""
    if not chosen.any():
        return
    indices = torch.from_numpy(np.flatnonzero(chosen)).to(images.device)
    some = torch.from_numpy(levels[chosen]).float().to(images.device)
    images[indices] = operation(images[indices], some)


def _policy(fill: Fill) -> list[tuple[Operation, Level]]:
    """All operations, and how their levels follow from strength in [0, 1] and sign; as timm's increasing set."""

    def none(strength: Numbers, sign: Numbers) -> Numbers:
        return strength

    def factor(strength: Numbers, sign: Numbers) -> Numbers:
        return np.maximum(0.1, 1 + sign * strength * 0.9)

    def signed(most: float) -> Level:
        return lambda strength, sign: sign * strength * most

    return [
        (auto_contrast, none),
        (equalize, none),
        (invert, none),
        (rotate(fill), signed(30)),
        (posterize, lambda strength, sign: 4 - np.floor(strength * 4)),
        (solarize, lambda strength, sign: 256 - np.floor(strength * 256)),
        (solarize_add, lambda strength, sign: np.floor(strength * 110)),
        (color, factor),
        (contrast, factor),
        (brightness, factor),
        (sharpness, factor),
        (shear(0, fill), signed(0.3)),
        (shear(1, fill), signed(0.3)),
        (translate(0, fill), signed(0.45)),
        (translate(1, fill), signed(0.45)),
    ]


def mixed(images: Tensor, labels: Tensor, keys: Bits, recipe: TrainRecipe, classes: int) -> tuple[Tensor, Tensor]:
    """Images, in place, and their targets: labels as they are, or (b, classes) float32 if they are soft.

    Each image is mixed with its partner from the other end of the batch, all in the same proportion (Zhang et al.,
    ICLR 2018), or has a rectangle of it pasted in (Yun et al., ICCV 2019); the first key draws which.

    Args:
        images: (b, 3, H, W) float, b even where pairs are made.
        labels: (b,) int64; or (b, classes) float32 of images with several classes, which are mixed, but not smoothed:
            their losses are of each class by itself, and none is certain to be absent because another is there.
    """
    if labels.ndim == 1 and recipe.label_smoothing:
        labels = smoothed(labels, recipe.label_smoothing, classes)
    if not recipe.mixes:
        return images, labels
    if labels.ndim == 1:
        labels = functional.one_hot(labels, classes).float()
    mixing: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = Mixup(
        recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=len(images)
    )
    with seeded_numpy(mix(int(keys[0]), Draw.MIX)):
        images, shares = mixing(images, torch.arange(len(images), device=images.device))
    return images, shares @ labels  # row i of shares: how much of each image of the batch is in image i


def smoothed(labels: Tensor, share: float, classes: int) -> Tensor:
    """Labels (b,) as shares of classes (b, classes) float32, of which ``share`` is spread over all classes."""
    return functional.one_hot(labels, classes) * (1 - share) + share / classes


_PADDING = 8  # the reflected border is 1/8 of the image on each side
_DEGREES = 10.0
_SHIFT = (0.0, 1 / 8)  # of the padded image: none along x, up to an eighth along y, as torchvision reads it
_ZOOM = (1.0, 1.2)

Change = Callable[[Images, int], Images]


@dataclass(frozen=True)
class Geometry:
    """Makes images square and as large as the model wants, and augments them: ``steps`` in order."""

    image_size: int
    steps: tuple[Change, ...]

    def __call__(self, image: Images, key: int) -> Images:
        """(H, W, 3) uint8 to (S, S, 3) uint8; any randomness comes from ``key``."""
        for step in self.steps:
            image = step(image, key)
        return image


def training_geometry(recipe: TrainRecipe, image_size: int, device: torch.device) -> Geometry:
    """The geometry of training images; where there is no accelerator, timm's RandAugment too."""
    steps: list[Change] = []
    if recipe.crop == "random":
        steps.append(partial(random_crop, size=image_size))
    elif recipe.crop == "resized":
        steps.append(partial(random_resized_crop, size=image_size, scale=recipe.crop_scale))
    else:
        steps.append(partial(_fit, size=image_size))
    if recipe.augment == "affine":
        steps.append(_affine(recipe, image_size))
    elif recipe.hflip:
        steps.append(partial(_flip, probability=recipe.hflip))
    if recipe.randaugment and device.type == "cpu":
        steps.append(timm_randaugment(image_size, recipe.randaugment, _fill(recipe)))
    return Geometry(image_size, tuple(steps))


def evaluation_geometry(recipe: TrainRecipe, image_size: int) -> Geometry:
    """The geometry of held-out images: resized; or their middle, where training sees pieces.

    Of pieces at full scale it is the middle at full scale; of resized ones that of the image whose shorter side is 8/7
    of what the model sees (256 for 224, as DeiT and torchvision's references have it): squares lose a little of their
    border, and no image its shape.
    """
    fit = {"none": _fit, "random": centre_crop, "resized": resized_centre_crop}[recipe.crop]
    return Geometry(image_size, (partial(fit, size=image_size),))


def training_batch(
    batch: Batch, recipe: TrainRecipe, classes: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model sees of a batch, and what it shall say of it, on the device.

    Returns:
        Images (b, 3, S, S) float32; labels (b,) int64, or (b, classes) float32 where images show several classes or
        the recipe mixes or smooths them.
    """
    images, labels = batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
    if recipe.randaugment:
        if device.type != "cpu":
            images = randaugment(images, batch.sample_keys, recipe.randaugment, _fill(recipe))
    elif recipe.color_jitter:
        images = color_jitter(images, batch.sample_keys, recipe.color_jitter)
    inputs = to_input(images, recipe)
    if recipe.erasing:
        inputs = erase(inputs, batch.sample_keys, recipe.erasing)
    return mixed(inputs, labels, batch.sample_keys, recipe, classes)


def to_input(images: torch.Tensor, recipe: TrainRecipe) -> torch.Tensor:
    """Images (b, 3, S, S) uint8 on any device to float32: [0, 1], then minus the mean, divided by the deviation."""
    mean = torch.tensor(recipe.mean, device=images.device).view(3, 1, 1)
    std = torch.tensor(recipe.std, device=images.device).view(3, 1, 1)
    inputs = images.to(torch.float32, memory_format=torch.contiguous_format)
    return inputs.div_(255).sub_(mean).div_(std)  # in place: new memory costs more than the arithmetic


def _fit(image: Images, _key: int, size: int) -> Images:
    """``size`` x ``size``, bilinear with antialiasing; an image that fits stays as it is."""
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def _flip(image: Images, key: int, probability: float) -> Images:
    flipped = uniforms(np.array([key], np.uint64), Draw.FLIP, 1)[0, 0] < probability
    return image[:, ::-1] if flipped else image


def _affine(recipe: TrainRecipe, image_size: int) -> Change:
    """The published augmentation for fine-tuning; it takes the nearest pixel, and what comes from outside the padded
    image is black. Pillow does it, as there: its affine map is three times as fast as torchvision's on tensors."""
    augment = v2.Compose(
        [
            v2.Pad(image_size // _PADDING, padding_mode="reflect"),
            v2.RandomAffine(_DEGREES, translate=_SHIFT, scale=_ZOOM),
            v2.CenterCrop(image_size),
            *([v2.RandomHorizontalFlip(recipe.hflip)] if recipe.hflip else []),
        ]
    )

    def apply(image: Images, key: int) -> Images:
        with seeded(key):
            return np.asarray(augment(Image.fromarray(image)))

    return apply


def _fill(recipe: TrainRecipe) -> Fill:
    """The colour that becomes 0 when it is normalised: what comes from outside of an image."""
    red, green, blue = (min(255, round(255 * mean)) for mean in recipe.mean)
    return red, green, blue
