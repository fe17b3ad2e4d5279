"""Packing an image folder: the bytes of every file arrive as they are, once, under the right class."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm.data
import webdataset
import xxhash
from click.testing import CliRunner, Result
from PIL import Image
from torchvision.datasets import ImageFolder

from fractalshards.cli import main
from fractalshards.digest import mapping_digest
from fractalshards.errors import FractalError
from fractalshards.labels import decode_label
from fractalshards.manifest import load_manifest, read_record
from fractalshards.packing import pack as pack_module
from fractalshards.packing.image_folder import list_folder
from fractalshards.packing.order import shuffled
from fractalshards.packing.pack import plan_pack, run_pack
from fractalshards.packing.source import parse_source
from fractalshards.png import decode_image
from fractalshards.reader import index_split, iterate_shard
from fractalshards.tarball import Sample

Make = Callable[..., Path]
Encode = Callable[..., bytes]
FRACTALSHARDS = Path(sys.executable).with_name("fractalshards")
CLASSES = {"tulip": 11, "aster": 14, "rose": 10}


def pack(source: object, out: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["pack", str(source), str(out), "--workers", "1", *options])


def samples(dataset: Path, split: str) -> list[Sample]:
    return [sample for shard in index_split(load_manifest(dataset), split) for sample in iterate_shard(shard)]


def images(dataset: Path, split: str) -> dict[bytes, int]:
    """The class of every image file of a split, by its bytes."""
    found = samples(dataset, split)
    pairs = [(data, decode_label(one.files)) for one in found for end, data in one.files.items() if end != "cls"]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def flowers(tmp_path_factory: pytest.TempPathFactory, image_folder: Make) -> Path:
    """35 JPEGs of three classes."""
    return image_folder(tmp_path_factory.mktemp("source") / "flowers", CLASSES)


@pytest.fixture(scope="module")
def packed(flowers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The flowers in shards of eight, a fifth of every class held out."""
    out = tmp_path_factory.mktemp("packed") / "flowers"
    result = pack(f"imagefolder:{flowers}", out, "--split", "train=0.8,val=0.2", "--shard-size", "8")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"next: fractaltrain pt --shards {out}"
    return out


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


def test_seed_and_shard_size_decide_and_workers_do_not(flowers: Path, packed: Path, tmp_path: Path) -> None:
    def digest(name: str, *options: str) -> str:
        split = ("--split", "val=.20,train=0.80", "--shard-size", "8")
        result = pack(f"imagefolder:{flowers}", tmp_path / name, *split, *options)
        assert result.exit_code == 0, result.output
        return load_manifest(tmp_path / name).content_digest()

    assert digest("two", "--workers", "2") == load_manifest(packed).content_digest()
    assert digest("other", "--seed", "1") != load_manifest(packed).content_digest()
    assert images(tmp_path / "other", "val") != images(packed, "val")


