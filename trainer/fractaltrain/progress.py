"""The line that says how training goes: rewritten in place on a terminal, every ten seconds elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

from fractalshards.console import is_quiet
from fractalshards.human import human_seconds

_LOG_SECONDS = 10.0
_CLEAR = "\r\033[K"

_Item = TypeVar("_Item")


class Pace(NamedTuple):
    """Global rate of training, and the share in [0, 1] of the time in which this process waited for its data."""

    images_per_s: float
    waiting: float


class Clock:
    """Measures the pace of training between two lines of the metrics, and since this process began.

    Waiting is the time that the loop spends on getting its next batch. A GPU computes meanwhile, if it was given work
    ahead: so the share is the most that it may have been idle.
    """

    def __init__(self, batch: int) -> None:
        """``batch`` images per step, of all processes together."""
        self._batch = batch
        self._steps = self._lap_steps = 0
        self._busy = self._lap_busy = self._lap_waited = 0.0
        self._since = time.monotonic()

    def start(self) -> None:
        """Training goes on from here: what was spent since ``pause`` does not count."""
        self._since = time.monotonic()

    def pause(self) -> None:
        """Training stops for something else."""
        now = time.monotonic()
        self._lap_busy += now - self._since
        self._since = now

    def steps_of(self, batches: Iterable[_Item]) -> Iterator[_Item]:
        """The same batches; every one is a step, and waiting for it is measured."""
        iterator = iter(batches)
        while True:
            began = time.monotonic()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._lap_waited += time.monotonic() - began
            self._lap_steps += 1
            yield batch

    def lap(self) -> Pace:
        """The pace since the last lap ended, which ends another one here."""
        self.pause()
        pace = Pace(
            self._lap_steps * self._batch / max(self._lap_busy, 1e-9),
            min(self._lap_waited / max(self._lap_busy, 1e-9), 1.0),
        )
        self._steps += self._lap_steps
        self._busy += self._lap_busy
        self._lap_steps, self._lap_busy, self._lap_waited = 0, 0.0, 0.0
        return pace

    def seconds_per_step(self) -> float:
        """Mean over all laps of this process."""
        return self._busy / max(self._steps, 1)


class ProgressLine:
    """Prints, on one process of all."""

    def __init__(self, epochs: int, steps: int, show: bool) -> None:
        """``steps`` per epoch; nothing is printed unless ``show``, nor by a command that is to be quiet."""
        self._epochs = epochs
        self._steps = steps
        self._show = show and not is_quiet()
        self._printed = time.monotonic()
        self._unfinished = False  # the line on the terminal, which the next one would replace

    def print(self, epoch: int, step: int, loss: float, lr: float, pace: Pace, seconds_per_step: float) -> None:
        """Print where training is; without a terminal at most every ten seconds, and at the end of every epoch."""
        last = step == self._steps
        now = time.monotonic()
        terminal = sys.stdout.isatty()
        if not self._show or not (terminal or last or now - self._printed >= _LOG_SECONDS):
            return
        self._printed = now
        left = ((self._epochs - epoch) * self._steps - step) * seconds_per_step
        line = (
            f"epoch {epoch + 1}/{self._epochs}  step {step}/{self._steps}  loss {loss:.4f}  lr {lr:.3g}  "
            f"{pace.images_per_s:,.0f} images/s  {pace.waiting:.0%} waiting for data  {human_seconds(left)} left"
        )
        self._unfinished = terminal and not last
        sys.stdout.write((_CLEAR if terminal else "") + line + ("" if self._unfinished else "\n"))
        sys.stdout.flush()

    def say(self, text: str) -> None:
        """Print a line of its own."""
        if self._show:
            self.finish()
            print(text, flush=True)

    def finish(self) -> None:
        """What is printed next begins a line of its own."""
        if self._unfinished:
            self._unfinished = False
            print(flush=True)
