"""Datasets, each read through ``source.SampleSource``: shards, and real images."""
