"""A small study, its plan, and what takes the place of the processes that would run it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fractaltrain.study import Group, Study, plan_study, read_study

STUDY = """
[study]
image_size = 16
seeds = [0, 1]
[models.test_resnet]
[scratch]
[pretraining.small]
shards = "shards/small"
epochs = 3
[finetuning.digits]
per_class = [5, 10]
subset_seeds = [0, 1, 2]
"""


def planned(folder: Path, text: str = STUDY) -> tuple[Study, tuple[Group, ...]]:
    """The study that a text says, and its groups."""
    (folder / "s.toml").write_text(text)
    study = read_study(folder / "s.toml")
    return study, plan_study(study, folder, folder)


class Runner:
    """Takes the place of the processes: writes what a finished run has, unless its folder contains ``failing``.

    Of those that run at once, the last one ends first.
    """

    def __init__(self, folder: Path, groups, failing: str = "never") -> None:
        self._settings = {str(folder / step.run): step.settings for group in groups for step in group.steps()}
        self._failing = failing
        self._ended: list[tuple[str, int]] = []
        self.ran: list[str] = []
        self.arguments: list[tuple[str, ...]] = []
        self.most = 0

    @property
    def running(self) -> int:
        return len(self._ended)

    def start(self, name, arguments, log=None) -> None:
        out = arguments[arguments.index("--out") + 1]
        self.ran.append(Path(out).name)
        self.arguments.append(arguments)
        code = 1 if self._failing in out else 0
        if not code:
            finish(Path(out), self._settings[out])
        self._ended.append((name, code))
        self.most = max(self.most, self.running)

    def wait(self) -> tuple[str, int]:
        return self._ended.pop()


def finish(folder: Path, settings: Mapping[str, Any], top1: float = 0.5) -> None:
    """Write what tells that a run came to its end."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"settings": settings}))
    (folder / "result.json").write_text(json.dumps({"top1": top1, "best_top1": top1}))
