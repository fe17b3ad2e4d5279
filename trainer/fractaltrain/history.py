"""``history.png``: loss, accuracy, learning rate and throughput of a run over its epochs, drawn from its metrics."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fractalshards.human import one_line
from fractaltrain.plotting import BLUE, INK, MUTED, OCHRE, PALE_BLUE, RED, YELLOW, save, style
from fractaltrain.run_folder import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE = "history.png"
_TRAIN, _MEAN, _HELD_OUT, _SECOND, _SECOND_TEXT = PALE_BLUE, BLUE, RED, YELLOW, OCHRE
_FIRST = 10.0  # seconds until the first picture
_REST = 19  # times as long as drawing took
_ACCURACIES = ({"top1": "top-1", "top5": "top-5"}, {"map": "mean average precision", "f1": "F1"})
_FEW = 40  # points that are marked, each
_PLACES = {"left": 0.075, "right": 0.925, "bottom": 0.085, "top": 0.885, "wspace": 0.22, "hspace": 0.26}
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
    (loss, accuracy), (lr, throughput) = figure.subplots(2, 2, sharex=True, gridspec_kw=_PLACES)
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
