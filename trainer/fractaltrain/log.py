"""The line that says how training goes: rewritten in place on a terminal, every ten seconds elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from fractalshards.console import is_quiet
from fractalshards.human import human_seconds, one_line
from fractaltrain.checkpoint import Position
from fractaltrain.plotting import BLUE, INK, MUTED, OCHRE, PALE_BLUE, RED, YELLOW, save, style
from fractaltrain.run_folder import append_metrics, read_metrics, rewind_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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


FILE = "history.png"
_TRAIN, _MEAN, _HELD_OUT, _SECOND, _SECOND_TEXT = PALE_BLUE, BLUE, RED, YELLOW, OCHRE
_FIRST = 10.0  # seconds until the first picture
_REST = 19  # times as long as drawing took
_ACCURACIES = ({"top1": "top-1", "top5": "top-5"}, {"map": "mean average precision", "f1": "F1"})
_FEW = 40  # points that are marked, each
_HISTORY_PLACES = {"left": 0.075, "right": 0.925, "bottom": 0.085, "top": 0.885, "wspace": 0.22, "hspace": 0.26}
"""Of the panels; an engine that finds places draws everything once more."""
_LEGEND: dict[str, Any] = {"fontsize": 9, "labelcolor": INK, "framealpha": 0.85, "edgecolor": "none"}
_HEADROOM = 1.08
_ROOM = 1.015  # or the last ones would be cut at the edge


class History:
    """Keeps the picture of a run up to date, at no more than a twentieth of its time.

    So one that takes a few seconds has a single picture, of its end.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._next = time.monotonic() + _FIRST

    def redraw(self, last: bool) -> None:
        """After an epoch; several short ones are drawn together, but the last is never left out.

        A picture that cannot be drawn is no reason to lose a run: then the reason is printed.
        """
        began = time.monotonic()
        if began < self._next and not last:
            return
        try:
            draw_history(self._folder)
        except Exception as error:
            print(f"{self._folder / FILE}: not drawn ({one_line(str(error))}); training goes on", flush=True)
        done = time.monotonic()
        self._next = done + _REST * (done - began)


def draw_history(folder: Path) -> None:
    """Draw the metrics of ``folder`` into its ``history.png``.

    Raises:
        OSError: if it cannot be written.
    """
    from matplotlib.figure import Figure  # it takes a second, which only the main process needs

    lines = read_metrics(folder)
    epochs = [line for line in lines if line["split"] == "epoch"]
    steps = [line for line in lines if line["split"] == "train"]
    per_epoch = max((line["step"] for line in lines), default=1)
    x = [line["epoch"] + line["step"] / per_epoch for line in steps]
    ends = [line["epoch"] + 1 for line in epochs]
    evaluated = [line for line in epochs if "loss" in line]
    moments = [line["epoch"] + 1 for line in evaluated]

    figure = Figure(figsize=(10, 6.4), facecolor="white")
    (loss, accuracy), (lr, throughput) = figure.subplots(2, 2, sharex=True, gridspec_kw=_HISTORY_PLACES)
    figure.suptitle(folder.resolve().name, color=INK, fontsize=13, fontweight="bold")

    style(loss, "Loss", "cross-entropy, nats")
    loss.plot(x, [line["loss"] for line in steps], color=_TRAIN, linewidth=1, label="training, every few steps")
    _curve(loss, ends, [line["train_loss"] for line in epochs], _MEAN, "training, whole epoch")
    if evaluated:
        _curve(loss, moments, [line["loss"] for line in evaluated], _HELD_OUT, "held out")
    loss.legend(**_LEGEND)

    style(accuracy, "Accuracy on held-out images", "%")
    shown = next((names for names in _ACCURACIES if evaluated and all(name in evaluated[-1] for name in names)), None)
    if shown:
        (first, leading), (second, other) = shown.items()
        leading_curve, other_curve = ([100 * line[name] for line in evaluated] for name in (first, second))
        _curve(accuracy, moments, other_curve, _SECOND, f"{other}: {other_curve[-1]:.1f} %")
        label = f"{leading}: {leading_curve[-1]:.1f} %, best {max(leading_curve):.1f} %"
        _curve(accuracy, moments, leading_curve, _HELD_OUT, label)
        accuracy.set_ylim(0, 102)
        accuracy.legend(**_LEGEND)
    else:
        accuracy.set_yticks([])
        accuracy.text(
            0.5,
            0.5,
            "no evaluation on held-out images",
            transform=accuracy.transAxes,
            ha="center",
            va="center",
            color=MUTED,
        )

    style(lr, "Learning rate", "")
    lr.plot(x, [line["lr"] for line in steps], color=_MEAN, linewidth=1.6)
    _from_zero(lr, [line["lr"] for line in steps])
    lr.set_xlabel("epoch", color=MUTED)

    style(throughput, "Throughput", "images/s")
    throughput.plot(x, [line["images_per_s"] for line in steps], color=_MEAN, linewidth=1.2, label="images/s")
    _from_zero(throughput, [line["images_per_s"] for line in steps])
    throughput.set_xlabel("epoch", color=MUTED)
    waiting = throughput.twinx()
    waiting.plot(x, [100 * line["waiting"] for line in steps], color=_SECOND, linewidth=1)
    waiting.set_ylim(0, 100)
    waiting.set_ylabel("waiting for data, % of the time", color=_SECOND_TEXT, fontsize=9)
    waiting.tick_params(colors=_SECOND_TEXT, labelsize=9, length=0)
    waiting.spines[:].set_visible(False)

    for panel in (loss, accuracy, lr, throughput):
        panel.set_xlim(0, _ROOM * max(ends[-1] if ends else 0, x[-1] if x else 0, 1))
        panel.xaxis.get_major_locator().set_params(integer=True)
    save(figure, folder / FILE)


def _from_zero(panel: "Axes", y: Sequence[float]) -> None:
    """Room above what is shown, however flat it is."""
    panel.set_ylim(0, _HEADROOM * max(y, default=0) or 1)


def _curve(panel: "Axes", x: Sequence[float], y: Sequence[Any], color: str, label: str) -> None:
    """A line with a point per epoch, as long as there are few."""
    marker = "o" if len(x) <= _FEW else None
    panel.plot(x, y, color=color, linewidth=1.8, marker=marker, markersize=3.5, label=label)


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
