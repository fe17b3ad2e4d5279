"""``fractalshards report``: what the survey counts and shows, and how the command fails."""

import json
import os
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fractalshards.errors import FractalError
from fractalshards.manifest import load_manifest, read_record, sidecar_name
from fractalshards.report import (
    ClassView,
    Survey,
    Thumbnail,
    class_chart,
    fit_thumbnails,
    histogram,
    measure,
    survey_dataset,
    tally,
)
from fractalshards.sample import MultiLabel, Object
from fractalshards.storage import write_json
from painted_dataset import color, plain, report, write_dataset


def survey(folder: Path) -> Survey:
    return survey_dataset(load_manifest(folder), workers=1)


def color_of(thumbnail: Thumbnail) -> tuple[float, ...]:
    with Image.open(BytesIO(thumbnail.webp)) as image:
        return tuple(np.asarray(image.convert("RGB"), np.float64).mean(axis=(0, 1)))


def test_label_counts_are_exact_and_thumbnails_show_their_class(tmp_path: Path) -> None:
    labels = [0] * 5 + [1] * 20 + [2] * 3
    samples = [(plain(label), label) for label in labels]
    seen = survey(write_dataset(tmp_path / "data", [samples[:13], samples[13:]], classes=4))
    assert seen.label_counts["train"].tolist() == [5, 20, 3, 0]
    assert [view.count for view in seen.views] == [5, 20, 3, 0]
    assert [len(view.thumbnails) for view in seen.views] == [5, 8, 3, 0]
    for view in seen.views:
        assert len({one.key for one in view.thumbnails}) == len(view.thumbnails)
        for thumbnail in view.thumbnails:
            assert labels[int(thumbnail.key)] == view.index
            assert np.allclose(color_of(thumbnail), color(view.index), atol=6)
    assert len(seen.looks) == len(labels)


def test_shards_that_do_not_mix_classes_give_as_many_thumbnails(tmp_path: Path) -> None:
    shards = [[(plain(label), label)] * 10 for label in range(12)]
    seen = survey(write_dataset(tmp_path / "data", shards, classes=12))
    assert [len(view.thumbnails) for view in seen.views] == [8] * 12


