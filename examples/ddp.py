"""Distributed training with exact epochs and exact evaluation; it resumes on any number of processes.

torchrun --nproc-per-node 2 examples/ddp.py
"""

from pathlib import Path

import timm
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from fractaltrain import EpochSampler, ShardDataset

SHARDS, CHECKPOINT = "shards/single", Path("checkpoint.pt")
MODEL, EPOCHS, BATCH_SIZE, WORKERS = "resnet50", 90, 256, 8  # batch size of all processes together


def main() -> None:
    dist.init_process_group()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", dist.get_node_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    train, val = (ShardDataset(SHARDS, split, output="tensor") for split in ("train", "val"))
    sampler = EpochSampler(train, BATCH_SIZE)  # rank and world size are those of the process group
    loader = DataLoader(train, batch_sampler=sampler, num_workers=WORKERS)
    val_loader = DataLoader(val, BATCH_SIZE, sampler=range(rank, len(val), world_size), num_workers=WORKERS)
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=train.classes).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if CHECKPOINT.exists():
        state = torch.load(CHECKPOINT, map_location=device, weights_only=True)
        for name, part in (("model", model), ("optimizer", optimizer), ("sampler", sampler)):
            part.load_state_dict(state[name])
    parallel = torch.nn.parallel.DistributedDataParallel(model)

    for epoch in range(sampler.epoch, EPOCHS):
        sampler.set_epoch(epoch)
        model.train()
        for images, labels in loader:
            loss = torch.nn.functional.cross_entropy(parallel(images.to(device) / 127.5 - 1), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        correct = torch.zeros((), device=device)
        with torch.inference_mode():  # the model itself: processes may have different numbers of batches
            for images, labels in val_loader:
                correct += (model(images.to(device) / 127.5 - 1).argmax(1) == labels.to(device)).sum()
        dist.all_reduce(correct)
        if rank == 0:
            print(f"epoch {epoch} top-1 {correct.item() / len(val)}", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"sampler": sampler.state_dict(len(sampler))}, CHECKPOINT.with_suffix(".new"))
            CHECKPOINT.with_suffix(".new").replace(CHECKPOINT)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
