"""Every option of the commands that train arrives where it is used; what it does there, other tests show."""

from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import click
import pytest

from fractalshards.console import PATH
from fractalshards.storage import write_json
from fractaltrain import cli
from fractaltrain import distributed as launch_module
from fractaltrain.config import Caching
from fractaltrain.run_folder import RUN

RUNNING = [
    ("--recipe deit", "running.recipe.name", "deit"),
    ("--epochs 7", "running.recipe.epochs", 7),
    ("--batch-size 32", "running.recipe.batch_size", 32),
    ("--lr 0.5", "running.recipe.lr", 0.5),
    ("--batch-size 32 --scale-lr --lr 0.5", "running.recipe.lr", 0.25),
    ("--set mixup=0.5", "running.recipe.mixup", 0.5),
    ("--out elsewhere", "running.out", Path("elsewhere")),
    ("--workers 3", "running.workers", 3),
    ("--seed 5", "running.seed", 5),
    ("--amp bf16", "running.amp", "bf16"),
    ("--pad", "running.pad", True),
    ("--on-bad-sample skip", "running.on_bad_sample", "skip"),
    ("--eval-every 4", "running.eval_every", 4),
    ("--save-every-minutes 2.5", "running.save_every_minutes", 2.5),
    ("--keep 9", "running.keep", 9),
    ("--resume must", "running.resume", "must"),
    ("--accumulate 2", "running.accumulate", 2),
    ("--compile", "running.compile", True),
    ("--sync-batchnorm", "running.sync_batchnorm", True),
    ("--deterministic", "running.deterministic", True),
    ("--image-size 48", "image_size", 48),
]
PT = "--shards s3://bucket/single"
PRETRAINING = [
    *RUNNING,
    ("--shards s3://bucket/multi", "shards", "s3://bucket/multi"),
    ("--model resnet50", "model", "resnet50"),
    ("--window 5", "window", 5),
    ("--cache-dir here", "caching", Caching(Path("here"), 20 * 10**9)),
    ("--cache-size 1MB", "caching", Caching(None, 10**6)),
    ("--nodes-split", "nodes_split", True),
]
FT = "--weights timm --data digits"
FINETUNING = [
    (words.replace("deit", "nakashima"), name, "nakashima" if value == "deit" else value)
    for words, name, value in RUNNING
] + [
    ("--weights none", "weights", None),
    ("--data cifar10", "data.name", "cifar10"),
    ("--data-dir archives", "data.folder", Path("archives")),
    ("--per-class 5", "data.per_class", 5),
    ("--per-class 5 --subset-seed 6", "data.subset_seed", 6),
    ("--model resnet50", "model", "resnet50"),
    ("--freeze backbone", "freeze", "backbone"),
]
EVAL = "--weights run --data digits"
EVALUATION = [
    ("--weights other", "run", Path("other")),
    ("--data cifar100", "data.name", "cifar100"),
    ("--data-dir archives", "data.folder", Path("archives")),
    ("--out report", "out", Path("report")),
    ("--batch-size 7", "batch_size", 7),
]
COMMANDS = {"pt": (PT, PRETRAINING), "ft": (FT, FINETUNING), "eval": (EVAL, EVALUATION)}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[Any, int | None]]:
    """What a command line hands to the launcher, where there are two runs: the choice, and how many processes."""
    monkeypatch.chdir(tmp_path)
    for run in ("run", "other"):
        Path(run).mkdir()
        write_json(Path(run) / RUN, {"settings": {"model": "test_resnet", "image_size": 16}})
    taken: list[tuple[Any, int | None]] = []
    monkeypatch.setattr(launch_module, "launch", lambda entry, choice, nproc: taken.append((choice, nproc)))

    def ask(words: str) -> tuple[Any, int | None]:
        cli.main(words.split(), standalone_mode=False)
        return taken.pop()

    return ask


@pytest.mark.parametrize(
    ("command", "words", "name", "value"),
    [(command, words, name, value) for command, (_, options) in COMMANDS.items() for words, name, value in options],
)
def test_options_arrive(asked, command, words, name, value):
    get = attrgetter(name)
    base, _ = COMMANDS[command]
    assert get(asked(f"{command} {base}")[0]) != value
    assert get(asked(f"{command} {base} {words}")[0]) == value


@pytest.mark.parametrize("command", ["pt", "ft"])
def test_as_many_processes_as_asked_for(asked, command):
    assert asked(f"{command} {COMMANDS[command][0]}")[1] is None
    assert asked(f"{command} {COMMANDS[command][0]} --nproc 2")[1] == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_is_left_out(command):
    tested = " ".join(words for words, _, _ in COMMANDS[command][1])
    options = {option.opts[0] for option in cli.main.commands[command].params if isinstance(option, click.Option)}
    assert options - set(tested.split()) - {"--nproc", "--quiet"} == set()


def test_a_study_passes_its_options_on(tmp_path, monkeypatch):
    file = tmp_path / "one.toml"
    file.write_text("[study]\nimage_size = 16\n[models.test_resnet]\n[scratch]\n[finetuning.digits]\nepochs = 1\n")
    ran = []
    monkeypatch.setattr(cli, "run_study", lambda runs, plan, *rest: ran.append(rest) or [])
    out = tmp_path / "out"
    cli.main(f"study {file} --out {out} --nproc 3 --jobs 2 --data-dir archives".split(), standalone_mode=False)
    assert ran == [(out, Path("archives"), 3, 2, False)]


def test_every_path_refuses_empty_text(fractaltrain):
    parameters = [parameter for command in cli.main.commands.values() for parameter in command.params]
    paths = [parameter.type for parameter in parameters if isinstance(parameter.type, click.Path)]
    assert len(paths) > 10
    assert all(kind is PATH or kind.exists for kind in paths)
    refused = fractaltrain("export", "run", "--out", "")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "is empty; give a path" in refused.err