def test_running_again_does_only_what_is_missing(flowers: Path, packed: Path, tmp_path: Path) -> None:
    again = (f"imagefolder:{flowers}", tmp_path / "out", "--split", "train=0.8,val=0.2", "--shard-size", "8")
    out = shutil.copytree(packed, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    result = pack(*again)
    assert result.exit_code == 0, result.output
    assert "to pack: 0 images" in result.stderr
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    (out / "train-000001.json").unlink()
    os.truncate(out / "val-000000.tar", 700)
    (out / f".tmp~{os.uname().nodename}~999999999~00000000~train-000004.tar").write_bytes(b"half")
    result = pack(*again)
    assert "in 5 shards, 3 of them done" in result.stderr
    assert "to pack: 15 images" in result.stderr
    assert names(out) == names(packed)
    assert load_manifest(out).splits == load_manifest(packed).splits
    assert (out / "train-000000.tar").stat().st_mtime_ns == before["train-000000.tar"]


def test_another_recipe_and_a_folder_that_is_no_dataset_are_left_alone(
    flowers: Path, packed: Path, tmp_path: Path
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in packed.iterdir()}
    for options, words in (
        (("--split", "train=0.8,val=0.2", "--shard-size", "9"), "shard_size 8 there, 9 here"),
        (("--split", "train=0.9,val=0.1", "--shard-size", "8"), "val_share 0.2 there, 0.1 here"),
        (("--split", "train=0.8,val=0.2", "--shard-size", "8", "--seed", "1"), "seed 0 there, 1 here"),
    ):
        result = pack(f"imagefolder:{flowers}", packed, *options)
        assert result.exit_code == 1
        assert words in result.stderr
    other = shutil.copytree(flowers, tmp_path / "other")
    (other / "rose" / "025.jpg").rename(other / "rose" / "renamed.jpg")
    result = pack(f"imagefolder:{other}", packed, "--split", "train=0.8,val=0.2", "--shard-size", "8")
    assert "(files " in result.stderr
    assert {path.name: path.stat().st_mtime_ns for path in packed.iterdir()} == before
    (tmp_path / "thesis.tex").write_text("precious")
    result = pack(f"imagefolder:{flowers}", tmp_path)
    assert "no recipe.json; choose an empty or new folder" in result.stderr
    assert names(tmp_path) == ["other", "thesis.tex"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_half_way_it_continues_to_the_same_dataset(
    tmp_path: Path, image_folder: Make, number: signal.Signals, code: int
) -> None:
    big = image_folder(tmp_path / "big", {"a": 80, "b": 80})
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "killed"
    assert pack(f"imagefolder:{big}", undisturbed, "--shard-size", "1").exit_code == 0
    command = [FRACTALSHARDS, "pack", f"imagefolder:{big}", out, "--shard-size", "1", "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(out.glob("train-*.json"))) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    if number != signal.SIGKILL:
        advice = "stopped; finished shards are kept, run the same command again to go on"
        assert errors.splitlines()[-1] == f"error: {out}: {advice}"
    assert not (out / "_info.json").exists()
    result = subprocess.run(command, text=True, capture_output=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert "of them done" in result.stderr
    assert load_manifest(out).content_digest() == load_manifest(undisturbed).content_digest()


def test_all_bad_images_are_named_and_nothing_looks_finished(
    tmp_path: Path, image_folder: Make, image_file: Encode
) -> None:
    source = image_folder(tmp_path / "in", {"a": 6, "b": 6})
    whole = (source / "a" / "003.jpg").read_bytes()
    (source / "a" / "003.jpg").write_bytes(whole[:-200])
    run = (f"imagefolder:{source}", tmp_path / "out", "--shard-size", "2")
    result = pack(*run)
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert f"{source}/a/003.jpg: image cannot be decoded" in line
    assert "replace it and run the same command again, or remove it and pack into a new folder" in line
    (source / "b" / "009.jpg").write_text("<html>not found</html>")
    (source / "b" / "010.jpg").write_bytes(b"")
    shutil.rmtree(tmp_path / "out")
    result = pack(*run)
    for name in ("a/003.jpg", "b/009.jpg", "b/010.jpg"):
        assert f"{source}/{name}: image cannot be decoded" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "_info.json").exists()
    assert not [name for name in names(tmp_path / "out") if name.startswith(".")]
    for name, seed in (("a/003.jpg", 3), ("b/009.jpg", 9), ("b/010.jpg", 10)):
        (source / name).write_bytes(image_file("JPEG", 20, 20, seed))
    result = pack(*run)
    assert result.exit_code == 0, result.output
    assert "of them done" in result.stderr


def test_an_image_too_large_for_a_sample_is_named(tmp_path: Path, image_folder: Make) -> None:
    source = image_folder(tmp_path / "in", {"a": 2, "b": 2})
    os.truncate(source / "a" / "001.jpg", 72_000_000)  # decoders stop where the image ends
    os.truncate(source / "b" / "002.jpg", (64 << 20) - 1)  # itself small enough, but not with its headers
    result = pack(f"imagefolder:{source}", tmp_path / "out")
    assert result.exit_code == 1
    error = result.stderr.splitlines()[-1]
    assert f"{source}/a/001.jpg: larger than 64 MiB, too large for a sample" in error
    assert f"{source}/b/002.jpg: a sample of 67,110,400 bytes, but it may have 64 MiB at most" in error
    assert not list((tmp_path / "out").glob("*.tar"))
    os.truncate(source / "a" / "001.jpg", 60_000_000)
    os.truncate(source / "b" / "002.jpg", 60_000_000)
    result = pack(f"imagefolder:{source}", tmp_path / "out")
    assert result.exit_code == 0, result.output


def test_a_shard_that_vanishes_is_an_error(tmp_path: Path, image_folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    source = image_folder(tmp_path / "in", {"a": 2, "b": 2})
    plan = plan_pack(tmp_path / "out", parse_source(f"imagefolder:{source}", None), 0, 2)
    monkeypatch.setattr(pack_module, "run_jobs", lambda *_: ())  # all went well, they say
    with pytest.raises(FractalError, match=r"train-000000.tar, train-000001.tar vanished after being written; check"):
        run_pack(plan, 1)


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


def test_verify_wants_systems_just_where_the_recipe_names_them(packed: Path, tmp_path: Path) -> None:
    out = shutil.copytree(packed, tmp_path / "out")
    (out / "systems.npz").write_bytes(b"")
    result = CliRunner().invoke(main, ["verify", str(out), "--workers", "1"])
    assert result.exit_code == 1
    assert "systems.npz: not in the recipe" in result.stdout


def flip_a_bit(tar: Path) -> None:
    data = bytearray(tar.read_bytes())
    data[800] ^= 1
    tar.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_a_bit, "sha256 differs"),
        (lambda tar: os.truncate(tar, 700), "700 bytes instead of"),
        (lambda tar: tar.with_suffix(".json").write_text("{}"), "is missing or not"),
        (Path.unlink, "is missing"),
    ],
    ids=["flipped bit", "cut off", "sidecar", "missing"],
)
def test_what_verify_advises_for_a_damaged_dataset_mends_it(
    flowers: Path, packed: Path, tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    out = shutil.copytree(packed, tmp_path / "out")
    damage(out / "train-000001.tar")
    result = CliRunner().invoke(main, ["verify", str(out), "--workers", "1"])
    assert result.exit_code == 1
    assert [line for line in result.stdout.splitlines() if "train-000001" in line and words in line], result.stdout
    assert result.stderr.splitlines()[-1].endswith(
        "; fetch the named files again, or remove each named tar and the .json beside it, then run the same "
        "'fractalshards pack' again"
    )
    for name in ("train-000001.tar", "train-000001.json"):
        (out / name).unlink(missing_ok=True)
    result = pack(f"imagefolder:{flowers}", out, "--split", "train=0.8,val=0.2", "--shard-size", "8")
    assert result.exit_code == 0, result.output
    assert "to pack: 8 images" in result.stderr
    assert load_manifest(out).content_digest() == load_manifest(packed).content_digest()
    assert CliRunner().invoke(main, ["verify", str(out), "--workers", "1"]).exit_code == 0


def test_verify_notices_a_format_that_is_named_wrongly(packed: Path, tmp_path: Path) -> None:
    out = shutil.copytree(packed, tmp_path / "out")
    path = out / "train-000001.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        member = tar.getmembers()[0]
    member.name = member.name.replace(".jpg", ".png")
    data[:512] = member.tobuf(tarfile.USTAR_FORMAT)
    path.write_bytes(data)
    result = CliRunner().invoke(main, ["verify", str(out), "--workers", "1"])
    assert result.exit_code == 1
    assert "train-000001.tar: 000000008: its image is named .png but is a .jpg" in result.stdout


def test_a_seeded_order_never_changes() -> None:
    assert shuffled(8, 0, "train").tolist() == [3, 0, 5, 6, 4, 7, 2, 1]
    assert sorted(shuffled(1000, 5, "val").tolist()) == list(range(1000))


def test_the_list_does_not_depend_on_where_the_folder_lies(flowers: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(flowers, tmp_path / "elsewhere")
    assert list_folder(copied).digest == list_folder(flowers).digest
