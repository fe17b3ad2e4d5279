"""A plain training loop that can be killed at any time: run it again, and it ends with the same weights.

python examples/plain_loop.py
"""

from pathlib import Path
from typing import Any

import timm
import torch
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from fractaltrain import EpochSampler, ShardDataset

SHARDS = "shards/single"
MODEL, EPOCHS, BATCH_SIZE, WORKERS = "resnet50", 90, 256, 8
CHECKPOINT, SAVE_EVERY = Path("checkpoint.pt"), 1000  # steps


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = ShardDataset(SHARDS, output="tensor")
    sampler = EpochSampler(data, BATCH_SIZE)
    loader = DataLoader(data, batch_sampler=sampler, num_workers=WORKERS, pin_memory=device.type == "cuda")
    model = timm.create_model(MODEL, num_classes=data.classes).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = CosineAnnealingLR(optimizer, EPOCHS * len(sampler))
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if CHECKPOINT.exists():
        state = torch.load(CHECKPOINT, map_location=device, weights_only=True)
        sampler.load_state_dict(state["sampler"])
        for name, part in parts.items():
            part.load_state_dict(state[name])

    for epoch in range(sampler.epoch, EPOCHS):
        sampler.set_epoch(epoch)
        for step, (images, labels) in enumerate(loader, sampler.step):
            torch.manual_seed(epoch * len(sampler) + step)  # the same flips and dropout after a restart
            images = images.to(device, non_blocking=True) / 127.5 - 1
            images = torch.where(torch.rand(len(images), 1, 1, 1, device=device) < 0.5, images, images.flip(-1))
            loss = cross_entropy(model(images), labels.to(device, non_blocking=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == len(sampler):
                print(f"epoch {epoch} step {step} loss {loss.item()}", flush=True)
                state = {name: part.state_dict() for name, part in parts.items()}
                state["sampler"] = sampler.state_dict(step + 1)  # steps done: the workers are ahead of them
                torch.save(state, CHECKPOINT.with_suffix(".new"))
                CHECKPOINT.with_suffix(".new").replace(CHECKPOINT)  # a kill leaves a whole checkpoint


if __name__ == "__main__":
    main()
