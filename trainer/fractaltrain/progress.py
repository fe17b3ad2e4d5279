"""The line that says how training goes: rewritten in place on a terminal, every ten seconds elsewhere."""

import sys
import time

from fractalshards.human import human_seconds

_LOG_SECONDS = 10.0
_CLEAR = "\r\033[K"


class ProgressLine:
    """Counts steps since this process began, and prints."""

    def __init__(self, epochs: int, steps: int, batch: int, show: bool) -> None:
        """``steps`` per epoch of ``batch`` images each; nothing is printed unless ``show``."""
        self._epochs = epochs
        self._steps = steps
        self._batch = batch
        self._show = show
        self._done = 0
        self._busy = 0.0
        self._since = time.monotonic()
        self._printed = self._since

    def start(self) -> None:
        """Training goes on from here: what was spent since ``pause`` does not count."""
        self._since = time.monotonic()

    def pause(self) -> None:
        """Training stops for something else."""
        self._busy += time.monotonic() - self._since

    def advance(self, steps: int) -> None:
        """So many more steps are done."""
        self._done += steps

    def images_per_second(self) -> float:
        """Global rate of training since this process began."""
        busy = self._busy + time.monotonic() - self._since
        return self._done * self._batch / max(busy, 1e-9)

    def print(self, epoch: int, step: int, loss: float, lr: float) -> None:
        """Print where training is; without a terminal at most every ten seconds, and at the end of every epoch."""
        last = step == self._steps
        now = time.monotonic()
        terminal = sys.stdout.isatty()
        if not self._show or not (terminal or last or now - self._printed >= _LOG_SECONDS):
            return
        self._printed = now
        rate = self.images_per_second()
        left = ((self._epochs - epoch) * self._steps - step) * self._batch / rate
        line = (
            f"epoch {epoch + 1}/{self._epochs}  step {step}/{self._steps}  loss {loss:.4f}  lr {lr:.3g}  "
            f"{rate:,.0f} images/s  {human_seconds(left)} left"
        )
        sys.stdout.write((_CLEAR if terminal else "") + line + ("\n" if last or not terminal else ""))
        sys.stdout.flush()

    def say(self, text: str) -> None:
        """Print a line of its own."""
        if self._show:
            print(text, flush=True)
