"""Samples IFS codes, renders images, builds datasets. Never imports torch."""
