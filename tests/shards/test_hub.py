"""``hf://``: few commits, one after the other, none upon what others changed; the hub is played by memory."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import fsspec
import huggingface_hub
import pytest
from click.testing import CliRunner
from fsspec.implementations.memory import MemoryFileSystem
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HfHubHTTPError

from fractalshards.cli import main
from fractalshards.manifest import INFO
from fractalshards.remote import stores as hub_module
from fractalshards.remote.transfer import open_destination

pytestmark = pytest.mark.usefixtures("impatient")
URL = "hf://datasets/me/set"


class HubFiles(MemoryFileSystem):
    """Stands where Hugging Face's file system would."""

    protocol = "hf"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    cachable = False


class Hub:
    """Stands where Hugging Face's API would; ``faults`` are used up from the front, ``commits`` are names of files."""

    def __init__(self) -> None:
        self.commits: list[list[str]] = []
        self.faults: list[int] = []

    def repo_info(self, repo_id: str, repo_type: str, revision: str | None) -> SimpleNamespace:
        assert (repo_id, repo_type) == ("me/set", "dataset")
        return SimpleNamespace(sha=str(len(self.commits)))

    def create_commit(
        self,
        repo_id: str,
        operations: Sequence[CommitOperationAdd],
        *,
        commit_message: str,
        parent_commit: str | None,
        repo_type: str,
        revision: str | None,
    ) -> None:
        assert (repo_id, repo_type) == ("me/set", "dataset")
        stale = parent_commit not in (None, str(len(self.commits)))
        if self.faults or stale:
            status = self.faults.pop(0) if self.faults else 412
            raise HfHubHTTPError("no", response=SimpleNamespace(status_code=status, headers={}, request=None))
        root = f"datasets/{repo_id}" + (f"@{revision}" if revision else "")
        for operation in operations:
            with operation.as_file() as file:
                fsspec.filesystem("hf").pipe_file(f"{root}/{operation.path_in_repo}", file.read())
        self.commits.append([operation.path_in_repo for operation in operations])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub, before = Hub(), fsspec.get_filesystem_class("hf")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(HubFiles, "store", {})
    fsspec.register_implementation("hf", HubFiles, clobber=True)
    yield hub
    fsspec.register_implementation("hf", before, clobber=True)


def run(*words: object) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_many_files_go_in_one_commit_and_the_manifest_in_the_last(dataset: Path, tmp_path: Path, hub: Hub) -> None:
    assert "2 shards moved" in run("push", dataset, URL)
    tars = ["train-000000.tar", "train-000000.json", "train-000001.tar", "train-000001.json"]
    assert hub.commits == [["recipe.json", "systems.npz"], tars, ["README.md"], [INFO]]
    assert "0 shards moved" in run("push", dataset, URL)
    assert len(hub.commits) == 4
    out = tmp_path / "out"
    run("pull", URL, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in dataset.iterdir()
    }


def test_a_commit_holds_so_many_shards_at_the_most(dataset: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module.HubStore, "together", 1)
    run("push", dataset, f"{URL}@main/a/folder", "--jobs", 4)
    assert sorted(hub.commits[1:-1]) == [
        [f"a/folder/train-00000{number}.tar", f"a/folder/train-00000{number}.json"] for number in (0, 1)
    ]


@pytest.mark.parametrize("status", [409, 412, 429, 503])
def test_a_hub_that_is_busy_is_asked_again(dataset: Path, hub: Hub, status: int) -> None:
    hub.faults = [status] * 3
    run("push", dataset, URL)
    assert hub.commits[-1] == [INFO]


def test_a_hub_that_says_no(dataset: Path, hub: Hub) -> None:
    hub.faults = [403]
    result = CliRunner().invoke(main, ["push", str(dataset), URL])
    assert result.exit_code == 1
    assert "access denied; check credentials and permissions" in result.stderr


def test_a_commit_upon_what_others_changed_is_made_again(hub: Hub) -> None:
    remote, others = open_destination(URL), open_destination(URL)
    seen: list[bytes | None] = []

    def change(text: bytes | None) -> bytes:
        seen.append(text)
        if len(seen) == 1:
            others.update("list", 1000, lambda text: b"theirs")
        return (text or b"") + b" ours"

    remote.update("list", 1000, change)
    assert seen == [None, b"theirs"]
    assert remote.read("list", 1000) == b"theirs ours"


def test_the_card_names_the_tars_and_one_that_is_there_stays(dataset: Path, hub: Hub) -> None:
    run("push", dataset, URL)
    card = HubFiles.store["/datasets/me/set/README.md"].getvalue().decode()
    assert '\n  - {split: train, path: "train-*.tar"}\n---\n' in card
    assert "val" not in card
    assert hub_module.dataset_card(card.encode(), {"train", "val"}).decode().count("path:") == 2
    assert hub_module.dataset_card(b"my own", {"train", "val"}) == b"my own"


def test_load_dataset_takes_the_tars_by_the_card(dataset: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (dataset / "README.md").write_bytes(hub_module.dataset_card(None, {"train"}))
    rows = list(datasets.load_dataset(str(dataset), streaming=True)["train"])
    assert [row["cls"] for row in rows] == [index % 3 for index in (*range(5), *range(5))]


def test_what_is_not_what_it_should_be_is_not_committed(dataset: Path, hub: Hub) -> None:
    (dataset / "train-000001.tar").write_bytes(b"x")
    result = CliRunner().invoke(main, ["push", str(dataset), URL])
    assert result.exit_code == 1
    assert "train-000001.tar: not what the manifest says" in result.stderr
    assert hub.commits == [["recipe.json", "systems.npz"]]
