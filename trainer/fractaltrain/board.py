"""The same figures as ``metrics.jsonl``, for TensorBoard: ``tensorboard --logdir runs``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "tb"
_PLACES = ("split", "epoch", "step", "global_step")


class Board:
    """Scalars of a run, in its folder's ``tb``; named ``train/loss``, ``epoch/top1``, as the lines of the metrics."""

    def __init__(self, folder: Path, global_step: int) -> None:
        """Continue after ``global_step``: what a stopped run wrote of later steps is not shown any more."""
        from torch.utils.tensorboard import SummaryWriter  # only the main process needs it

        self._writer: Any = SummaryWriter(str(folder / FOLDER), purge_step=global_step + 1)

    def add(self, line: Mapping[str, Any]) -> None:
        """Add the figures of a line of the metrics."""
        for name, value in line.items():
            if name not in _PLACES:
                self._writer.add_scalar(f"{line['split']}/{name}", value, line["global_step"])

    def flush(self) -> None:
        """Let them be seen now."""
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
