"""``EpochSampler``: the exact, resumable order of an epoch as a batch sampler for any PyTorch training loop."""

import os
from collections.abc import Iterator, Mapping, Sized
from typing import Any

import torch.distributed
from torch.utils.data import Sampler

from fractalshards.errors import UsageError
from fractaltrain.config import WINDOW
from fractaltrain.stream.order import (
    PrefetchSchedule,
    epoch_order,
    epoch_samples,
    repeated,
    steps_per_epoch,
    training_positions,
)


class EpochSampler(Sampler[list[int]]):
    """Yields this process's part of every global batch: lists of ``batch_size / world_size`` sample indices.

    An epoch takes every sample exactly once, in an order that depends on the seed and the epoch alone; all processes
    take the same number of steps. The last, incomplete batch is left out, or filled up with ``pad``. It is the order in
    which ``fractaltrain pt`` trains.

        sampler = EpochSampler(data, batch_size=256)
        loader = DataLoader(data, batch_sampler=sampler, num_workers=8)
        for epoch in range(sampler.epoch, 90):
            sampler.set_epoch(epoch)
            for step, (images, labels) in enumerate(loader, sampler.step):
                ...
                torch.save({"sampler": sampler.state_dict(step + 1), ...}, path)  # now and then

    Attributes:
        epoch: the current epoch.
        step: the step at which iterating over this epoch begins, or began: 0, or where a loaded state says.
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        window: int = WINDOW,
        pad: bool = False,
        passes: int = 1,
        repeats: int = 1,
    ) -> None:
        """Create the sampler; it begins at epoch 0.

        Args:
            dataset: a ``ShardDataset`` or ``RenderedDataset``; or any map-style dataset, which counts as one shard.
            batch_size: global batch size, divided equally among the processes.
            seed: random seed of the order, in [0, 2^64).
            rank: number of this process; by default that in torch.distributed if it is initialised, else 0.
            world_size: number of processes; by default that in torch.distributed, else 1.
            window: number of shards that are shuffled together.
            pad: fill up the last batch with the first samples of the epoch, so that every sample is used.
            passes: passes over the dataset in an epoch, for small datasets.
            repeats: repeated augmentation: an epoch takes one in ``repeats`` samples, each ``repeats`` times.

        Raises:
            UsageError: if the batch is larger than an epoch or cannot be divided, a number is out of range, only one of
                ``rank`` and ``world_size`` is given, or a launcher started several processes that have not joined
                torch.distributed yet.
        """
        if (rank is None) != (world_size is None):
            raise UsageError("give both rank and world_size, or neither")
        self.rank, self.world_size = _place() if rank is None or world_size is None else (rank, world_size)
        self.epoch = self.step = 0
        self._dataset = dataset
        self._lengths = tuple(getattr(dataset, "lengths", (len(dataset),)))
        self._order = {
            "dataset": getattr(dataset, "digest", None),
            "samples": sum(self._lengths),
            "fresh": bool(getattr(dataset, "fresh", False)),
            "batch_size": batch_size,
            "seed": seed,
            "window": window,
            "pad": pad,
            "passes": passes,
            "repeats": repeats,
        }
        for name, low in (("batch_size", 1), ("seed", 0), ("window", 1), ("passes", 1), ("repeats", 1)):
            if self._order[name] < low:
                raise UsageError(f"{name} is {self._order[name]}: expected at least {low}")
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"rank is {self.rank}: expected 0 to {self.world_size - 1}")
        if batch_size % self.world_size:
            raise UsageError(f"a batch of {batch_size} cannot be divided among {self.world_size} processes equally")
        samples = epoch_samples(sum(self._lengths), repeats, passes)
        if batch_size > samples:
            raise UsageError(f"a batch of {batch_size} is larger than an epoch of {samples} samples; lower batch_size")
        self._steps = steps_per_epoch(samples, batch_size, pad)
        self._positions = training_positions(samples, batch_size, self.rank, self.world_size, pad)
        self._handed_out = 0
        self._began = False
        if hasattr(dataset, "use_window"):
            dataset.use_window(window)

    def __len__(self) -> int:
        """Return the number of steps of a whole epoch."""
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of the epoch from ``step`` on. A further iteration over it begins at its first batch."""
        self.step = 0 if self._began else self.step
        self._began = True
        order, epoch = self._order, self.epoch
        passes = epoch_order(self._lengths, order["seed"], epoch, order["window"], order["passes"], order["fresh"])
        indices = repeated(passes, order["repeats"])
        prefetch = getattr(self._dataset, "prefetch", None)
        schedule = PrefetchSchedule(self._lengths, *(order[name] for name in ("seed", "window", "repeats", "passes")))
        for step in range(self.step, self._steps):
            if prefetch is not None:
                prefetch(schedule.shards(epoch, step * order["batch_size"]))
            self._handed_out = step + 1
            yield indices[self._positions[step] % len(indices)].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate over next. That of a loaded state keeps its step, others begin at step 0."""
        if epoch < 0:
            raise UsageError(f"epoch is {epoch}: expected at least 0")
        if epoch != self.epoch or self._began:
            self.epoch, self.step, self._began = epoch, 0, False
        self._handed_out = self.step

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Return everything from which ``load_state_dict`` continues, for a checkpoint.

        Args:
            step: number of steps of this epoch that are done. By default the number of batches handed out, which is
                more than that where loader workers take batches ahead of the training.
        """
        done = self._handed_out if step is None else step
        if not 0 <= done <= self._steps:
            raise UsageError(f"step is {done}: an epoch has {self._steps} steps")
        epoch, step = (self.epoch + 1, 0) if done == self._steps else (self.epoch, done)
        return {**self._order, "epoch": epoch, "step": step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a state says, with any number of processes.

        Raises:
            UsageError: if it is the state of another dataset, seed, batch size, window, number of passes or repeats.
        """
        for name, value in self._order.items():
            if state.get(name) != value:
                raise UsageError(f"the state has {name} {state.get(name)}, not {value}; use the same value")
        epoch, step = state.get("epoch"), state.get("step")
        if not isinstance(epoch, int) or not isinstance(step, int) or epoch < 0 or not 0 <= step < self._steps:
            raise UsageError(f"the state has epoch {epoch} and step {step}; an epoch has {self._steps} steps")
        self.epoch, self.step, self._handed_out, self._began = epoch, step, step, False


def _place() -> tuple[int, int]:
    """Return rank and number of processes in torch.distributed, if it is initialised; else 0 and 1."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if (size := int(os.environ.get("WORLD_SIZE") or 1)) > 1:
        problem = f"WORLD_SIZE is {size}, but torch.distributed is not initialised"
        raise UsageError(f"{problem}; call init_process_group before EpochSampler, or give it rank and world_size")
    return 0, 1
