"""Lightning with exact epochs; run again after a kill, it continues inside the epoch.

pip install lightning
python examples/lightning_fit.py
"""

from typing import Any

import lightning.pytorch as pl
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from fractaltrain import EpochSampler, ShardDataset

SHARDS, MODEL, EPOCHS, BATCH_SIZE, WORKERS, SAVE_EVERY = "shards/single", "resnet50", 90, 256, 8, 1000
TO_TENSOR = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])


class Classifier(pl.LightningModule):
    sampler_state: dict[str, Any] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.data = ShardDataset(SHARDS, transform=TO_TENSOR)
        self.model = timm.create_model(MODEL, num_classes=self.data.classes)

    def train_dataloader(self) -> DataLoader[Any]:
        self.sampler = EpochSampler(self.data, BATCH_SIZE)  # here, since Lightning has joined the processes now
        if self.sampler_state is not None:
            self.sampler.load_state_dict(self.sampler_state)
        return DataLoader(self.data, batch_sampler=self.sampler, num_workers=WORKERS)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.sampler_state = checkpoint["sampler"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["sampler"] = self.sampler.state_dict(self.steps_done)  # the workers have taken more batches

    def on_train_epoch_start(self) -> None:
        self.sampler.set_epoch(self.current_epoch)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.steps_done = batch_idx + 1
        return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    pl.seed_everything(0)
    saves = ModelCheckpoint("checkpoints", every_n_train_steps=SAVE_EVERY, save_last=True)
    pl.Trainer(max_epochs=EPOCHS, callbacks=[saves], use_distributed_sampler=False).fit(Classifier(), ckpt_path="last")


if __name__ == "__main__":
    main()
