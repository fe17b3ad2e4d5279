"""Kind ``multi``: several coloured fractals of several classes on one background (Anderson & Farrell, WACV 2022).

fractalgen build --kind multi --n 1000000
"""

from dataclasses import dataclass

import numpy as np

from fractalgen.kernels.chaos_game import chaos_game
from fractalgen.kernels.compose import Canvas, resize
from fractalgen.kernels.paint import BLACK, paint
from fractalgen.kernels.random import Stream
from fractalgen.kernels.raster import bounding_box, splat
from fractalgen.kinds import anderson
from fractalgen.kinds.kind import Kind, Unit, parameter
from fractalshards.errors import FractalError
from fractalshards.png import Pixels
from fractalshards.sample import MultiLabel, Object
from fractalshards.systems import Systems
from fractalshards.writer import Rendered

_TRIES = 100  # images drawn until one shows an object; with the published parameters the first one does


@dataclass(frozen=True)
class MultiParams(anderson.AndersonParams):
    """Parameters with the published values as defaults; pairs bound a uniform distribution."""

    objects: tuple[int, int] = parameter((1, 5), "number of objects in an image, inclusive", 1, 255)
    object_size: tuple[float, float] = parameter((0.15, 0.6), "side of an object, as a share of the image's", 0.01, 1.0)


def render(params: MultiParams, size: int, points: int, unit: Unit, systems: Systems) -> tuple[Rendered]:
    """Render one image, (size, size, 3) uint8, labelled with its visible objects.

    An image without visible objects is drawn again from another stream. Raises FractalError if a hundred images in a
    row have none.
    """
    for attempt in range(_TRIES):
        rng = Stream.of("multi", *unit.identity(), attempt)
        image, objects = _draw_image(params, size, points, systems, rng)
        if objects:
            return ((anderson.blur_at_random(image, params, rng), MultiLabel.of(objects)),)
    raise FractalError(f"no object is visible in {_TRIES} images of one sample; raise --size, 'object_size' or 'value'")


def _draw_image(
    params: MultiParams, size: int, points: int, systems: Systems, rng: Stream
) -> tuple[Pixels, tuple[Object, ...]]:
    """Draw an image before blur, and its visible objects in paint order."""
    nothing = np.zeros((size, size), np.uint32)
    colors = anderson.draw_fractal_colors(params, rng)
    canvas = Canvas(paint(nothing, colors, *anderson.draw_background(params, size, rng)))
    labels = []
    for _ in range(rng.integer(params.objects[0], params.objects[1] + 1)):
        labels.append(rng.integer(0, len(systems)))
        side = max(int(rng.uniform(*params.object_size) * size), 1)
        x, y = (rng.integer(-(side // 2), size - side // 2) for _ in range(2))
        canvas.paste(resize(_draw_object(params, size // 2, points, systems[labels[-1]], rng), side), x, y)
    boxes = canvas.visible_boxes()
    return canvas.image, tuple(Object(label, box) for label, box in zip(labels, boxes, strict=True) if box)


def _draw_object(params: MultiParams, size: int, points: int, system: np.ndarray, rng: Stream) -> Pixels:
    """Draw one fractal on black, (size, size, 3) uint8, filling its bounding box."""
    xs, ys = chaos_game(system, points, rng.key())
    patch = anderson.draw_patch(params, rng)
    counts = splat(xs, ys, size, bounding_box(xs, ys), patch, anderson.draw_orientation(params, rng))
    return paint(counts, anderson.draw_fractal_colors(params, rng), np.zeros((size, size), np.float32), BLACK)


KIND = Kind(
    name="multi",
    summary="several coloured fractals of several classes on a noise background (Anderson & Farrell 2022)",
    params=MultiParams,
    size=224,
    points=100_000,
    draw_systems=anderson.draw_systems,
    render=render,
    label_type="multi",
)
