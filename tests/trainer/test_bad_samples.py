"""Bad samples in runs that were interrupted: the count is that of the run, not of its last process."""

import shutil
import signal
from pathlib import Path

import pytest

from fractalshards.manifest import read_record
from fractaltrain.log import read_metrics

BAD = (3, 9, 14)  # of the first shard


@pytest.fixture
def damaged(dataset: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "damaged"
    shutil.copytree(dataset, folder)
    offsets = read_record(folder, "train-000000.tar", "single").offsets
    with (folder / "train-000000.tar").open("r+b") as file:
        for place in BAD:
            file.seek(offsets[place] + 512 + 60)
            file.write(b"garbage" * 20)
    return folder


def test_they_are_counted_over_all_restarts_of_an_epoch(world, damaged, tmp_path):
    out = tmp_path / "run"
    arguments = (
        "pt", "--shards", damaged, "--out", out, "--model", "test_resnet", "--epochs", 1, "--batch-size", 8,
        "--image-size", 16, "--on-bad-sample", "skip",
    )  # fmt: skip
    stopped = world(2, *arguments, signals=[[1, 0, 2, signal.SIGTERM]], agent=False)  # it has met one of them
    assert stopped.codes == [75, 75], stopped.said()
    done = world(2, *arguments)
    assert done.codes == [0, 0], done.said()
    assert f"epoch 1/1  {len(BAD)} bad samples replaced by others\n" in done.out[0]
    assert [line["bad_samples"] for line in read_metrics(out) if line["split"] == "epoch"] == [len(BAD)]
