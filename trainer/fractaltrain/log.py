"""The log of a run: progress line, ``metrics.jsonl``, TensorBoard files, ``history.png`` and ``result.json``."""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from fractalshards.errors import FractalError
from fractalshards.human import human_count, human_seconds, one_line
from fractalshards.storage import atomic_file, write_json
from fractaltrain.checkpoint import Position
from fractaltrain.evaluate import describe_scores
from fractaltrain.plotting import draw_history
from fractaltrain.run_folder import METRICS, RESULT

TENSORBOARD = "tb"
HISTORY = "history.png"

_LOG_SECONDS = 10.0  # between lines if stdout is not a terminal
_FLUSH_SECONDS = 10  # of TensorBoard
_DRAWING_SECONDS = 60.0  # between drawings of the history
_CLEAR = "\r\033[K"


def append_metrics(folder: Path, line: Mapping[str, Any]) -> None:
    """Append a line to ``metrics.jsonl``; its ``global_step`` counts the optimiser steps since the start."""
    with (folder / METRICS).open("a") as file:
        file.write(json.dumps(line) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl``, without one that a kill cut off; raises FractalError if one is damaged."""
    path = folder / METRICS
    try:
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    except ValueError as error:
        raise FractalError(f"{path}: damaged ({error}); remove it to continue without it") from error


def rewind_metrics(folder: Path, global_step: int) -> None:
    """Remove the lines after ``global_step``; a resumed run writes them again."""
    kept = [line for line in read_metrics(folder) if line["global_step"] <= global_step]
    with atomic_file(folder / METRICS) as file:
        file.writelines(json.dumps(line).encode() + b"\n" for line in kept)


class Timer:
    """Measures images per second of all ranks, and the share of time in which the loop waits for its next batch.

    A GPU may still be computing meanwhile, so the share is an upper bound on its idle time.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._total_steps = self._steps = 0
        self._total_seconds = self._waited = self._worked = 0.0
        self._mark = time.monotonic()

    def start(self) -> None:
        """Start or resume the measurement: what happened since the last step does not count."""
        self._mark = time.monotonic()

    def loaded(self) -> None:
        """Count the time since the last call as waiting for a batch."""
        self._waited += self._elapsed()

    def stepped(self) -> None:
        """Count the time since the last call as a training step."""
        self._worked += self._elapsed()
        self._steps += 1

    def lap(self) -> dict[str, float]:
        """Return ``images_per_s`` and ``waiting`` (a share in [0, 1]) since the last lap, and begin a new one."""
        self._worked += self._elapsed()
        seconds = max(self._waited + self._worked, 1e-9)
        images_per_s, waiting = self._steps * self._batch_size / seconds, self._waited / seconds
        self._total_steps += self._steps
        self._total_seconds += seconds
        self._steps, self._waited, self._worked = 0, 0.0, 0.0
        return {"images_per_s": round(images_per_s, 1), "waiting": round(waiting, 4)}

    def seconds_per_step(self) -> float:
        """Return the mean over all laps."""
        return self._total_seconds / max(self._total_steps, 1)

    def _elapsed(self) -> float:
        before, self._mark = self._mark, time.monotonic()
        return self._mark - before


class RunLog:
    """Logs a run on rank 0; on other ranks it only keeps time. The loop calls ``timer`` at every batch and step."""

    def __init__(
        self, folder: Path, epochs: int, steps: int, batch_size: int, start: Position, main: bool, quiet: bool
    ) -> None:
        """Continue the log after ``start``, and remove later entries; ``steps`` is the length of an epoch."""
        self.timer = Timer(batch_size)
        self._folder, self._epochs, self._steps, self._main = folder, epochs, steps, main
        self._print = main and not quiet
        self._printed = time.monotonic()
        self._unfinished = False  # whether the cursor is behind a progress line
        self._drawn = time.monotonic()
        if main:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            done = start.epoch * steps + start.step
            rewind_metrics(folder, done)
            (folder / TENSORBOARD).mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(folder / TENSORBOARD, os.O_RDONLY)  # TensorBoard needs names in UTF-8
            where = f"/proc/self/fd/{self._descriptor}"
            self._tensorboard: Any = SummaryWriter(where, purge_step=done + 1, flush_secs=_FLUSH_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._end_line()
        # Ctrl-C may come while TensorBoard wakes its writing thread, which then sleeps on; closing would wait for it.
        if self._main and not (kind and issubclass(kind, KeyboardInterrupt)):
            self._tensorboard.close()
            os.close(self._descriptor)

    def message(self, text: str) -> None:
        """Print a message on a separate line."""
        if self._print:
            self._end_line()
            print(text, flush=True)

    def step(self, epoch: int, step: int, loss: float, lr: float) -> None:
        """Log the mean loss since the last call, after ``step`` steps of ``epoch`` (from 0)."""
        rates = self.timer.lap()
        self._write("train", epoch, step, {"loss": loss, "lr": lr, **rates})
        last, terminal = step == self._steps, sys.stdout.isatty()
        if not self._print or not (terminal or last or time.monotonic() - self._printed >= _LOG_SECONDS):
            return
        self._printed = time.monotonic()
        left = ((self._epochs - epoch) * self._steps - step) * self.timer.seconds_per_step()
        line = (
            f"epoch {epoch + 1}/{self._epochs}  step {step}/{self._steps}  loss {loss:.4f}  lr {lr:.3g}  "
            f"{rates['images_per_s']:,.0f} images/s  {rates['waiting']:.0%} waiting for data  "
            f"{human_seconds(left)} left"
        )
        self._unfinished = terminal and not last
        sys.stdout.write((_CLEAR if terminal else "") + line + ("" if self._unfinished else "\n"))
        sys.stdout.flush()

    def epoch(self, epoch: int, summary: Mapping[str, Any]) -> None:
        """Log the figures of an epoch (from 0); now and then, and after the last, update ``history.png``."""
        self._write("epoch", epoch, self._steps, summary)
        if not self._main:
            return
        self._tensorboard.flush()
        if epoch + 1 < self._epochs and time.monotonic() - self._drawn < _DRAWING_SECONDS:
            return
        try:
            draw_history(self._folder / HISTORY, read_metrics(self._folder))
        except Exception as error:  # a failed picture must not end a run
            self.message(f"{self._folder / HISTORY}: not drawn ({one_line(str(error))})")
        self._drawn = time.monotonic()

    def result(self, position: Position) -> None:
        """Write ``result.json``, with the best top-1 or mAP and its epoch, and print it, even with ``quiet``."""
        if not self._main:
            return
        last = position.history[-1]
        result: dict[str, Any] = {"epochs": position.epoch, **last}
        lines = [f"{human_count(position.epoch, 'epoch')} done, training loss {last['train_loss']:.4f}"]
        if leading := next((name for name in ("top1", "map") if name in last), None):
            evaluated = (epoch for epoch in range(position.epoch) if leading in position.history[epoch])
            best = max(evaluated, key=lambda epoch: position.history[epoch][leading])
            highest = position.history[best][leading]
            result |= {f"best_{leading}": highest, "best_epoch": best + 1}
            lines.append(f"{describe_scores(last)} (best {highest:.2%} after epoch {best + 1})")
        self._end_line()
        write_json(self._folder / RESULT, result, indent=1)
        print(*(f"{self._folder}: {line}" for line in lines), sep="\n", flush=True)

    def _write(self, split: str, epoch: int, step: int, figures: Mapping[str, Any]) -> None:
        if not self._main:
            return
        global_step = epoch * self._steps + step
        append_metrics(
            self._folder, {"split": split, "epoch": epoch, "step": step, "global_step": global_step, **figures}
        )
        for name, value in figures.items():
            self._tensorboard.add_scalar(f"{split}/{name}", value, global_step)

    def _end_line(self) -> None:
        if self._unfinished:
            self._unfinished = False
            print(flush=True)
