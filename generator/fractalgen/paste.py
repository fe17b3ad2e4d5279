"""A canvas that objects are pasted onto, and what of each is visible in the end."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from numba import njit

from fractalgen.color import Pixels

Box = tuple[int, int, int, int]  # x, y, width, height in pixels


@dataclass
class Canvas:
    """An image (size, size, 3) uint8, and for every pixel the number of the object it shows, 0 for none.

    At most 255 objects.
    """

    image: Pixels
    owner: npt.NDArray[np.uint8]
    pasted: int = field(default=0)

    @classmethod
    def of(cls, background: Pixels) -> "Canvas":
        """A canvas with nothing on it but a background (size, size, 3) uint8, which is painted over."""
        return cls(background, np.zeros(background.shape[:2], np.uint8))

    def paste(self, pixels: Pixels, x: int, y: int) -> None:
        """Lay an object (s, s, 3) uint8 with its top left corner at column x, row y; pixels that are black are clear.

        What lies outside the canvas is cut off.
        """
        self.pasted += 1
        _paste(self.image, self.owner, pixels, x, y, np.uint8(self.pasted))

    def visible_boxes(self) -> list[Box | None]:
        """For every object in order of pasting, the smallest box round its visible pixels; None if there are none."""
        low = np.full((self.pasted + 1, 2), len(self.owner), np.int64)
        high = np.full((self.pasted + 1, 2), -1, np.int64)
        _find_boxes(self.owner, low, high)
        corners = zip(low[1:].tolist(), high[1:].tolist(), strict=True)
        return [(x, y, right - x + 1, down - y + 1) if right >= 0 else None for (x, y), (right, down) in corners]


@njit(cache=True)
def _paste(image: Pixels, owner: npt.NDArray[np.uint8], pixels: Pixels, x: int, y: int, number: np.uint8) -> None:
    height, width, _ = image.shape
    for row in range(max(0, -y), min(len(pixels), height - y)):
        for column in range(max(0, -x), min(pixels.shape[1], width - x)):
            red, green, blue = pixels[row, column, 0], pixels[row, column, 1], pixels[row, column, 2]
            if red | green | blue:
                image[y + row, x + column, 0] = red
                image[y + row, x + column, 1] = green
                image[y + row, x + column, 2] = blue
                owner[y + row, x + column] = number


@njit(cache=True)
def _find_boxes(owner: npt.NDArray[np.uint8], low: npt.NDArray[np.int64], high: npt.NDArray[np.int64]) -> None:
    for row in range(len(owner)):
        for column in range(owner.shape[1]):
            number = owner[row, column]
            if number == 0:
                continue
            low[number, 0] = min(low[number, 0], column)
            low[number, 1] = min(low[number, 1], row)
            high[number, 0] = max(high[number, 0], column)
            high[number, 1] = max(high[number, 1], row)
