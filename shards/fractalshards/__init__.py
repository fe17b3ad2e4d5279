"""The shard contract: format, manifest, reading, verifying. Imports neither numba nor torch.

from fractalshards import open_dataset
image, label = open_dataset("shards/single")[7]
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fractalshards.reader import StoredSplit, open_dataset

__all__ = ["StoredSplit", "open_dataset"]


def __getattr__(name: str) -> Any:
    """Import the public names when they are used: the commands start faster without them."""
    if name in __all__:
        from fractalshards import reader

        return getattr(reader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
