"""Trainer: pre-trains vision models on shards, fine-tunes and evaluates them; datasets for other training loops.

from fractaltrain import EpochSampler, RenderedDataset, ShardDataset
data = ShardDataset("shards/single", transform=my_transform)
sampler = EpochSampler(data, batch_size=256)
loader = DataLoader(data, batch_sampler=sampler, num_workers=8)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fractaltrain.data.datasets import RenderedDataset, ShardDataset
    from fractaltrain.stream.sampler import EpochSampler

__all__ = ["EpochSampler", "RenderedDataset", "ShardDataset"]


def __getattr__(name: str) -> Any:
    """Import the public names when they are used: the commands must not wait for PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fractaltrain.data import datasets
    from fractaltrain.stream import sampler

    return getattr(sampler if name == "EpochSampler" else datasets, name)
