"""Parts of a dataset that move side by side: in the end the folder lists all of them."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from threading import Thread
from types import ModuleType

import numpy as np
import pytest

from fractalshards.digest import mapping_digest
from fractalshards.errors import FractalError
from fractalshards.manifest import INFO, RECIPE, load_manifest, sample_key, shard_name, write_manifest
from fractalshards.remote import transfer as pull_module
from fractalshards.remote import transfer as push_module
from fractalshards.remote.transfer import open_destination
from fractalshards.storage import write_json
from fractalshards.writer import write_shard

pytestmark = pytest.mark.usefixtures("impatient")
SHARDS = 4
COMMAND = [sys.executable, "-c", "import sys; from fractalshards.cli import main; main(sys.argv[1:])"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four shards of one sample."""
    folder = tmp_path / "source"
    folder.mkdir()
    recipe = {"kind": "random"}
    write_json(folder / RECIPE, {"recipe": recipe, "recipe_digest": mapping_digest(recipe)})
    images = np.random.default_rng(0).integers(0, 256, (SHARDS, 16, 16, 3), np.uint8)
    records = [
        write_shard(folder, shard_name("train", number), 1, [(sample_key(number), (image, 0))]).shard()
        for number, image in enumerate(images)
    ]
    traits = {"recipe": recipe, "recipe_digest": mapping_digest(recipe), "label_type": "single", "classes": 1}
    write_manifest(folder, {"train": records}, image_size=16, **traits)
    return folder


def started(*words: object) -> subprocess.Popen:
    return subprocess.Popen([*COMMAND, *map(str, words)], stderr=subprocess.PIPE, text=True)


def same(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


def transfer(module: ModuleType, source: Path, out: Path, wanted: list[range]) -> None:
    """Push or pull, as the module does."""

    def meter(label: str, total: int, unit: str) -> nullcontext:
        return nullcontext(lambda count: None)

    if module is push_module:
        push_module.push(source, str(out), wanted, 1, meter)
    else:
        pull_module.pull(str(source), out, wanted, 1, meter)


@pytest.mark.parametrize("command", ["push", "pull"])
def test_parts_that_move_at_once_add_up(source: Path, tmp_path: Path, command: str) -> None:
    out = tmp_path / "out"
    parts = [started(command, source, out, "--shards", number) for number in range(SHARDS)]
    assert [(part.communicate()[1][-300:], part.returncode)[1] for part in parts] == [0] * SHARDS
    assert same(source, out)


@pytest.mark.parametrize(("module", "name"), [(push_module, "_push_shards"), (pull_module, "_pull_shard")])
def test_what_others_listed_meanwhile_stays(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str
) -> None:
    out, move = tmp_path / "out", getattr(module, name)

    def slowly(*arguments: object) -> None:
        assert started("push", source, out, "--shards", "1-3").wait() == 0
        move(*arguments)

    monkeypatch.setattr(module, name, slowly)
    transfer(module, source, out, [range(1)])
    assert same(source, out)


@pytest.mark.parametrize(("module", "name"), [(push_module, "_push_shards"), (pull_module, "_pull_shard")])
def test_another_dataset_that_came_meanwhile_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str
) -> None:
    out = tmp_path / "out"
    text = (source / INFO).read_text().replace(load_manifest(source).splits["train"][0].content_digest, "0" * 32)
    monkeypatch.setattr(module, name, lambda *arguments: (out / INFO).write_text(text))
    with pytest.raises(FractalError, match=r"holds another dataset \(train-000000.tar has other content\)"):
        transfer(module, source, out, [range(1)])
    assert (out / INFO).read_text() == text


def test_a_small_file_that_many_change_loses_nothing(tmp_path: Path) -> None:
    def add(number: int) -> None:
        open_destination(str(tmp_path)).update("list", 1000, lambda text: (text or b"") + b"%d\n" % number)

    threads = [Thread(target=add, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(map(int, (tmp_path / "list").read_text().split())) == list(range(30))
    assert [path.name for path in tmp_path.iterdir()] == ["list"]


@pytest.mark.parametrize("before", [None, b"old"])
def test_s3_refuses_to_overwrite_what_has_changed(bucket: str, before: bytes | None) -> None:
    remote, seen = open_destination(bucket), []
    if before:
        remote.update("list", 1000, lambda text: before)

    def change(text: bytes | None) -> bytes:
        seen.append(text)
        if len(seen) == 1:  # somebody else is quicker
            open_destination(bucket).update("list", 1000, lambda text: b"theirs")
        return (text or b"") + b" ours"

    remote.update("list", 1000, change)
    assert seen == [before, b"theirs"]
    assert remote.read("list", 1000) == b"theirs ours"
