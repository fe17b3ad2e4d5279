"""Compiled kernels: random bits, orbits, rasters, colours, compression. Pure functions of arrays."""

SIZES = range(16, 4097)  # side of an image in pixels
MAX_POINTS = 10**8  # per chaos game
MAX_MAPS = 255  # per system: map numbers are bytes, and one value means no map
