"""The shard contract: format, manifest, reading, verifying. Imports neither numba nor torch.

from fractalshards import open_dataset
image, label = open_dataset("shards/single")[7]
"""

from fractalshards.reader import StoredSplit, open_dataset

__all__ = ["StoredSplit", "open_dataset"]
