"""Augmentation: what a training image is changed to, seeded by (seed, epoch, position) and by nothing else.

``crop`` works on single images in the loader workers, ``randaugment`` there and, by ``operations``, on batches of the
device, ``erasing`` and ``mixing`` on these alone.
"""
