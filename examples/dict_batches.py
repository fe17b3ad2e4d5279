"""Batches as dictionaries, which Hugging Face models and Trainer take; rendered while training, without shards.

fractalgen recipe --kind single --n 1000000 > single.json
python examples/dict_batches.py
"""

from typing import Any

import timm
import torch
from torch.utils.data import DataLoader, default_collate

from fractaltrain import EpochSampler, RenderedDataset

RECIPE = "single.json"
MODEL, EPOCHS, BATCH_SIZE, WORKERS = "resnet50", 90, 256, 8


class Classifier(torch.nn.Module):
    """Called like the models of Hugging Face."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.model = timm.create_model(MODEL, num_classes=classes)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.model(pixel_values)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def collate(samples: list[tuple[Any, Any]]) -> dict[str, torch.Tensor]:
    """Make a batch of samples; pass this as ``data_collator`` to a Trainer."""
    images, labels = default_collate(samples)
    return {"pixel_values": images / 127.5 - 1, "labels": labels}


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = RenderedDataset(RECIPE, output="tensor", fresh=True)  # new images in every epoch
    sampler = EpochSampler(data, BATCH_SIZE)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=collate, num_workers=WORKERS, persistent_workers=True)
    model = Classifier(data.classes).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(sampler.epoch, EPOCHS):
        sampler.set_epoch(epoch)
        for batch in loader:
            loss = model(**{name: tensor.to(device) for name, tensor in batch.items()})["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch} loss {loss.item()}")


if __name__ == "__main__":
    main()
