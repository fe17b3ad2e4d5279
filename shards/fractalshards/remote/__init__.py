"""Datasets elsewhere: push, pull, and a bounded cache of shards, over fsspec and huggingface_hub."""
