"""The published rasteriser's interface on the kernel that builds datasets, to compare the two."""

import numpy as np

from fractalgen.kernels.raster import POINT, bounding_box, peak_of, splat


def rasterize(
    points: np.ndarray,
    size: int,
    window: np.ndarray | list[float] | None = None,
    patch: np.ndarray = POINT,
    graded: bool = True,
) -> np.ndarray:
    """Render points (n, 2), x selecting the row, to (size, size): counts over their maximum, or uint8 hit or not."""
    xs, ys = np.ascontiguousarray(points[:, 0]), np.ascontiguousarray(points[:, 1])
    xmin, ymin, xmax, ymax = np.asarray(bounding_box(xs, ys) if window is None else window, np.float64).tolist()
    counts = splat(xs, ys, size, (xmin, ymin, xmax, ymax), np.asarray(patch, np.int64).reshape(-1, 2))
    return counts / peak_of(counts) if graded else (counts > 0).astype(np.uint8)
