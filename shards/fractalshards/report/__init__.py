"""A page about a dataset: what to read of it, thumbnails and measures, charts, HTML."""
