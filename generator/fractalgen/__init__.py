"""Renders fractal images and builds datasets of them. Does not import torch.

from fractalgen import draw_systems, make_recipe, render_sample
recipe = make_recipe("single", n=1000, classes=10)
image, label = render_sample(recipe, draw_systems(recipe), 7)
"""

from fractalgen.recipe import Recipe, make_recipe
from fractalgen.render import draw_systems, render_sample

__all__ = ["Recipe", "draw_systems", "make_recipe", "render_sample"]
