"""Packing an image folder: every file arrives once, byte for byte, under its class; packing again continues."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm.data
import webdataset
from PIL import Image
from torchvision.datasets import ImageFolder

from building import times, wait_until
from fractalshards.image_files import list_folder
from fractalshards.manifest import load_manifest
from fractalshards.png import decode_image
from fractalshards.sample import decode_label
from packing import assert_refused, good, images, is_sound, pack, run, samples

pytestmark = pytest.mark.usefixtures("threads")
FLOWERS = ("--split", "train=0.8,val=0.2", "--shard-size", "8")  # as the fixture ``packed``


def test_pack_stores_every_file_once_under_its_class(flowers, packed):
    listing = ImageFolder(flowers)
    train, val = images(packed, "train"), images(packed, "val")
    assert not set(train) & set(val)
    assert train | val == {Path(path).read_bytes(): label for path, label in listing.samples}
    assert Counter(val.values()) == {0: 3, 1: 2, 2: 2}  # a fifth of 14, 10 and 11
    manifest = load_manifest(packed)
    assert list(manifest.class_names) == listing.classes == ["aster", "rose", "tulip"]
    assert (manifest.class_ids, manifest.image_size, manifest.classes) == ((), None, 3)
    assert is_sound(packed)
    assert str(flowers.parent) not in (packed / "recipe.json").read_text() + (packed / "_info.json").read_text()
    found = samples(packed, "train") + samples(packed, "val")
    assert [sample.key for sample in found] == [f"{index:09d}" for index in range(35)]
    shards = [{decode_label(one.files) for one in found[at : at + 8]} for at in (0, 8, 16)]
    assert shards == [{0, 1, 2}] * 3  # classes are mixed


@pytest.mark.parametrize(
    ("options", "content", "recipe"),
    [
        ("", "321039868b7ab10637cc1a7e4da37e88", "a57d6e86ba971dd93b13dfd89d84564e"),
        ("--split train=0.75,val=0.25", "4ac0561c6e97ca72be6ad03747ee2368", "1cfdc05135ccce873fe80c0a78f3db99"),
        ("--split val=.25,train=0.75 --seed 7", "cf99db8e3ffd6223269908d94c6cee4f", "84915a380433b2b76acb5ae8a15d952b"),
    ],
)
def test_pack_digests_never_change(tmp_path, options, content, recipe):
    """The order of images and the choice of held-out ones are those of the first release."""
    classes = {"rose": 9, "aster": 12, "tulip": 7}
    names = [f"{name}/{place}.png" for name, count in classes.items() for place in range(count)]
    for value, name in enumerate(names):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 5, 3), 9 * value, np.uint8)).save(tmp_path / "in" / name)
    options = f"--shard-size 10 --workers 2 {options}"
    pack(f"imagefolder:{tmp_path / 'in'}", tmp_path / "out", *options.split())
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.content_digest(), manifest.recipe_digest) == (content, recipe)


def test_packed_shards_open_in_webdataset_and_timm(packed):
    urls = sorted(map(str, packed.glob("train-*.tar")))
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    ours = samples(packed, "train")
    assert [(one["__key__"], one["cls"]) for one in theirs] == [(one.key, decode_label(one.files)) for one in ours]
    assert np.array_equal(theirs[0]["jpg"], decode_image(ours[0].files["jpg"]))
    for split, count in (("train", 28), ("val", 7)):
        dataset = timm.data.create_dataset("wds/flowers", root=str(packed), split=split)
        assert [label for _, label in dataset] == [decode_label(one.files) for one in samples(packed, split)]
        assert len(dataset) == count


def test_formats_go_by_content_and_others_become_png(tmp_path, image_file):
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
    pack(f"imagefolder:{tmp_path / 'in'}", tmp_path / "out")
    found = samples(tmp_path / "out", "train")
    stored = {data: end for one in found for end, data in one.files.items() if end != "cls"}
    kept = {files[name]: end for name, end in zip(files, ("png", "jpg", "jpg", "webp"), strict=False)}
    assert kept.items() <= stored.items()
    recoded = [decode_image(data).tobytes() for data in set(stored) - set(kept)]
    assert sorted(recoded) == sorted(decode_image(files[name]).tobytes() for name in ("old.bmp", "deep.tif"))
    assert load_manifest(tmp_path / "out").image_size == 9
    assert is_sound(tmp_path / "out")


@pytest.mark.parametrize("options", [[], ["--split", "train=train,val=val"], ["--split", "val=held/out,train=train"]])
def test_split_folders_become_splits(tmp_path, options, image_folder):
    source = tmp_path / "in"
    val = source / ("held/out" if "held" in str(options) else "val")
    image_folder(source / "train", {"b": 4, "a": 3})
    image_folder(val, {"b": 2, "a": 1}, first=10)
    pack(f"imagefolder:{source}", tmp_path / "out", *options)
    for split, folder in (("train", source / "train"), ("val", val)):
        expected = {Path(path).read_bytes(): label for path, label in ImageFolder(folder).samples}
        assert images(tmp_path / "out", split) == expected


def test_class_folders_may_look_like_splits_or_synsets(tmp_path, image_folder):
    assert list_folder(image_folder(tmp_path / "a", {"car": 2, "train": 2})).class_names == ("car", "train")
    synsets = list_folder(image_folder(tmp_path / "b", {"n01443537": 1, "n01440764": 1}))
    assert (synsets.class_ids, synsets.class_names) == (("n01440764", "n01443537"), ())
    image_folder(tmp_path / "c" / "train", {"a": 2})
    image_folder(tmp_path / "c" / "valid", {"a": 1})
    assert any("--split" in note for note in list_folder(tmp_path / "c").notes)  # no val
    (tmp_path / "c" / "train").rename(tmp_path / "c" / "training")
    assert any("--split" in note for note in list_folder(tmp_path / "c").notes)  # classes train, training


def test_links_are_followed_and_other_files_are_skipped(flowers, tmp_path):
    source = tmp_path / "in"
    (source / "daisy" / "deeper").mkdir(parents=True)
    (source / ".git").mkdir()
    (source / "rose").symlink_to(flowers / "rose")
    (source / "daisy" / "deeper" / "link.jpg").symlink_to(flowers / "aster" / "011.jpg")
    for name in ("README", "daisy/notes.txt", "daisy/._link.jpg", "daisy/.DS_Store"):
        (source / name).write_text("not an image")
    assert "skipped 5 items" in pack(f"imagefolder:{source}", tmp_path / "out").stderr
    assert Counter(images(tmp_path / "out", "train").values()) == {0: 1, 1: 10}


def different_forms(source: Path) -> None:
    """The same letter in both, once composed and once not, as macOS writes it."""
    for split, name in (("train", "\xe9"), ("val", "e\u0301")):
        shutil.copytree(source / "a", source / split / name)


def different_splits(source: Path) -> None:
    for split in ("train", "val"):
        shutil.copytree(source / "a", source / split / split)


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "loop": (lambda source: (source / "a" / "again").symlink_to(source), "a/again"),
    "dangling link": (lambda source: (source / "a" / "gone.jpg").symlink_to(source / "nowhere.jpg"), "a/gone.jpg"),
    "pipe": (lambda source: os.mkfifo(source / "a" / "pipe.jpg"), "a/pipe.jpg"),
    "device": (lambda source: (source / "a" / "zero.jpg").symlink_to("/dev/zero"), "a/zero.jpg"),
    "empty class": (lambda source: (source / "c").mkdir(), "in/c"),
    "no classes": (lambda source: shutil.rmtree(source / "a"), "0 class folders"),
    "different splits": (different_splits, "('train', 'val')"),
    "forms of letters": (different_forms, r"u0301"),
    "bytes in a name": (lambda source: os.rename(source / "a", os.fsencode(source) + b"/\xff"), "UTF-8"),
    "itself for a result": (lambda source: (source.parent / "out").symlink_to("out"), "out"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_folders_are_refused(tmp_path, name, image_folder):
    source = image_folder(tmp_path / "in", {"a": 2})
    damage, noun = ODD[name]
    damage(source)
    assert_refused(run("pack", f"imagefolder:{source}", tmp_path / "out"), 1, noun)
    assert not (tmp_path / "out").exists()


def test_class_names_do_not_depend_on_the_locale(tmp_path, image_folder):
    source = image_folder(tmp_path / "in", {"été": 1, "日本": 1})
    code = "import sys; from pathlib import Path; from fractalshards.image_files import list_folder as read; print("
    code += "ascii(read(Path(sys.argv[1])).class_names))"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, source]
    printed = subprocess.run(command, text=True, capture_output=True, check=True, env=os.environ | locale).stdout
    assert printed == ascii(list_folder(source).class_names) + "\n" == ascii(("été", "日本")) + "\n"


def test_hostile_class_names_are_data(tmp_path, image_folder):
    name = "<script>'; rm -rf ~\nb\x1b[2J%s{0}"
    source = image_folder(tmp_path / "in", {name: 1, "zz": 1, "...": 1})
    result = pack(f"imagefolder:{source}", tmp_path / "out")
    assert load_manifest(tmp_path / "out").class_names == (name, "zz")
    assert "\x1b" not in result.output + good("info", tmp_path / "out").output


@pytest.mark.parametrize(
    ("source", "options", "code", "noun"),
    [
        ("flowers", (), 2, "imagefolder:PATH"),
        ("imagefolder:nowhere", (), 1, "nowhere"),
        ("imagefolder:FLOWERS", ("--split", "train=0.9,val=0.2"), 2, "--split"),
        ("imagefolder:FLOWERS", ("--split", "train=a,train=b"), 2, "--split"),
        ("imagefolder:FLOWERS", ("--split", "train=a,val=b"), 1, "flowers/a"),
        ("imagefolder:FLOWERS", ("--split", "train=0.99,val=0.01"), 1, "--split"),
        ("imagefolder:FLOWERS", ("--shard-size", "0"), 2, "--shard-size"),
        ("imagefolder:INSIDE", (), 1, "/out"),
        ("imagenet:FLOWERS", (), 1, "ILSVRC2012_img_train.tar"),
        ("imagenet:x", ("--split", "train=a,val=b"), 2, "--split"),
    ],
)
def test_wrong_usage_is_refused(flowers, tmp_path, source, options, code, noun):
    source = source.replace("FLOWERS", str(flowers)).replace("INSIDE", str(tmp_path))
    assert_refused(run("pack", source, tmp_path / "out", *options), code, noun)
    assert not (tmp_path / "out").exists()


def test_pack_again_writes_only_what_is_missing(flowers, packed, tmp_path):
    out = shutil.copytree(packed, tmp_path / "out")
    before = times(out)
    assert "to pack: 0 images" in pack(f"imagefolder:{flowers}", out, *FLOWERS).stderr
    assert times(out) == before
    (out / "train-000001.json").unlink()
    os.truncate(out / "val-000000.tar", 700)
    (out / f".tmp~{os.uname().nodename}~999999999~00000000~train-000004.tar").write_bytes(b"half")
    assert "to pack: 15 images" in pack(f"imagefolder:{flowers}", out, *FLOWERS).stderr
    assert times(out).keys() == times(packed).keys()
    assert load_manifest(out).splits == load_manifest(packed).splits
    assert times(out)["train-000000.tar"] == before["train-000000.tar"]


def test_pack_leaves_other_folders_alone(flowers, packed, tmp_path):
    before = times(packed)
    for options, noun in ((("--shard-size", "9"), "shard_size"), (("--split", "train=0.9,val=0.1"), "val_share")):
        assert_refused(run("pack", f"imagefolder:{flowers}", packed, *FLOWERS, *options), 1, noun)
    other = shutil.copytree(flowers, tmp_path / "other")
    (other / "rose" / "025.jpg").rename(other / "rose" / "renamed.jpg")
    assert_refused(run("pack", f"imagefolder:{other}", packed, *FLOWERS), 1, "files")
    assert times(packed) == before
    (tmp_path / "thesis.tex").write_text("precious")
    assert_refused(run("pack", f"imagefolder:{flowers}", tmp_path), 1, "recipe.json")
    assert set(times(tmp_path)) == {"other", "thesis.tex"}


def test_bad_images_are_all_named(tmp_path, image_folder, image_file):
    source = image_folder(tmp_path / "in", {"a": 6, "b": 6})
    (source / "a" / "003.jpg").write_bytes((source / "a" / "003.jpg").read_bytes()[:-200])
    (source / "b" / "009.jpg").write_text("<html>not found</html>")
    (source / "b" / "010.jpg").write_bytes(b"")
    os.truncate(source / "a" / "001.jpg", 72_000_000)  # decoders stop where the image ends
    os.truncate(source / "b" / "008.jpg", (64 << 20) - 1)  # small enough itself, but not with its tar headers
    bad = {"a/001.jpg": 1, "a/003.jpg": 3, "b/008.jpg": 8, "b/009.jpg": 9, "b/010.jpg": 10}
    command = (f"imagefolder:{source}", tmp_path / "out", "--shard-size", "1")
    result = run("pack", *command)
    for name in bad:
        assert_refused(result, 1, f"{source / name}: ")
    assert not (tmp_path / "out" / "_info.json").exists()
    assert len(list((tmp_path / "out").glob("*.tar"))) == 7
    assert not list((tmp_path / "out").glob(".*"))
    for name, seed in bad.items():
        (source / name).write_bytes(image_file("JPEG", 20, 20, seed))
    assert "to pack: 5 images" in pack(*command).stderr


def test_skipped_images_change_nothing_else(tmp_path, image_folder, image_file):
    source = image_folder(tmp_path / "in", {"a": 300, "b": 6})
    options = ("--split", "train=0.8,val=0.2", "--shard-size", "50")
    pack(f"imagefolder:{source}", tmp_path / "clean", *options)
    (source / "a" / "000-bad.jpg").write_bytes(image_file("JPEG", 20, 20, 0)[:200])
    (source / "b" / "zz.tif").write_bytes(image_file("TIFF", 20, 20, 0, "F"))
    assert_refused(run("pack", f"imagefolder:{source}", tmp_path / "out", *options), 1, "2 bad images")
    shutil.rmtree(tmp_path / "out")
    result = pack(f"imagefolder:{source}", tmp_path / "out", *options, "--on-bad-image", "skip", "--quiet")
    skipped = [line for line in result.stderr.splitlines() if "skipped" in line]
    assert all(name in line for name, line in zip(("a/000-bad.jpg", "b/zz.tif", "2 "), skipped, strict=True))
    manifest, clean = load_manifest(tmp_path / "out"), load_manifest(tmp_path / "clean")
    assert (manifest.recipe, manifest.content_digest()) == (clean.recipe, clean.content_digest())
    for path in (source / "b").glob("*.jpg"):
        path.write_bytes(b"")
    refused = run("pack", f"imagefolder:{source}", tmp_path / "other", *options, "--on-bad-image", "skip")
    assert_refused(refused, 1, "class b")


def test_killed_pack_continues_to_the_same_dataset(tmp_path, image_folder):
    source = image_folder(tmp_path / "in", {"a": 40, "b": 40})
    pack(f"imagefolder:{source}", tmp_path / "undisturbed", "--shard-size", "1")
    out = tmp_path / "killed"
    command = [Path(sys.executable).with_name("fractalshards"), "pack", f"imagefolder:{source}", out]
    process = subprocess.Popen([*command, "--shard-size", "1", "--workers", "1"], stderr=subprocess.DEVNULL)
    wait_until(lambda: len(list(out.glob("train-*.json"))) >= 3, process)
    process.kill()
    process.wait(60)
    assert not (out / "_info.json").exists()
    result = pack(f"imagefolder:{source}", out, "--shard-size", "1")
    assert "of them done" in result.stderr
    assert load_manifest(out).content_digest() == load_manifest(tmp_path / "undisturbed").content_digest()
