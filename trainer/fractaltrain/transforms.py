"""Transforms: crops, flips and augmentation of single images in the loader workers, the rest on batches on the device.

The random numbers of an image depend on the key of its sample alone, those of a batch on the key of its first sample.
timm and torchvision draw from global generators, which ``seeded`` seeds and restores. Crops and flips are our own:
torchvision's take 0.1 to 0.2 ms more per image, where decoding takes 0.4 ms.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2

from fractalshards.random import GOLDEN64, MASK64, mix64
from fractaltrain.data.source import Images
from fractaltrain.recipes.recipe import Channels, TrainRecipe
from fractaltrain.seeding import Purpose, mix
from fractaltrain.stream.loader import Batch, Transform

_VAL_SCALE = 256 / 224  # shorter side over the side of the crop, as in DeiT and torchvision's reference scripts
_CROP_TRIES = 10  # before falling back to the largest crop of the nearest aspect ratio
_CROP_RATIO = (3 / 4, 4 / 3)
_MAX_MAGNITUDE = 9.999  # of RandAugment; at 10 Posterize would keep 0 bits, which Pillow refuses

Augmentation = Callable[[Image.Image], Image.Image]


def train_transform(recipe: TrainRecipe, image_size: int) -> Transform:
    """Build the transform of training images: crop, flip, then RandAugment, colour jitter or affine augmentation.

    Normalising, erasing and mixing are left to ``train_batch``.
    """
    augmentations: list[Augmentation] = []
    if recipe.augment == "affine":
        augmentations += [
            v2.Pad(image_size // 8, padding_mode="reflect"),
            v2.RandomAffine(10.0, translate=(0.0, 1 / 8), scale=(1.0, 1.2)),  # degrees; shares of the padded image
            v2.CenterCrop(image_size),
        ]
        if recipe.hflip:
            augmentations.append(v2.RandomHorizontalFlip(recipe.hflip))
        if recipe.vflip:
            augmentations.append(v2.RandomVerticalFlip(recipe.vflip))
    if recipe.randaugment:
        augmentations.append(_randaugment(recipe))
    elif recipe.color_jitter:
        augmentations.append(v2.ColorJitter(recipe.color_jitter, recipe.color_jitter, recipe.color_jitter))
    return partial(_transform_train, size=image_size, recipe=recipe, augmentations=tuple(augmentations))


def val_transform(recipe: TrainRecipe, image_size: int) -> Transform:
    """Build the transform of images to evaluate on: the whole image, or its centre if training crops.

    After training on resized crops, the shorter side is first resized to 8/7 of the crop (256 for 224).
    """
    return partial(_transform_val, size=image_size, crop=recipe.crop)


def train_batch(batch: Batch, recipe: TrainRecipe, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Move a batch to the device and normalise, erase and mix its images there.

    Returns:
        Images (b, 3, S, S) float32. Labels (b,) int64, or (b, classes) float32 for multi-label images and if the recipe
        mixes images or smooths labels.
    """
    images = normalize(batch.images.to(device, non_blocking=True), recipe)
    labels = batch.labels.to(device, non_blocking=True)
    if recipe.label_smoothing and labels.ndim == 1:
        labels = functional.one_hot(labels, classes) * (1 - recipe.label_smoothing) + recipe.label_smoothing / classes
    if recipe.erasing or recipe.mixes:
        key = mix(int(batch.sample_keys[0]), Purpose.BATCH)
        with seeded(key, device):
            if recipe.erasing:
                images = RandomErasing(recipe.erasing, mode="pixel", device=device)(images)
            if recipe.mixes:
                images, labels = _mix(images, labels, recipe, classes)
    return images, labels


def normalize(images: Tensor, recipe: TrainRecipe) -> Tensor:
    """Scale images (b, 3, S, S) uint8 to [0, 1], subtract the mean, divide by the standard deviation: float32."""
    inputs = images.to(torch.float32, memory_format=torch.contiguous_format)
    mean, std = (_per_channel(values, images.device) for values in (recipe.mean, recipe.std))
    return inputs.div_(255).sub_(mean).div_(std)  # in place: allocating memory takes longer than the arithmetic


@lru_cache(maxsize=16)
def _per_channel(values: Channels, device: torch.device) -> Tensor:
    """Return a float32 tensor (3, 1, 1) on a device. It is kept: copying one to a GPU waits for all work there."""
    with torch.inference_mode(mode=False):
        return torch.tensor(values, device=device).view(3, 1, 1)


