"""Where samples come from: one file per source of images, all read through ``source.Source``."""
