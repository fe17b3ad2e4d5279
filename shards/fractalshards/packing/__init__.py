"""Packs image files that exist already, as folders or as ImageNet's archives, into shards, their bytes as they are."""
