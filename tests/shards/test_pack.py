"""Packing an image folder: the bytes of every file arrive as they are, once, under the right class."""

import io
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm.data
import webdataset
import xxhash
from click.testing import CliRunner
from PIL import Image
from torchvision.datasets import ImageFolder

from fractalshards.cli import main
from fractalshards.digest import mapping_digest
from fractalshards.manifest import load_manifest, read_record
from fractalshards.pack import list_folder, shuffled
from fractalshards.png import decode_image
from fractalshards.reader import index_split, iterate_shard
from fractalshards.sample import decode_label
from packed_flowers import Encode, Make, images, names, pack, samples


def test_every_file_arrives_once_under_its_class(flowers: Path, packed: Path) -> None:
    listing = ImageFolder(flowers)
    expected = {Path(path).read_bytes(): label for path, label in listing.samples}
    train, val = images(packed, "train"), images(packed, "val")
    assert not set(train) & set(val)
    assert train | val == expected
    assert Counter(val.values()) == {0: 3, 1: 2, 2: 2}  # a fifth of 14, 10 and 11
    manifest = load_manifest(packed)
    assert list(manifest.class_names) == listing.classes == ["aster", "rose", "tulip"]
    assert (manifest.class_ids, manifest.image_size, manifest.classes) == ((), None, 3)


def test_keys_count_through_the_splits_and_classes_are_mixed(packed: Path) -> None:
    found = samples(packed, "train") + samples(packed, "val")
    assert [sample.key for sample in found] == [f"{index:09d}" for index in range(35)]
    shards = [{decode_label(one.files) for one in samples(packed, "train")[at : at + 8]} for at in (0, 8, 16)]
    assert shards == [{0, 1, 2}] * 3


