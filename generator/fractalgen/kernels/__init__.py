"""Compiled kernels: random bits, orbits, rasters, colours, compression. Pure functions of arrays."""
