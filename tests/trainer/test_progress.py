import pytest

from fractalshards.console import as_quiet_as, note
from fractaltrain import log as progress
from fractaltrain.log import Clock, Pace, ProgressLine


class Time:
    """A clock that only moves when told to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_pace_and_waiting_of_each_lap(monkeypatch):
    time = Time()
    monkeypatch.setattr(progress, "time", time)

    def batches(seconds: float, count: int):
        for _ in range(count):
            time.now += seconds  # the loader is that slow
            yield None

    clock = Clock(batch=8)
    clock.start()
    for _ in clock.steps_of(batches(1.0, 4)):
        time.now += 3.0  # the step itself
    assert clock.lap() == Pace(images_per_s=2.0, waiting=0.25)
    clock.pause()
    time.now += 100.0  # evaluation
    clock.start()
    for _ in clock.steps_of(batches(0.0, 2)):
        time.now += 2.0
    assert clock.lap() == Pace(images_per_s=4.0, waiting=0.0)
    assert clock.seconds_per_step() == 20 / 6
    assert clock.lap() == Pace(images_per_s=0.0, waiting=0.0)


def test_line_says_it_all(capfd):
    line = ProgressLine(epochs=3, steps=100, show=True)
    line.print(1, 100, 0.12345, 0.05, Pace(1234.5, 0.031), seconds_per_step=2.0)
    expected = "epoch 2/3  step 100/100  loss 0.1235  lr 0.05  1,234 images/s  3% waiting for data  0:03:20 left\n"
    assert capfd.readouterr().out == expected
    ProgressLine(epochs=3, steps=100, show=False).print(1, 100, 0.1, 0.05, Pace(1, 0), 1.0)
    assert capfd.readouterr().out == ""


def test_what_is_said_beside_the_line_of_a_terminal_stands_alone(capfd, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    line = ProgressLine(epochs=3, steps=100, show=True)
    line.print(0, 10, 0.1, 0.05, Pace(1, 0), 1.0)
    line.say("saved")
    line.say("stopped")
    line.print(0, 20, 0.1, 0.05, Pace(1, 0), 1.0)
    line.finish()
    first, said, again, second, end = capfd.readouterr().out.split("\n")
    assert first.startswith("\r\033[Kepoch 1/3  step 10/100")
    assert (said, again) == ("saved", "stopped")
    assert second.startswith("\r\033[Kepoch 1/3  step 20/100")
    assert end == ""


@pytest.mark.parametrize("quiet", [True, False])
def test_a_process_is_as_quiet_as_the_command_that_started_it(capfd, quiet):
    with as_quiet_as(quiet):
        ProgressLine(epochs=3, steps=100, show=True).say("said")
        note("noted")
    assert capfd.readouterr() == (("", "") if quiet else ("said\n", "noted\n"))
