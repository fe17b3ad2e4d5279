"""Datasets elsewhere: pushed, pulled, or read through a bounded cache; over fsspec, and nothing is trusted."""