@contextmanager
def seeded(key: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the global generators of torch, on the CPU and a CUDA device, numpy and Python; restore them at the end."""
    generators = [torch.default_generator]
    if device and device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    states = [generator.get_state() for generator in generators]
    python_state, numpy_generator = random.getstate(), get_bit_generator()
    for generator in generators:
        generator.manual_seed(key)
    random.seed(key)
    set_bit_generator(np.random.PCG64(key))
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        random.setstate(python_state)
        set_bit_generator(numpy_generator)


def _mix(images: Tensor, labels: Tensor, recipe: TrainRecipe, classes: int) -> tuple[Tensor, Tensor]:
    """Apply mixup (Zhang et al., ICLR 2018) or CutMix (Yun et al., ICCV 2019) to pairs from both ends of the batch.

    Labels of single-label images are mixed after smoothing, as timm does. Those of multi-label images are not smoothed:
    a class may be absent.
    """
    if labels.ndim == 1:
        labels = functional.one_hot(labels, classes).float()
    mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=len(images))
    images, shares = mixup(images, torch.arange(len(images), device=images.device))
    return images, shares @ labels  # row i of the shares: how much of each image of the batch is in image i


def _randaugment(recipe: TrainRecipe) -> Augmentation:
    """Build timm's RandAugment ``rand-mM-mstd0.5-inc1``, where M need not be a whole number."""
    red, green, blue = (min(255, round(255 * mean)) for mean in recipe.mean)
    figures = {
        "img_mean": (red, green, blue),  # fills the area outside the image; 0 after normalising
        "interpolation": Image.Resampling.BICUBIC,
        "magnitude_max": _MAX_MAGNITUDE,
    }
    augment = rand_augment_transform("rand-mstd0.5-inc1", figures)
    for operation in augment.ops:
        operation.magnitude = recipe.randaugment
    result: Augmentation = augment
    return result


def _transform_train(
    image: Images, key: int, size: int, recipe: TrainRecipe, augmentations: Sequence[Augmentation]
) -> Images:
    numbers = _uniforms(key)
    if recipe.crop == "none":
        image = _resize(image, size)
    elif recipe.crop == "random":
        image = _crop(image, size, numbers)
    else:
        top, left, height, width = _resized_crop_box(image.shape, numbers, recipe.crop_scale)
        image = _stretch(image[top : top + height, left : left + width], size)
    if recipe.augment == "none" and (recipe.hflip or recipe.vflip):  # affine augmentation flips at its end
        image = image[:, ::-1] if next(numbers) < recipe.hflip else image
        image = image[::-1] if recipe.vflip and next(numbers) < recipe.vflip else image
    if not augmentations:
        return image
    with seeded(key):
        picture = Image.fromarray(image)
        for augmentation in augmentations:
            picture = augmentation(picture)
        return np.asarray(picture)


def _uniforms(key: int) -> Iterator[float]:
    """Yield random numbers in [0, 1): the output of splitmix64."""
    while True:
        key = key + GOLDEN64 & MASK64
        yield (mix64(key) >> 11) * 2.0**-53


def _transform_val(image: Images, key: int, size: int, crop: str) -> Images:
    if crop == "none":
        return _resize(image, size)
    if crop == "resized":
        square = _crop(image, min(image.shape[:2]))  # cropped first: its margins would not be seen
        image = _stretch(square, round(size * _VAL_SCALE))
    return _crop(image, size)


def _resize(image: Images, size: int) -> Images:
    """Resize to ``size`` x ``size``, bilinear with antialiasing, unless it has that size."""
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def _stretch(image: Images, size: int) -> Images:
    """Resize to ``size`` x ``size``, bicubic with antialiasing; torch is three times as fast at it as Pillow."""
    tensor = torch.from_numpy(np.ascontiguousarray(image) if image.flags.writeable else image.copy())
    resized = functional.interpolate(tensor.permute(2, 0, 1)[None], (size, size), mode="bicubic", antialias=True)
    pixels: Images = resized[0].permute(1, 2, 0).numpy()
    return pixels


def _crop(image: Images, size: int, numbers: Iterator[float] | None = None) -> Images:
    """Crop at a random place, or the centre without ``numbers``; stretch an image that is smaller."""
    height, width, _ = image.shape
    if height < size or width < size:
        return _stretch(image, size)
    if numbers is None:
        top, left = (height - size) // 2, (width - size) // 2
    else:
        top, left = int(next(numbers) * (height - size + 1)), int(next(numbers) * (width - size + 1))
    return image[top : top + size, left : left + size]


def _resized_crop_box(
    shape: tuple[int, ...], numbers: Iterator[float], scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draw the box of RandomResizedCrop (Szegedy et al., Going deeper with convolutions, 2015), as torchvision does.

    Its area is uniform in ``scale`` of the image's; the logarithm of its aspect ratio is uniform, too.

    Returns:
        Top, left, height and width in pixels.
    """
    height, width, _ = shape
    low, high = map(math.log, _CROP_RATIO)
    for _ in range(_CROP_TRIES):
        area = height * width * (scale[0] + next(numbers) * (scale[1] - scale[0]))
        ratio = math.exp(low + next(numbers) * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(next(numbers) * (height - h + 1)), int(next(numbers) * (width - w + 1)), h, w
    w = min(width, max(1, round(height * math.exp(high))))
    h = min(height, max(1, round(width / math.exp(low))))
    return (height - h) // 2, (width - w) // 2, h, w
