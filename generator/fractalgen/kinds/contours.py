"""Kinds ``visualatom`` (Takashima et al., CVPR 2023) and ``rcdb`` (Kataoka et al., CVPR 2022): rings of noisy curves.

    fractalgen build --kind visualatom
    fractalgen build --kind rcdb

By default the published datasets, pixel for pixel. Their programs are processes that each make classes one after the
other, with all instances, from one generator that is seeded once (``random.seed(process + 1)``). An instance therefore
depends on all those before it in its process. ``follow`` runs through a process without drawing; a table has the state
of the generator at several places of every class, from which any instance is a few milliseconds away.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fractalgen.kernels.exact import log, sine_and_cosine
from fractalgen.kernels.lines import NO_BUFFERS, NO_KEY, draw_ring, skip_instances
from fractalgen.kernels.mt19937 import STATE_WORDS, Mersenne, Words, seed_state
from fractalgen.kernels.random import Key, Stream
from fractalgen.kinds.kind import Kind, LazyImages, Unit, check_parameters, parameter
from fractalgen.kinds.tables import shared_table
from fractalshards.errors import FractalError, UsageError
from fractalshards.png import GREYS, Indexed
from fractalshards.systems import Systems
from fractalshards.workers import OnProgress, no_progress
from fractalshards.writer import Rendered

Generator = Mersenne | Stream

_CANVAS = 512  # side of the canvas that centres are drawn for; others move them by half the difference
_PER_UNIT = 25  # instances that are drawn in a row
_FEWEST_STATES, _MOST_STATES = 4, 20  # stored per class; with more, any instance is reached sooner
_TABLE_STATES = 20_000  # stored in all, 50 MB, unless classes would get fewer than the fewest
_VERSION = 1  # of the table
_SYSTEM_WORDS = 24  # of 12 float64
_PROCESSES = "processes of the published program; each makes an equal share of the classes"
_SHIFT = "largest shift of the centre from the middle of the image, along x and y, in half pixels"


class Contour(NamedTuple):
    """The parameters of an instance, in the columns of the published lists; most are those of its class."""

    vertices: int
    orbits: int
    noise_scale: float
    line_offset: float
    radius: int
    frequency_1: int
    frequency_2: int
    oval_x: float
    oval_y: float
    first_y: float
    first_x: float


@dataclass(frozen=True)
class ContourParams:
    """Parameters of both kinds; pairs bound a uniform distribution, for integers inclusive."""

    stream: Literal["published", "own"] = parameter(
        "published", "published: the random numbers of the published program; own: ours, for any number of images"
    )
    processes: int = parameter(1, _PROCESSES, 1, 1000)
    instances: int = parameter(1000, "images per class of the published program", 1, 10_000)
    vertices: tuple[int, int] = parameter((3, 200), "vertices of a curve", 3, 1000)
    orbits: tuple[int, int] = parameter((1, 200), "curves of an image", 1, 1000)
    noise_scale: tuple[float, float] = parameter((0.0, 4.0), "factor on the noise that displaces a curve", 0.0, 100.0)
    line_offset: tuple[float, float] = parameter((0.0, 0.1), "distance between curves without noise", 0.0, 100.0)
    radius: tuple[int, int] = parameter((0, 100), "radius of the first curve in pixels", 0, 4096)
    oval: tuple[float, float] = parameter((1.0, 2.0), "factors on the radius along x and y", 0.0, 10.0)
    shift: int = parameter(512, _SHIFT, 0, 4096)

    name: ClassVar[str]
    ground: ClassVar[int]  # grey level of the background
    greys: ClassVar[int]  # grey levels that are drawn; the last one of 257 shows as 255
    noise_factor: ClassVar[float]
    floating: ClassVar[bool]  # ovals and radius differ by instance; centres are added when a curve is drawn, not before

    def __post_init__(self) -> None:
        check_parameters(self)

    def draw_class(self, rng: Generator) -> Contour:
        """Draw the parameters of a class and its first instance, in the published order."""
        vertices, orbits = self.draw_vertices(rng), _integer(rng, self.orbits)
        scale, offset = rng.uniform(*self.noise_scale), rng.uniform(*self.line_offset)
        radius, frequencies = _integer(rng, self.radius), self.draw_frequencies(rng)
        ovals = rng.uniform(*self.oval), rng.uniform(*self.oval)
        return Contour(vertices, orbits, scale, offset, radius, *frequencies, *ovals, *self.draw_centre(rng))

    def draw_vertices(self, rng: Generator) -> int:
        """Draw the number of vertices."""
        return _integer(rng, self.vertices)

    def draw_frequencies(self, rng: Generator) -> tuple[int, int]:
        """Draw the numbers of waves of the two sinusoids; 0 if the kind has none."""
        return 0, 0

    def draw_centre(self, rng: Generator) -> tuple[float, float]:
        """Draw the centre, y before x."""
        y, x = ((_CANVAS + rng.integer(-self.shift, self.shift + 1)) / 2 for _ in range(2))
        return y, x

    def draw_next(self, rng: Generator, contour: Contour) -> Contour:
        """Draw what differs in the instance that follows; ``between`` says how much that is."""
        if self.floating:
            ovals, radius = (rng.uniform(*self.oval), rng.uniform(*self.oval)), _integer(rng, self.radius)
            contour = contour._replace(radius=radius, oval_x=ovals[0], oval_y=ovals[1])
        y, x = self.draw_centre(rng)
        return contour._replace(first_y=y, first_x=x)

    def between(self) -> tuple[int, list[int]]:
        """Return how many real numbers ``draw_next`` draws, and of how many values each integer after them is."""
        centre = [2 * self.shift + 1] * 2
        return (2, [self.radius[1] - self.radius[0] + 1, *centre]) if self.floating else (0, centre)


@dataclass(frozen=True)
class VisualatomParams(ContourParams):
    """Parameters with the values of the published 1k set as defaults; see ``ContourParams``."""

    processes: int = parameter(20, _PROCESSES, 1, 1000)
    vertices: tuple[int, int] = parameter((200, 1000), "vertices of a curve", 3, 1000)
    radius: tuple[int, int] = parameter((10, 60), "radius of the first curve in pixels", 0, 4096)
    frequency: tuple[int, int] = parameter((0, 20), "waves of two sinusoids along a curve", 0, 100)

    name, ground, greys, noise_factor, floating = "visualatom", 0, 256, 1.0, False

    def draw_frequencies(self, rng: Generator) -> tuple[int, int]:
        first, second = _integer(rng, self.frequency), _integer(rng, self.frequency)
        while second == first != 0 and self.frequency[0] < self.frequency[1]:
            second = _integer(rng, self.frequency)
        return first, second


@dataclass(frozen=True)
class RcdbParams(ContourParams):
    """Parameters with the values of the published 1k set as defaults; see ``ContourParams``."""

    processes: int = parameter(10, _PROCESSES, 1, 1000)
    mean_vertices: float = parameter(100.0, "mean of the exponential distribution of vertices", 100.0, 1000.0)
    vertices: tuple[int, int] = parameter((3, 200), "vertices of a curve; others are drawn again", 3, 500)
    shift: int = parameter(400, _SHIFT, 0, 4096)

    name, ground, greys, noise_factor, floating = "rcdb", 255, 257, 2.0, True

    def draw_vertices(self, rng: Generator) -> int:
        low, high = self.vertices
        while True:
            rest = 1.0 - rng.uniform(0.0, 1.0)
            if low - 1 < -math.log(rest) * self.mean_vertices < high + 2:  # saves most of the exact logarithms
                vertices = int(-log(rest) / (1.0 / self.mean_vertices))
                if low <= vertices <= high:
                    return vertices


def _integer(rng: Generator, bounds: tuple[int, int]) -> int:
    return rng.integer(bounds[0], bounds[1] + 1)


def follow(params: ContourParams, classes: int, process: int) -> Iterator[Words]:
    """Follow one of the published processes: yield the system of each of its classes, and states of the generator.

    They are in one row of words, see ``unpack``. State k comes before everything that instance k S draws, for
    S = ``_stride(params, classes)``.
    """
    rng = Mersenne.of(seed_state(process + 1))
    stride = _stride(params, classes)
    for _ in range(classes // params.processes):
        position = rng.at
        contour = params.draw_class(rng)
        states = []
        for first in range(0, params.instances, stride):
            states.append(rng.state())
            _skip(params, contour, rng, first, min(first + stride, params.instances))
        params.draw_next(rng, contour)
        yield np.concatenate([np.array([*contour, position]).view(np.uint32), *states])


def unpack(row: Words) -> tuple[npt.NDArray[np.float64], Words]:
    """Return the system in a row, (1, 12) float64 as in ``draw_systems``, and the states, (k, 624) uint32."""
    system: npt.NDArray[np.float64] = np.array(row[:_SYSTEM_WORDS]).view(np.float64)
    return system.reshape(1, -1), row[_SYSTEM_WORDS:].reshape(-1, STATE_WORDS)


def _stride(params: ContourParams, classes: int) -> int:
    states = min(max(_TABLE_STATES // classes, _FEWEST_STATES), _MOST_STATES)
    return -(-params.instances // states)


def _skip(params: ContourParams, contour: Contour, rng: Mersenne, first: int, stop: int) -> None:
    """Skip instances ``first`` to ``stop - 1`` of a class; what ``draw_next`` draws comes before all but instance 0."""
    floats, ranges = params.between()
    shape = contour.vertices, contour.orbits, params.greys
    rng.at = skip_instances(rng.buffers, rng.at, *shape, first, stop, floats, np.array(ranges, np.int32))


@lru_cache(maxsize=4)
def _table(params: ContourParams, classes: int) -> Words:
    """Return a row for every class, see ``unpack``."""
    return _prepare(params, classes, no_progress)


def _prepare(params: ContourParams, classes: int, on_progress: OnProgress) -> Words:
    states = len(range(0, params.instances, _stride(params, classes)))
    shape = classes, _SYSTEM_WORDS + STATE_WORDS * states
    rows = [follow(params, classes, process) for process in range(params.processes)]
    return shared_table(("contours", _VERSION, params), shape, rows, on_progress)


def prepare(params: ContourParams, classes: int, on_progress: OnProgress) -> None:
    """Follow the published processes, unless their table is in the cache or the stream is our own."""
    if params.stream == "published":
        _prepare(params, classes, on_progress)


def draw_systems(params: ContourParams, seed: int, classes: int) -> Systems:
    """Return the parameters of every class, (1, 12) float64 each.

    They are the columns of ``Contour``, and the number of words that its process has drawn before the class, 0 for our
    own stream. The centre is that of a canvas of 512 x 512.
    """
    return tuple(_draw_system(params, seed, classes, label) for label in range(classes))


def _draw_system(params: ContourParams, seed: int, classes: int, label: int) -> npt.NDArray[np.float64]:
    if params.stream == "published":
        return unpack(_table(params, classes)[label])[0]
    return np.array([[*params.draw_class(Stream.of(params.name, seed, "class", label)), 0.0]])


def parameter_table(systems: Systems) -> bytes:
    """Return the parameters of all classes as CSV, with all digits of real numbers."""
    rows = ((label, *system[0, : len(Contour._fields)]) for label, system in enumerate(systems))
    lines = [",".join(("category", *Contour._fields)), *(",".join(f"{value:.17g}" for value in row) for row in rows)]
    return "".join(f"{line}\n" for line in lines).encode()


def check(params: ContourParams, n: int, val: int, classes: int) -> None:
    """Refuse classes that the published processes cannot share equally, and more images than they make."""
    if params.stream == "own":
        return
    if classes % params.processes:
        raise UsageError(f"classes is {classes}, not a multiple of {params.processes}, the 'processes': change one")
    if n > classes * params.instances:
        most = classes * params.instances
        raise UsageError(f"n is {n}, but the stream has {most} images: lower n, raise 'instances', or --set stream=own")


def units_per_class(params: ContourParams) -> int | None:
    """Return the number of units of a class, the last of which may be shorter; unlimited for our own stream."""
    return None if params.stream == "own" else -(-params.instances // _PER_UNIT)


def render(params: ContourParams, size: int, points: int, unit: Unit, systems: Systems) -> Sequence[Rendered]:
    """Return the instances of a unit, each (size, size) indexed in grey; they are drawn when they are asked for.

    Raises FractalError if the system of the class is not the one that the recipe draws.
    """
    system = _draw_system(params, unit.seed, len(systems), unit.label)
    if not np.array_equal(system, systems[unit.label]):
        raise FractalError(f"class {unit.label}: not a system of the {params.stream} stream; fetch systems.npz again")
    contour, first, count = _contour(system), unit.number * _PER_UNIT, _PER_UNIT
    if params.stream == "published" and unit.split == "train":
        _, states = unpack(_table(params, len(systems))[unit.label])
        count = min(count, params.instances - first)
        images = partial(_published_images, params, size, contour, states)
    else:
        images = partial(_own_images, params, size, contour, unit)
    return LazyImages(lambda start: ((image, unit.label) for image in images(first + start)), count)


def render_instance(
    params: ContourParams, size: int, classes: int, category: int, instance: int, on_progress: OnProgress = no_progress
) -> Indexed:
    """Draw one image of a published stream, (size, size) in grey, following only its process, without the cache.

    ``category`` and ``instance`` count from 0; ``on_progress`` is called with the classes followed, and to follow.
    Raises UsageError if the stream does not have this image.
    """
    if params.stream == "own":
        raise UsageError("stream is own, but only images of the published stream can be rendered: leave it out")
    check(params, 0, 0, classes)
    for name, value, count in (("category", category, classes), ("instance", instance, params.instances)):
        if not 0 <= value < count:
            raise UsageError(f"{name} is {value}: this stream has 0 to {count - 1}")
    process, last = divmod(category, classes // params.processes)
    followed = follow(params, classes, process)
    for number in range(last):
        next(followed)
        on_progress(number + 1, last + 1)
    system, states = unpack(next(followed))
    return next(_published_images(params, size, _contour(system), states, instance))


def _contour(system: npt.NDArray[np.float64]) -> Contour:
    columns = zip(Contour.__annotations__.values(), system[0].tolist(), strict=False)  # the position comes last
    return Contour(*(kind(value) for kind, value in columns))


def _published_images(
    params: ContourParams, size: int, contour: Contour, states: Words, first: int
) -> Iterator[Indexed]:
    """Draw the instances of a class from number ``first`` on, beginning at the nearest state before it."""
    stride = -(-params.instances // len(states))
    rng = Mersenne.of(states[first // stride])
    _skip(params, contour, rng, first - first % stride, first)
    for instance in itertools.count(first):
        if instance:
            contour = params.draw_next(rng, contour)
        image, rng.at = _draw(params, size, contour, rng.buffers, rng.at)
        yield image


def _own_images(params: ContourParams, size: int, contour: Contour, unit: Unit, first: int) -> Iterator[Indexed]:
    """Draw the images of our own stream from number ``first`` on; ``val`` follows the published instances."""
    for number in itertools.count(first + (params.instances if unit.split == "val" else 0)):
        rng = Stream.of(params.name, unit.seed, unit.split, unit.label, number)
        image, _ = _draw(params, size, params.draw_next(rng, contour), key=rng.key())
        yield image


@lru_cache(maxsize=1024)  # of 20 kB; as many classes are trained on in turn
def _waves(vertices: int, *frequencies: int) -> npt.NDArray[np.float64]:
    """Return cosine and sine of the angle of every vertex, and half the sines of its multiples: (4, V) float64."""
    angles = np.arange(vertices, dtype=np.float64) * (2 * math.pi / vertices)
    sines, cosines = sine_and_cosine(angles)
    return np.stack([cosines, sines, *(0.5 * sine_and_cosine(angles * number)[0] for number in frequencies)])


def _draw(
    params: ContourParams, size: int, contour: Contour, buffers: Words = NO_BUFFERS, at: int = 0, key: Key = NO_KEY
) -> tuple[Indexed, int]:
    """Draw an instance; return it and the number of words drawn."""
    vertices, orbits, scale, offset, radius, first, second, oval_x, oval_y, y, x = contour
    waves = _waves(vertices, first, second)
    centre = np.array([x, y]) + (size - _CANVAS) / 2
    curve = waves[:2] * radius * np.array([[oval_x], [oval_y]])
    if not params.floating:
        curve += centre[:, None]
        centre[:] = 0.0
    canvas = np.full((size, size), params.ground, np.uint8)
    numbers = orbits, params.greys, scale, params.noise_factor, offset
    at = draw_ring(canvas, curve, (centre[0], centre[1]), waves, *numbers, buffers, at, key)
    return Indexed(canvas, GREYS), at


def _kind(params: type[ContourParams], summary: str) -> Kind:
    return Kind(
        name=params.name,
        summary=summary,
        params=params,
        n=1_000_000,
        size=_CANVAS,
        points=0,
        draw_systems=draw_systems,
        render=render,
        map_shape=(12,),
        images_per_unit=_PER_UNIT,
        images_in_memory=_PER_UNIT,
        units_per_class=units_per_class,
        check=check,
        prepare=prepare,
        preview=("processes=1",),
    )


VISUALATOM = _kind(VisualatomParams, "curves displaced by noise and sinusoids, grey on black (Takashima et al. 2023)")
RCDB = _kind(RcdbParams, "curves displaced by noise, grey on white (Kataoka et al. 2022)")
STREAMS: dict[str, type[ContourParams]] = {params.name: params for params in (VisualatomParams, RcdbParams)}
