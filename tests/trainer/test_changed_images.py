"""A fine-tuning on an image folder notices that its images are others now."""

from pathlib import Path

import pytest

from fractaltrain.data.images import FolderSource

OPTIONS = ("--weights", "none", "--data", "imagefolder:photos", "--model", "test_resnet", "--image-size", 16,
           "--batch-size", 4, "--epochs", 1, "--out", "run")  # fmt: skip


def add(part: Path) -> None:
    (part / "ant" / "new.jpg").write_bytes(next((part / "ant").glob("*.jpg")).read_bytes())


def replace(part: Path) -> None:
    path = next((part / "bee").glob("*.jpg"))
    path.write_bytes(path.read_bytes() + b"\0")


def move(part: Path) -> None:
    path = next((part / "ant").glob("*.jpg"))
    path.rename(part / "bee" / path.name)


@pytest.mark.parametrize("change", [add, replace, move])
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_run_is_not_continued_on_other_images(fractaltrain, image_folder, tmp_path, monkeypatch, change, part):
    monkeypatch.chdir(tmp_path)
    for first, name in enumerate(("train", "val")):
        image_folder(Path("photos") / name, {"ant": 3, "bee": 3}, first=10 * first)
    assert fractaltrain("ft", *OPTIONS).code == 0
    assert fractaltrain("ft", *OPTIONS).code == 0
    change(Path("photos") / part)
    refused = fractaltrain("ft", *OPTIONS)
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert refused.err.startswith("error: run: holds a run with data_digest ")
    assert refused.err.endswith("; choose another folder with --out, or remove this one\n")


def test_eval_looks_at_no_file_that_it_does_not_read(fractaltrain, image_folder, tmp_path, monkeypatch):
    """There may be millions of them, on a file system that many share."""
    monkeypatch.chdir(tmp_path)
    for first, name in enumerate(("train", "val")):
        image_folder(Path("photos") / name, {"ant": 3, "bee": 3}, first=10 * first)
    assert fractaltrain("ft", *OPTIONS).code == 0
    monkeypatch.setattr(FolderSource, "describe", lambda self: pytest.fail("all files are looked at"))
    assert fractaltrain("eval", "--weights", "run", "--data", "imagefolder:photos").code == 0