def test_thumbnails_come_from_many_shards(tmp_path: Path) -> None:
    shards = [[(plain(0), 0)] * 10 for _ in range(8)]
    (view,) = survey(write_dataset(tmp_path / "data", shards, classes=1)).views
    assert {int(one.key) // 10 for one in view.thumbnails} == set(range(8))


def test_measures_are_bounded_and_evenly_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fractalshards.report.MAX_LOOKS", 10)
    shards = [[(plain(0, 16 + number), 0)] * 20 for number in range(5)]
    seen = survey(write_dataset(tmp_path / "data", shards, classes=1))
    assert sorted(look.width for look in seen.looks) == [16, 16, 17, 17, 18, 18, 19, 19, 20, 20]


def test_a_multi_label_image_stands_under_each_of_its_classes_with_its_boxes(tmp_path: Path) -> None:
    label = MultiLabel.of((Object(2, (1, 2, 3, 4)), Object(0, (10, 10, 99, 99))))
    seen = survey(write_dataset(tmp_path / "data", [[(plain(0), label)]], classes=3))
    assert [len(view.thumbnails) for view in seen.views] == [1, 0, 1]
    assert seen.views[2].thumbnails[0].objects == (Object(2, (1, 2, 3, 4)), Object(0, (10, 10, 6, 6)))
    assert seen.looks[0].objects == 2


def test_measures() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    image[:4, :4] = 1, 0, 0
    assert measure(image, 0, 100).fill == 0.25
    assert measure(image, 0, 100).detail == 0
    image[:4, :4] = 0, 33, 0
    assert measure(image, 0, 100).detail == (8 + 7) / 64  # both sides of an edge of 4 + 4 pixels, the corner once
    label = MultiLabel.of((Object(1, (0, 0, 4, 8)), Object(1, (2, 0, 4, 4))))
    assert measure(image, label, 100).covered == (32 + 8) / 64
    assert (measure(image, label, 100).objects, measure(image, 0, 100).bytes) == (2, 100)


def test_thumbnails_fit_into_a_bound() -> None:
    thumbnail = Thumbnail("0", 1, 1, bytes(100), ())
    views = tuple(ClassView(label, 9, (thumbnail,) * 4) for label in range(10))
    assert [len(view.thumbnails) for view in fit_thumbnails(views, 4000)] == [4] * 10
    assert [len(view.thumbnails) for view in fit_thumbnails(views, 3999)] == [3] * 10
    assert [len(view.thumbnails) for view in fit_thumbnails(views, 10)] == [0] * 10


def test_charts() -> None:
    chart = class_chart("", np.array([2, 4, 0]))
    assert [bar.height for bar in chart.bars] == [50, 100, 0]
    assert chart.note == "From 0 to 4 images per class, median 2. 1 class without any."
    assert class_chart("", np.array([3, 3])).note == "Every class has 3 images."
    many = class_chart("", np.arange(1500))
    assert len(many.bars) == 250
    assert many.bars[1].tip == "classes 6 to 11: 8.5 images"
    assert sum(bar.height > 0 for bar in histogram("", "", [0.1, 0.1, 0.9], (0, 1), str).bars) == 2
    assert [bar.tip for bar in tally("", [1, 1, 99]).bars[:2]] == ["0: 0 images", "1: 2 images"]
    assert tally("", [1, 1, 99]).ticks[-1] == "15 or more"


def test_errors_are_one_line(tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = report(dataset, tmp_path / "page.txt")
    assert (wrong.exit_code, wrong.stderr) == (
        2,
        f"error: --out is {tmp_path / 'page.txt'}: expected a name that ends in .html\n",
    )
    missing = report(tmp_path / "nowhere", tmp_path / "page.html")
    assert (missing.exit_code, missing.stderr.count("\n")) == (1, 1)
    record = read_record(dataset, "train-000000.tar", "single")
    with (dataset / "train-000000.tar").open("r+b") as file:
        os.pwrite(file.fileno(), bytes(400), record.offsets[1] + 512 + 20)
    damaged = report(dataset, tmp_path / "page.html")
    assert damaged.exit_code == 1
    assert "train-000000.tar: sample 1: image cannot be decoded" in damaged.stderr.splitlines()[-1]
    os.truncate(dataset / "train-000000.tar", 3000)
    assert "train-000000.tar: 3000 bytes instead of" in report(dataset, tmp_path / "page.html").stderr
    monkeypatch.setitem(sys.modules, "jinja2", None)
    without = report(dataset, tmp_path / "page.html")
    assert without.exit_code == 1
    assert without.stderr == (
        "error: a report needs jinja2, which is not installed; run pip install '.[report]' in a clone of the project\n"
    )
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("name", ["label_counts", "bytes"])
def test_a_sidecar_of_another_dataset_is_refused(dataset: Path, name: str) -> None:
    path = dataset / sidecar_name("train-000001.tar")
    record = json.loads(path.read_text())
    write_json(path, {**record, name: [*record[name], 0] if name == "label_counts" else 10**15})
    with pytest.raises(FractalError, match=r"train-000001.tar: its sidecar and the manifest disagree"):
        survey(dataset)


def test_a_dataset_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FractalError, match="no image in it"):
        survey(write_dataset(tmp_path / "data", [], classes=2))


def test_the_page_of_many_classes_is_bounded(tmp_path: Path) -> None:
    names = ["<&\"'>" * 60] * 20_000
    folder = write_dataset(tmp_path / "data", [[(plain(0), 0)]], classes=20_000, class_names=names, class_ids=names)
    assert report(folder, tmp_path / "page.html").exit_code == 0
    assert (tmp_path / "page.html").stat().st_size < 6_000_000  # and 6.7 MB of thumbnails at most
    assert "4,000 of 20,000 classes, evenly spread" in (tmp_path / "page.html").read_text()


def test_a_dataset_that_was_not_rendered_offers_no_recipe(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", [[(plain(0), 0)]], classes=1, recipe={"kind": "packed"})
    assert report(folder, tmp_path / "page.html").exit_code == 0
    page = (tmp_path / "page.html").read_text()
    assert f"fractalshards push {folder} URL" in page
    assert "fractalshards recipe" not in page
