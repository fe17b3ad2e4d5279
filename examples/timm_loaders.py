"""timm's loader over a folder of shards: through timm's own reader, and with exact epochs.

python examples/timm_loaders.py
"""

from typing import Any

import torch
from timm.data import create_dataset, create_loader
from torch.utils.data import DataLoader

from fractaltrain import EpochSampler, ShardDataset

SHARDS, EPOCHS, BATCH_SIZE, WORKERS = "shards/single", 90, 256, 8
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_loader(data: Any) -> Any:
    """Call timm as its train.py does, with its augmentation and prefetching."""
    return create_loader(
        data,
        input_size=(3, 224, 224),
        batch_size=BATCH_SIZE,
        is_training=True,
        auto_augment="rand-m9-inc1",
        re_prob=0.25,
        num_workers=WORKERS,
        device=DEVICE,
    )


def timm_loader() -> Any:
    """Read the folder as ``train.py --dataset wds/single --data-dir shards/single`` does, shuffled in a buffer."""
    return make_loader(create_dataset("wds/single", SHARDS, split="train", is_training=True, batch_size=BATCH_SIZE))


def exact_loader(data: ShardDataset, sampler: EpochSampler) -> Any:
    """Make the same loader, and replace its order. In train.py, change ``loader_train.loader`` like this."""
    loader = make_loader(data)  # sets data.transform
    options = {name: getattr(loader.loader, name) for name in ("num_workers", "collate_fn", "worker_init_fn")}
    loader.loader = DataLoader(data, batch_sampler=sampler, pin_memory=DEVICE.type == "cuda", **options)
    return loader


def main() -> None:
    for images, labels in timm_loader():
        print("timm", tuple(images.shape), labels.sum().item())
    data = ShardDataset(SHARDS)
    sampler = EpochSampler(data, BATCH_SIZE)
    loader = exact_loader(data, sampler)
    for epoch in range(sampler.epoch, EPOCHS):
        sampler.set_epoch(epoch)
        for step, (images, labels) in enumerate(loader, sampler.step):
            print("exact", epoch, step, tuple(images.shape), labels.sum().item())


if __name__ == "__main__":
    main()
