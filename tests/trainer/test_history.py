import pytest
from PIL import Image

from fractaltrain import log as history
from fractaltrain.log import FILE, History, draw_history
from fractaltrain.run_folder import append_metrics

HELD_OUT = {"samples": 5, "loss": 1.2, "top1": 0.5, "top5": 0.9}


def write(folder, epochs: int, **scores: float) -> None:
    folder.mkdir()
    for epoch in range(epochs):
        for step in (10, 20):
            place = {"epoch": epoch, "step": step, "global_step": 20 * epoch + step}
            pace = {"images_per_s": 100.0 + step, "waiting": 0.1}
            append_metrics(folder, {"split": "train", **place, "loss": 2 - epoch / 5, "lr": 0.1, **pace})
        append_metrics(folder, {"split": "epoch", **place, "train_loss": 1.9 - epoch / 5, **scores})


@pytest.mark.parametrize("epochs", [0, 1, 3])
@pytest.mark.parametrize("scores", [HELD_OUT, {}], ids=["held out", "training alone"])
def test_picture_of_any_run(tmp_path, epochs, scores):
    folder = tmp_path / "run"
    write(folder, epochs, **scores)
    draw_history(folder)
    with Image.open(folder / FILE) as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(picture.width * picture.height)) > 50


def test_curves_are_those_of_the_metrics(tmp_path):
    """A run with more to show makes another picture; the same metrics make the same."""
    pictures = []
    for name, epochs in (("a", 2), ("b", 3), ("c", 3)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "run", epochs, **HELD_OUT)
        draw_history(tmp_path / name / "run")
        pictures.append((tmp_path / name / "run" / FILE).read_bytes())
    assert pictures[0] != pictures[1]
    assert pictures[1] == pictures[2]


def test_short_epochs_are_drawn_together_but_never_without_the_last(tmp_path, monkeypatch):
    drawn = []

    class Time:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

    def draw(folder) -> None:
        drawn.append(time.now)
        time.now += 1.0

    time = Time()
    monkeypatch.setattr(history, "time", time)
    monkeypatch.setattr(history, "draw_history", draw)
    picture = History(tmp_path)
    for epoch in range(10):
        time.now += 5.0
        picture.redraw(last=epoch == 9)
    assert drawn == [10.0, 31.0, 52.0]
