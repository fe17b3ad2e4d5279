"""How a run is told: the progress line, ``metrics.jsonl``, TensorBoard and ``history.png``, from the same figures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fractaltrain.board import Board
from fractaltrain.checkpoint import Position
from fractaltrain.history import History
from fractaltrain.progress import Clock, ProgressLine
from fractaltrain.run_folder import append_metrics, rewind_metrics


class Report:
    """Tells on one process of all; the others only keep time."""

    def __init__(self, folder: Path, epochs: int, steps: int, batch_size: int, start: Position, main: bool) -> None:
        """Continue after ``start``: what was written of later steps is removed.

        Args:
            steps: in an epoch.
            main: whether this is the process that tells.
        """
        self.clock = Clock(batch_size)
        self._folder = folder
        self._epochs = epochs
        self._steps = steps
        self._line = ProgressLine(epochs, steps, show=main)
        self._main = main
        if main:
            done = start.epoch * steps + start.step
            rewind_metrics(folder, done)
            self._board = Board(folder, done)
            self._history = History(folder)

    def say(self, text: str) -> None:
        """Print a line of its own."""
        self._line.say(text)

    def step(self, epoch: int, step: int, loss: float, lr: float) -> None:
        """Where training is, both counted as in the metrics, and its mean loss since the last line."""
        pace = self.clock.lap()
        self._line.print(epoch, step, loss, lr, pace, self.clock.seconds_per_step())
        rates = {"images_per_s": round(pace.images_per_s, 1), "waiting": round(pace.waiting, 4)}
        self._write("train", epoch, step, {"loss": loss, "lr": lr, **rates})

    def epoch(self, epoch: int, summary: Mapping[str, Any]) -> None:
        """What an epoch that is finished came to."""
        self._write("epoch", epoch, self._steps, summary)
        if self._main:
            self._board.flush()

    def draw(self, done: int) -> None:
        """Bring the picture up to date after so many epochs."""
        if self._main:
            self._history.redraw(last=done == self._epochs)

    def close(self) -> None:
        """Write what is left."""
        self._line.finish()
        if self._main:
            self._board.close()

    def _write(self, split: str, epoch: int, step: int, figures: Mapping[str, Any]) -> None:
        if self._main:
            place = {"split": split, "epoch": epoch, "step": step, "global_step": epoch * self._steps + step}
            line = {**place, **figures}
            append_metrics(self._folder, line)
            self._board.add(line)
