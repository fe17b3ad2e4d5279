"""Kind ``fractaldb``: one category of FractalDB, grey or coloured, on black (Kataoka et al., ACCV 2020).

fractalgen build --kind fractaldb --n 1000000
"""

from dataclasses import dataclass

from fractalgen.categories import shipped_categories
from fractalgen.kernels import fractaldb as kernel
from fractalgen.kernels.random import Stream
from fractalgen.kinds.kind import Kind, Unit, check_parameters, parameter
from fractalshards.errors import UsageError
from fractalshards.png import Indexed
from fractalshards.systems import Systems
from fractalshards.writer import Rendered

FLIPS = 4


@dataclass(frozen=True)
class FractaldbParams:
    """Parameters with the published values as defaults."""

    draw: kernel.Draw = parameter("patch-gray", "points as pixels or random 3 x 3 patches, grey or coloured")
    weight_step: float = parameter(0.4, "s: 24 weight rows multiply one of a..f by 1-2s, 1-s, 1+s or 1+2s", 0.0, 1.0)
    weight_rows: tuple[int, int] = parameter((0, 24), "first and last weight row; row 2 changes nothing", 0, 24)

    def __post_init__(self) -> None:
        check_parameters(self)

    @property
    def rows(self) -> int:
        """Number of weight rows in use."""
        return self.weight_rows[1] - self.weight_rows[0] + 1


def draw_systems(params: FractaldbParams, seed: int, classes: int) -> Systems:
    """Return the first categories of the published search, each (maps, 7) float64: a b c d e f p.

    Raises UsageError if there are fewer than ``classes``.
    """
    categories = shipped_categories()
    if classes > len(categories):
        search = f"'fractalgen search --classes {classes} --out FILE.npz', and give --categories FILE.npz"
        raise UsageError(f"classes is {classes}, but {len(categories)} categories are known: run {search}")
    return categories[:classes]


def units_per_class(params: FractaldbParams) -> int | None:
    """Return the number of renders of a category: one per weight row for points, unlimited for random patches."""
    return None if kernel.is_patch(params.draw) else params.rows


def check(params: FractaldbParams, n: int, val: int, classes: int) -> None:
    """Refuse more images than points give without repeating one."""
    limit = units_per_class(params)
    units = sum(-(-count // (classes * FLIPS)) for count in (n, val))
    if limit is not None and units > limit:
        raise UsageError(f"n and val take {units * FLIPS} of {limit * FLIPS} images of a class: raise classes")


def render(params: FractaldbParams, size: int, points: int, unit: Unit, systems: Systems) -> tuple[Rendered, ...]:
    """Render a category and its three flips, each (size, size) indexed.

    All weight rows are used before patches are drawn again. The validation split continues after the training split:
    with new patches, or for points with other weight rows. Fresh training images continue after both.
    """
    number, (train, val) = unit.number, (_numbers(params, count) for count in unit.per_class)
    if unit.split == "val":
        number += train
    elif number >= train:
        number += val
    draw, row = divmod(number, params.rows)
    weights = kernel.weight_rows(params.weight_step)[params.weight_rows[0] + row]
    masks = None
    if kernel.is_patch(params.draw):
        masks = kernel.masks(Stream.of("fractaldb", unit.seed, unit.label, row, draw).key(), points)
    indices = kernel.render(systems[unit.label], weights, size, points, params.draw, masks)
    palette = kernel.palette(params.draw)
    return tuple((Indexed(kernel.flip(indices, flip), palette), unit.label) for flip in range(FLIPS))


def _numbers(params: FractaldbParams, count: int) -> int:
    """How many numbers a split of ``count`` renders per class takes; patches start a new draw of all rows after it."""
    return -(-count // params.rows) * params.rows if kernel.is_patch(params.draw) else count


KIND = Kind(
    name="fractaldb",
    summary="one category of FractalDB, grey or coloured, on black (Kataoka et al. 2020)",
    params=FractaldbParams,
    size=362,
    points=200_000,
    draw_systems=draw_systems,
    render=render,
    map_shape=(7,),
    images_per_unit=FLIPS,
    units_per_class=units_per_class,
    check=check,
)