def test_it_is_sound_and_can_be_looked_at(packed: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["verify", str(packed), "--workers", "1"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(main, ["info", str(packed)])
    assert "of several sizes" in result.stdout
    assert "imagefolder" in result.stdout
    out = tmp_path / "sheet.png"
    result = CliRunner().invoke(main, ["sheet", str(packed), "--out", str(out), "--tile", "32"])
    assert result.exit_code == 0, result.output
    with Image.open(out) as sheet:
        assert sheet.height == 3 * 36 + 4


def test_the_folder_tells_nothing_of_this_machine(flowers: Path, packed: Path) -> None:
    described = (packed / "recipe.json").read_text() + (packed / "_info.json").read_text()
    assert str(flowers.parent) not in described
    recipe = json.loads((packed / "recipe.json").read_text())
    assert recipe["recipe_digest"] == mapping_digest(recipe["recipe"])
    assert not (packed / "systems.npz").exists()


def test_webdataset_and_timm_read_it(packed: Path) -> None:
    urls = [str(packed / name) for name in names(packed) if name.startswith("train") and name.endswith(".tar")]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    ours = samples(packed, "train")
    assert [(one["__key__"], one["cls"]) for one in theirs] == [(one.key, decode_label(one.files)) for one in ours]
    assert np.array_equal(theirs[0]["jpg"], decode_image(ours[0].files["jpg"]))
    for split, count in (("train", 28), ("val", 7)):
        dataset = timm.data.create_dataset("wds/flowers", root=str(packed), split=split)
        assert [label for _, label in dataset] == [decode_label(one.files) for one in samples(packed, split)]
        assert len(dataset) == count


def test_the_digest_of_files_is_that_of_the_specification(packed: Path) -> None:
    shard = index_split(load_manifest(packed), "train")[1]
    hashed = b"".join(
        b"%b\x00file %d\x00%b\x00%b\x00" % (one.key.encode(), len(one.files["jpg"]), one.files["jpg"], one.files["cls"])
        for one in iterate_shard(shard)
    )
    assert read_record(packed, shard.path.name, "single").content_digest == xxhash.xxh3_128_hexdigest(hashed)


def test_formats_are_told_by_content_and_others_become_png(tmp_path: Path, image_file: Encode) -> None:
    files = {
        "named.JPEG": image_file("PNG", 9, 9, 0),
        "grey.png": image_file("JPEG", 9, 9, 1, "L"),
        "cmyk.jpg": image_file("JPEG", 9, 9, 2, "CMYK"),
        "web.webp": image_file("WEBP", 9, 9, 3),
        "old.bmp": image_file("BMP", 9, 9, 4),
        "deep.tif": image_file("TIFF", 9, 9, 5),
    }
    (tmp_path / "in" / "only").mkdir(parents=True)
    for name, data in files.items():
        (tmp_path / "in" / "only" / name).write_bytes(data)
    assert pack(f"imagefolder:{tmp_path / 'in'}", tmp_path / "out").exit_code == 0
    found = samples(tmp_path / "out", "train")
    stored = {data: end for one in found for end, data in one.files.items() if end != "cls"}
    kept = {files[name]: end for name, end in zip(files, ("png", "jpg", "jpg", "webp"), strict=False)}
    assert kept.items() <= stored.items()
    recoded = [decode_image(data).tobytes() for data in set(stored) - set(kept)]
    assert sorted(recoded) == sorted(decode_image(files[name]).tobytes() for name in ("old.bmp", "deep.tif"))
    manifest = load_manifest(tmp_path / "out")
    assert manifest.image_size == 9
    assert CliRunner().invoke(main, ["verify", str(tmp_path / "out"), "--workers", "1"]).exit_code == 0


def test_grey_of_sixteen_bits_is_not_clipped() -> None:
    pixels = np.array([[0, 0x1234], [0x8000, 0xFFFF]], np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    assert decode_image(buffer.getvalue())[..., 0].tolist() == [[0, 0x12], [0x80, 0xFF]]


@pytest.mark.parametrize("options", [[], ["--split", "train=train,val=val"], ["--split", "val=held/out,train=train"]])
def test_a_folder_for_every_split(tmp_path: Path, options: list[str], image_folder: Make) -> None:
    source = tmp_path / "in"
    held_out = source / ("held/out" if "held" in str(options) else "val")
    image_folder(source / "train", {"b": 4, "a": 3})
    image_folder(held_out, {"b": 2, "a": 1}, first=10)
    result = pack(f"imagefolder:{source}", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    for split, folder in (("train", source / "train"), ("val", held_out)):
        expected = {Path(path).read_bytes(): label for path, label in ImageFolder(folder).samples}
        assert images(tmp_path / "out", split) == expected


def test_a_class_may_be_called_train(tmp_path: Path, image_folder: Make) -> None:
    image_folder(tmp_path / "in", {"car": 2, "train": 2})
    assert pack(f"imagefolder:{tmp_path / 'in'}", tmp_path / "out").exit_code == 0
    assert load_manifest(tmp_path / "out").class_names == ("car", "train")


def test_folders_that_may_be_splits_are_not_taken_for_classes_in_silence(tmp_path: Path, image_folder: Make) -> None:
    source = tmp_path / "in"
    image_folder(source / "train", {"a": 2, "b": 2})
    image_folder(source / "valid", {"a": 1, "b": 1}, first=10)
    result = pack(f"imagefolder:{source}", tmp_path / "out")
    assert f"note: no folder val in {source}, so no split val; name folders with --split" in result.stderr
    assert load_manifest(tmp_path / "out").samples("train") == 4
    result = pack(f"imagefolder:{source}", tmp_path / "shares", "--split", "train=0.5,val=0.5")
    assert result.exit_code == 2
    assert "shares are for PATH/CLASS/*, but" in result.stderr
    (source / "train").rename(source / "training")
    result = pack(f"imagefolder:{source}", tmp_path / "flat")
    assert "note: all images lie in folders below training, ...; if those are splits" in result.stderr


def test_synsets_are_identifiers(tmp_path: Path, image_folder: Make) -> None:
    image_folder(tmp_path / "in", {"n01443537": 1, "n01440764": 1})
    assert pack(f"imagefolder:{tmp_path / 'in'}", tmp_path / "out").exit_code == 0
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.class_ids, manifest.class_names) == (("n01440764", "n01443537"), ())


def test_links_are_followed_and_what_is_no_image_is_skipped_and_counted(flowers: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    (source / "daisy" / "deeper").mkdir(parents=True)
    (source / ".git").mkdir()
    (source / "rose").symlink_to(flowers / "rose")
    (source / "daisy" / "deeper" / "link.jpg").symlink_to(flowers / "aster" / "011.jpg")
    for name in ("README", "daisy/notes.txt", "daisy/._link.jpg", "daisy/.DS_Store"):
        (source / name).write_text("not an image")
    result = pack(f"imagefolder:{source}", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "note: skipped 4 files" in result.stderr
    assert Counter(images(tmp_path / "out", "train").values()) == {0: 1, 1: 10}


def hostile(tmp_path: Path, what: str, image_folder: Make) -> Path:
    source = image_folder(tmp_path / "in", {"a": 2, "b": 2})
    if what == "empty class":
        (source / "c").mkdir()
    elif what == "loop":
        (source / "a" / "again").symlink_to(source)
    elif what == "dangling":
        (source / "a" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    elif what == "pipe":
        os.mkfifo(source / "a" / "pipe.jpg")
    elif what == "device":
        (source / "a" / "zero.jpg").symlink_to("/dev/zero")
    elif what == "no classes":
        shutil.rmtree(source / "a")
        shutil.rmtree(source / "b")
    elif what == "not UTF-8":
        os.rename(source / "b", os.fsencode(source) + b"/\xff")
    return source


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("empty class", "in/c: no image in this class"),
        ("loop", "in/a/again: a link to a folder that it lies in"),
        ("dangling", "a/gone.jpg: a link that leads nowhere"),
        ("pipe", "a/pipe.jpg: not a regular file"),
        ("device", "a/zero.jpg: not a regular file"),
        ("no classes", "in: 0 class folders in it; images belong into PATH/CLASS/"),
        ("not UTF-8", "is not UTF-8; rename it"),
    ],
)
def test_odd_folders_end_in_one_line(tmp_path: Path, what: str, words: str, image_folder: Make) -> None:
    result = pack(f"imagefolder:{hostile(tmp_path, what, image_folder)}", tmp_path / "out")
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    assert words in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "options", "code", "words"),
    [
        ("flowers", (), 2, "expected imagefolder:PATH or imagenet:PATH"),
        ("imagefoldr:x", (), 2, "did you mean 'imagefolder'"),
        ("imagefolder:", (), 2, "expected imagefolder:PATH"),
        ("imagefolder:nowhere", (), 1, "nowhere: no such folder"),
        ("imagefolder:FLOWERS", ("--split", "train=0.9,val=0.2"), 2, "add up to 1"),
        ("imagefolder:FLOWERS", ("--split", "train=0.9"), 2, "add up to 1"),
        ("imagefolder:FLOWERS", ("--split", "train=1,val=0"), 2, "must be above 0"),
        ("imagefolder:FLOWERS", ("--split", "train=0.9,val=rose"), 2, "a share and a folder"),
        ("imagefolder:FLOWERS", ("--split", "val=rose"), 2, "give shares as train=0.9,val=0.1 or folders"),
        ("imagefolder:FLOWERS", ("--split", "train=a,test=b"), 2, "give shares"),
        ("imagefolder:FLOWERS", ("--split", "train=a,val=b"), 1, "flowers/a: no such folder, so nothing for train"),
        ("imagefolder:FLOWERS", ("--split", "train=0.99,val=0.01"), 1, "raise the share of val"),
        ("imagefolder:FLOWERS", ("--shard-size", "0"), 2, "shard_size is 0"),
        ("imagefolder:FLOWERS", ("--seed", "-1"), 2, "seed is -1"),
        ("imagenet:FLOWERS", (), 1, "no ILSVRC2012_img_train.tar; fetch it, or pack unpacked images"),
        ("imagenet:nowhere", (), 1, "nowhere: no such folder"),
        ("imagenet:x", ("--split", "train=a,val=b"), 2, "are no folders"),
    ],
)
def test_wrong_usage_ends_in_one_line(
    flowers: Path, tmp_path: Path, source: str, options: tuple[str, ...], code: int, words: str
) -> None:
    result = pack(source.replace("FLOWERS", str(flowers)), tmp_path / "out", *options)
    assert result.exit_code == code, result.output
    (line,) = result.stderr.splitlines()
    assert words in line
    assert not (tmp_path / "out").exists()


def test_shards_do_not_go_into_the_image_folder(tmp_path: Path, image_folder: Make) -> None:
    source = image_folder(tmp_path / "in", {"a": 2})
    result = pack(f"imagefolder:{source}", source / "shards")
    assert result.exit_code == 1
    assert "choose a folder outside of it" in result.stderr
    assert names(source) == ["a"]


def test_classes_of_the_splits_must_agree(tmp_path: Path, image_folder: Make) -> None:
    image_folder(tmp_path / "in" / "train", {"a": 1, "b": 1})
    image_folder(tmp_path / "in" / "val", {"a": 1, "c": 1})
    result = pack(f"imagefolder:{tmp_path / 'in'}", tmp_path / "out")
    assert result.exit_code == 1
    assert "train and val differ in their class folders (b, c); make them equal" in result.stderr


def test_a_seeded_order_never_changes() -> None:
    assert shuffled(8, 0, "train").tolist() == [3, 0, 5, 6, 4, 7, 2, 1]
    assert sorted(shuffled(1000, 5, "val").tolist()) == list(range(1000))


def test_the_list_does_not_depend_on_where_the_folder_lies(flowers: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(flowers, tmp_path / "elsewhere")
    assert list_folder(copied).digest == list_folder(flowers).digest
