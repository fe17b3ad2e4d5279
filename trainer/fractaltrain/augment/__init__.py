"""Augmentation: what a training image is changed to, seeded by (seed, epoch, position) and by nothing else.

``crop`` works on single images in the loader workers, ``randaugment`` in both places, ``erasing`` and ``mixing`` on
batches of the device.
"""
